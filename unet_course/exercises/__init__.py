"""What answers the exercises of each chapter; exported from hidden cells of the notebooks."""
