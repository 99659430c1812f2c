"""The plan's name for Stable Diffusion 1.5's U-Net with taps and heads: `models/aligned.py`.

from models.sd15_unet_aligned import AlignHead, SD15UNetAligned
"""

from method.alignment import AlignHead
from models.aligned import SD15UNetAligned

__all__ = ["AlignHead", "SD15UNetAligned"]
