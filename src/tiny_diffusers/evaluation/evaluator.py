"""
`evaluate`: images and a reference in, a report out.

Images are drawn once, features are taken once, and every figure is computed from what then lies on disk. All sets are
brought into the order of their images' hashes first: what "the first thousand" or "a random half" means is then a matter
of the images alone, not of the order or the batches that they came in.
"""

import hashlib
import inspect
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import hardware
from ..data import ImageData, cache_root, normalize
from ..errors import UserError
from . import features as feature_extractors
from . import images as image_sets
from . import metrics
from .metrics import Estimate
from .report import METRICS, Protocol, Report


if TYPE_CHECKING:
    from accelerate import PartialState
    from diffusers import DiffusionPipeline
    from PIL import Image

FEATURE_BATCH = 64
_CACHE_FORMAT = 1  # raised when the same images would get other features
_SMALL = 10_000  # below this a Frechet distance's bias is no longer small, with any features
_HIDDEN = ".evaluation"  # in a checkpoint's folder; hidden files are not pushed
_SAMPLER_OPTIONS = ("num_inference_steps", "eta", "guidance_scale")  # what the report says of them, given or not
_MIN_OF_CLASS = 10  # images of a class, for figures of its own

_IMAGES = (ImageData, np.ndarray, torch.Tensor)  # what may be measured in place of a pipeline

# What a pipeline's own `bits_per_dim` is worth; for diffusion it is the scheduler's bound.
_LIKELIHOODS = {"TinyPixelCNNPipeline": "exact", "TinyVAEPipeline": "the ELBO: an upper bound"}


@dataclass
class _Set:
    """Images of one kind in the order of their hashes: their features (N, D) and classes (N,)."""

    images: np.ndarray  # as they came
    order: np.ndarray  # (N,): the numbers of the images that the rows of the others are of
    labels: np.ndarray | None
    features: np.ndarray


@dataclass
class _Likelihood:
    """Bits/dim of real images: what they are worth, and of how many levels of a pixel they are."""

    bits: np.ndarray
    kind: str
    levels: int


def evaluate(
    pipe_or_images: "DiffusionPipeline | ImageData | np.ndarray | torch.Tensor",
    reference: ImageData | np.ndarray | torch.Tensor,
    protocol: Protocol | None = None,
    *,
    training: ImageData | None = None,
    output_dir: str | Path | None = None,
    name: str | None = None,
    load: dict[str, Any] | None = None,
    command: str = "",
) -> Report:
    """
    Measures a pipeline's images, or any images, against real ones.

    Where several processes run it (`accelerate launch`, `torchrun`), they share the work on a disk that all of them see,
    and all of them get the report.

    Args:
        pipe_or_images (`DiffusionPipeline`, [`~tiny_diffusers.data.ImageData`], `np.ndarray` or `torch.Tensor`):
            What is measured: a pipeline that images are drawn from, or (N, C, H, W) images as uint8, or floats in [0, 1].
        reference ([`~tiny_diffusers.data.ImageData`], `np.ndarray` or `torch.Tensor`):
            Real images of the same size and kind; with labels where classes are to be measured.
        protocol ([`Protocol`], *optional*):
            How to measure.
        training ([`~tiny_diffusers.data.ImageData`], *optional*):
            What the model was trained on: for the distance to the training set, and the real images that the baselines
            are made of. Without it the baselines take the reference's own.
        output_dir (`str` or `Path`, *optional*):
            Where `report.json`, `report.md` and `report.png` go. What is drawn is kept below it in a hidden folder, and
            otherwise in the package's cache, so that a stopped run goes on.
        name (`str`, *optional*):
            What the report calls the model.
        load (`dict`, *optional*):
            The arguments of [`~tiny_diffusers.data.load_images`] that gave the reference, for the report.
        command (`str`, *optional*):
            What was run, for the report.

    Returns:
        [`Report`]: The figures, with all that made them.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: for images that can't be compared, and features that can't be had.
    """
    protocol = protocol or Protocol()
    state = processes()
    extractor = feature_extractors.load(
        protocol.features, protocol.feature_weights, protocol.feature_dtype, device=state.device
    )
    reference = _as_data(reference, "reference")
    shape = tuple(reference.images.shape[1:])
    image_sets.check(reference.images.numpy(), shape, "The reference's images")
    if training is not None:
        image_sets.check(training.images.numpy(), shape, "The training images")
    no_likelihood = None
    if "bits_per_dim" in protocol.metrics:
        no_likelihood = _why_no_likelihood(pipe_or_images, reference)
        by_name = set(protocol.metrics) != set(METRICS)
        if no_likelihood and by_name and not isinstance(pipe_or_images, _IMAGES):
            raise UserError(f"leave out bits_per_dim: {no_likelihood}.")
    work = Path(output_dir, _HIDDEN) if output_dir is not None else cache_root() / "samples"
    cache = cache_root() / "features"

    # 1. Images
    data, source = _source(pipe_or_images, reference, protocol, work, state, name)
    image_sets.check(data.images.numpy(), shape, f"The images of '{source['name']}'")

    # 2. Features
    dim = extractor(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]

    def fill(path: Path, rows: int, read: Callable[[int, int], np.ndarray], desc: str) -> np.ndarray:
        def compute(start: int, stop: int) -> np.ndarray:
            return extractor(torch.from_numpy(read(start, stop))).numpy()

        return image_sets.fill(path, (rows, dim), np.float32, compute, FEATURE_BATCH, state, f"Features: {desc}")

    def extract(data: ImageData, folder: Path, desc: str, limit: int | None = None) -> _Set:
        images = data.images.numpy()
        order = image_sets.order_of(images)[:limit]
        path = folder / f"{_key(extractor, image_sets.fingerprint(images), len(order))}.npy"
        features = fill(path, len(order), lambda start, stop: images[order[start:stop]], desc)
        return _Set(images, order, None if data.labels is None else data.labels.numpy()[order], features)

    generated = extract(data, work, "the images", protocol.num_images)
    count = len(generated.features)
    real = extract(reference, cache, "the reference")
    seen = None  # of the training set all for its nearest neighbours, and as many as were drawn for the baselines
    if training is not None and ("nearest_neighbour" in protocol.metrics or protocol.baselines):
        limit = None if "nearest_neighbour" in protocol.metrics else count
        seen = extract(training, cache, "the training set", limit)

    baselines = {}
    for kind in protocol.baselines:
        if kind == "real":
            continue  # these have features already
        base = seen or real
        rows = min(count, len(base.order)) if kind == "blurred" else count
        labels = base.labels[:rows] if kind == "blurred" and base.labels is not None else None
        path = cache / f"{_key(extractor, image_sets.fingerprint(base.images), kind, image_sets.BLUR_SIGMA, rows)}.npy"
        draw = image_sets.BASELINES[kind](base.images, base.order)
        baselines[kind] = _Set(base.images, base.order, labels, fill(path, rows, draw, kind))

    # 3. Likelihoods
    likelihood = None
    if "bits_per_dim" in protocol.metrics and no_likelihood is None:
        likelihood = _bits_per_dim(pipe_or_images, real, protocol, work / f"bits-{source['key']}.npy", state)

    # 4. Figures, from what lies on disk now
    report = None
    if state.is_main_process:
        sets = _Sets(generated, real, seen, baselines, _is_same(reference, training))
        report = _Figures(protocol, extractor, sets).report(source, reference, training, likelihood, no_likelihood)
        report.command = command
        report.measured_by["reference"]["load"] = load or {}
        if output_dir is not None:
            report.save(output_dir)
            _picture(sets, "nearest_neighbour" in protocol.metrics).save(Path(output_dir, "report.png"))
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (report,) = broadcast_object_list([report])
    return report


def processes() -> "PartialState":
    """The processes that share the work; one where none were launched."""
    from accelerate import PartialState

    # accelerate shares out CPUs only where told that they are meant; the others wait while the main one computes figures
    return PartialState(cpu=hardware.default_device().type == "cpu", timeout=timedelta(hours=12))


def _as_data(images: ImageData | np.ndarray | torch.Tensor, name: str) -> ImageData:
    if isinstance(images, ImageData):
        return images
    pixels = torch.from_numpy(np.array(image_sets.to_uint8(images)))
    return ImageData(pixels, None, None, name, "as given", image_sets.fingerprint(pixels.numpy()))


def _is_same(reference: ImageData, training: ImageData | None) -> bool:
    return training is not None and training.fingerprint == reference.fingerprint


def _key(extractor: feature_extractors.Extractor, *what: object) -> str:
    """What features are a function of."""
    described = json.dumps(
        [_CACHE_FORMAT, extractor.name, extractor.preprocessing, FEATURE_BATCH, *what], sort_keys=True
    )
    return hashlib.sha256(described.encode()).hexdigest()[:32]


# What is measured


def _source(
    given: Any, reference: ImageData, protocol: Protocol, work: Path, state: "PartialState", name: str | None
) -> tuple[ImageData, dict[str, Any]]:
    """The images to judge, drawn where they are a pipeline's; and what the report says of where they come from."""
    reconstructs = protocol.kind == "reconstructions"
    if reconstructs and not hasattr(given, "reconstruct"):
        what = "a folder of images" if isinstance(given, _IMAGES) else f"a {type(given).__name__}"
        raise UserError(f"--kind reconstructions: {what} reconstructs no images; leave it out, or give a VAE.")
    if isinstance(given, _IMAGES):
        data = _with_labels_of(_as_data(given, name or "images"), reference)
        return data, {"kind": "images", "name": name or data.name, "fingerprint": data.fingerprint}

    labels, id2label = _labels_to_ask_for(given, reference, protocol)
    scheduler = getattr(given, "scheduler", None)
    parameters = inspect.signature(given.__call__).parameters
    defaults = {option: parameters[option].default for option in _SAMPLER_OPTIONS if option in parameters}
    source = {
        "kind": "pipeline",
        "name": name or given.config.get("_name_or_path") or type(given).__name__,
        "class": type(given).__name__,
        "weights_sha256": {
            part: feature_extractors.digest(module)
            for part, module in sorted(given.components.items())
            if isinstance(module, torch.nn.Module)
        },
        "dtype": str(given.dtype).removeprefix("torch."),
        "sampling": defaults | protocol.sampling,
    }
    if scheduler is not None:
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        source["scheduler"] = {"class": type(scheduler).__name__, **json.loads(json.dumps(config, default=str))}
    described = [source, protocol.seed, protocol.num_images, None if labels is None else labels.tolist()]
    if reconstructs:
        described += [protocol.kind, reference.fingerprint]
    source["key"] = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    real = None
    if reconstructs:
        real = reference.images.numpy()
        real = real[image_sets.order_of(real)[: protocol.num_images]]
    images = image_sets.sample(
        given,
        tuple(reference.images.shape[1:]),
        work / f"samples-{source['key']}.npy",
        num_images=protocol.num_images if real is None else len(real),
        seed=protocol.seed,
        batch_size=protocol.batch_size,
        options=protocol.sampling,
        class_labels=labels,
        real=real,
        state=state,
    )
    images = torch.from_numpy(np.load(images.filename, mmap_mode="c"))  # torch wants memory that it may write to
    labels = None if labels is None else torch.from_numpy(labels)
    return ImageData(images, labels, id2label, source["name"], "generated", ""), source


def _with_labels_of(data: ImageData, reference: ImageData) -> ImageData:
    """The images with the reference's numbers for their classes, found by name; without classes where a name is unknown."""
    if data.labels is None or data.id2label == reference.id2label:
        return data
    numbers = {label: number for number, label in (reference.id2label or {}).items()}
    if any(label not in numbers for label in data.id2label.values()):
        return replace(data, labels=None, id2label=None)
    table = torch.tensor([numbers[data.id2label[label]] for label in range(len(data.id2label))])
    return replace(data, labels=table[data.labels], id2label=reference.id2label)


def _labels_to_ask_for(
    pipe: "DiffusionPipeline", reference: ImageData, protocol: Protocol
) -> tuple[np.ndarray | None, dict[int, str] | None]:
    """Equally many images of each class of a conditional pipeline, whose classes must be the reference's."""
    classes = list(getattr(pipe, "_class_ids", []))
    if not classes or protocol.sampling.get("guidance_scale") == 0 or "class_labels" in protocol.sampling:
        return None, None
    named = pipe.config.get("id2label")
    if reference.id2label is not None:
        ours = {int(key): label for key, label in named.items()} if named else None
        if (ours is not None and ours != reference.id2label) or len(classes) != len(reference.id2label):
            raise UserError(
                f"The model's classes are {list((ours or dict.fromkeys(classes)).values())[:5]} and the reference's "
                f"{list(reference.id2label.values())[:5]}: give the data set, and the classes, that it was trained on."
            )
    return np.array([classes[i % len(classes)] for i in range(protocol.num_images)]), reference.id2label


def _why_no_likelihood(given: Any, reference: ImageData) -> str | None:
    """Why there are no bits/dim, found out before any image is drawn; None where there are."""
    if isinstance(given, _IMAGES):
        return "a folder of images has no likelihood"
    scheduler = getattr(given, "scheduler", None)
    if hasattr(given, "bits_per_dim"):  # though the network may have none: one image tells
        conditional = bool(getattr(given, "_class_ids", [])) and reference.labels is not None
        try:
            given.bits_per_dim(
                reference.images[:1],
                class_labels=reference.labels[:1].to(given.device) if conditional else None,
                generator=torch.Generator("cpu").manual_seed(0),
            )
        except ValueError as error:
            return str(error).removesuffix(".")
    elif scheduler is None:
        return f"a {type(given).__name__} has no likelihood"
    elif not hasattr(scheduler, "variational_bound"):
        return (
            f"a {type(scheduler).__name__} has no bound of the likelihood; TinyDDIMScheduler, TinyDDPMScheduler have"
        )
    return None


def _bits_per_dim(
    pipe: "DiffusionPipeline", real: _Set, protocol: Protocol, path: Path, state: "PartialState"
) -> _Likelihood:
    """Bits/dim of each of the first real images, by the pipeline's own method or its scheduler's variational bound."""
    count = min(protocol.likelihood_images, len(real.order))
    scheduler = getattr(pipe, "scheduler", None)
    conditional = bool(getattr(pipe, "_class_ids", [])) and real.labels is not None

    def compute(start: int, stop: int) -> np.ndarray:
        images = torch.from_numpy(real.images[real.order[start:stop]])
        labels = torch.from_numpy(real.labels[start:stop]).to(pipe.device) if conditional else None
        generator = torch.Generator("cpu").manual_seed(protocol.seed + start)
        if hasattr(pipe, "bits_per_dim"):
            return pipe.bits_per_dim(images, class_labels=labels, generator=generator).float().cpu().numpy()
        bound = scheduler.variational_bound(
            lambda sample, *rest, **labels: pipe.unet(sample.to(pipe.unet.dtype), *rest, **labels),
            normalize(images).to(pipe.device),
            class_labels=labels,
            generator=generator,
        )
        return bound.total.float().cpu().numpy()

    path = path.with_stem(f"{path.stem}-{image_sets.fingerprint(real.images)[:16]}-{count}")
    bits = image_sets.fill(path, (count,), np.float32, compute, protocol.batch_size, state, "Bits/dim")
    configs = [getattr(part, "config", {}) for part in pipe.components.values()]
    levels = next((config["num_levels"] for config in configs if "num_levels" in config), 256)
    kind = _LIKELIHOODS.get(type(pipe).__name__, "the variational bound: an upper bound")
    return _Likelihood(bits, f"{kind}, of images with {levels} levels", levels)


# What is found


@dataclass
class _Sets:
    generated: _Set
    real: _Set  # the reference
    seen: _Set | None  # the training set
    baselines: dict[str, _Set]
    trained_on_reference: bool


class _Figures:
    """All figures of one protocol; the reference is factored once for all of them."""

    def __init__(self, protocol: Protocol, extractor: feature_extractors.Extractor, sets: _Sets):
        self.protocol, self.extractor, self.sets = protocol, extractor, sets
        self.count = len(sets.generated.features)
        self.target = None
        if self._asked("frechet_distance", "frechet_infinity"):
            self.target = metrics.FrechetReference(sets.real.features)

    def _asked(self, *names: str) -> bool:
        return any(name in self.protocol.metrics for name in names)

    def report(
        self,
        source: dict,
        reference: ImageData,
        training: ImageData | None,
        likelihood: _Likelihood | None,
        no_likelihood: str | None,
    ) -> Report:
        sets = self.sets
        figures = self._distances(sets.generated, sets.real, self.target)
        if "frechet_distance" in figures and self.protocol.num_bootstrap:
            figures["frechet_distance"] = self._with_error(figures["frechet_distance"])
        if likelihood is not None:
            bits, source = likelihood.bits, {**source, "likelihood": likelihood.kind}
            error = bits.std(ddof=1) / np.sqrt(len(bits)) if len(bits) > 1 else None
            figures["bits_per_dim"] = Estimate(float(bits.mean()), error, "standard error over images")
        baselines = self._baselines()
        per_class = self._per_class(figures, baselines, reference.id2label)
        if self._asked("nearest_neighbour") and sets.seen is not None:
            self._nearest(figures, baselines)
        return Report(
            protocol=asdict(self.protocol),
            measured_by=self._measured_by(reference, training, likelihood),
            source=source,
            figures=_as_json(figures),
            per_class={label: _as_json(entries) for label, entries in per_class.items()},
            baselines={
                kind: {"images": size, "figures": _as_json(entries)} for kind, (size, entries) in baselines.items()
            },
            warnings=self._warnings(source, reference, training, no_likelihood),
            versions=_versions(),
        )

    def _distances(
        self, judged: _Set, real: _Set, target: metrics.FrechetReference | None, extrapolate: bool = True
    ) -> dict[str, Estimate]:
        """The figures that a set of features has, against real ones."""
        features, reference = judged.features, real.features
        figures = {}
        if self._asked("frechet_distance"):
            figures["frechet_distance"] = Estimate(target.distance(features))
        if self._asked("frechet_infinity") and extrapolate and len(features) >= 4:
            figures["frechet_infinity"] = metrics.frechet_infinity(features, target)
        if self._asked("kernel_distance") and min(len(features), len(reference)) >= 4:
            figures["kernel_distance"] = metrics.kernel_distance(features, reference)
        if self._asked("inception_score") and self.extractor.classifier is not None:
            figures["inception_score"] = metrics.inception_score(self.extractor.probabilities(features))
        most = self.protocol.max_neighbours
        if min(len(features), len(reference)) > 5:
            if self._asked("precision_recall"):
                figures |= metrics.precision_recall(reference[:most], features[:most])
            if self._asked("density_coverage"):
                figures |= metrics.density_coverage(reference[:most], features[:most])
        if self._asked("diversity"):
            figures |= _diversity(judged, real)
        return figures

    def _with_error(self, distance: Estimate) -> Estimate:
        features, resamples = self.sets.generated.features, self.protocol.num_bootstrap
        error = metrics.bootstrap(lambda rows: self.target.distance(features, rows), len(features), resamples)
        return Estimate(distance.value, error, f"standard error, {resamples} bootstrap resamples")

    def _baselines(self) -> dict[str, tuple[int, dict[str, Estimate]]]:
        """baseline -> its images, and its figures."""
        baselines = {}
        if "real" in self.protocol.baselines:
            judged, real, target = self._real_against_real()
            baselines["real"] = (len(judged.features), self._distances(judged, real, target))
        for kind, judged in self.sets.baselines.items():
            baselines[kind] = (
                len(judged.features),
                self._distances(judged, self.sets.real, self.target, extrapolate=False),
            )
        return {kind: baselines[kind] for kind in self.protocol.baselines}

    def _real_against_real(self) -> tuple[_Set, _Set, metrics.FrechetReference | None]:
        """As many training images as were drawn against the reference, or else the reference's halves."""
        real, seen = self.sets.real, self.sets.seen
        if seen is not None and not self.sets.trained_on_reference:
            return _rows(seen, slice(self.count)), real, self.target
        half = len(real.features) // 2
        judged, other = _rows(real, slice(half)), _rows(real, slice(half, None))
        return judged, other, metrics.FrechetReference(other.features) if self.target is not None else None

    def _per_class(
        self, figures: dict[str, Estimate], baselines: dict, id2label: dict[int, str] | None
    ) -> dict[str, dict[str, Estimate]]:
        """Each class's own figures, and how often a classifier of real images agrees with the class asked for."""
        generated, real = self.sets.generated, self.sets.real
        if generated.labels is None or real.labels is None or len(np.unique(real.labels)) < 2:
            return {}
        learned, tested, _ = self._real_against_real()
        if learned.labels is None:
            learned, tested = (
                _rows(real, slice(len(real.features) // 2)),
                _rows(real, slice(len(real.features) // 2, None)),
            )
        probe = metrics.class_probe(learned.features, learned.labels)
        agrees = probe(generated.features) == generated.labels
        figures["class_agreement"] = _share(agrees)
        if "real" in baselines:
            baselines["real"][1]["class_agreement"] = _share(probe(tested.features) == tested.labels)

        per_class = {}
        for label in np.unique(generated.labels):
            mine, its = generated.labels == label, real.labels == label
            if min(mine.sum(), its.sum()) < _MIN_OF_CLASS:
                continue
            judged, of_class = _rows(generated, mine), _rows(real, its)
            target = metrics.FrechetReference(of_class.features) if self.target is not None else None
            name = (id2label or {}).get(int(label), str(label))
            per_class[name] = self._distances(judged, of_class, target, extrapolate=False)
            per_class[name]["class_agreement"] = _share(agrees[mine])
        return per_class

    def _nearest(self, figures: dict[str, Estimate], baselines: dict) -> None:
        """How near to the training set the images are, and how near real images are that aren't in it."""
        most = self.protocol.max_neighbours
        distances, _ = metrics.nearest_neighbours(self.sets.generated.features[:most], self.sets.seen.features)
        figures["nearest_neighbour"] = Estimate(float(np.median(distances)))
        if self.sets.trained_on_reference:
            return  # no real images are left to compare with
        unseen, _ = metrics.nearest_neighbours(self.sets.real.features[:most], self.sets.seen.features)
        figures["near_copies"] = _share(distances < np.quantile(unseen, 0.01))
        if "real" in baselines:
            baselines["real"][1]["nearest_neighbour"] = Estimate(float(np.median(unseen)))
            baselines["real"][1]["near_copies"] = Estimate(0.01)

    def _measured_by(
        self, reference: ImageData, training: ImageData | None, likelihood: _Likelihood | None
    ) -> dict[str, Any]:
        def describe(data: ImageData) -> dict[str, Any]:
            channels, height, width = data.images.shape[1:]
            return {
                "name": data.name,
                "split": data.split,
                "images": len(data),
                "shape": [channels, height, width],
                "fingerprint": data.fingerprint,
                "notes": data.notes,
            }

        measured_by = {
            "num_images": self.count,
            "features": self.extractor.preprocessing,
            "feature_batch": FEATURE_BATCH,
            "reference": describe(reference),
            "max_neighbours": self.protocol.max_neighbours,
        }
        if likelihood is not None:
            measured_by["likelihood_images"] = self.protocol.likelihood_images
            measured_by["likelihood_levels"] = likelihood.levels
        if training is not None:
            measured_by["training"] = describe(training)
        return measured_by

    def _warnings(
        self, source: dict, reference: ImageData, training: ImageData | None, no_likelihood: str | None
    ) -> list[str]:
        warnings = []
        if self.protocol.kind == "reconstructions":
            warnings.append(
                "These are reconstructions of the reference's own images: the figures say how much the latents keep, and "
                "nothing of samples."
            )
        dim = self.sets.real.features.shape[1]
        for what, size in (("images", self.count), ("reference images", len(self.sets.real.features))):
            if size < max(_SMALL, dim):
                limit = f"their {dim:,} features" if size < dim else f"{_SMALL:,}"
                warnings.append(
                    f"{size:,} {what} are fewer than {limit}: a Frechet distance is too large by an amount that depends on "
                    "their number. Compare it with the real images' at the same size alone, or read the kernel distance."
                )
        if self.count < self.protocol.num_images:
            warnings.append(f"{self.protocol.num_images:,} images were asked for, and there are {self.count:,}.")
        if "real" in self.protocol.baselines:
            judged, other, _ = self._real_against_real()
            if self.sets.real is not other:
                warnings.append(
                    f"Real against real is one half of the reference against the other, {len(judged.features):,} images each:"
                    " there are no other real images."
                )
            elif len(judged.features) < self.count:
                warnings.append(f"Real against real has {len(judged.features):,} images, all of the training set's.")
        if self._asked("nearest_neighbour") and training is None:
            warnings.append("The distance to the training set was not measured: no training set was given.")
        if self._asked("inception_score") and self.extractor.classifier is None:
            warnings.append(f"No classifier's score was measured: '{self.protocol.features}' have no classifier.")
        if no_likelihood is not None:
            warnings.append(f"Bits/dim were not measured: {no_likelihood}.")
        if "likelihood" in source:
            warnings.append(f"Bits/dim are {source['likelihood']}.")
        return warnings + [f"{reference.name}: {note}." for note in reference.notes]


def _rows(part: _Set, rows: slice | np.ndarray) -> _Set:
    labels = None if part.labels is None else part.labels[rows]
    return _Set(part.images, part.order[rows], labels, part.features[rows])


def _diversity(judged: _Set, real: _Set) -> dict[str, Estimate]:
    """The spread of the judged images in units of the real ones': the mean over classes, where both have classes."""
    if judged.labels is not None and real.labels is not None:
        ours = metrics.spread_within_classes(judged.features, judged.labels)
        theirs = metrics.spread_within_classes(real.features, real.labels)
        ratios = [ours[label] / theirs[label] for label in ours if theirs.get(label)]
    else:
        ours, theirs = (metrics.spread(features) for features in (judged.features, real.features))
        ratios = [ours / theirs] if theirs else []
    return {"diversity": Estimate(float(np.mean(ratios)))} if ratios else {}


def _share(flags: np.ndarray) -> Estimate:
    share = float(flags.mean())
    return Estimate(share, float(np.sqrt(share * (1 - share) / len(flags))), "standard error over images")


def _as_json(figures: dict[str, Estimate]) -> dict[str, dict]:
    return {
        name: {
            "value": float(figure.value),
            "error": None if figure.error is None else float(figure.error),
            "error_kind": figure.error_kind,
        }
        for name, figure in figures.items()
        if np.isfinite(figure.value)
    }


def _versions() -> dict[str, str]:
    import accelerate
    import diffusers

    from .. import __version__

    return {
        "python": platform.python_version(),
        "tiny-diffusers": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
    }


def _picture(sets: _Sets, with_neighbours: bool) -> "Image.Image":
    """Images beside real ones; and, with the training set known, those nearest to it beside what they are near."""
    from ..plots import image_grid

    columns = min(12, len(sets.generated.order), len(sets.real.order))
    rows = [
        ("images", sets.generated.images[np.sort(sets.generated.order[:columns])]),
        ("real", sets.real.images[np.sort(sets.real.order[:columns])]),
    ]
    if with_neighbours and sets.seen is not None:
        distances, nearest = metrics.nearest_neighbours(sets.generated.features, sets.seen.features)
        closest = np.argsort(distances, kind="stable")[:columns]
        rows.append(("nearest to training", sets.generated.images[sets.generated.order[closest]]))
        rows.append(("what they are near", sets.seen.images[sets.seen.order[nearest[closest]]]))
    return image_grid(np.concatenate([images for _, images in rows]), columns, row_labels=[name for name, _ in rows])
