from .pipeline_tiny import TinyPipeline, TinyPipelineOutput
from .pipeline_tiny_conditional import TinyConditionalPipeline
from .pipeline_tiny_interpolation import TinyInterpolationPipeline


__all__ = ["TinyConditionalPipeline", "TinyInterpolationPipeline", "TinyPipeline", "TinyPipelineOutput"]
