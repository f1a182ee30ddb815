from .scheduling_tiny_ddim import TinyDDIMScheduler
from .scheduling_tiny_ddpm import TinyDDPMScheduler
from .scheduling_tiny_edm import TinyEDMScheduler
from .scheduling_tiny_flow_match import TinyFlowMatchScheduler


__all__ = ["TinyDDIMScheduler", "TinyDDPMScheduler", "TinyEDMScheduler", "TinyFlowMatchScheduler"]
