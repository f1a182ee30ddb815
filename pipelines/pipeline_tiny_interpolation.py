"""
`TinyInterpolationPipeline`: the frames of a walk between two seeds, latents, images or classes.

This file travels with checkpoints: it imports nothing but torch, diffusers and its siblings.
"""

import inspect
import numbers
from collections.abc import Callable
from typing import Optional

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging

from .pipeline_tiny import Images, TinyPipeline, TinyPipelineOutput, predict_original_sample
from .pipeline_tiny_classes import ClassConditioningMixin, ClassLabels


logger = logging.get_logger(__name__)

# With a second pass of the network a step, 20 steps invert a model's samples as closely as 100 do with one.
_INVERSION_ITERATIONS = 2


class TinyInterpolationPipeline(ClassConditioningMixin, TinyPipeline):
    r"""
    Walks between two samples of a diffusion model: between the noises that two seeds draw, two latents, or the noises
    that two images come from, and between two classes at once.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`ModelMixin`]):
            The network, called as [`UNet2DModel`] is.
        scheduler ([`SchedulerMixin`]):
            The scheduler that denoises with it. The path is smooth only under a deterministic one, such as
            `TinyDDIMScheduler` with `eta=0`; images can be inverted only with that or a stock [`DDIMScheduler`].
        id2label (`dict[int, str]`, *optional*):
            The names of the classes, by id.
        null_class_id (`int`, *optional*, defaults to -1):
            The network's null class, by default the last row of its table; None where it has none.
        class_dropout_prob (`float`, *optional*):
            The share of the labels that the network was trained without; with 0 guidance warns.

    Example:

    ```py
    >>> from diffusers.utils import export_to_gif
    >>> from tiny_diffusers import TinyInterpolationPipeline

    >>> pipe = TinyInterpolationPipeline.from_pretrained("path/or/hub-id")
    >>> frames = pipe(seeds=(0, 1), num_frames=24).images
    >>> export_to_gif(frames, "walk.gif")
    ```
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        id2label: Optional[dict] = None,
        null_class_id: Optional[int] = -1,
        class_dropout_prob: Optional[float] = None,
    ):
        super().__init__(unet, scheduler)
        self._register_classes(id2label, null_class_id, class_dropout_prob)

    @torch.no_grad()
    def __call__(
        self,
        seeds: tuple[int, int] | None = None,
        latents: torch.Tensor | None = None,
        images: Images | None = None,
        num_frames: int = 16,
        interpolation: str = "slerp",
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[int] | None = None,
        return_intermediates: int | None = None,
    ) -> TinyPipelineOutput | tuple:
        r"""
        Samples the frames of a walk, in order. Its ends are the two samples themselves.

        Args:
            seeds (`tuple[int, int]`, *optional*):
                The two seeds: an end is what `generator=[torch.Generator().manual_seed(seed)]` gives. One of `seeds`,
                `latents` and `images` must be given.
            latents (`torch.Tensor` of shape `(2, C, H, W)`, *optional*):
                The two latents.
            images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(2, H, W, C)` or `torch.Tensor` of shape `(2, C, H, W)`, *optional*):
                The two images, arrays and tensors in [0, 1], which are inverted by [`~TinyInterpolationPipeline.invert`].
            num_frames (`int`, *optional*, defaults to 16):
                The number of frames, both ends included: at least 2.
            interpolation (`str`, *optional*, defaults to `"slerp"`):
                `"slerp"` goes along the sphere that Gaussian noise lies near, as in
                [DDIM](https://huggingface.co/papers/2010.02502), eq. 67; `"linear"` cuts through it, so that frames
                between are smoother than the model's samples.
            class_labels (`int`, `str`, a list of two, `np.ndarray` or `torch.Tensor`, *optional*):
                The class, or the two classes to walk between; ids, names or weights of the rows of the network's table.
                Needed for a network with classes unless `guidance_scale` is 0.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w in eps = w eps(x, c) + (1 - w) eps(x, null).
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The share of the steps that are guided, from the noise's end at 0 to the image's at 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes a scheduler that adds noise deterministic; a list has one for each frame.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps, and of steps of the inversion.
            eta (`float`, *optional*, defaults to 0.0):
                η of DDIM, in [0, 1]. Above 0 the path is not smooth.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`L` or `RGB`), `"np"` (`(num_frames, H, W, C)` in [0, 1]), `"pt"` (`(num_frames, C, H, W)` in
                [0, 1]) or `"latent"` (the denoised latents as they are, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`TinyPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)` after each step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The tensors that `callback_kwargs` holds.
            timesteps (`list[int]`, *optional*):
                The timesteps to visit, decreasing, in place of `num_inference_steps`.
            return_intermediates (`int`, *optional*):
                K evenly spaced states and x_0 predictions are returned too.

        Returns:
            [`TinyPipelineOutput`] or `tuple`: the frames as its `images`, ready for `diffusers.utils.export_to_gif`,
            and the intermediates where they were asked for.

        Raises:
            `ValueError`: for an argument outside what is said above; for images with a scheduler other than DDIM.
        """
        self._check_inputs(
            2,
            num_inference_steps,
            timesteps,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
            return_intermediates,
        )
        self._check_guidance(guidance_scale, guidance_interval)
        if not isinstance(num_frames, numbers.Integral) or num_frames < 2:
            raise ValueError(f"`num_frames` must be an integer of at least 2, the two ends, got {num_frames}.")
        if interpolation not in ("slerp", "linear"):
            raise ValueError(f"`interpolation` must be 'slerp' or 'linear', got {interpolation!r}.")
        if sum(given is not None for given in (seeds, latents, images)) != 1:
            raise ValueError("Give one of `seeds`, `latents` and `images`: the two ends of the walk.")
        if isinstance(generator, list) and len(generator) != num_frames:
            raise ValueError(
                f"A list of generators needs one for each frame: got {len(generator)} for {num_frames} frames."
            )
        labels, _ = self._encode_class_labels(class_labels, 2, guidance_scale)

        # 1. the two ends, as latents (2, C, H, W)
        if images is not None:
            latents = self._invert(
                self._preprocess(images, 2), labels, guidance_scale, guidance_interval, num_inference_steps, timesteps
            )
        elif seeds is not None:
            if len(seeds) != 2:
                raise ValueError(f"`seeds` must be two, got {seeds}.")
            latents = self._prepare_latents(2, [torch.Generator().manual_seed(int(seed)) for seed in seeds], None)
        else:
            latents = self._prepare_latents(2, None, latents)

        # 2. the frames between them
        share = torch.linspace(0, 1, num_frames, dtype=latents.dtype, device=latents.device)
        frames = (slerp if interpolation == "slerp" else torch.lerp)(latents[:1], latents[1:], share.view(-1, 1, 1, 1))
        if labels is not None:
            labels = self._walk(labels, share)

        # 3. their images
        if _adds_noise(self.scheduler, eta):
            logger.warning(
                f"{type(self.scheduler).__name__} with eta={eta} adds noise at each step: the path won't be smooth. Use "
                "`TinyDDIMScheduler` with `eta=0`."
            )
        self._set_timesteps(self.scheduler, num_inference_steps, timesteps)
        frames, intermediates = self._denoise(
            frames,
            self._guided(labels, guidance_scale, guidance_interval),
            self.scheduler,
            eta=eta,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            return_intermediates=return_intermediates,
        )
        return self._output(frames, intermediates, output_type, return_dict)

    @torch.no_grad()
    def invert(
        self,
        images: Images,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
    ) -> torch.Tensor:
        r"""
        Finds the latents that images come from: DDIM's map from noise to image, run backwards, at two passes of the
        network a step. Sampling from them with the same arguments and `eta=0` gives the images back, the better the more
        steps are taken. What a scheduler with `clip_sample` or `thresholding` cuts off on the way is found only as far as
        the image tells it: under guidance above 1, where that is much, set both to False.

        Args:
            images (`list[PIL.Image.Image]`, `np.ndarray` of shape `(B, H, W, C)` or `torch.Tensor` of shape `(B, C, H, W)`):
                The images, arrays and tensors in [0, 1]. Images of another size are resized to the network's.
            class_labels, guidance_scale, guidance_interval, num_inference_steps, timesteps:
                As for sampling.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: the latents, near N(0, I) for images like the model's own.

        Raises:
            `ValueError`: where the scheduler is not a [`DDIMScheduler`] or an argument is not as said.
        """
        self._check_inputs(1, num_inference_steps, timesteps, 0.0, "pt", (), None)
        self._check_guidance(guidance_scale, guidance_interval)
        sample = self._preprocess(images, None)
        labels, _ = self._encode_class_labels(class_labels, len(sample), guidance_scale)
        latents = self._invert(sample, labels, guidance_scale, guidance_interval, num_inference_steps, timesteps)
        self.maybe_free_model_hooks()
        return latents

    def _invert(
        self,
        sample: torch.Tensor,
        labels: torch.Tensor | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        num_inference_steps: int,
        timesteps: list[int] | None,
    ) -> torch.Tensor:
        scheduler = self.scheduler
        if not isinstance(scheduler, DDIMScheduler):
            raise ValueError(
                f"Images are inverted by DDIM, not by {type(scheduler).__name__}: set `pipe.scheduler = "
                "TinyDDIMScheduler.from_config(pipe.scheduler.config)`."
            )
        predict = self._guided(labels, guidance_scale, guidance_interval)
        self._set_timesteps(scheduler, num_inference_steps, timesteps)

        alpha_prod_prev = float(scheduler.final_alpha_cumprod)
        dtype = self.unet.dtype
        on_device = scheduler.timesteps.to(sample.device)
        for step in self.progress_bar(range(len(on_device) - 1, -1, -1)):
            # DDIM's step, eq. 12 with σ = 0, solved for x_t. The noise in x_t is predicted from x_t itself, by a fixed
            # point from x_t-1 on: its first iterate is the usual inversion, which takes the noise at x_t-1 for it.
            timestep = scheduler.timesteps[step]
            alpha_prod = scheduler.alphas_cumprod[timestep].item()
            ratio = (alpha_prod / alpha_prod_prev) ** 0.5
            prev_sample = sample
            for _ in range(_INVERSION_ITERATIONS):
                model_output = predict(sample.to(dtype), on_device[step], step)[:, : sample.shape[1]]
                pred_original_sample = predict_original_sample(scheduler, model_output, timestep, sample)
                # what the step clips off x_0, or thresholds, x_t has and x_t-1 has not
                clipped = scheduler.step(model_output, timestep, sample).pred_original_sample
                if self._is_guided(step):
                    pred_original_sample = clipped
                epsilon = (sample - alpha_prod**0.5 * pred_original_sample) / (1 - alpha_prod) ** 0.5
                direction = (1 - alpha_prod) ** 0.5 - ratio * (1 - alpha_prod_prev) ** 0.5
                cut_off = alpha_prod**0.5 * (pred_original_sample - clipped)
                sample = ratio * prev_sample + direction * epsilon + cut_off
            alpha_prod_prev = alpha_prod
        return sample

    def _walk(self, labels: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The line between two labels, ids (2,) or weights (2, rows), as weights (num_frames, rows)."""
        if not labels.is_floating_point():
            labels = torch.nn.functional.one_hot(labels, self._num_rows)
        start, end = labels.to(share.dtype)
        return torch.lerp(start, end, share[:, None])


def slerp(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """
    Spherical linear interpolation, (sin((1 - s) θ) x + sin(s θ) y) / sin θ with θ the angle between x and y
    ([DDIM](https://huggingface.co/papers/2010.02502), eq. 67; Shoemake, 1985).

    Args:
        start (`torch.Tensor` of shape `(1, C, H, W)`): x.
        end (`torch.Tensor` of shape `(1, C, H, W)`): y.
        share (`torch.Tensor` of shape `(N, 1, 1, 1)`): s, from 0 at x to 1 at y.

    Returns:
        `torch.Tensor` of shape `(N, C, H, W)`: the points between, in order.
    """
    theta = torch.acos(torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1))
    if torch.sin(theta) < 1e-4:  # along one line no arc is singled out
        return torch.lerp(start, end, share)
    return (torch.sin((1 - share) * theta) * start + torch.sin(share * theta) * end) / torch.sin(theta)


def _adds_noise(scheduler: SchedulerMixin, eta: float) -> bool:
    name = type(scheduler).__name__
    return (
        isinstance(scheduler, DDPMScheduler)
        or "Ancestral" in name
        or "SDE" in name
        or scheduler.config.get("algorithm_type", "").startswith("sde-")
        or (eta > 0 and "eta" in inspect.signature(scheduler.step).parameters)
    )


# `custom_pipeline=` loads the one pipeline class that it finds in a file.
del TinyPipeline
