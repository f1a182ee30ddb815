"""How a study measures a run: what is measured again, what is drawn, and what goes wrong with one sampler only."""

import base64
import errno
import io
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tiny_diffusers import TinyConditionalPipeline, TinyDDIMScheduler, TinyPipeline
from tiny_diffusers.data import load_images
from tiny_diffusers.evaluation import Report, images
from tiny_diffusers.studies import measure as measuring
from tiny_diffusers.studies import study as studies


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def study(plan):
    section = {"num_inference_steps": [2, 3], "features": "pixels", "metrics": ["kernel_distance"], "num_images": 14}
    return plan(study=section | {"baselines": "none"})


@pytest.fixture
def run(study, tiny_unet):
    """A run that is trained, with an untrained network."""
    run = study.runs({})[0]
    TinyPipeline(tiny_unet(), TinyDDIMScheduler(num_train_timesteps=10)).save_pretrained(run.folder.path)
    run.folder.config.write_text(yaml.safe_dump({"dataset_name": "digits", "split": "train"}))
    run.folder.log.write_text(json.dumps({"step": 4, "val_loss": 0.5}) + "\n")
    return run


@pytest.fixture
def evaluated(monkeypatch):
    """Lists the numbers of steps that are evaluated."""
    calls, evaluate = [], measuring.evaluate

    def count(pipe, reference, protocol, **options):
        calls.append(protocol.sampling["num_inference_steps"])
        return evaluate(pipe, reference, protocol, **options)

    monkeypatch.setattr(measuring, "evaluate", count)
    return calls


def decode(samples):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(samples))))


@pytest.mark.slow
def test_a_report_is_kept_for_the_same_weights_only(study, run, evaluated):
    first = measuring.measure(run, study)
    assert [entry["num_inference_steps"] for entry in first["measured"]] == evaluated == [2, 3]
    assert measuring.measure(run, study) == first and evaluated == [2, 3]

    # A damaged report is made again, and after another training all are.
    reports = sorted(run.folder.reports.glob("*/report.json"))
    reports[0].write_text("{")
    assert measuring.measure(run, study) == first and evaluated == [2, 3, 2]
    pipe = TinyPipeline.from_pretrained(run.folder.path)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe.save_pretrained(run.folder.path)
    assert measuring.measure(run, study)["measured"] != first["measured"] and evaluated == [2, 3, 2, 2, 3]


def test_the_row_names_the_real_images_by_their_fingerprints(study, run):
    row = measuring.measure(run, study)
    measured_by = Report.load(next(run.folder.reports.glob("*/report.json"))).measured_by
    assert row["images"] == [measured_by["reference"]["fingerprint"], measured_by["training"]["fingerprint"]]


def test_the_samples_are_the_first_that_were_measured_with_the_last_sampler(study, run, tmp_path):
    row = measuring.measure(run, study)
    key = Report.load(next(run.folder.reports.glob("*3*/report.json"))).source["key"]
    drawn = np.load(tmp_path / "cache" / "samples" / key / "array.npy")
    assert np.array_equal(decode(row["samples"])[1:9, 1:9], drawn[0, 0])
    assert decode(row["samples"]).shape == (10, 12 * 9 + 1)


def test_a_model_with_a_conditioning_image_is_drawn_too(study, run, tiny_unet):
    unet = tiny_unet("none", in_channels=2)
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(num_train_timesteps=10), conditioning="low_resolution:2")
    pipe.save_pretrained(run.folder.path)
    row = measuring.measure(run, study)
    assert all("figures" in entry for entry in row["measured"])
    assert decode(row["samples"]).shape == (10, 12 * 9 + 1)


def test_each_guidance_scale_is_measured_with_each_number_of_steps(plan, tiny_unet):
    study = plan(
        {"guidance_scale": [1.0, 3.0], "num_images": 4, "baselines": [], "metrics": ["kernel_distance"]},
        name="conditional_x.yaml",
    )
    run = study.runs({})[0]
    unet = tiny_unet(num_class_embeds=10)
    names = load_images("digits").id2label
    pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(num_train_timesteps=10), id2label=names)
    pipe.save_pretrained(run.folder.path)
    run.folder.config.write_text(yaml.safe_dump({"dataset_name": "digits", "split": "train"}))
    run.folder.log.write_text(json.dumps({"step": 4, "val_loss": 0.5}) + "\n")
    entries = measuring.measure(run, study)["measured"]
    samplers = [(entry["num_inference_steps"], entry["guidance_scale"]) for entry in entries]
    assert samplers == [(2, 1.0), (2, 3.0), (4, 1.0), (4, 3.0)]
    assert len({entry["figures"]["kernel_distance"]["value"] for entry in entries}) == 4


def test_an_error_with_one_sampler_leaves_the_others(study, run, monkeypatch):
    sample = images.sample

    def fail(pipe, *args, options, **others):
        if options["num_inference_steps"] == 3:
            raise IndexError("out of range")
        return sample(pipe, *args, options=options, **others)

    monkeypatch.setattr(images, "sample", fail)
    row = measuring.measure(run, study)
    assert [entry.get("error") for entry in row["measured"]] == [None, "out of range"]
    assert row["samples"] and "IndexError: out of range" in run.log.read_text()


@pytest.mark.parametrize("error", [IndexError("out of range"), OSError("the Hub is down")])
def test_an_unexpected_error_is_a_row(plan, work, monkeypatch, error):
    def fail(run, study):
        if run.cell == "linear":
            raise error
        return {"measured": []}

    monkeypatch.undo()
    monkeypatch.setattr(studies, "_train", lambda run: None)
    monkeypatch.setattr(measuring, "measure", fail)
    rows = json.loads((studies.run_study(plan({"seeds": [0]})) / "study.json").read_text())["rows"]
    assert [(row["state"], row.get("error")) for row in rows] == [("failed", str(error)), ("measured", None)]


def test_a_full_disk_is_no_fact_about_a_run(plan, monkeypatch):
    def fail(run, study):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(studies, "_train", lambda run: None)
    monkeypatch.setattr(measuring, "measure", fail)
    study = plan({"seeds": [0]})
    with pytest.raises(OSError, match="No space left"):
        studies.run_study(study)
    assert study.runs({})[0].read()["state"] == "trained"
