"""Protocols and reports: metrics are saved with all that is needed to reproduce them, and tabulated side by side."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from ..errors import UserError, markdown, unknown
from ..files import load_json, read_text, replace_file
from ..flags import Flags, flag
from ..paths import public_name
from ..runs import RunFolder
from ..zoo import find_published


# Raised when a metric of the same name is computed differently: such reports are read, but not compared. Version 2 has
# resized images clipped, coverage and density at equal sizes, the kernel distance over all pairs, the extrapolation
# from disjoint parts, and standard errors by the jackknife.
REPORT_FORMAT = 2

Kind = Literal["samples", "reconstructions"]
FeatureDtype = Literal["float32", "bfloat16"]
Metric = Literal[
    "frechet_distance",
    "frechet_infinity",
    "kernel_distance",
    "inception_score",
    "precision_recall",
    "density_coverage",
    "diversity",
    "nearest_neighbor",
    "bits_per_dim",
    "classifier_score",
    "feature_distance",
    "condition_agreement",
]
Baseline = Literal["real", "blurred", "pixel_gaussian", "noise"]

METRICS: tuple[str, ...] = get_args(Metric)
BASELINES: tuple[str, ...] = get_args(Baseline)
# not by default
_SLOW_METRICS = ("nearest_neighbor", "bits_per_dim", "classifier_score", "feature_distance", "condition_agreement")
# names that these metrics have elsewhere -> what gives them here
_MEANT = {
    "fid": "frechet_distance with --features inception",
    "kid": "kernel_distance with --features inception",
    "is": "inception_score with --features inception",
    "nll": "bits_per_dim",
    "bpd": "bits_per_dim",
    "likelihood": "bits_per_dim",
    "lpips": "feature_distance",
    **dict.fromkeys(("precision", "recall"), "precision_recall"),
    **dict.fromkeys(("density", "coverage"), "density_coverage"),
    **dict.fromkeys(("memorization", "near_copies"), "nearest_neighbor"),
}
# Options of a scheduler's config that are named with it; the others say how the model was trained. A switch is named
# where it is on.
_SAMPLER_OPTIONS = ("algorithm_type", "solver_order", "solver_type", "timestep_spacing", "final_sigmas_type")
_SAMPLER_SWITCHES = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "skip_prk_steps"),
    *("rescale_betas_zero_snr", "clip_sample", "thresholding"),
)

# key in a report -> name, name with the features of `inception`, and whether lower is better (None: neither)
FIGURES = {
    "frechet_distance": ("Frechet distance", "FID", True),
    "frechet_infinity": ("Frechet distance at infinity", "FID at infinity", True),
    "kernel_distance": ("Kernel distance", "KID", True),
    "inception_score": ("Classifier score (the features' classes)", "Inception Score", False),
    "precision": ("Precision", "Precision", False),
    "recall": ("Recall", "Recall", False),
    "density": ("Density", "Density", False),
    "coverage": ("Coverage", "Coverage", False),
    "diversity": ("Diversity within classes, real = 1", "Diversity within classes, real = 1", None),
    "class_agreement": ("Agreement with the class", "Agreement with the class", False),
    "nearest_neighbor": ("Median distance to the training set", "Median distance to the training set", None),
    "near_copies": ("Nearer to it than 99% of real images", "Nearer to it than 99% of real images", True),
    "bits_per_dim": ("Bits/dim", "Bits/dim", True),
    "classifier_score": (*2 * ("Classifier score (the data's classes)",), False),
    "classifier_agreement": (*2 * ("Agreement by the data's classifier",), False),
    "feature_distance": (*2 * ("Perceptual distance of pairs (unweighted)",), None),
    "condition_correlation": (*2 * ("Correlation with the conditions",), False),
    "condition_error": (*2 * ("Mean error of the condition",), True),
    "condition_agreement": (*2 * ("Agreement with the conditions",), False),
}
# metric -> its figures, where it has others than one of its name; class_agreement comes with any metric, if there are classes
_FIGURES_OF = {
    "precision_recall": ("precision", "recall"),
    "density_coverage": ("density", "coverage"),
    "nearest_neighbor": ("nearest_neighbor", "near_copies"),
    "classifier_score": ("classifier_score", "classifier_agreement"),
    "condition_agreement": ("condition_correlation", "condition_agreement"),
}
BASELINE_NAMES = {
    "real": "real against real",
    "blurred": "blurred real images",
    "pixel_gaussian": "per-pixel Gaussian",
    "noise": "uniform noise",
}


@dataclass(frozen=True)
class Protocol(Flags):
    """
    Settings of an evaluation: how images are drawn, and how they are measured.

    Every field except `sampling` is a flag of `tiny-diffusers evaluate`. `metrics=["all"]` becomes the list of all
    metrics, and `baselines=["none"]` an empty list.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a name is unknown or a number is out of range.
    """

    kind: Kind = flag("samples", "Images to measure: samples, or a VAE's reconstructions of the reference images.")
    sampling: dict[str, Any] = field(default_factory=dict)  # arguments of the pipeline's call
    seed: int = flag(0, "Image i is drawn with the seed SEED + i.", within="[0, 9223372036854775807]")
    batch_size: int = flag(64, "Number of images drawn at a time.", within="[1, inf)", changes_run=False)
    features: str = flag("efficientnet-lite0", "Features: inception, dinov2, efficientnet-lite0 or pixels.")
    feature_weights: str | None = flag(None, "Weights of inception (a file) or dinov2 (a folder or a Hub id).")
    feature_dtype: FeatureDtype = flag(
        "float32", "Dtype of the feature network; bfloat16 is faster and shifts distances by 1 or 2 percent."
    )
    feature_channels: list[int] | None = flag(
        None, "Channels, numbered from 0, that the features see: 1 or 3 for a network.", within="[0, 1024)"
    )
    metrics: list[Literal[Metric, "all"]] = flag(
        [name for name in METRICS if name not in _SLOW_METRICS],
        f"Metrics: {', '.join(METRICS)}, or all.",
        meant=_MEANT,
    )
    num_images: int = flag(
        10_000, "Number of images to draw, reconstruct, or take from a folder.", within="[2, 10000000]"
    )
    num_jackknife: int = flag(
        20,
        "Groups of the jackknife for the standard errors of Frechet distances and classifier_score; 0 for none.",
        within="[0, inf)",
    )
    baselines: list[Literal[Baseline, "none"]] = flag(list(BASELINES), f"Baselines: {', '.join(BASELINES)}, or none.")
    max_neighbors: int = flag(
        10_000,
        "Maximum number of images per set for kernel distance, precision, recall, density and coverage, and of "
        "generated images for nearest_neighbor.",
        within="[10, inf)",
    )
    likelihood_images: int = flag(256, "Number of real images that bits_per_dim is averaged over.", within="[1, inf)")

    TITLE: ClassVar[str] = "protocol"
    DASHES: ClassVar[str] = ""

    def __post_init__(self):
        super().__post_init__()
        metrics = METRICS if "all" in self.metrics else self.metrics
        object.__setattr__(self, "metrics", list(metrics))  # the dataclass is frozen
        object.__setattr__(self, "baselines", [name for name in self.baselines if name != "none"])
        for what, given, allowed in (
            ("kind", [self.kind], get_args(Kind)),
            ("feature dtype", [self.feature_dtype], get_args(FeatureDtype)),
            ("metric", self.metrics, METRICS),
            ("baseline", self.baselines, BASELINES),
        ):
            for name in given:
                if name not in allowed:
                    raise unknown(what, name, allowed, _MEANT if what == "metric" else None)
        if 0 < self.num_jackknife < 4:
            raise UserError(f"num_jackknife {self.num_jackknife}: it must be 0, or 4 or more.")

    @property
    def figures(self) -> list[str]:
        """Returns the figures that a report by this protocol can hold."""
        return [*(name for metric in self.metrics for name in _FIGURES_OF.get(metric, (metric,))), "class_agreement"]

    def leave_out(self, metric: str, reason: str | None) -> str | None:
        """
        Returns the reason why a metric cannot be measured if it is asked for by "all"; None if it is not asked for.

        Raises:
            [`~tiny_diffusers.errors.UserError`]: If there is a reason and the metric is asked for by its name.
        """
        if reason is None or metric not in self.metrics:
            return None
        if set(self.metrics) != set(METRICS):
            raise UserError(f"Leave out the metric {metric}: {reason}.")
        return reason

    def describe(self) -> dict[str, Any]:
        """Returns the fields as a report holds them, with the feature weights by their last name."""
        weights = None if self.feature_weights is None else public_name(self.feature_weights)
        return asdict(self) | {"feature_weights": weights}


def metric_of(figure: str) -> str:
    """Returns a metric that gives a figure."""
    given = next((metric for metric, figures in _FIGURES_OF.items() if figure in figures), figure)
    return given if given in METRICS else METRICS[0]


@dataclass
class Report:
    """
    Metrics with everything that is needed to reproduce them.

    Args:
        protocol (`dict`): The fields of the [`Protocol`].
        measured_by (`dict`): Everything that must agree before two reports are compared: the features' preprocessing,
            the `reference` and `training` sets with their fingerprints, the number of images.
        source (`dict`): The images: a pipeline with the fingerprint of its weights and its scheduler, or a folder.
        figures (`dict`): metric -> `value`, `error` and `error_kind`.
        per_class (`dict`): class -> metric -> the same.
        per_condition (`dict`): condition -> metric -> the same.
        baselines (`dict`): baseline -> `images`, and `figures` as above.
        warnings (`list[str]`): Caveats of the metrics.
        versions (`dict`): Versions of Python and the libraries.
        command (`str`): The command line.
        format (`int`): Version of this format, and of how metrics are computed.
    """

    protocol: dict[str, Any]
    measured_by: dict[str, Any]
    source: dict[str, Any]
    figures: dict[str, dict]
    per_class: dict[str, dict] = field(default_factory=dict)
    baselines: dict[str, dict] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    per_condition: dict[str, dict] = field(default_factory=dict)
    format: int = REPORT_FORMAT

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """
        Loads a report from a file or folder, as [`find_report`] finds it.

        Raises:
            [`~tiny_diffusers.errors.UserError`]: If there is no report, none of several is published, or this version
                cannot read it.
        """
        place, path = path, find_report(path)
        try:
            content = load_json(read_text(path))
        except OSError as error:
            raise UserError(f"There is no report at '{place}': `tiny-diffusers evaluate` writes one.") from error
        except ValueError as error:
            raise UserError(f"'{path}' is not a report: {error}.") from error
        version = content.get("format") if isinstance(content, dict) else None
        if version not in range(1, REPORT_FORMAT + 1):
            raise UserError(f"'{path}' has report version {version}, this is version {REPORT_FORMAT}: evaluate again.")
        missing = {"protocol", "measured_by", "source", "figures"} - content.keys()
        unexpected = content.keys() - {entry.name for entry in fields(cls)}
        if missing or unexpected:
            raise UserError(
                f"'{path}' is not a report: it lacks {sorted(missing)} and has the unknown keys {sorted(unexpected)}."
            )
        mistake = _find_mistake(content)
        if mistake is not None:
            raise UserError(f"'{path}' is not a report: {mistake}.")
        return cls(**content)

    @classmethod
    def load_same(
        cls, folder: Path, protocol: dict[str, Any], source: dict[str, Any], load: dict[str, Any]
    ) -> "Report | None":
        """
        Loads the report of a folder if it is of the same protocol, see [`asks_the_same`]. Returns None if it is not, if there
        is none, or if it can't be read, being damaged or of another version.
        """
        try:
            report = cls.load(folder / "report.json")
        except UserError:
            return None
        return report if report.asks_the_same(protocol, source, load) else None

    def save(self, folder: str | Path) -> Path:
        """Writes `report.json` and `report.md`; returns the path of the first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        replace_file(path, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")
        replace_file(folder / "report.md", self.markdown())
        return path

    @staticmethod
    def knows(figure: str) -> bool:
        """Checks that a name is that of a metric in reports."""
        return figure in FIGURES

    def label(self, figure: str) -> str:
        """Returns the name of a metric: FID, KID and Inception Score are reserved for the features of `inception`."""
        return figure_label(figure, self.protocol["features"])

    @property
    def kind(self) -> str:
        """The protocol's kind; the oldest reports have none and are of samples."""
        return self.protocol.get("kind", "samples")

    @property
    def images(self) -> str:
        """The number and kind of the images: "10,000 images" or "10,000 reconstructions"."""
        return f"{self.measured_by['num_images']:,} {'images' if self.kind == 'samples' else self.kind}"

    @property
    def sampling(self) -> str:
        """The scheduler with its options, and the arguments of the pipeline's call."""
        scheduler = self.source.get("scheduler", {})
        words = [scheduler["class"]] if "class" in scheduler else []
        words += [f"solver {name}" for name in _own_solver(scheduler)]
        words += [f"{name} {scheduler[name]}" for name in _SAMPLER_OPTIONS if scheduler.get(name) is not None]
        words += [name for name in _SAMPLER_SWITCHES if scheduler.get(name) is True]
        words += [f"{name} {value}" for name, value in self.source.get("sampling", {}).items()]
        return ", ".join(words)

    @property
    def likelihood_given(self) -> list[str]:
        """What the model is told of each image whose bits/dim are measured: `"class"`, and the names of conditions."""
        return [str(name) for name in self.measured_by.get("likelihood_given", [])]

    @property
    def likelihood_kind(self) -> str:
        """What the bits/dim are: exact, or a bound; empty without them, and in earlier reports."""
        return self.measured_by.get("likelihood_kind", "")

    def asks_the_same(self, protocol: dict[str, Any], source: dict[str, Any], load: dict[str, Any]) -> bool:
        """
        Checks that a report is of the same protocol: that measuring again would replace it by one of the same name.

        Args:
            protocol (`dict`): The fields of the [`Protocol`].
            source (`dict`): The images, as in [`Report`]. The weights may differ: those of a longer training do.
            load (`dict`): How the real images are loaded.
        """
        names = [entry.name for entry in fields(Protocol) if entry.metadata.get("changes_run", True)]
        of_images = ("kind", "name", "class", "dtype", "sampling", "scheduler")

        def described(protocol: dict, source: dict, load: dict) -> list:
            chosen = [
                {name: protocol.get(name) for name in names},
                {name: source.get(name) for name in of_images},
                load,
            ]
            return json.loads(json.dumps(chosen))  # tuples as lists

        earlier = described(self.protocol, self.source, self.measured_by["reference"].get("load", {}))
        return earlier == described(protocol, source, load)

    @property
    def against(self) -> str:
        """The reference and the features, in words."""
        reference, dtype = self.measured_by["reference"], self.measured_by["features"]["dtype"]
        return (
            f"against {reference['images']:,} of {reference['name']} ({reference['split']}); "
            f"features {self.protocol['features']} in {dtype}"
        )

    def summary(self) -> str:
        """Returns the protocol in one line, for the caption of a table."""
        sampling = f" ({self.sampling})" if self.sampling else ""
        resize = self.measured_by["features"]["resize"]
        return f"{self.images}{sampling}, seed {self.protocol['seed']}, {self.against}, resize: {resize}"

    def markdown(self) -> str:
        """Returns the report as Markdown: metrics beside those of the baselines, metrics per class, warnings."""
        rows = {self.source.get("name", "model"): self.figures}
        rows |= {BASELINE_NAMES[name]: entry["figures"] for name, entry in self.baselines.items() if entry["figures"]}
        parts = [f"{markdown(self.summary())}.", format_table(self, rows, "")]
        kinds = {f"{self.label(key)}: {entry['error_kind']}" for key, entry in self.figures.items() if entry["error"]}
        if kinds:
            parts.append("After ±: " + "; ".join(sorted(kinds)) + ".")
        if self.per_class:
            parts.append(format_table(self, self.per_class, "class"))
        if self.per_condition:
            parts.append(format_table(self, self.per_condition, "condition"))
        parts += [f"**Note:** {markdown(str(warning))}" for warning in self.warnings]
        return "\n\n".join(parts) + "\n"

    def card_results(self) -> list[dict[str, Any]]:
        """Returns the metrics as arguments of `huggingface_hub.EvalResult`, for the `model-index` of a model card."""
        reference = self.measured_by["reference"]
        name = public_name(reference.get("load", {}).get("dataset_name") or reference["name"])
        return [
            {
                "task_type": "unconditional-image-generation",
                "dataset_type": name,
                "dataset_name": reference["name"],
                "dataset_split": reference["split"],
                "metric_type": figure,
                "metric_name": f"{self.label(figure)} ({self._features_of(figure)}{self.images})",
                "metric_value": round(entry["value"], 6),
                "metric_args": {key: entry[key] for key in ("error", "error_kind") if entry[key] is not None} or None,
            }
            for figure, entry in self.figures.items()
        ]

    def _features_of(self, figure: str) -> str:
        """Returns the features of a metric, with a comma; none of those by the data's own classifier or regressor."""
        return "" if figure.startswith(("classifier_", "condition_")) else f"{self.protocol['features']}, "


_MOST_DECIMALS = 6  # of a figure with its error

# The parts of a report that are read, with their types; those after "?" may be missing.
_FORM = {
    "protocol": {"features": str, "seed": int, "?kind": str, "?sampling": dict, "?feature_weights": (str, type(None))},
    "measured_by": {
        "num_images": int,
        "features": {"dtype": str, "resize": str},
        "reference": {"name": str, "split": str, "images": int, "fingerprint": str, "?load": dict},
        "?likelihood_given": list,
        "?likelihood_kind": str,
    },
    "source": {"kind": str, "name": str, "?sampling": dict, "?scheduler": {"class": str}},
    "figures": dict,
    "?per_class": dict,
    "?per_condition": dict,
    "?baselines": dict,
    "?warnings": list,
    "?versions": dict,
    "?command": str,
}


def _find_mistake(content: dict[str, Any]) -> str | None:
    """Returns what is wrong with the content of a report, which may be a stranger's, or None."""
    mistake = _check_form(content, _FORM)
    if mistake is not None:
        return mistake
    sets = {"figures": content["figures"], **content.get("per_class", {}), **content.get("per_condition", {})}
    for name, entry in content.get("baselines", {}).items():
        if name not in BASELINES or not isinstance(entry, dict):
            return f"its baseline {name!r} is unknown or damaged"
        sets[name] = entry.get("figures")
    for where, figures in sets.items():
        if not isinstance(figures, dict):
            return f"its {where} are no metrics"
        for name, figure in figures.items():
            if name not in FIGURES or not _is_estimate(figure):
                return f"its metric {name!r} is unknown or damaged"
    return None


def _check_form(content: Any, form: dict[str, Any], where: str = "") -> str | None:
    for name, expected in form.items():
        key = name.removeprefix("?")
        if key not in content and key != name:
            continue
        value, place = content.get(key), f"{where}{key}"
        kind = dict if isinstance(expected, dict) else expected
        if not isinstance(value, kind):
            return f"its {place} is {type(value).__name__}"
        mistake = _check_form(value, expected, f"{place}.") if isinstance(expected, dict) else None
        if mistake is not None:
            return mistake
    return None


def _is_estimate(figure: Any) -> bool:
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and abs(value) < 1e300  # so neither infinite nor NaN

    if not isinstance(figure, dict) or figure.keys() != {"value", "error", "error_kind"}:
        return False
    error, kind = figure["error"], figure["error_kind"]
    has_error = error is None or (is_number(error) and error >= 0)
    return is_number(figure["value"]) and has_error and isinstance(kind, (str, type(None)))


def figure_label(figure: str, features: str) -> str:
    """Returns the name of a metric with these features, as [`Report.label`] does."""
    general, with_inception, _ = FIGURES[figure]
    return with_inception if features == "inception" else general


def find_report(place: str | Path) -> Path:
    """
    Finds the file of a report: in its own folder, or in that of a checkpoint, which may be a published model, where it is
    published or the only one.
    """
    place = find_published(place)
    return RunFolder(place).find_report() if Path(place).is_dir() else Path(place)


def default_name(protocol: Protocol, source: dict[str, Any]) -> str:
    """
    Returns the name of a report from its protocol: "ddim-50", "sde-dpmsolver-10-guidance_scale-3", "reconstructions".

    Args:
        protocol ([`Protocol`]): The protocol.
        source (`dict`): The images, as in [`Report`].
    """
    scheduler, sampling = source.get("scheduler", {}), dict(source.get("sampling", {}))
    words = [protocol.kind] if protocol.kind != "samples" or not scheduler else []
    if scheduler:
        solver = scheduler["class"].removeprefix("Tiny").removesuffix("Scheduler")
        words += [scheduler.get("algorithm_type") or solver, *(s for s in _own_solver(scheduler) if s != "euler")]
    if "num_inference_steps" in sampling:
        words.append(sampling.pop("num_inference_steps"))
    for name, value in sampling.items():
        if name in protocol.sampling:  # it was asked for
            words += [name, *(value if isinstance(value, (list, tuple)) else [value])]
    words = [f"{word:g}" if isinstance(word, float) else str(word) for word in words]
    return re.sub(r"[^\w.-]+", "", "-".join(words)).lower()


def _own_solver(scheduler: dict[str, Any]) -> list[str]:
    """Returns the solver of this package's schedulers for flow and EDM. In the config of another it means nothing."""
    return [scheduler["solver"]] if "solver" in scheduler and str(scheduler.get("class")).startswith("Tiny") else []


def format_table(report: Report, rows: dict[str, dict[str, dict]], corner: str) -> str:
    """Returns metrics as a Markdown table, a row each, named as the report names them."""
    columns = [name for name in FIGURES if any(name in figures for figures in rows.values())]
    lines = [
        f"| {corner} | " + " | ".join(report.label(name) + arrow(name) for name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, figures in rows.items():
        lines.append(
            f"| {markdown(str(name))} | " + " | ".join(format_figure(figures.get(column)) for column in columns) + " |"
        )
    return "\n".join(lines)


def arrow(figure: str) -> str:
    """Returns the arrow of a metric in the head of a table: down if lower is better."""
    return {True: " ↓", False: " ↑", None: ""}[FIGURES[figure][2]]


def format_figure(entry: dict | None) -> str:
    """Returns a metric with its error, as a cell of a table."""
    if entry is None:
        return "–"
    value, error = entry["value"], entry["error"]
    if not error or round(error, _MOST_DECIMALS) == 0:
        return f"{value:.4g}"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), _MOST_DECIMALS)  # two significant digits of the error
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
