"""The diffusion U-Net, block by block.

Names are imported when they are first used (SPEC 1 of Scientific Python): `unet-course --help` does not wait for PyTorch.
What there is, and where it comes from, stands in `__init__.pyi`, for this module and for type checkers alike.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
