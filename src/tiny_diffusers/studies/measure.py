"""Measures a trained run with every sampler that a study asks for, each from the same noise."""

import base64
import dataclasses
import io
import itertools
import os
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from .. import TinyPipeline, hardware, plots
from ..errors import UserError, first_line
from ..evaluation import Protocol, Report, evaluate, references
from ..evaluation.evaluator import describe_pipeline, processes
from ..evaluation.report import default_name
from ..flags import as_flags, default_of
from ..paths import keep_paths, public_command
from ..pipelines.pipeline_tiny import image_generators
from ..runs import RunFolder, read_log
from ..samplers import use_scheduler
from .cells import Run, Study


NUM_SAMPLES = 12  # of a run, in the picture of all


def measure(run: Run, study: Study) -> dict[str, Any]:
    """
    Measures a run, and returns its part of `study.json`. A report that is there already is not made again.

    Raises:
        UserError: If the run can't be measured with any sampler.
    """
    state = processes()
    # as `tiny-diffusers evaluate` does
    device = hardware.setup_torch(torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None)
    logging.disable_progress_bar()  # of the loading, which is short
    logging.set_verbosity_error()  # no warnings about keys of our schedulers that another one ignores
    pipe = TinyPipeline.from_pretrained(run.folder.path).to(device, hardware.resolve_dtype("auto", device))
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)

    images = references.choose({}, references.flags_of_run(run.folder, {}))
    channels, _, side = pipe._image_shape
    reference, training, images = references.load_real_images(images, channels, side, state)
    load, paths = references.describe(images)
    notes = references.find_mismatches(run.folder, reference, training)

    measured, reports, samples = [], [], None
    scheduler = getattr(pipe, "scheduler", None)
    for name, steps in samplers(study):
        entry = {"scheduler": name, "num_inference_steps": steps}
        try:
            if scheduler is not None:
                pipe.scheduler = scheduler  # each sampler takes the config of the saved one
            if name is not None:
                use_scheduler(pipe, name, str(run.folder.path))
            protocol = dataclasses.replace(study.protocol, sampling=_sampling(study, steps))
            source = describe_pipeline(pipe, protocol, str(run.folder.path))
            folder = run.folder.reports / f"study-{default_name(protocol, source)}"
            report = _find_report(folder, protocol, source, load)
            if report is None:
                report = evaluate(
                    pipe,
                    reference,
                    protocol,
                    training=training,
                    output_dir=folder,
                    name=str(run.folder.path),
                    load=load,
                    notes=notes,
                    command=_command(run, protocol, name),
                )
                keep_paths(folder, paths)
            samples = draw_samples(pipe, protocol)  # the last sampler's
            reports.append(report)
            entry |= {"sampling": report.sampling, "figures": report.figures}
        except ValueError as error:  # of a scheduler too: such as more steps than it has
            entry["error"] = first_line(error)
        measured.append(entry)
    if not reports:
        raise UserError(measured[0]["error"])
    first = reports[0]
    return {
        **_facts(run.folder),
        "measured": measured,
        "baselines": {name: entry["figures"] for name, entry in first.baselines.items()},
        "against": f"{first.images} {first.against}",
        "warnings": first.warnings,
        "samples": samples,
    }


def samplers(study: Study) -> list[tuple[str | None, int | None]]:
    """Lists the samplers of a study: the name of a scheduler and a number of steps, None for the run's own."""
    return list(itertools.product(study.arguments.schedulers or [None], study.arguments.num_inference_steps or [None]))


def _sampling(study: Study, steps: int | None) -> dict[str, Any]:
    asked = {
        "num_inference_steps": steps,
        "eta": study.arguments.eta,
        "guidance_scale": study.arguments.guidance_scale,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _find_report(folder: Any, protocol: Protocol, source: dict[str, Any], load: dict[str, Any]) -> Report | None:
    if not (folder / "report.json").is_file():
        return None
    report = Report.load(folder / "report.json")
    return report if report.asks_the_same(protocol.describe(), source, load) else None


def _command(run: Run, protocol: Protocol, scheduler: str | None) -> str:
    """Returns the command that makes one of the reports again."""
    fields = [field for field in dataclasses.fields(protocol) if "help" in field.metadata]
    own = {f.name: getattr(protocol, f.name) for f in fields if getattr(protocol, f.name) != default_of(f)}
    flags = as_flags({"scheduler": scheduler, **protocol.sampling, **own})
    return public_command(["tiny-diffusers", "evaluate", str(run.folder.path), *flags])


def draw_samples(pipe: DiffusionPipeline, protocol: Protocol) -> str:
    """Draws a row of images, those that an evaluation by the same seed draws first: a PNG in base64."""
    count, options = min(NUM_SAMPLES, protocol.num_images), dict(protocol.sampling)
    classes = list(getattr(pipe, "_class_ids", []))
    if classes:
        options["class_labels"] = np.resize(classes, count).tolist()
    images = pipe(
        batch_size=count, generator=image_generators(protocol.seed, count), output_type="pt", **options
    ).images
    file = io.BytesIO()
    plots.image_grid(images.float().cpu(), columns=count, scale=1, padding=1).save(file, format="PNG")
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
