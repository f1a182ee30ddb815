from .scheduling_tiny_ddim import TinyDDIMScheduler
from .scheduling_tiny_ddpm import TinyDDPMScheduler


__all__ = ["TinyDDIMScheduler", "TinyDDPMScheduler"]
