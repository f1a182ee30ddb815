"""`ClassConditioningMixin`: class labels in any form, and classifier-free guidance, also by an image or conditions."""

import contextlib
import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Optional

import numpy as np
import torch
from diffusers import SchedulerMixin, UNet2DModel


ClassLabels = int | str | Sequence[int] | Sequence[str] | np.ndarray | torch.Tensor


class ClassConditioningMixin:
    """
    Mixin with class labels and classifier-free guidance, for a [`DiffusionPipeline`] with a class-conditional network. A
    pipeline of diffusion takes its arguments, and has `ConditionsMixin` beside it; others have their own. An image, or
    numbers by name, may be conditions as well, or instead.

    A network has an embedding table with one row per class. The networks of this package have `num_class_embeds` = K
    classes and K + 1 rows, where row K is the null class. A stock [`UNet2DModel`] has `num_class_embeds` rows in all.
    The pipeline's `null_class_id` is the row of the null class, or None if there is no null class.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        id2label: Optional[dict] = None,
        null_class_id: Optional[int] = -1,
        class_dropout_prob: Optional[float] = None,
        conditioning: Optional[str] = None,
        value_range: Optional[dict] = None,
        condition_statistics: Optional[dict] = None,
        guidance_model: Optional[torch.nn.Module] = None,
    ):
        super().__init__(unet, scheduler, value_range, guidance_model)
        self._register_classes(id2label, null_class_id, class_dropout_prob)
        self._register_conditioning(conditioning)
        self._register_conditions(condition_statistics)

    def _register_conditioning(self, conditioning: str | None):
        """Refuses a network that takes an image as a condition; a pipeline with an argument for it overrides this."""
        self._refuse_conditioning(conditioning)

    def _register_classes(self, id2label: dict | None, null_class_id: int | None, class_dropout_prob: float | None):
        """Checks the arguments against the network and saves them in the pipeline's config."""
        rows = self._num_rows
        if rows == 0:
            null_class_id = None
        elif null_class_id is not None:
            if not -rows <= null_class_id < rows:
                raise ValueError(
                    f"`null_class_id` must be one of the network's {rows} rows, 0 to {rows - 1}, or None for no null "
                    f"class, got {null_class_id}."
                )
            null_class_id %= rows
        self.register_to_config(null_class_id=null_class_id, class_dropout_prob=class_dropout_prob)
        self._register_names(id2label)

    def _register_names(self, id2label: dict[int, str] | None):
        """Checks the class names against the network and saves them in the pipeline's config."""
        if id2label is not None:
            id2label = {int(class_id): str(name) for class_id, name in id2label.items()}
            unknown = sorted(set(id2label) - set(self._class_ids))
            if unknown:
                raise ValueError(
                    f"`id2label` has ids that are no class of the network: {unknown}. The network's classes are "
                    f"{self._allowed_classes} and its null class is {self._null_class_id}."
                )
            if len(set(id2label.values())) < len(id2label):
                raise ValueError(f"`id2label` gives one name to several classes: {id2label}.")
        self.register_to_config(id2label=id2label)

    @property
    def _has_condition(self) -> bool:
        """Returns whether the network takes a class, an image or numbers as conditions, and so can be guided."""
        others = (self.config.get(name) for name in ("conditioning", "condition_statistics"))
        return self._num_rows > 0 or any(each is not None for each in others)

    @property
    def _num_rows(self) -> int:
        """Returns the number of rows of the class embedding, null class included, or 0 without classes."""
        num_class_embeds = self._network.config.get("num_class_embeds")
        if num_class_embeds is None:
            return 0
        return num_class_embeds if isinstance(self._network, UNet2DModel) else num_class_embeds + 1

    @property
    def _null_class_id(self) -> int | None:
        """Returns the row of the null class: the last one if the pipeline has no `null_class_id` in its config."""
        return self.config.get("null_class_id", self._num_rows - 1 if self._num_rows else None)

    @property
    def _class_ids(self) -> list[int]:
        return [row for row in range(self._num_rows) if row != self._null_class_id]

    @property
    def _allowed_classes(self) -> str:
        if self.config.get("id2label"):
            return ", ".join(f"{class_id}: {name}" for class_id, name in self.config.id2label.items())
        ids = self._class_ids
        return f"{ids[0]} to {ids[-1]}" if ids else "none"

    @property
    def _can_guide(self) -> bool:
        return super()._can_guide or self._has_condition

    def _check_guidance(self, guidance_scale: float, guidance_interval: tuple[float, float]):
        super()._check_guidance(guidance_scale, guidance_interval)
        if guidance_scale == 1 or super()._can_guide:
            return
        if self._num_rows and self._null_class_id is None:
            raise ValueError(
                f"`guidance_scale` must be 1 for a network without a null class, got {guidance_scale}: train one with "
                "label dropout for guidance."
            )
        if self.config.class_dropout_prob == 0:
            warnings.warn(
                f"`guidance_scale` {guidance_scale} won't help: the network was trained without label dropout, which drops "
                "conditions and conditioning images as well, and so never without its condition. Use 1, or train with "
                "`--class_dropout_prob 0.1`.",
                stacklevel=4,
            )

    def _encode_class_labels(
        self, class_labels: ClassLabels | None, batch_size: int | None, guidance_scale: float | None = None
    ) -> tuple[torch.Tensor | None, int]:
        """
        Converts labels to the network's input on the device: ids (B,), mixing weights (B, rows), or None for a network
        without classes. Also returns B: the number of labels, or `batch_size` if there is one label or none. Pipelines
        without guidance pass no `guidance_scale`.
        """
        if class_labels is None:
            batch_size = 1 if batch_size is None else batch_size
            if self._num_rows == 0:
                return None, batch_size
            if guidance_scale != 0 or self._null_class_id is None:
                hint = "" if guidance_scale in (None, 0) else ", or `guidance_scale=0` for unconditional samples"
                raise ValueError(f"The network needs `class_labels`: give classes of {self._allowed_classes}{hint}.")
            labels = torch.tensor([self._null_class_id])
        elif self._num_rows == 0:
            raise ValueError("The network has no classes: leave out `class_labels`.")
        else:
            labels = self._parse_labels(class_labels)

        if len(labels) == 1 and batch_size is not None:
            labels = labels.repeat_interleave(batch_size, dim=0)
        elif batch_size not in (None, len(labels)):
            raise ValueError(
                f"`class_labels` must be one label, or one for each of {batch_size} images, got {len(labels)}."
            )
        return labels.to(self._execution_device), len(labels)

    def _parse_labels(self, class_labels: ClassLabels) -> torch.Tensor:
        """Converts labels in any form to ids (B,) or mixing weights (B, rows)."""
        if isinstance(class_labels, np.ndarray) and class_labels.dtype.kind in "OU":  # names
            class_labels = class_labels.reshape(-1).tolist()
        if isinstance(class_labels, str):
            class_labels = [class_labels]
        if isinstance(class_labels, Sequence) and len(class_labels) > 0:
            ids = [self._class_id(label) if isinstance(label, str) else label for label in class_labels]
            class_labels = torch.stack([torch.as_tensor(label) for label in ids])
        labels = torch.as_tensor(class_labels)

        if labels.numel() == 0:
            raise ValueError(f"`class_labels` is empty: give one label or more of {self._allowed_classes}.")
        if labels.is_floating_point():
            labels = labels.reshape(1, -1) if labels.ndim < 2 else labels
            if labels.shape[1:] != (self._num_rows,) or not torch.isfinite(labels).all():
                raise ValueError(
                    f"Float `class_labels` are weights of the network's {self._num_rows} rows. They must be finite "
                    f"and of shape (B, {self._num_rows}), got {tuple(labels.shape)}."
                )
            self._check_null_weights(labels)
            return labels.float()
        if labels.ndim > 1 and labels.shape[1:] != (1,):
            labels = self._decode_one_hot(labels)
        labels = labels.reshape(-1).long()
        unknown = sorted(set(labels.tolist()) - set(self._class_ids))
        if unknown:
            raise ValueError(f"Unknown class id {unknown}: the classes are {self._allowed_classes}.")
        return labels

    def _check_null_weights(self, weights: torch.Tensor):
        """Refuses weights (B, rows) of the null class where training has not shown the network what they stand for."""
        null = self._null_class_id
        if null is None or not weights[:, null].any():
            return
        others = (self.config.get(name) for name in ("conditioning", "condition_statistics"))
        if self.config.get("class_dropout_prob", 0) == 0:
            reason = "no label was dropped in training, so it was never trained"
        elif any(each is not None for each in others):
            reason = "training drops the class with the other conditions, and never alone"
        else:
            return
        raise ValueError(f"Float `class_labels` must give the null class, row {null}, a weight of 0: {reason}.")

    def _decode_one_hot(self, labels: torch.Tensor) -> torch.Tensor:
        """Converts one-hot rows (B, K) over the classes, or (B, rows) with the null class, to ids (B,)."""
        rows = {self._num_rows: range(self._num_rows), len(self._class_ids): self._class_ids}.get(labels.shape[-1])
        is_one_hot = labels.ndim == 2 and ((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()
        if rows is None or not is_one_hot:
            raise ValueError(
                f"Integer `class_labels` are ids of shape (B,), or one-hot rows of shape (B, {len(self._class_ids)}), got "
                f"{tuple(labels.shape)}."
            )
        return torch.tensor(rows)[labels.long().argmax(dim=1)]

    def _interpolate_labels(self, labels: torch.Tensor | None, share: torch.Tensor) -> torch.Tensor | None:
        """Returns the weights of the class embedding's rows on the line between two labels, for shares (N, 1): (N, rows)."""
        if labels is None:
            return None
        if not labels.is_floating_point():
            labels = torch.nn.functional.one_hot(labels, self._num_rows)
        return torch.lerp(*labels.to(share.dtype), share)

    def _class_id(self, label: str) -> int:
        label2id = {name: class_id for class_id, name in (self.config.id2label or {}).items()}
        if label in label2id:
            return label2id[label]
        if label.isdecimal():
            return int(label)
        near = difflib.get_close_matches(label, label2id, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"Unknown class '{label}': the classes are {self._allowed_classes}.{hint}")

    def _guided_predict(
        self,
        labels: torch.Tensor | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        image: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
        """
        Returns the guided network as `predict(sample, timestep, step)`: without a guidance model,
        eps = w eps(x, c) + (1 - w) eps(x, null). This is eq. 6 of
        [Ho & Salimans](https://huggingface.co/papers/2207.12598) with w for their 1 + w. The condition c is the class, the
        image (B, K, H, W) and the numbers (B, D), as far as the network takes them; without them, the image is zeros and
        the numbers are NaN.
        """
        condition, null = (labels, image, conditions), None
        has_null = (
            self._null_class_id is not None if labels is not None else image is not None or conditions is not None
        )
        if has_null:
            null_labels = (
                None if labels is None else torch.full((len(labels),), self._null_class_id, device=labels.device)
            )
            if labels is not None and labels.is_floating_point():
                null_labels = torch.nn.functional.one_hot(null_labels, self._num_rows).to(labels.dtype)
            null_image = None if image is None else torch.zeros_like(image)
            null_conditions = None if conditions is None else torch.full_like(conditions, math.nan)
            null = (null_labels, null_image, null_conditions)
        return self._guide(condition, null, guidance_scale, guidance_interval)

    def _predict(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        if image is not None:
            x_t = torch.cat([x_t, image.to(x_t.dtype)], dim=1)  # (B, C, H, W), (B, K, H, W) -> (B, C + K, H, W)
        is_mixture = labels is not None and labels.is_floating_point()
        unwrapped = self._network if network is None else network
        if is_mixture and isinstance(unwrapped, UNet2DModel):
            with _mix_embeddings(unwrapped.class_embedding):
                return super()._predict(x_t, timestep, labels, conditions, network)
        return super()._predict(x_t, timestep, labels, conditions, network)


@contextlib.contextmanager
def _mix_embeddings(embedding: torch.nn.Embedding):
    """Makes an embedding, which maps ids (B,) to (B, D), map weights of its rows (B, rows) to (B, D) instead."""
    inputs = []

    def look_up_all(module: torch.nn.Module, args: tuple) -> torch.Tensor:
        inputs.append(args[0])
        return torch.arange(module.num_embeddings, device=args[0].device)

    def mix(module: torch.nn.Module, args: tuple, rows: torch.Tensor) -> torch.Tensor:
        return inputs.pop().to(rows.dtype) @ rows  # (B, rows) @ (rows, D)

    handles = [embedding.register_forward_pre_hook(look_up_all), embedding.register_forward_hook(mix)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
