"""
tiny-diffusers: train, sample, measure, compare and share generative models of small images with diffusers.

Names are imported when first used, so `import tiny_diffusers` costs no more than what is asked of it.
"""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# public name -> the module that defines it
_MODULES = {
    "TinyPipeline": "pipelines.pipeline_tiny",
    "TinyConditionalPipeline": "pipelines.pipeline_tiny_conditional",
    "TinyLatentPipeline": "pipelines.pipeline_tiny_latent",
    "TinyInterpolationPipeline": "pipelines.pipeline_tiny_interpolation",
    "TinyImg2ImgPipeline": "pipelines.pipeline_tiny_img2img",
    "TinyInpaintPipeline": "pipelines.pipeline_tiny_inpaint",
    "TinyRestorationPipeline": "pipelines.pipeline_tiny_restoration",
    "TinyPixelCNNPipeline": "pipelines.pipeline_tiny_pixelcnn",
    "TinyVAEPipeline": "pipelines.pipeline_tiny_vae",
    "TinyDCGANPipeline": "pipelines.pipeline_tiny_dcgan",
    "TinyDDPMScheduler": "schedulers.scheduling_tiny_ddpm",
    "TinyDDIMScheduler": "schedulers.scheduling_tiny_ddim",
    "TinyFlowMatchScheduler": "schedulers.scheduling_tiny_flow_match",
    "TinyEDMScheduler": "schedulers.scheduling_tiny_edm",
    "TinyUNet2DModel": "models.unet_tiny",
    "TinyTransformer2DModel": "models.transformer_tiny",
    "TinyPixelCNNModel": "models.pixelcnn_tiny",
    "TinyVAEModel": "models.vae_tiny",
    "TinyDCGANGenerator": "models.dcgan_tiny",
    "TinyDCGANDiscriminator": "models.dcgan_tiny",
}

__all__ = sorted(_MODULES)


if TYPE_CHECKING:  # names that a checker takes for public, and no `__getattr__` that would give it any other
    from .models.dcgan_tiny import TinyDCGANDiscriminator as TinyDCGANDiscriminator
    from .models.dcgan_tiny import TinyDCGANGenerator as TinyDCGANGenerator
    from .models.pixelcnn_tiny import TinyPixelCNNModel as TinyPixelCNNModel
    from .models.transformer_tiny import TinyTransformer2DModel as TinyTransformer2DModel
    from .models.unet_tiny import TinyUNet2DModel as TinyUNet2DModel
    from .models.vae_tiny import TinyVAEModel as TinyVAEModel
    from .pipelines.pipeline_tiny import TinyPipeline as TinyPipeline
    from .pipelines.pipeline_tiny_conditional import TinyConditionalPipeline as TinyConditionalPipeline
    from .pipelines.pipeline_tiny_dcgan import TinyDCGANPipeline as TinyDCGANPipeline
    from .pipelines.pipeline_tiny_img2img import TinyImg2ImgPipeline as TinyImg2ImgPipeline
    from .pipelines.pipeline_tiny_inpaint import TinyInpaintPipeline as TinyInpaintPipeline
    from .pipelines.pipeline_tiny_interpolation import TinyInterpolationPipeline as TinyInterpolationPipeline
    from .pipelines.pipeline_tiny_latent import TinyLatentPipeline as TinyLatentPipeline
    from .pipelines.pipeline_tiny_pixelcnn import TinyPixelCNNPipeline as TinyPixelCNNPipeline
    from .pipelines.pipeline_tiny_restoration import TinyRestorationPipeline as TinyRestorationPipeline
    from .pipelines.pipeline_tiny_vae import TinyVAEPipeline as TinyVAEPipeline
    from .schedulers.scheduling_tiny_ddim import TinyDDIMScheduler as TinyDDIMScheduler
    from .schedulers.scheduling_tiny_ddpm import TinyDDPMScheduler as TinyDDPMScheduler
    from .schedulers.scheduling_tiny_edm import TinyEDMScheduler as TinyEDMScheduler
    from .schedulers.scheduling_tiny_flow_match import TinyFlowMatchScheduler as TinyFlowMatchScheduler
else:

    def __getattr__(name: str):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
