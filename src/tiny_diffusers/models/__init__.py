"""The networks: one file each, which imports only torch, diffusers and `layers_tiny`, to travel with a checkpoint."""

from .dcgan_tiny import TinyDCGANDiscriminator, TinyDCGANGenerator
from .pixelcnn_tiny import TinyPixelCNNModel
from .transformer_tiny import TinyTransformer2DModel
from .unet_tiny import TinyUNet2DModel
from .vae_tiny import TinyVAEModel


__all__ = [
    "TinyDCGANDiscriminator",
    "TinyDCGANGenerator",
    "TinyPixelCNNModel",
    "TinyTransformer2DModel",
    "TinyUNet2DModel",
    "TinyVAEModel",
]
