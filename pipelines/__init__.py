"""The pipelines. Their files travel with checkpoints: they import only stdlib, numpy, PIL, torch, diffusers, siblings."""

from .pipeline_tiny import TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_conditional import TinyConditionalPipeline
from .pipeline_tiny_dcgan import TinyDCGANPipeline
from .pipeline_tiny_img2img import TinyImg2ImgPipeline
from .pipeline_tiny_inpaint import TinyInpaintPipeline
from .pipeline_tiny_interpolation import TinyInterpolationPipeline
from .pipeline_tiny_latent import TinyLatentPipeline
from .pipeline_tiny_pixelcnn import TinyPixelCNNPipeline
from .pipeline_tiny_restoration import TinyRestorationPipeline
from .pipeline_tiny_vae import TinyVAEPipeline


__all__ = [
    "TinyConditionalPipeline",
    "TinyDCGANPipeline",
    "TinyImg2ImgPipeline",
    "TinyInpaintPipeline",
    "TinyInterpolationPipeline",
    "TinyLatentPipeline",
    "TinyPipeline",
    "TinyPipelineOutput",
    "TinyPixelCNNPipeline",
    "TinyRestorationPipeline",
    "TinyVAEPipeline",
]
