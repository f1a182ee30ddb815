"""
How images get from the dataset into a step: which ones, in which order, how augmented, and with which classes and
conditions.
"""

import logging
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ..data import AUGMENT_DRAWS, ImageData, augment, normalize
from ..data.augmentation import AUGMENTATIONS, GEOMETRIC
from ..data.labeled_augmentation import LABELED_DRAWS, augment_labeled
from .arguments import TrainingArguments
from .draws import DataOrder, Draws
from .family import Batch, Family, measured_rows
from .settings import split_indices


logger = logging.getLogger(__name__)


class Batches:
    """
    Makes the batches of one process. The processes share the images of a step, each of which depends on the seed, the step
    and its index in the global batch alone.

    Args:
        settings ([`TrainingArguments`]): From [`~tiny_diffusers.training.settings.resolve_settings`].
        accelerator (`Accelerator`): The processes and their device.
        data ([`ImageData`]): The dataset, of which some images are held out.
        family ([`Family`]): Says what a batch has beside its images.

    Attributes:
        train_indices (`torch.Tensor` of shape `(N,)`): Of the images to train on.
        validation_indices (`torch.Tensor` of shape `(M,)`, *optional*): Of those that are held out.
        global_batch (`int`): Number of images of an optimizer step, over all processes.
        steps_per_epoch (`float`): Steps in which each training image is seen once.
    """

    def __init__(self, settings: TrainingArguments, accelerator: Accelerator, data: ImageData, family: Family):
        self.data, self.family, self.device = data, family, accelerator.device
        self.seed, self.size = settings.seed, settings.train_batch_size
        self.process_index, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.train_indices, self.validation_indices = split_indices(settings, data)
        self._warn_of_absent_classes()
        self.order = DataOrder(self.seed, len(self.train_indices))
        self.global_batch = self.size * self.num_processes * settings.gradient_accumulation_steps
        self.steps_per_epoch = len(self.train_indices) / self.global_batch
        self.augmentation = {name: getattr(settings, name) for name in AUGMENTATIONS if getattr(settings, name)}
        # Refuses what does not fit the images.
        augment(normalize(data.images[:1], data.value_range), torch.zeros(1, AUGMENT_DRAWS), **self.augmentation)

    def _warn_of_absent_classes(self) -> None:
        """Warns of classes that the network has and no training image shows."""
        data = self.data
        if data.labels is None or self.family.null_label is None:
            return
        counts = torch.bincount(data.labels[self.train_indices], minlength=len(data.id2label))
        absent = [name for class_id, name in data.id2label.items() if counts[class_id] == 0]
        if absent:
            held_out = " that is not held out (--validation_split)" if self.validation_indices is not None else ""
            logger.warning(
                f"{len(absent)} of {len(counts)} classes have no training image{held_out}, so nothing is learned of "
                f"them: {', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}."
            )

    # ---------------------------------------------------------------------------------------------- which images

    def training(self, step: int, micro_batch: int = 0, max_steps: int | None = None) -> Batch:
        """Makes this process's share of a micro-batch of a step, of `max_steps` in the run."""
        first = (micro_batch * self.num_processes + self.process_index) * self.size
        rows = range(first, first + self.size)
        offset = step * self.global_batch
        indices = self.train_indices[self.order(range(offset + rows.start, offset + rows.stop))]
        progress = step / max_steps if max_steps else 1.0
        return self._assemble(indices, self._draws(step, rows), training=True, progress=progress)

    def trial(self, count: int) -> Batch:
        """Makes a batch of any size as it is trained on, the same one in each process."""
        rows = range(count)
        return self._assemble(self.train_indices[self.order(rows)], self._draws(0, rows), training=True)

    def measured(self) -> Iterator[Batch]:
        """Yields training images from all of the dataset, which stand for it in a measurement."""
        for rows in measured_rows(len(self.train_indices)).split(self.size):
            yield self._assemble(self.train_indices[rows], self._draws("measure", range(len(rows))), training=False)

    @property
    def num_held_out(self) -> int:
        """Number of images that are held out."""
        return 0 if self.validation_indices is None else len(self.validation_indices)

    def validation(self, count: int) -> Iterator[Batch]:
        """Yields this process's share of the first `count` held-out images, always with the same noise and timesteps."""
        for start in range(self.process_index * self.size, count, self.size * self.num_processes):
            rows = range(start, min(start + self.size, count))
            indices = self.validation_indices[rows.start : rows.stop]
            yield self._assemble(indices, self._draws("validation", rows), training=False)

    def examples(self, count: int) -> Batch:
        """Makes a batch of at most `count` images to be shown beside samples, held-out ones if there are any."""
        shown = self.train_indices if self.validation_indices is None else self.validation_indices
        rows = range(min(count, len(shown)))
        return self._assemble(shown[: len(rows)], self._draws("examples", rows), training=False)

    def _draws(self, step: int | str, rows: range) -> Draws:
        return Draws(self.seed, step, rows, self.device)

    # ----------------------------------------------------------------------------------------- how they are made

    def _assemble(self, indices: torch.Tensor, draws: Draws, training: bool, progress: float = 1.0) -> Batch:
        """
        Makes a batch of these images; for training they are augmented, and the class and the conditions of some are left
        out. `progress` is the share of the run that is over.
        """
        data, family, labels = self.data, self.family, None
        conditioning_images = conditions = None
        if data.latents is None:
            images = self._load(data.images, indices, data.value_range)
        else:
            images = self._load_latents(indices, draws, training)
        if data.conditioning_images is not None:
            conditioning_images = self._load(data.conditioning_images, indices)
        if training and self.augmentation and data.latents is None:
            uniform = draws.uniform("augment", AUGMENT_DRAWS)
            images = augment(images, uniform, **self.augmentation)
            if conditioning_images is not None:
                geometric = {name: self.augmentation[name] for name in GEOMETRIC if name in self.augmentation}
                conditioning_images = augment(conditioning_images, uniform, **geometric)
        augment_labels = None
        if training and family.augment_prob > 0:
            uniform = draws.uniform("augment_labelled", LABELED_DRAWS)  # the name is part of the seed
            images, augment_labels = augment_labeled(images, uniform, family.augment_prob)
        if family.conditioning is not None and family.conditioning.is_made:
            conditioning_images = family.conditioning.enlarge(family.conditioning.observe(images))
        if data.labels is not None and family.null_label is not None:
            labels = data.labels[indices].to(self.device, non_blocking=True)
        if family.condition_statistics is not None:
            conditions = family.condition_statistics.standardize(data.conditions[indices].to(self.device))
        if training and family.label_dropout > 0:
            dropped = draws.uniform("label_dropout") < family.label_dropout
            if labels is not None:
                labels = labels.masked_fill(dropped, family.null_label)
            if conditioning_images is not None:
                conditioning_images = conditioning_images.masked_fill(dropped[:, None, None, None], 0)
            if conditions is not None:
                conditions = conditions.masked_fill(dropped[:, None], math.nan)
        return Batch(images, labels, draws, conditioning_images, conditions, augment_labels, progress)

    def _load(
        self, images: torch.Tensor, indices: torch.Tensor, value_range: tuple[float, float] | None = None
    ) -> torch.Tensor:
        return normalize(images[indices].to(self.device, non_blocking=True), value_range)

    def _load_latents(self, indices: torch.Tensor, draws: Draws, training: bool) -> torch.Tensor:
        """Loads latents, of the mirror image where [`augment`] would flip the image."""
        views = self.data.latents[indices].to(self.device, non_blocking=True)  # (B, V, C, h, w)
        if not training or views.shape[1] == 1:
            return views[:, 0]
        flips = draws.uniform("augment", AUGMENT_DRAWS)[:, 0] < 0.5
        return torch.where(flips[:, None, None, None], views[:, 1], views[:, 0])
