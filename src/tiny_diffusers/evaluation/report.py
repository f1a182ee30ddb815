"""
A figure with everything that made it: the protocol, the report that carries it, and the table of several reports.
"""

import itertools
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown


REPORT_FORMAT = 1  # raised when a figure of the same name would mean something else
METRICS = (
    "frechet_distance",
    "frechet_infinity",
    "kernel_distance",
    "inception_score",
    "precision_recall",
    "density_coverage",
    "diversity",
    "nearest_neighbour",
    "bits_per_dim",
)
BASELINES = ("real", "blurred", "pixel_gaussian", "noise")
KINDS = ("samples", "reconstructions")

# figure -> its name with any features, with those of `inception`, and whether lower is better (None: neither is)
FIGURES = {
    "frechet_distance": ("Frechet distance", "FID", True),
    "frechet_infinity": ("Frechet distance at infinity", "FID at infinity", True),
    "kernel_distance": ("Kernel distance", "KID", True),
    "inception_score": ("Classifier score", "Inception Score", False),
    "precision": ("Precision", "Precision", False),
    "recall": ("Recall", "Recall", False),
    "density": ("Density", "Density", False),
    "coverage": ("Coverage", "Coverage", False),
    "diversity": ("Diversity within classes, real = 1", "Diversity within classes, real = 1", None),
    "class_agreement": ("Agreement with the class", "Agreement with the class", False),
    "nearest_neighbour": ("Median distance to the training set", "Median distance to the training set", None),
    "near_copies": ("Nearer to it than 99 % of real images", "Nearer to it than 99 % of real images", True),
    "bits_per_dim": ("Bits/dim", "Bits/dim", True),
}
BASELINE_NAMES = {
    "real": "real against real",
    "blurred": "blurred real images",
    "pixel_gaussian": "per-pixel Gaussian",
    "noise": "uniform noise",
}


@dataclass
class Protocol:
    """
    How images are drawn, and how they are measured.

    Args:
        kind (`str`): `"samples"`, or `"reconstructions"` of the reference's first images in the order of their hashes, by
            the pipeline's `reconstruct`.
        sampling (`dict`): Arguments of the pipeline's call: `num_inference_steps`, `eta`, `guidance_scale`, ...
        seed (`int`): Image i is drawn with seed + i.
        batch_size (`int`): Images drawn at a time.
        features (`str`): What images are compared by: see [`~tiny_diffusers.evaluation.features.load`].
        feature_weights (`str`, *optional*): Where the features' weights are, where they need to be told.
        feature_dtype (`str`): What the features' network computes in, `"float32"` or `"bfloat16"`.
        metrics (`list[str]`): Of `METRICS`.
        num_images (`int`): Images drawn, reconstructed, or taken of a folder.
        num_bootstrap (`int`): Resamples behind the Frechet distance's standard error; 0 for none.
        baselines (`list[str]`): Of `BASELINES`.
        max_neighbours (`int`): At most so many images a side in precision, recall, density and coverage.
        likelihood_images (`int`): Real images that bits/dim are a mean over.
    """

    kind: str = "samples"
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 64
    features: str = "efficientnet-lite0"
    feature_weights: str | None = None
    feature_dtype: str = "float32"
    metrics: list[str] = field(default_factory=lambda: list(METRICS[:7]))
    num_images: int = 10_000
    num_bootstrap: int = 20
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    max_neighbours: int = 10_000
    likelihood_images: int = 256

    def __post_init__(self):
        lists = (
            ("--kind", [self.kind], KINDS),
            ("metric", self.metrics, METRICS),
            ("baseline", self.baselines, BASELINES),
        )
        for kind, given, allowed in lists:
            for name in given:
                if name not in allowed:
                    raise unknown(kind, name, allowed)
        for name, least in (("num_images", 2), ("batch_size", 1), ("max_neighbours", 10), ("likelihood_images", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be {least} or more.")
        if self.num_bootstrap < 0 or self.num_bootstrap == 1:
            raise UserError(f"--num_bootstrap {self.num_bootstrap}: it must be 0, or 2 or more.")


@dataclass
class Report:
    """
    What was measured, of what, and how: enough to measure it again.

    Args:
        protocol (`dict`): The [`Protocol`]'s fields.
        measured_by (`dict`): What the protocol came to: the features' `preprocessing`, the `reference` and the `training`
            set with their fingerprints, and the number of images.
        source (`dict`): What was measured: a pipeline with its weights' fingerprint and scheduler, or a folder.
        figures (`dict`): figure -> `value`, `error` and `error_kind`.
        per_class (`dict`): class -> figure -> the same.
        baselines (`dict`): baseline -> `images`, and `figures` as above.
        warnings (`list[str]`): What a reader of the figures must know.
        versions (`dict`): Of Python and the libraries.
        command (`str`): What was run.
        format (`int`): Of the report.
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
    format: int = REPORT_FORMAT

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """
        The report in a file, or in the folder of a checkpoint.

        Raises:
            [`~tiny_diffusers.errors.UserError`]: where there is none, and for one that this version can't read.
        """
        path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"There is no report '{path}': `tiny-diffusers evaluate` makes one.") from error
        except ValueError as error:
            raise UserError(f"'{path}' is not a report: {error}.") from error
        if not isinstance(content, dict) or content.get("format") != REPORT_FORMAT:
            given = content.get("format") if isinstance(content, dict) else None
            raise UserError(
                f"'{path}' is a report of version {given}, and this is version {REPORT_FORMAT}: evaluate again."
            )
        missing = {"protocol", "measured_by", "source", "figures"} - content.keys()
        if missing or content.keys() - {entry.name for entry in fields(cls)}:
            raise UserError(f"'{path}' is not a report: it lacks {sorted(missing)}, or has what no report has.")
        return cls(**content)

    def save(self, folder: str | Path) -> Path:
        """Writes `report.json` and `report.md`; returns the first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        return path

    def label(self, figure: str) -> str:
        """What a figure is called: FID, KID and Inception Score only with the features that these names stand for."""
        general, with_inception, _ = FIGURES[figure]
        return with_inception if self.protocol["features"] == "inception" else general

    @property
    def images(self) -> str:
        """What was measured, in words: "10,000 images", or "10,000 reconstructions"."""
        return f"{self.measured_by['num_images']:,} {'images' if self.kind == 'samples' else self.kind}"

    @property
    def kind(self) -> str:
        """The protocol's; those of before there was a choice are of samples."""
        return self.protocol.get("kind", "samples")

    def summary(self) -> str:
        """The protocol in one line, for a table's caption."""
        reference, of = self.measured_by["reference"], self.measured_by["features"]
        sampling = ", ".join(f"{name} {value}" for name, value in self.source.get("sampling", {}).items())
        return (
            f"{self.images}{f' ({sampling})' if sampling else ''}, seed "
            f"{self.protocol['seed']}, against {reference['images']:,} of {reference['name']} ({reference['split']}); "
            f"features {self.protocol['features']} in {of['dtype']}, resize: {of['resize']}"
        )

    def markdown(self) -> str:
        """The figures beside the baselines', then per class, then the warnings and the protocol."""
        rows = {self.source.get("name", "model"): self.figures}
        rows |= {BASELINE_NAMES[name]: entry["figures"] for name, entry in self.baselines.items()}
        parts = [f"{self.summary()}.", _table(self, rows, "")]
        kinds = {
            f"{self.label(name)}: {entry['error_kind']}" for name, entry in self.figures.items() if entry["error"]
        }
        if kinds:
            parts.append("After ±: " + "; ".join(sorted(kinds)) + ".")
        if self.per_class:
            parts.append(_table(self, self.per_class, "class"))
        parts += [f"**Note:** {warning}" for warning in self.warnings]
        return "\n\n".join(parts) + "\n"

    def card_results(self) -> list[dict[str, Any]]:
        """The figures as `huggingface_hub.EvalResult` takes them, for a card's `model-index`."""
        reference = self.measured_by["reference"]
        name = reference.get("load", {}).get("dataset_name") or reference["name"]
        return [
            {
                "task_type": "unconditional-image-generation",
                "dataset_type": name,
                "dataset_name": reference["name"],
                "dataset_split": reference["split"],
                "metric_type": figure,
                "metric_name": f"{self.label(figure)} ({self.protocol['features']}, {self.images})",
                "metric_value": round(entry["value"], 6),
                "metric_args": {name: entry[name] for name in ("error", "error_kind") if entry[name] is not None}
                or None,
            }
            for figure, entry in self.figures.items()
        ]


def compare(reports: dict[str, Report]) -> str:
    """
    One Markdown table over several reports, a row each.

    Args:
        reports (`dict[str, Report]`): What to call each, and the report.

    Returns:
        `str`: The table, under one line that states the protocol they share.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: where two were measured differently; it names what differs.
    """
    for (first_name, first), (name, other) in itertools.combinations(reports.items(), 2):
        ignored = {"load", "file", "name"}  # where the same images, and the same weights, were read from
        if not ("nearest_neighbour" in first.figures and "nearest_neighbour" in other.figures):
            ignored.add("training")
        if not ("bits_per_dim" in first.figures and "bits_per_dim" in other.figures):
            ignored |= {"likelihood_images", "likelihood_levels"}
        one, two = ({"kind": report.kind, **report.measured_by} for report in (first, other))
        difference = _difference(one, two, ignored)
        if difference is not None:
            where, a, b = difference
            raise UserError(
                f"'{first_name}' and '{name}' can't stand in one column: their {where} differ, {a} and {b}. Evaluate both by "
                "one protocol (evaluate --from_report)."
            )
    first = next(iter(reports.values()))
    reference, of = first.measured_by["reference"], first.measured_by["features"]
    caption = (
        f"{first.images} against {reference['images']:,} of {reference['name']} "
        f"({reference['split']}); features {first.protocol['features']} in {of['dtype']}."
    )
    rows = {}
    for name, report in reports.items():
        sampling = ", ".join(f"{key} {value}" for key, value in report.source.get("sampling", {}).items())
        rows[f"{name} ({sampling})" if sampling else name] = report.figures
    rows |= {BASELINE_NAMES[name]: entry["figures"] for name, entry in first.baselines.items()}
    return f"{caption}\n\n{_table(first, rows, '')}\n"


def _difference(a: Any, b: Any, ignored: set[str], where: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two protocols differ, and what they say there."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted((a.keys() | b.keys()) - ignored):
            found = _difference(a.get(key), b.get(key), ignored, f"{where} {key}".strip())
            if found is not None:
                return found
        return None
    return None if a == b else (where, a, b)


def _table(report: Report, rows: dict[str, dict[str, dict]], corner: str) -> str:
    columns = [name for name in FIGURES if any(name in figures for figures in rows.values())]
    arrows = {True: " ↓", False: " ↑", None: ""}
    lines = [
        f"| {corner} | " + " | ".join(report.label(name) + arrows[FIGURES[name][2]] for name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, figures in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(figures.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "–"
    value, error = entry["value"], entry["error"]
    if not error:
        return f"{value:.4g}"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)  # two digits of the error, and as many of the value
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
