"""
Loads a dataset by name as uint8 images (N, C, H, W) with labels, decodes it once and caches the result on disk.

    data = load_images("ylecun/mnist", resolution=32)        # a Hub id, a folder, or "digits"
    train, validation = held_out(len(data), share=0.05, seed=0)
    images = normalize(data.images[train[:64]])              # float32 in [-1, 1]
    images = augment(images, uniform, random_flip=True)      # uniform: (B, AUGMENT_DRAWS), drawn by the caller
"""

from .augmentation import AUGMENT_DRAWS, augment
from .cache import cache_root
from .images import ImageData, denormalize, held_out, normalize
from .loading import load_images
from .sources import UnknownSplitError


__all__ = [
    "AUGMENT_DRAWS",
    "ImageData",
    "UnknownSplitError",
    "augment",
    "cache_root",
    "denormalize",
    "held_out",
    "load_images",
    "normalize",
]
