"""Measures a trained run with every sampler that a study asks for, each from the same noise."""

import base64
import dataclasses
import io
import itertools
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from .. import TinyPipeline, hardware, plots
from ..data import ImageData
from ..errors import UserError, first_line
from ..evaluation import Protocol, Report, evaluate, references
from ..evaluation.drawing import describe_pipeline, draw_images
from ..evaluation.evaluator import processes
from ..evaluation.images import as_pictures
from ..evaluation.report import default_name
from ..files import is_disk_full
from ..flags import as_flags, default_of
from ..paths import keep_paths, public_command
from ..runs import RunFolder, read_log
from ..samplers import use_scheduler
from .cells import Run, Study
from .results import Sampler
from .settings import SAMPLERS, SAMPLING, protocol_of


NUM_SAMPLES = 12  # of a run, in the picture of all


def measure(run: Run, study: Study) -> dict[str, Any]:
    """
    Measures a run, and returns its part of `study.json`. A report that is there already is not made again.

    Raises:
        UserError: If the run can't be measured with any sampler.
    """
    state = processes()
    device = hardware.setup_torch()
    logging.disable_progress_bar()  # of the loading, which is short
    logging.set_verbosity_error()  # no warnings about keys of our schedulers that another one ignores
    pipe = TinyPipeline.from_pretrained(run.folder.path).to(device, hardware.resolve_dtype("auto", device))
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)

    images = references.choose({}, references.flags_of_run(run.folder, {}))
    conditioning = getattr(pipe, "_conditioning", None)
    conditioning_channels = None if conditioning is None else conditioning.shape[0]
    reference, training, images = references.load_real_images(
        images, pipe._image_shape, state, conditioning_channels, pipe._value_range
    )
    load, paths = references.describe(images)
    notes = references.find_mismatches(run.folder, reference, training)

    measured, reports, last = [], [], None
    scheduler = getattr(pipe, "scheduler", None)
    for sampler in samplers(study):
        entry = sampler._asdict()
        try:
            if scheduler is not None:
                pipe.scheduler = scheduler  # each sampler takes the config of the saved one
            if sampler.scheduler is not None:
                use_scheduler(pipe, sampler.scheduler, str(run.folder.path))
            protocol = protocol_of(run.script, study.protocol)
            protocol = dataclasses.replace(protocol, sampling=_sampling(study, sampler))
            source = describe_pipeline(pipe, protocol, str(run.folder.path))
            folder = run.folder.reports / f"study-{default_name(protocol, source)}"
            report = Report.load_same(folder, protocol.describe(), source, load)
            if report is None or not _is_of(report, source, reference, training):
                report = evaluate(
                    pipe,
                    reference,
                    protocol,
                    training=training,
                    output_dir=folder,
                    name=str(run.folder.path),
                    load=load,
                    notes=notes,
                    command=_command(run, protocol, sampler.scheduler),
                )
                keep_paths(folder, paths)
            reports.append(report)
            last = getattr(pipe, "scheduler", None), protocol
            entry["figures"] = report.figures
        except Exception as error:  # of a scheduler too, such as more steps than it has: the others go on
            if is_disk_full(error):
                raise
            run.log_error()
            entry["error"] = first_line(error)
        measured.append(entry)
    if not reports:
        raise UserError(measured[0]["error"])
    if last[0] is not None:
        pipe.scheduler = last[0]
    samples = draw_samples(pipe, reference, last[1])
    first = reports[0]
    return {
        **_facts(run.folder),
        "measured": measured,
        "baselines": _baselines(reports),
        "against": f"{first.images} {first.against}",
        "images": _fingerprints(first),
        "likelihood_given": first.likelihood_given,
        "likelihood_kind": first.likelihood_kind,
        "warnings": first.warnings,
        "samples": samples,
    }


def samplers(study: Study) -> list[Sampler]:
    """Lists the samplers of a study: each scheduler with each number of steps and each guidance scale."""
    return list(
        itertools.starmap(Sampler, itertools.product(*(getattr(study.arguments, n) or [None] for n in SAMPLERS)))
    )


def _sampling(study: Study, sampler: Sampler) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call."""
    asked = {**sampler._asdict(), **{name: getattr(study.arguments, name) for name in SAMPLING}}
    return {name: value for name, value in asked.items() if value is not None and name != "scheduler"}


def _is_of(report: Report, source: dict[str, Any], reference: ImageData, training: ImageData | None) -> bool:
    """Checks that a report is of these weights and real images: a run may have been trained again."""
    images = [reference.fingerprint, training and training.fingerprint]
    return report.source.get("weights_sha256") == source["weights_sha256"] and _fingerprints(report) == images


def _baselines(reports: list[Report]) -> dict[str, dict[str, Any]]:
    """Returns the figures of each baseline. Those of classes are missing where a sampler has none, at guidance 0."""
    figures: dict[str, dict[str, Any]] = {}
    for report in reversed(reports):
        for name, entry in report.baselines.items():
            figures.setdefault(name, {}).update(entry["figures"])
    return figures


def _fingerprints(report: Report) -> list[str | None]:
    """Returns those of the reference and of the training set: metrics are compared where they agree."""
    return [report.measured_by.get(name, {}).get("fingerprint") for name in ("reference", "training")]


def _command(run: Run, protocol: Protocol, scheduler: str | None) -> str:
    """Returns the command that makes one of the reports again."""
    fields = [field for field in dataclasses.fields(protocol) if "help" in field.metadata]
    own = {f.name: getattr(protocol, f.name) for f in fields if getattr(protocol, f.name) != default_of(f)}
    flags = as_flags({"scheduler": scheduler, **protocol.sampling, **own})
    return public_command(["tiny-diffusers", "evaluate", str(run.folder.path), *flags])


def draw_samples(pipe: DiffusionPipeline, reference: ImageData, protocol: Protocol) -> str:
    """Returns a row of images, those that an evaluation draws first: a PNG in base64."""
    count = min(NUM_SAMPLES, protocol.num_images)
    drawn, _ = draw_images(pipe, reference, dataclasses.replace(protocol, num_images=count), processes())
    file = io.BytesIO()
    plots.image_grid(as_pictures(drawn.images.numpy()), columns=count, scale=1, padding=1).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _facts(folder: RunFolder) -> dict[str, Any]:
    """Returns what a run says of itself: its size, its length, its validation losses."""
    facts, log = folder.read_facts(), read_log(folder.log)
    parameters = facts.get("parameters")
    losses = log.get("val_loss")
    return {
        "parameters": sum(parameters.values()) if isinstance(parameters, dict) else None,
        "seconds": facts.get("seconds"),
        "steps": max((int(steps[-1]) for steps, _ in log.values()), default=None),
        "val_loss": [] if losses is None else [[int(step), value] for step, value in zip(*losses, strict=True)],
    }
