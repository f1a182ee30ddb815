"""The networks: each a diffusers `ModelMixin` in one self-contained file, so that the file can travel with a checkpoint."""

from .dcgan_tiny import TinyDCGANDiscriminator, TinyDCGANGenerator
from .pixelcnn_tiny import TinyPixelCNNModel
from .unet_tiny import TinyUNet2DModel
from .vae_tiny import TinyVAEModel


__all__ = ["TinyDCGANDiscriminator", "TinyDCGANGenerator", "TinyPixelCNNModel", "TinyUNet2DModel", "TinyVAEModel"]
