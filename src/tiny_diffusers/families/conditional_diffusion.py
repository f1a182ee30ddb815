"""Diffusion with classes, conditions (numbers and labels by name), an image, or several, and classifier-free guidance."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import AutoencoderKL
from torch import nn

from .. import plots
from ..data import ImageData
from ..errors import UserError, refusals, unknown
from ..flags import flag
from ..pipelines.pipeline_tiny import image_generators
from ..pipelines.pipeline_tiny_conditional import TinyConditionalPipeline
from ..pipelines.pipeline_tiny_conditions import ConditionStatistics, FarValueWarning
from ..pipelines.pipeline_tiny_latent import TinyLatentPipeline
from ..pipelines.pipeline_tiny_operators import Conditioning
from ..training.family import condition_grid
from .conditions import ConditionArguments
from .diffusion import Diffusion, DiffusionArguments, TinyScheduler
from .unets import ConditionalUNetArguments


logger = logging.getLogger(__name__)

# The conditioning images that are made from the image itself, by their names, and how they are given
_MADE_CONDITIONS = {"grayscale": "grayscale", "low_resolution": "low_resolution:2"}


@dataclass(frozen=True)
class ConditionalArguments(ConditionalUNetArguments, DiffusionArguments, ConditionArguments):
    """The classes, the conditions and the conditioning image, and how they guide."""

    TITLE: ClassVar[str] = "conditions"
    SCRIPT: ClassVar[str] = "conditional"
    FAMILY: ClassVar[str] = "conditional-ddpm"

    conditioning: str | None = flag(
        None,
        "Give the network an image as a condition, made from the training image: grayscale, or low_resolution:2 (by any "
        "factor that divides the size). Labels are then not required; those that the data have are conditions as well, "
        "unless --label_column is none.",
    )
    conditioning_column: str | None = flag(
        None, "The same, but the image is that of another column, such as conditioning_image."
    )
    class_dropout_prob: float = flag(
        0.1,
        "Share of the labels that are dropped, and of the conditions and conditioning images with them; guidance needs "
        "some.",
        "--conditioning_dropout_prob",
        within="[0, 1)",
    )
    guidance_scales: list[float] | None = flag(
        None,
        "Guidance scales of the sample grids; 1 and 3 if not given, and with a conditioning image or conditions 1.",
        within="(-inf, inf)",
        changes_run=False,
    )
    ema_start_step: int | None = flag(
        None,
        "The EMA starts as a copy of the weights after this step; a tenth of the run, 2,000 at most, if not given.",
        within="[0, inf)",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.conditioning is not None and self.conditioning_column is not None:
            raise UserError(
                f"--conditioning {self.conditioning} --conditioning_column {self.conditioning_column}: give one of them."
            )
        if self.conditioning is not None and self.conditioning.partition(":")[0] not in _MADE_CONDITIONS:
            raise unknown("--conditioning", self.conditioning, [*_MADE_CONDITIONS.values()])

        if self.augment_prob > 0 and self.conditioning_column is not None:
            raise UserError(
                f"--augment_prob {self.augment_prob:g} moves the images, but not those of --conditioning_column: leave it out."
            )

    @property
    def has_conditioning(self) -> bool:
        """Returns whether the network is given an image as a condition."""
        return self.conditioning is not None or self.conditioning_column is not None

    @property
    def requires_labels(self) -> bool:
        """Returns whether classes are the only condition."""
        return not self.has_conditioning and self.condition_columns is None


def build_conditioning(settings: ConditionalArguments, data: ImageData) -> Conditioning | None:
    """
    Returns the conditioning image that the settings ask for, for images like those of the data; None for none.

    Raises:
        UserError: If it is unknown, or such images have none.
    """
    if not settings.has_conditioning:
        return None
    kind = settings.conditioning
    if kind is None:
        kind = f"image:{data.conditioning_images.shape[1]}"
    with refusals("--conditioning: "):
        return Conditioning(kind, tuple(data.images.shape[1:]))


class ConditionalDiffusion(Diffusion):
    """
    Diffusion with classes, conditions, an image as a condition, or several of them, and classifier-free guidance (Ho &
    Salimans 2022, arXiv 2207.12598).

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels).sample`, with a row for each of K classes and
            row K for no class. With a conditioning image, `sample` has its channels after those of the noisy image, and
            with conditions it is given `conditions`.
        scheduler (`TinyScheduler`): One of this package's. Its `training_loss` is minimized.
        id2label (`dict[int, str]`, *optional*): The names of the classes 0 to K - 1; None for a network without classes.
        class_dropout_prob (`float`): Share of the labels that are replaced by the null class, and of the conditioning
            images and conditions that are dropped with them.
        guidance_scales (`list[float]`): Guidance scales of the sample grids.
        num_inference_steps (`int`, *optional*): Sampling steps of the last sample grid; the pipeline's if not given.
        num_preview_steps (`int`, *optional*): Those of the grids during training; as many if not given.
        conditioning ([`Conditioning`], *optional*): The conditioning image.
        condition_statistics ([`ConditionStatistics`], *optional*): The conditions.
        augment_prob (`float`): Probability of each kind of augmentation that the network is told of.
        vae ([`AutoencoderKL`], *optional*): The autoencoder whose latents the network denoises.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: TinyScheduler,
        id2label: dict[int, str] | None,
        class_dropout_prob: float = 0.1,
        guidance_scales: list[float] | None = None,
        num_inference_steps: int | None = None,
        num_preview_steps: int | None = None,
        conditioning: Conditioning | None = None,
        condition_statistics: ConditionStatistics | None = None,
        augment_prob: float = 0.0,
        vae: AutoencoderKL | None = None,
    ):
        super().__init__(unet, scheduler, num_inference_steps, num_preview_steps, augment_prob, vae)
        self.id2label, self.conditioning = id2label, conditioning
        self.condition_statistics = condition_statistics
        self.null_label = None if id2label is None else len(id2label)
        self.label_dropout = class_dropout_prob
        guides = class_dropout_prob > 0 and conditioning is None and condition_statistics is None
        self.guidance_scales = guidance_scales or ([1.0, 3.0] if guides else [1.0])
        if class_dropout_prob == 0 and self.guidance_scales != [1.0]:
            logger.warning(
                "guidance won't help if no label is dropped: the null class stays as it was initialized, and guidance "
                "leads away from nothing; use --class_dropout_prob 0.1, or --guidance_scales 1."
            )

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyConditionalPipeline | TinyLatentPipeline:
        parts = {
            "unet": modules["unet"],
            "scheduler": self.scheduler,
            "id2label": self.id2label,
            "class_dropout_prob": self.label_dropout,
            "condition_statistics": self.condition_config,
        }
        if self.vae is not None:
            return TinyLatentPipeline(vae=self.vae, **parts)
        return TinyConditionalPipeline(
            **parts, conditioning=None if self.conditioning is None else self.conditioning.kind
        )

    def _draw(self, pipeline: TinyConditionalPipeline, num_images: int, seed: int, steps: int) -> tuple[list, dict]:
        """Draws a row for each class or some conditions, with a guidance scale after another, each from the same noise."""
        if self.conditioning is not None:
            return self._draw_examples(pipeline, num_images, seed, steps)
        num_images //= len(self.guidance_scales)
        options, each, grid = condition_grid(self.id2label, self.condition_statistics, num_images)
        rows, names = self._draw_rows(pipeline, each, each * len(grid["row_labels"]), seed, steps, **options)
        return sum(rows, []), {**grid, "columns": len(names), "column_labels": names}

    def _draw_examples(
        self, pipeline: TinyConditionalPipeline, num_images: int, seed: int, steps: int
    ) -> tuple[list, dict]:
        """Draws a row for each held-out image: what is given of it, the samples, and the image itself."""
        count = min(num_images, len(self.examples.images))
        each = max(1, num_images // (count * len(self.guidance_scales)))
        given, images = self.examples.conditioning_images[:count], self.examples.images[:count]
        factor = self.conditioning.factor  # by which the given images were enlarged
        observed = (given[:, :, ::factor, ::factor] / 2 + 0.5).clamp(0, 1)
        conditions = {"image": observed.repeat_interleave(each, dim=0)}
        if self.examples.labels is not None:
            conditions["class_labels"] = self.examples.labels[:count].repeat_interleave(each)
        if self.condition_statistics is not None:
            values = self.condition_statistics.restore(self.examples.conditions[:count])
            conditions["conditions"] = values.repeat_interleave(each, dim=0)
        rows, names = self._draw_rows(pipeline, each, count * each, seed, steps, **conditions)
        # Only an image of low resolution has the channels of the samples, and may be wider or narrower otherwise.
        given = pipeline._to_images(given, "pil") if factor > 1 else plots.to_pil((given / 2 + 0.5).clamp(0, 1))
        images = pipeline._to_images(images, "pil")
        rows = [[first, *row, last] for first, row, last in zip(given, rows, images, strict=True)]
        names = ["given", *names, "image"]
        return plots.pad_to_one_size(sum(rows, [])), {"columns": len(names), "column_labels": names}

    def _draw_rows(
        self, pipeline: TinyConditionalPipeline, each: int, num_images: int, seed: int, steps: int, **conditions: Any
    ) -> tuple[list[list], list[str]]:
        """Draws rows with `each` images of a guidance scale after another, and returns them with the columns' names."""
        with warnings.catch_warnings():  # held-out images may have values far outside the range of training
            warnings.simplefilter("ignore", FarValueWarning)
            batches = [
                pipeline(
                    guidance_scale=scale,
                    generator=image_generators(seed, num_images),
                    num_inference_steps=steps,
                    **conditions,
                ).images
                for scale in self.guidance_scales
            ]
        starts = range(0, num_images, each)
        rows = [[image for batch in batches for image in batch[start : start + each]] for start in starts]
        return rows, [text for w in self.guidance_scales for text in [f"w = {w:g}", *[""] * (each - 1)]]
