"""What a study asks: the flags of `tiny-diffusers study`, which the section `study:` of a recipe holds by the same names."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import UserError
from ..evaluation.report import FIGURES, METRICS, Protocol
from ..flags import Flags, flag
from ..samplers import check_scheduler_name


Plot = Literal["losses", "steps", "guidance", "parameters", "seconds", "samples"]

PLOTS: tuple[str, ...] = get_args(Plot)
_DIFFUSION = ("unconditional", "conditional", "consistency")
_WITH_OPTIONAL_CLASSES = ("pixelcnn", "vae", "dcgan")
_WITHOUT_LIKELIHOOD = ("dcgan", "autoencoder")
_OF_GUIDANCE = ("guidance_scale", "guidance_interval", "dynamic_thresholding")
SAMPLERS = ("schedulers", "num_inference_steps", "guidance_scale")  # a sampler is one of each
SAMPLING = ("eta", "clip_sample", "guidance_interval", "dynamic_thresholding")  # the same for all samplers


@dataclass(frozen=True)
class StudyArguments(Flags):
    """How the cells of a grid are trained, sampled and shown. How they are measured is the [`Protocol`]."""

    script: str | None = flag(
        None, "Script that the cells are for which name none; the beginning of the recipe's name if not given."
    )
    cells: list[str] | None = flag(None, "Cells of the grid to train; all if not given.")
    seeds: list[int] = flag([0], "Seeds to train each cell with.", within="[0, 9223372036854775807]")
    max_train_minutes: float | None = flag(
        None, "Minutes to train each cell; as the recipe says if not given.", within="(0, inf)"
    )
    budget: float | None = flag(
        None,
        "The same, in narrower networks where 500 steps would take longer; with `--set max_train_steps=N`, each run takes N "
        "steps, in networks of which N steps fit into these minutes.",
        within="(0, inf)",
    )
    num_inference_steps: list[int] | None = flag(
        None, "Numbers of sampling steps to measure with; the pipeline's if not given.", within="[1, inf)"
    )
    schedulers: list[str] | None = flag(
        None, "Samplers to measure with, as in `tiny-diffusers evaluate --scheduler`; the run's own if not given."
    )
    eta: float | None = flag(None, "Fresh noise in each sampling step.", within="[0, inf)")
    clip_sample: bool | None = flag(None, "Clip the predicted image at each step; as saved if not given.")
    guidance_scale: list[float] | None = flag(
        None, "Guidance scales to measure with, for classes; the pipeline's if not given.", within="[0, inf)"
    )
    guidance_interval: list[float] | None = flag(
        None,
        "Share of the steps that are guided: two numbers, from 0 at the noise to 1 at the image.",
        within="[0, 1]",
    )
    dynamic_thresholding: float | None = flag(
        None, "Percentile, such as 0.995, that keeps high guidance from saturating.", within="(0, 1]"
    )
    main_metric: Literal[tuple(FIGURES)] | None = flag(
        None, "Metric that is plotted and names the winner; the first of --metrics if not given."
    )
    plots: list[Plot] = flag(list(PLOTS), f"Pictures to draw, of {', '.join(PLOTS)}.")

    def __post_init__(self):
        super().__post_init__()
        for name in SAMPLERS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, list(dict.fromkeys(getattr(self, name))))  # the dataclass is frozen
        if self.max_train_minutes is not None and self.budget is not None:
            raise UserError(
                f"--max_train_minutes {self.max_train_minutes:g} --budget {self.budget:g}: both are the minutes of a cell, so "
                "give one of them."
            )
        if self.guidance_interval is not None and len(self.guidance_interval) != 2:
            raise UserError(
                f"--guidance_interval {self.guidance_interval}: it must be two numbers, its start and its end."
            )


def choose_main_metric(arguments: StudyArguments, protocol: Protocol) -> str:
    """
    Returns the figure that is plotted and names the winner.

    Raises:
        UserError: If the protocol does not measure it, or cannot say which figure comes first.
    """
    figures = protocol.figures
    if arguments.main_metric not in (None, *figures):
        raise UserError(
            f"--main_metric {arguments.main_metric} is not measured: add it to --metrics, or choose from {', '.join(figures)}."
        )
    if arguments.main_metric is None and figures[0] == "condition_correlation":
        raise UserError(
            "--metrics begins with condition_agreement: give --main_metric condition_correlation, if a condition is a "
            "number, or condition_agreement, if one is a label."
        )
    return arguments.main_metric or figures[0]


def protocol_of(script: str, protocol: Protocol) -> Protocol:
    """Returns what is measured of the models of a script where those of others are measured as well: what they have."""
    asks_for_all = set(protocol.metrics) == set(METRICS)  # of which reports leave out what there is not
    if script not in _WITHOUT_LIKELIHOOD or asks_for_all:
        return protocol
    return dataclasses.replace(protocol, metrics=[name for name in protocol.metrics if name != "bits_per_dim"])


def check_family(script: str, arguments: StudyArguments, protocol: Protocol, main_metric: str) -> None:
    """
    Checks that the models of a script can be sampled and measured so.

    Raises:
        UserError: If a sampler's option or a metric means nothing to them.
    """
    for name in (*SAMPLERS, *SAMPLING):
        known = ("conditional", "consistency") if name in _OF_GUIDANCE else _DIFFUSION
        if getattr(arguments, name) is not None and script not in known:
            raise UserError(f"--{name} means nothing to the models of train_{script}.py: leave it out.")
    for name in arguments.schedulers or []:
        check_scheduler_name(name)
    if protocol.kind == "reconstructions" and script not in ("vae", "autoencoder"):
        raise UserError(
            f"--kind reconstructions: the models of train_{script}.py reconstruct nothing, only a VAE does."
        )
    if script in _WITHOUT_LIKELIHOOD:
        protocol.leave_out("bits_per_dim", f"the models of train_{script}.py have no likelihood")
        if main_metric == "bits_per_dim":
            raise UserError(
                f"The metric bits_per_dim: the models of train_{script}.py have no likelihood: give another --main_metric."
            )
    if script in ("unconditional", "autoencoder"):
        protocol.leave_out("condition_agreement", f"the models of train_{script}.py take no conditions")
    if main_metric == "inception_score" and protocol.features != "inception":
        raise UserError(f"The metric inception_score: the features of {protocol.features} have no classifier.")
    if main_metric == "class_agreement" and script in ("unconditional", "autoencoder"):
        raise UserError(f"The metric class_agreement: the models of train_{script}.py have no classes.")


def check_conditions(
    script: str, settings: Mapping[str, Any], protocol: Protocol, main_metric: str, model: str = "the model"
) -> None:
    """
    Checks that a model which is trained with these settings has the classes and conditions that are measured.

    Raises:
        UserError: If it has not. `model` names it there.
    """
    if settings.get("condition_columns") is None:
        protocol.leave_out("condition_agreement", f"{model} has no condition_columns")
    if main_metric != "class_agreement":
        return
    if script in _WITH_OPTIONAL_CLASSES and not settings.get("class_conditional"):
        raise UserError(f"The metric class_agreement: {model} has no classes; train it with class_conditional.")
    if settings.get("label_column") == "none":
        raise UserError(f"The metric class_agreement: {model} has no classes, as its label_column is none.")
