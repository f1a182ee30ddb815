"""Diffusion: its arguments, its scheduler, its loss. Both diffusion scripts share it."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from torch import nn

from ..errors import UserError, refusals
from ..flags import default_of, flag
from ..pipelines.pipeline_tiny import DEFAULT_STEPS, TinyPipeline, image_generators, objective_of
from ..pipelines.pipeline_tiny_latent import TinyLatentPipeline
from ..schedulers.scheduling_tiny_common import CHOICES
from ..schedulers.scheduling_tiny_ddim import TinyDDIMScheduler
from ..schedulers.scheduling_tiny_ddpm import TinyDDPMScheduler
from ..schedulers.scheduling_tiny_edm import TinyEDMScheduler
from ..schedulers.scheduling_tiny_flow_match import TinyFlowMatchScheduler
from ..training.arguments import LENGTHS, Optimizer, TrainingArguments
from ..training.family import Batch, Family, load_pretrained
from .transformers import TransformerArguments
from .unets import UNetArguments


logger = logging.getLogger(__name__)

_NUM_PREVIEW_STEPS = 10  # for the sample grids but the last, if not given; fewer if there are fewer timesteps

# By optimizer, if not given: see docs/training.md
_LEARNING_RATE, _LEARNING_RATES = 1e-3, {"muon": 3e-3}

# A flag of beta schedules decides what is predicted, if nobody says
_OF_BETAS = {"decides": ("prediction_type", "x_prediction")}

# The flags that mean nothing without a beta schedule, with the values that they have on one if not given
_BETA_FLAGS = {
    "ddpm_beta_schedule": "cosine",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "variance_type": "fixed_small",
    "loss_type": "l2",
    "huber_delta": None,
    "huber_schedule": "constant",
    "snr_gamma": None,
}
# All that mean nothing to a --prediction_type
_OF_FLOW = ("timestep_distribution", "x_prediction")
_MEANINGLESS = {"flow": [*_BETA_FLAGS], "edm": [*_BETA_FLAGS, "ddpm_num_steps", *_OF_FLOW]}

# The level below which the error of a predicted image has no more weight (https://huggingface.co/papers/2511.13720)
MIN_LOSS_LEVEL = 0.05

# And to latents
_OF_PIXELS = (
    *("dynamic_thresholding", "augment_prob", "random_crop_padding", "color_jitter", "cutout"),
    *("conditioning", "conditioning_column"),
)

TinyScheduler = TinyDDIMScheduler | TinyDDPMScheduler | TinyFlowMatchScheduler | TinyEDMScheduler


@dataclass(frozen=True)
class DiffusionArguments(UNetArguments, TransformerArguments, TrainingArguments):
    """The forward process, the loss and the network."""

    TITLE: ClassVar[str] = "diffusion"
    SCRIPT: ClassVar[str] = "unconditional"
    FAMILY: ClassVar[str] = "ddpm"
    SMOKE: ClassVar[dict[str, Any]] = {
        **TrainingArguments.SMOKE,
        "ddpm_num_inference_steps": 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention": ["linear"],
        "mid_attention": "linear",
        "num_layers": 1,
        "num_attention_heads": 1,
    }

    ddpm_num_steps: int = flag(1000, "Timesteps T of the forward process (not used by edm).", within="[1, 100000]")
    ddpm_num_inference_steps: int | None = flag(
        None,
        f"Sampling steps of the sample grids, T at most; if not given the pipeline's, and {_NUM_PREVIEW_STEPS} during "
        "training.",
        within="[1, inf)",
        changes_run=False,
    )
    ddpm_beta_schedule: Literal[CHOICES["beta_schedule"]] | None = flag(
        None, "Schedule of the betas; cosine if not given.", **_OF_BETAS
    )
    beta_start: float | None = flag(
        None, "First beta (not used by cosine); 1e-4 if not given.", within="(0, 1)", **_OF_BETAS
    )
    beta_end: float | None = flag(
        None, "Last beta (not used by cosine); 0.02 if not given.", within="(0, 1)", **_OF_BETAS
    )
    prediction_type: Literal[(*CHOICES["prediction_type"], "flow", "edm")] | None = flag(
        None,
        "What the network predicts: with a beta schedule epsilon, sample or v_prediction; flow: the velocity of "
        "rectified flow; edm: the output F of EDM's preconditioned network. If not given: that of the checkpoint to "
        "start from, v_prediction with a flag of beta schedules, or else flow.",
        decides=(*_BETA_FLAGS, *_OF_FLOW),
    )
    timestep_distribution: Literal[CHOICES["timestep_distribution"]] | None = flag(
        None,
        "Distribution of the timesteps of --prediction_type flow; mixed if not given.",
        decides=("prediction_type",),
    )
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"] | None
    ) = flag(None, "Variance of the reverse process; fixed_small if not given.", **_OF_BETAS)
    loss_type: Literal[CHOICES["loss_type"]] | None = flag(
        None, "Loss of a pixel, or vlb: the variational bound in bits/dim; l2 if not given.", **_OF_BETAS
    )
    huber_delta: float | None = flag(None, "Delta of the Huber losses.", within="(0, inf)", **_OF_BETAS)
    huber_schedule: Literal[CHOICES["huber_schedule"]] | None = flag(
        None, "Delta over the timesteps; constant if not given.", **_OF_BETAS
    )
    snr_gamma: float | None = flag(None, "Gamma of min-SNR weighting; 5 is usual.", within="(0, inf)", **_OF_BETAS)
    vae: str | None = flag(
        None,
        "Train on the latents of this autoencoder: a checkpoint of `tiny-diffusers train autoencoder`, or a Hub id; if not "
        "given, of the autoencoder of the latent diffusion model to start from.",
        decides=("network",),
        changes_run=False,  # its weights are compared
    )
    dynamic_thresholding: float | None = flag(
        None,
        "Percentile in (0, 1] of dynamic thresholding in sampling, such as 0.995; saved with the model.",
        within="(0, 1]",
    )

    budget: float | None = flag(
        None,
        "As --max_train_minutes, but with a narrower U-Net if 500 steps of it, or --max_train_steps, wouldn't fit.",
        within="(0, inf)",
        changes_run=False,
        replaces=LENGTHS,
    )
    augment_prob: float = flag(
        0.0,
        "Probability of each kind of augmentation that the network is told of, so that none leaks into the samples: "
        "mirroring, flipping, scaling, rotation, stretching, shifting. 0.12 is usual, for few images.",
        within="[0, 1]",
    )
    pretrained_model_name_or_path: str | None = flag(
        None,
        "Checkpoint or Hub id to start from.",
        decides=("network", "prediction_type", *_BETA_FLAGS, "timestep_distribution", "vae"),
    )
    optimizer: Optimizer | None = flag(
        None, "Optimizer; if not given muon, or adamw under FSDP.", decides=("learning_rate",)
    )
    learning_rate: float | None = flag(
        None,
        f"Peak learning rate; if not given, {_LEARNING_RATES['muon']:g} for muon and {_LEARNING_RATE:g} for the others.",
        within="[0, inf)",
    )

    network: Literal["unet", "transformer"] | None = flag(
        None, "The network, unless it is loaded; if not given, that of the preset, or unet.", decides=("network",)
    )
    model_config_name_or_path: str | None = flag(
        None, "JSON file or folder of a network's configuration, with its class in it.", decides=("network",)
    )
    preset: str | None = flag(
        None,
        "A network by its name: one of the reports', such as self-attention-2-levels, or of DiT, such as dit-s-2.",
        decides=("network",),
    )

    def __post_init__(self):
        super().__post_init__()
        given, most = self.ddpm_num_inference_steps, self.ddpm_num_steps
        if given is not None and given > most:
            raise UserError(f"--ddpm_num_inference_steps {given}: it must be at most --ddpm_num_steps, {most}.")
        if self.prediction_type is not None:
            for name in self.asked_of(_MEANINGLESS.get(self.prediction_type, _OF_FLOW)):
                raise UserError(
                    f"--{name} {getattr(self, name)} means nothing to --prediction_type {self.prediction_type}: leave "
                    "it out."
                )

        lengths = [name for name in ("max_train_minutes", "num_epochs") if name in self.given]
        if self.budget is not None and lengths:
            raise UserError(
                f"--budget {self.budget:g} --{lengths[0]}: both are the length of the run, so give one of them."
            )

        if self.vae is not None:
            for name in self.asked_of([name for name in _OF_PIXELS if hasattr(self, name)]):
                raise UserError(
                    f"--{name} {getattr(self, name)} is for pixels, and this run is on the latents of {self.vae}: leave it "
                    "out."
                )
            if self.loss_type == "vlb" or self.variance_type == "learned_range":
                name = "loss_type" if self.loss_type == "vlb" else "variance_type"
                raise UserError(
                    f"--{name} {getattr(self, name)} is of bits/dim, which are of pixels, and this run is on the latents of "
                    f"{self.vae}: leave it out."
                )

    def asked_of(self, names: Sequence[str]) -> list[str]:
        """Lists those of the named settings that are not at their default."""
        defaults = {field.name: default_of(field) for field in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def num_inference_steps(self) -> int:
        """Sampling steps of the last sample grid."""
        steps = DEFAULT_STEPS.get(self.prediction_type, DEFAULT_STEPS["betas"])
        return self.ddpm_num_inference_steps or min(steps, self.ddpm_num_steps)

    @property
    def num_preview_steps(self) -> int:
        """Sampling steps of the sample grids during training."""
        return self.ddpm_num_inference_steps or min(_NUM_PREVIEW_STEPS, self.ddpm_num_steps)


def resolve_diffusion(arguments: DiffusionArguments, state: PartialState) -> dict[str, Any]:
    """
    Resolves the objective, the optimizer and the learning rate, where they are not given.

    Args:
        arguments ([`DiffusionArguments`]): The settings as asked for.
        state (`PartialState`): The processes of the run.

    Raises:
        UserError: If the checkpoint to start from cannot be loaded, or flags are given that do not go together.
    """
    is_sharded = state.distributed_type == DistributedType.FSDP  # whose parts of matrices Muon can't train
    optimizer = arguments.optimizer or ("adamw" if is_sharded else "muon")
    learning_rate, prediction_type = arguments.learning_rate, arguments.prediction_type
    if learning_rate is None:
        learning_rate = _LEARNING_RATES.get(optimizer, _LEARNING_RATE)
    if prediction_type is None:
        asked = arguments.asked_of(_BETA_FLAGS) or arguments.time_embedding == "learned"  # for each timestep of T
        prediction_type = "v_prediction" if asked else "flow"
        pipeline = load_pretrained(arguments, TinyPipeline)
        if "scheduler" in getattr(pipeline, "components", {}):
            objective = objective_of(pipeline.scheduler)
            if objective == "betas":
                prediction_type = pipeline.scheduler.config.get("prediction_type", "epsilon")
            elif not asked:
                prediction_type = objective
        dataclasses.replace(arguments, prediction_type=prediction_type)  # checks the other flags against it
    is_on_betas = prediction_type not in _MEANINGLESS
    betas = {name: value if is_on_betas else None for name, value in _BETA_FLAGS.items()}
    betas |= {name: getattr(arguments, name) for name in betas if getattr(arguments, name) is not None}
    return {"prediction_type": prediction_type, "optimizer": optimizer, "learning_rate": learning_rate, **betas}


def build_scheduler(settings: DiffusionArguments) -> TinyDDIMScheduler | TinyFlowMatchScheduler | TinyEDMScheduler:
    """
    Builds the scheduler that computes the training loss and is saved with the network.

    Raises:
        UserError: On an unknown name, or values that do not go together.
    """
    thresholding = {}
    if settings.dynamic_thresholding is not None:
        thresholding = {"thresholding": True, "dynamic_thresholding_ratio": settings.dynamic_thresholding}
    if settings.prediction_type == "flow":
        distribution = settings.timestep_distribution or "mixed"
        return TinyFlowMatchScheduler(
            settings.ddpm_num_steps, timestep_distribution=distribution, solver="multistep", **thresholding
        )
    if settings.prediction_type == "edm":
        sigma_data = 0.5 if settings.vae is None else 1.0
        return TinyEDMScheduler(sigma_data=sigma_data, solver="multistep", **thresholding)
    with refusals():
        scheduler = TinyDDIMScheduler(
            num_train_timesteps=settings.ddpm_num_steps,
            beta_schedule=settings.ddpm_beta_schedule,
            beta_start=settings.beta_start,
            beta_end=settings.beta_end,
            prediction_type=settings.prediction_type,
            variance_type=settings.variance_type,
            loss_type=settings.loss_type,
            huber_delta=settings.huber_delta,
            huber_schedule=settings.huber_schedule,
            snr_gamma=settings.snr_gamma,
            # From pure noise epsilon tells nothing of the image, so that its x_0 is far out of range there.
            clip_sample=settings.prediction_type == "epsilon" and settings.vae is None,
            timestep_spacing="linspace",  # the last step is that from timestep 0
            **thresholding,
        )
    last_signal = float(scheduler.alphas_cumprod[-1].sqrt())
    if last_signal > 0.05:
        advice = "--ddpm_beta_schedule cosine"
        start, end = (min(beta * 1000 / settings.ddpm_num_steps, 0.999) for beta in (1e-4, 0.02))
        scaled = TinyDDIMScheduler.from_config(scheduler.config, beta_start=start, beta_end=end)
        if float(scaled.alphas_cumprod[-1].sqrt()) <= 0.05:
            advice = f"--beta_start {start:.2g} --beta_end {end:.2g}, or {advice}"
        logger.warning(
            f"the last timestep keeps {last_signal:.2f} of the image (sqrt of its alpha_cumprod), but sampling "
            f"starts from pure noise; use {advice}."
        )
    return scheduler


class Diffusion(Family):
    """
    Denoising diffusion (Ho et al. 2020, arXiv 2006.11239), rectified flow or EDM: a U-Net and a scheduler.

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels=None).sample`.
        scheduler (`TinyScheduler`): One of this package's. Its `training_loss` is minimized.
        num_inference_steps (`int`, *optional*): Sampling steps of the last sample grid; the pipeline's if not given.
        num_preview_steps (`int`, *optional*): Those of the grids during training; as many if not given.
        augment_prob (`float`): Probability of each kind of augmentation that the network is told of.
        vae ([`AutoencoderKL`], *optional*): The autoencoder whose latents the network denoises.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: TinyScheduler,
        num_inference_steps: int | None = None,
        num_preview_steps: int | None = None,
        augment_prob: float = 0.0,
        vae: AutoencoderKL | None = None,
    ):
        self.augment_prob, self.vae = augment_prob, vae
        self.modules = {"unet": unet}
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps or DEFAULT_STEPS[objective_of(scheduler)]
        self.num_preview_steps = num_preview_steps or self.num_inference_steps
        self.preview_share = self.num_preview_steps / self.num_inference_steps

    @property
    def x_prediction(self) -> bool:
        """Whether the layers of the network predict the image, from which it computes the velocity."""
        return getattr(self.modules["unet"], "config", {}).get("x_prediction", False)

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
        yield "unet", self._image_losses(modules["unet"], batch).mean()

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        return self._image_losses(modules["unet"], batch)

    def _image_losses(self, unet: nn.Module, batch: Batch) -> torch.Tensor:
        noise = batch.draws.normal("noise", *batch.images.shape[1:])
        if hasattr(self.scheduler, "sample_timesteps"):
            timesteps = self.scheduler.sample_timesteps(batch.draws.uniform("timesteps", 2))
        else:
            timesteps = batch.draws.integers("timesteps", self.scheduler.config.num_train_timesteps)
        noisy = self.scheduler.add_noise(batch.images, noise, timesteps)
        output = self._predict(unet, batch, noisy, timesteps)
        options = {"min_level": MIN_LOSS_LEVEL} if self.x_prediction else {}
        return self.scheduler.training_loss(output, batch.images, noise, timesteps, reduction="none", **options)

    def _predict(self, unet: nn.Module, batch: Batch, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Runs the network on noisy images, with the conditions of the batch."""
        given = {"class_labels": batch.labels, "conditions": batch.conditions, "augment_labels": batch.augment_labels}
        given = {name: values for name, values in given.items() if values is not None}
        sample = self.scheduler.scale_model_input(noisy, timesteps)
        if batch.conditioning_images is not None:
            sample = torch.cat([sample, batch.conditioning_images], dim=1)  # (B, C + K, H, W)
        return unet(sample, timesteps, **given).sample

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyPipeline:
        parts = {"unet": modules["unet"], "scheduler": self.scheduler}
        return TinyPipeline(**parts) if self.vae is None else TinyLatentPipeline(vae=self.vae, **parts)

    def sample(self, pipeline: TinyPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        return self._draw(pipeline, num_images, seed, self.num_inference_steps)

    def preview(self, pipeline: TinyPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        return self._draw(pipeline, num_images, seed, self.num_preview_steps)

    def _draw(self, pipeline: TinyPipeline, num_images: int, seed: int, steps: int) -> tuple[list, dict]:
        generator = image_generators(seed, num_images)
        return pipeline(batch_size=num_images, generator=generator, num_inference_steps=steps).images, {}
