"""The diffusion U-Net, block by block."""

__version__ = "0.1.0"
