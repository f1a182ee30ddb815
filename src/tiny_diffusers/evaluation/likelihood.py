"""Bits/dim of real images: a pipeline's own likelihood, or by its scheduler the variational bound or the ODE's."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..data import ImageData, normalize
from ..pipelines.pipeline_tiny import image_generators, objective_of
from ..pipelines.pipeline_tiny_conditions import FarValueWarning
from ..schedulers.scheduling_tiny_continuous import MAX_EXACT_DIMENSIONS
from .drawing import condition_names
from .images import IMAGE_TYPES, digest, fill
from .measurement import ImageSet
from .metrics import Estimate
from .regressor import with_conditions
from .report import Protocol


# pipelines with their own `bits_per_dim` -> its kind
_KINDS = {"TinyPixelCNNPipeline": "exact", "TinyVAEPipeline": "the ELBO: an upper bound"}
_BOUND = "the variational bound: an upper bound"
# of rectified flow and EDM
_ODE = (
    "by the probability-flow ODE: an estimate, {trace}, 25 Runge-Kutta steps, uniform dequantization as lowest noise"
)
_SCHEDULERS = {
    "betas": "TinyDDIMScheduler or TinyDDPMScheduler",
    "flow": "TinyFlowMatchScheduler",
    "edm": "TinyEDMScheduler",
}


@dataclass
class Likelihood:
    """Bits/dim of real images."""

    bits: np.ndarray  # (N,)
    kind: str  # "exact" or a bound
    levels: int  # of a pixel: bits/dim of images with other levels are not comparable
    given: list[str] = field(default_factory=list)  # to the model, of each image: "class", and names of conditions

    def describe(self) -> str:
        """Returns the kind, the levels and what is given, in words."""
        given = f", given {', '.join(self.given)}" if self.given else ""
        return f"{self.kind}, of images with {self.levels} levels{given}"

    def mean(self) -> Estimate:
        """Returns the mean over the images."""
        error = float(self.bits.std(ddof=1) / np.sqrt(len(self.bits))) if len(self.bits) > 1 else None
        return Estimate(float(self.bits.mean()), error, "standard error over images")


def why_unavailable(given: Any, reference: ImageData, protocol: Protocol) -> str | None:
    """
    Returns why bits/dim cannot be measured, before any image is drawn; None if they can, or need not.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a pipeline has none and the protocol names them, other than by "all".
    """
    if "bits_per_dim" not in protocol.metrics:
        return None
    if isinstance(given, IMAGE_TYPES):
        return "images alone have no likelihood"
    scheduler, reason = getattr(given, "scheduler", None), None
    if getattr(given, "_value_range", None) is not None:
        reason = "they are of 8-bit images"
    elif hasattr(given, "bits_per_dim"):  # its network may still have no likelihood: try one image
        try:
            _bits(given, reference, torch.zeros(1, dtype=torch.long), image_generators(0, 1))
        except ValueError as error:
            reason = str(error).removesuffix(".")
    elif getattr(given, "_conditioning", None) is not None:
        reason = "they depend on the conditioning image"
    elif getattr(given, "_condition_statistics", None) is not None:
        reason = "they depend on the conditions"
    elif scheduler is not None and scheduler.config.get("stochastic_sampling"):
        reason = "a consistency model has no likelihood"
    elif scheduler is not None and "vae" in given.components:
        reason = "the network denoises latents, not images"
    elif scheduler is None:
        reason = f"a {type(given).__name__} has no likelihood"
    elif not hasattr(scheduler, "variational_bound") and not hasattr(scheduler, "ode_likelihood"):
        reason = f"a {type(scheduler).__name__} has no likelihood; use {_SCHEDULERS[objective_of(scheduler)]}"
    return protocol.leave_out("bits_per_dim", reason)


def measure_likelihood(
    pipe: DiffusionPipeline, real: ImageSet, protocol: Protocol, cache: Path, key: str, state: PartialState
) -> Likelihood:
    """
    Computes bits/dim of the first `protocol.likelihood_images` real images, in the order of their hashes.

    Args:
        pipe (`DiffusionPipeline`): The model.
        real ([`ImageSet`]): The real images.
        protocol ([`Protocol`]): Gives the number of images, the batch size, and the seed of the first image.
        cache (`Path`): Folder that keeps the values.
        key (`str`): Key of the model and its seed.
        state (`PartialState`): The processes, which share the batches.
    """
    num_images, batch_size = min(protocol.likelihood_images, len(real)), protocol.batch_size
    labels = None if real.labels is None else real.labels[:num_images].tolist()
    kind = _KINDS.get(type(pipe).__name__) or _scheduler_kind(pipe, real.data.images[0].numel())
    entry = cache / digest("bits", kind, key, real.fingerprint, num_images, labels)

    def compute(start: int, stop: int) -> np.ndarray:
        rows = torch.from_numpy(real.order[start:stop])
        generator = image_generators(protocol.seed, stop - start, first=start)
        return _bits(pipe, real.data, rows, generator).float().cpu().numpy()

    bits = fill(entry, (num_images,), np.float32, compute, batch_size=batch_size, state=state, desc="Bits/dim")
    configs = [getattr(part, "config", {}) for part in pipe.components.values()]
    levels = next((config["num_levels"] for config in configs if "num_levels" in config), 256)
    given = ["class"] if _takes_class(pipe, real.data) else []
    return Likelihood(bits, kind, levels, [*given, *condition_names(pipe)])


def _scheduler_kind(pipe: DiffusionPipeline, dimensions: int) -> str:
    if not hasattr(getattr(pipe, "scheduler", None), "ode_likelihood"):
        return _BOUND
    is_exact = dimensions <= MAX_EXACT_DIMENSIONS
    return _ODE.format(trace="exact trace" if is_exact else "Hutchinson's trace with 2 probes")


def _takes_class(pipe: DiffusionPipeline, data: ImageData) -> bool:
    return bool(getattr(pipe, "_class_ids", [])) and data.labels is not None


def _bits(
    pipe: DiffusionPipeline, data: ImageData, rows: torch.Tensor, generator: list[torch.Generator]
) -> torch.Tensor:
    """Computes bits/dim of the images in `rows` (B,), by their classes and conditions if the pipeline takes some: (B,)."""
    images = data.images[rows]
    options = {
        "class_labels": data.labels[rows].to(pipe.device) if _takes_class(pipe, data) else None,
        "generator": generator,
    }
    if hasattr(pipe, "bits_per_dim"):
        names = condition_names(pipe)
        if names:
            options["conditions"] = with_conditions(data, names).conditions[rows]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FarValueWarning)  # which the report counts where images are drawn by them
            return pipe.bits_per_dim(images, **options)

    def network(sample: torch.Tensor, *args, **kwargs):
        return pipe.unet(sample.to(pipe.unet.dtype), *args, **kwargs)

    method = getattr(pipe.scheduler, "ode_likelihood", None) or pipe.scheduler.variational_bound
    return method(network, normalize(images).to(pipe.device), **options).total
