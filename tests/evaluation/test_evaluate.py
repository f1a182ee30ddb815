import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from torch import nn

from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDCGANGenerator,
    TinyDCGANPipeline,
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyPipeline,
    TinyVAEModel,
    TinyVAEPipeline,
    cards,
    cli,
)
from tiny_diffusers.commands import shared
from tiny_diffusers.data import ImageData, load_images, loading
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import (
    BASELINES,
    METRICS,
    Protocol,
    Report,
    compare,
    evaluate,
    features,
    images,
    metrics,
)
from tiny_diffusers.evaluation.evaluator import processes
from tiny_diffusers.evaluation.references import is_same_dataset
from tiny_diffusers.evaluation.report import format_figure
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.flags import FlagParser
from tiny_diffusers.paths import keep_paths
from tiny_diffusers.runs import RunFolder
from tiny_diffusers.training.arguments import saved_settings, split_paths


FAST = {
    "features": "pixels",
    "num_images": 24,
    "num_jackknife": 4,
    "batch_size": 8,
    "sampling": {"num_inference_steps": 2},
}
NO_BASELINES = {**FAST, "baselines": []}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def pipeline(tiny_unet):
    def build(steps=10):
        pipe = TinyPipeline(tiny_unet("none"), TinyDDIMScheduler(num_train_timesteps=steps))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def image_data(count=60, seed=0, labels=True, name="blobs"):
    """Returns images of two classes: the left half is bright, or the right one."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 2
    pixels = rng.normal(60, 25, (count, 1, 8, 8))
    for i, label in enumerate(classes):
        pixels[i, :, :, 4 * label : 4 * label + 4] += 120
    pixels = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    return ImageData(
        pixels,
        torch.from_numpy(classes) if labels else None,
        {0: "left", 1: "right"} if labels else None,
        name,
        "test",
        images.fingerprint(pixels.numpy()),
    )


def vae(reconstruction="logistic", **options):
    torch.manual_seed(0)
    pipe = TinyVAEPipeline(TinyVAEModel(8, 1, 4, (8,), reconstruction=reconstruction, **options).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def values(report):
    return {name: entry["value"] for name, entry in report.figures.items()}


class TestProtocol:
    def test_every_field_but_the_sampling_is_a_flag(self):
        assert [field.name for field in dataclasses.fields(Protocol) if "help" not in field.metadata] == ["sampling"]
        line = "--kind reconstructions --metrics diversity,bits_per_dim --baselines real noise --max_neighbors 99"
        given = FlagParser(Protocol).given(line.split())
        protocol = Protocol(**given)
        assert (protocol.kind, protocol.max_neighbors) == ("reconstructions", 99)
        assert protocol.metrics == ["diversity", "bits_per_dim"] and protocol.baselines == ["real", "noise"]
        for line in ("--kind sampels", "--metrics fid", "--baselines nois", "--feature_dtype float16"):
            flag = line.split()[0]
            with pytest.raises(UserError, match=f"Unknown {flag}"):
                FlagParser(Protocol).given(line.split())

    def test_all_and_none_stand_for_lists_of_names(self):
        assert Protocol(metrics=["all"]) == Protocol(metrics=list(METRICS))
        assert Protocol(baselines=["none"]) == Protocol(baselines=[])
        assert FlagParser(Protocol).given(["--metrics", "all", "--baselines", "none"])
        assert Protocol(**asdict(Protocol(metrics=["all"], baselines=["none"]))) == Protocol(
            metrics=list(METRICS), baselines=[]
        )

    def test_the_slow_metrics_are_not_measured_by_default(self):
        slow = {"nearest_neighbor", "bits_per_dim", "classifier_score", "feature_distance", "condition_agreement"}
        assert set(METRICS) - set(Protocol().metrics) == slow
        assert Protocol().baselines == list(BASELINES)

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Protocol().num_images = 3

    def test_importing_it_does_not_import_torch(self):
        code = "import sys, tiny_diffusers.evaluation; assert not {'torch', 'diffusers'} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestReport:
    def test_has_the_metrics_with_their_protocol_and_the_baselines(self, tmp_path, pipeline):
        report = evaluate(pipeline(), image_data(), Protocol(**FAST), training=image_data(seed=1), output_dir=tmp_path)
        assert set(report.figures) == {
            *("frechet_distance", "frechet_infinity", "kernel_distance", "precision", "recall", "density", "coverage"),
            "diversity",
        }
        assert set(report.baselines) == {"real", "blurred", "pixel_gaussian", "noise"}
        distances = {kind: entry["figures"]["frechet_distance"]["value"] for kind, entry in report.baselines.items()}
        assert distances["real"] < distances["pixel_gaussian"] < distances["noise"]
        kind = "standard error over images, with the reference held fixed: jackknife of 4 groups"
        for figure in ("frechet_distance", "frechet_infinity"):
            assert report.figures[figure]["error_kind"] == kind and report.figures[figure]["error"] > 0
        assert report.measured_by["features"]["input"] == "x / 255"
        assert report.source["sampling"] == {"num_inference_steps": 2, "eta": 1.0}
        assert any("fewer than" in warning for warning in report.warnings)
        assert Report.load(tmp_path) == report
        assert "FID" not in report.markdown() and "uniform noise" in (tmp_path / "report.md").read_text()
        with Image.open(tmp_path / "report.png") as picture:
            assert picture.width > 100

    def test_notes_and_rows_are_of_the_measured_metrics_alone(self):
        real = image_data(labels=False)
        copies = evaluate(real, real, Protocol(**FAST | {"metrics": ["nearest_neighbor"]}), training=real)
        text = copies.markdown()
        assert "Median distance" in text and "training split" in text
        assert "Frechet" not in text and "uniform noise" not in text and "Real against real" not in text

    def test_fid_is_reserved_for_the_features_of_inception(self):
        report = evaluate(image_data(seed=1), image_data(), Protocol(**NO_BASELINES))
        assert report.label("frechet_distance") == "Frechet distance"
        report.protocol["features"] = "inception"
        assert (report.label("frechet_distance"), report.label("kernel_distance")) == ("FID", "KID")

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            (127.04, 1.06, "127.0 ± 1.1"),
            (0.171756, 8.2e-5, "0.171756 ± 0.000082"),
            (1.0, 3e-9, "1"),
            (2.5, None, "2.5"),
        ],
    )
    def test_a_figure_has_two_digits_of_its_error(self, value, error, text):
        assert format_figure({"value": value, "error": error}) == text

    def test_the_same_protocol_gives_the_same_metrics(self, pipeline):
        one, two = (evaluate(pipeline(), image_data(), Protocol(**NO_BASELINES)) for _ in range(2))
        assert values(one) == values(two)

    def test_each_reference_is_factored_once(self, monkeypatch):
        factored = []

        class Counting(metrics.FrechetReference):
            def __init__(self, reference):
                factored.append(len(reference))
                super().__init__(reference)

        monkeypatch.setattr(metrics, "FrechetReference", Counting)
        evaluate(image_data(seed=1), image_data(), Protocol(**{**FAST, "num_images": 60}))
        assert sorted(factored) == [30, 30, 30, 60]  # one half, two classes, and the whole reference

    def test_without_a_training_set_real_against_real_is_between_halves(self):
        report = evaluate(image_data(seed=1), image_data(), Protocol(**{**FAST, "baselines": ["real"]}))
        assert report.baselines["real"]["images"] == 30
        assert any("half" in warning for warning in report.warnings)


class TestImages:
    def test_image_i_is_the_pipelines_own_with_seed_plus_i(self, tmp_path, pipeline):
        evaluate(pipeline(), image_data(), Protocol(**NO_BASELINES, seed=5), output_dir=tmp_path)
        (path,) = (tmp_path / "cache" / "samples").glob("*/array.npy")
        drawn = np.load(path)
        for i in (0, 7, 23):
            generator = torch.Generator().manual_seed(5 + i)
            (expected,) = pipeline()(generator=generator, num_inference_steps=2).images
            np.testing.assert_allclose(drawn[i, 0], np.asarray(expected), atol=1)

    def test_a_stopped_run_resumes(self, tmp_path, pipeline):
        whole = evaluate(pipeline(), image_data(), Protocol(**NO_BASELINES), output_dir=tmp_path / "whole")
        pipe, calls = pipeline(), []
        draw = TinyPipeline.__call__

        class Stopping(TinyPipeline):
            def __call__(self, **kwargs):
                calls.append(kwargs["batch_size"])
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return draw(self, **kwargs)

        pipe.__class__ = Stopping
        Stopping.__name__ = "TinyPipeline"
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(KeyboardInterrupt):
            evaluate(pipe, image_data(), Protocol(**NO_BASELINES), output_dir=tmp_path / "stopped")
        report = evaluate(pipe, image_data(), Protocol(**NO_BASELINES), output_dir=tmp_path / "stopped")
        assert calls == [8, 8, 8, 8]  # a complete batch, the stopped one, and the remaining two
        assert values(report) == values(whole)

    def test_a_stopped_run_resumes_with_another_batch_size(self, tmp_path, pipeline, monkeypatch):
        def drawn():
            (path,) = (tmp_path / "cache" / "samples").glob("*/array.npy")
            return np.load(path)

        whole = evaluate(pipeline(), image_data(), Protocol(**NO_BASELINES))
        expected = drawn()
        shutil.rmtree(tmp_path / "cache")
        draw, calls = TinyPipeline.__call__, []

        def stopping(self, **kwargs):
            calls.append(kwargs["batch_size"])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return draw(self, **kwargs)

        monkeypatch.setattr(TinyPipeline, "__call__", functools.wraps(draw)(stopping))
        with pytest.raises(KeyboardInterrupt):
            evaluate(pipeline(), image_data(), Protocol(**NO_BASELINES))
        report = evaluate(pipeline(), image_data(), Protocol(**{**NO_BASELINES, "batch_size": 5}))
        assert calls == [8, 8, 5, 5, 5, 4]  # images 5 to 24, as those from 8 on are missing
        np.testing.assert_allclose(drawn(), expected, atol=1)
        assert values(report) == pytest.approx(values(whole), rel=0.01)

    def test_bits_per_dim_do_not_depend_on_the_batch_size(self, tmp_path, pipeline):
        options = {**NO_BASELINES, "metrics": ["bits_per_dim"], "likelihood_images": 8}
        found = []
        for batch_size in (8, 3):
            protocol = Protocol(**{**options, "batch_size": batch_size})
            found.append(values(evaluate(pipeline(steps=3), image_data(), protocol))["bits_per_dim"])
            shutil.rmtree(tmp_path / "cache")
        assert found[0] == pytest.approx(found[1], rel=1e-5)

    def test_two_evaluations_at_once_share_the_work(self, tmp_path):
        started, computed = threading.Barrier(2), []

        def compute(start, stop):
            computed.append(start)
            return np.arange(start, stop)

        def fill():
            started.wait()
            arguments = {"batch_size": 2, "state": processes(), "desc": "numbers"}
            return images.fill(tmp_path / "cache" / "entry", (6,), np.int64, compute, **arguments)

        with ThreadPoolExecutor(2) as pool:
            one, two = (pool.submit(fill) for _ in range(2))
            assert one.result().tolist() == two.result().tolist() == list(range(6))
        assert computed == [0, 2, 4]

    def test_what_the_cache_holds_is_checked(self, tmp_path, pipeline):
        report = evaluate(pipeline(), image_data(), Protocol(**NO_BASELINES))
        for path in (tmp_path / "cache").rglob("array.npy"):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
        assert values(evaluate(pipeline(), image_data(), Protocol(**NO_BASELINES))) == values(report)

    def test_nothing_is_read_from_the_folder_of_the_checkpoint(self, tmp_path, pipeline):
        pipe, folder = pipeline(), tmp_path / "model"
        pipe.save_pretrained(folder)
        expected = values(evaluate(TinyPipeline.from_pretrained(folder), image_data(), Protocol(**NO_BASELINES)))
        for cached in ("samples", "features"):
            shutil.copytree(tmp_path / "cache" / cached, folder / ".evaluation" / cached)
        for path in (folder / ".evaluation").rglob("array.npy"):
            array = np.load(path)
            np.save(path, np.zeros_like(array))
        shutil.rmtree(tmp_path / "cache")
        pipe = TinyPipeline.from_pretrained(folder)
        assert values(evaluate(pipe, image_data(), Protocol(**NO_BASELINES), output_dir=folder)) == expected

    def test_images_are_kept_by_what_decides_them(self, tmp_path, pipeline, monkeypatch):
        def kept():
            return len(list((tmp_path / "cache" / "samples").iterdir()))

        def measure(pipe, **options):
            return evaluate(pipe, image_data(), Protocol(**{**NO_BASELINES, "metrics": ["diversity"], **options}))

        pipeline().save_pretrained(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        for name in ("model", "./model/", tmp_path / "model"):
            report = measure(TinyPipeline.from_pretrained(name))
            assert report.source["name"] == "model"
        measure(TinyPipeline.from_pretrained("model"), batch_size=5)
        entries = kept()
        pipe = TinyPipeline.from_pretrained("model")
        for i, change in enumerate(({"seed": 1}, {"num_images": 9}, {"sampling": {"num_inference_steps": 3}})):
            measure(pipe, **change)
            assert kept() == (i + 2) * entries
        pipe.unet.register_to_config(norm_eps=0.1)
        measure(pipe)
        assert kept() == 5 * entries

    def test_the_order_of_images_never_matters(self):
        judged, real = image_data(seed=1), image_data()
        report = evaluate(judged, real, Protocol(**NO_BASELINES))
        for data in (judged, real):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
            data.images, data.labels = data.images[order], data.labels[order]
        assert values(evaluate(judged, real, Protocol(**NO_BASELINES))) == values(report)

    def test_swapping_the_sets_keeps_the_symmetric_metrics(self):
        one, two = image_data(seed=1), image_data(seed=2)
        protocol = Protocol(**{**NO_BASELINES, "num_images": 60})
        a, b = values(evaluate(one, two, protocol)), values(evaluate(two, one, protocol))
        assert a["frechet_distance"] == pytest.approx(b["frechet_distance"], rel=1e-6)
        assert (a["precision"], a["recall"]) == pytest.approx((b["recall"], b["precision"]))

    def test_distances_grow_with_noise_with_blur_and_with_missing_modes(self, monkeypatch):
        real, judged = image_data(200), image_data(200, seed=1)
        rng = np.random.default_rng(0)

        def distances(pixels):
            protocol = Protocol(**{**NO_BASELINES, "num_images": len(pixels), "num_jackknife": 0})
            found = values(evaluate(pixels, real, protocol))
            return found["frechet_distance"], found["kernel_distance"]

        pixels = judged.images.numpy()
        noises = [
            distances((pixels + rng.normal(0, s, pixels.shape)).clip(0, 255).astype(np.uint8)) for s in (0, 120, 250)
        ]
        blurs = []
        for sigma in (0.5, 2, 4):
            monkeypatch.setattr(images, "BLUR_SIGMA", sigma)
            blurs.append(distances(images.blurred(pixels, np.arange(200))(0, 200)))
        modes = [distances(pixels[:100]), distances(pixels[0:200:2])]
        for series in (noises, blurs, modes):
            assert (np.diff(np.array(series), axis=0) > 0).all()


class TestMeasures:
    def test_each_class_is_measured_on_its_own(self, tiny_unet):
        pipe = TinyConditionalPipeline(
            tiny_unet("none", num_class_embeds=2),
            TinyDDIMScheduler(num_train_timesteps=10),
            id2label={0: "left", 1: "right"},
        )
        report = evaluate(pipe, image_data(), Protocol(**FAST), training=image_data(seed=1))
        assert set(report.per_class) == {"left", "right"}
        assert 0 <= report.figures["class_agreement"]["value"] <= 1
        assert report.baselines["real"]["figures"]["class_agreement"]["value"] == 1  # an easy task
        assert "left" in report.markdown()

    def test_real_images_agree_with_their_classes_and_are_as_diverse(self):
        report = evaluate(image_data(seed=1), image_data(seed=2), Protocol(**FAST))
        assert values(report)["class_agreement"] == 1
        assert values(report)["diversity"] == pytest.approx(1, abs=0.1)

    def test_classes_of_a_folder_are_found_by_name(self):
        judged, reference = image_data(seed=1), image_data(seed=2)
        judged.labels, judged.id2label = 1 - judged.labels, {0: "right", 1: "left"}
        assert values(evaluate(judged, reference, Protocol(**NO_BASELINES)))["class_agreement"] == 1
        judged.id2label = {0: "cat", 1: "dog"}
        assert "class_agreement" not in evaluate(judged, reference, Protocol(**NO_BASELINES)).figures

    def test_other_classes_than_the_references_are_refused(self, tiny_unet):
        pipe = TinyConditionalPipeline(
            tiny_unet("none", num_class_embeds=2),
            TinyDDIMScheduler(num_train_timesteps=10),
            id2label={0: "cat", 1: "dog"},
        )
        with pytest.raises(UserError, match="classes"):
            evaluate(pipe, image_data(), Protocol(**NO_BASELINES))

    def test_copies_of_the_training_set_are_seen(self, tmp_path):
        training, reference = image_data(100, seed=1), image_data(100, seed=2)
        protocol = Protocol(**{**FAST, "metrics": ["nearest_neighbor"], "baselines": ["real"]})
        copies = evaluate(training.images[:30], reference, protocol, training=training, output_dir=tmp_path)
        fresh = evaluate(image_data(30, seed=3), reference, protocol, training=training)
        assert values(copies) == {"nearest_neighbor": 0, "near_copies": 1}
        assert values(fresh)["near_copies"] < 0.2
        assert copies.baselines["real"]["figures"]["nearest_neighbor"]["value"] > 0
        assert (tmp_path / "report.png").is_file()

    def test_bits_per_dim_are_the_schedulers_bound(self, pipeline):
        pipe, reference = pipeline(steps=5), image_data()
        protocol = Protocol(**{**NO_BASELINES, "metrics": ["bits_per_dim"], "likelihood_images": 8})
        report = evaluate(pipe, reference, protocol)
        order = images.order_of(reference.images.numpy())[:8]
        sample = reference.images[order.copy()].float() / 127.5 - 1
        generator = [torch.Generator().manual_seed(i) for i in range(8)]
        expected = pipe.scheduler.variational_bound(pipe.unet, sample, generator=generator).total.mean().item()
        assert values(report) == {"bits_per_dim": pytest.approx(expected, rel=1e-4)}
        assert "bound" in report.source["likelihood"] and "256 levels" in report.markdown()
        assert report.measured_by["likelihood_levels"] == 256

    @pytest.mark.parametrize("scheduler", [TinyFlowMatchScheduler, TinyEDMScheduler])
    def test_bits_per_dim_of_flow_and_edm_are_an_estimate_by_the_ode(self, tiny_unet, scheduler):
        pipe = TinyPipeline(tiny_unet("none"), scheduler())
        pipe.scheduler.ode_likelihood = functools.partial(pipe.scheduler.ode_likelihood, num_steps=2)
        reference = image_data()
        protocol = Protocol(**{**NO_BASELINES, "metrics": ["bits_per_dim"], "likelihood_images": 2})
        report = evaluate(pipe, reference, protocol)
        order = images.order_of(reference.images.numpy())[:2]
        sample = reference.images[order.copy()].float() / 127.5 - 1
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        expected = pipe.scheduler.ode_likelihood(pipe.unet, sample, generator=generator).total.mean().item()
        assert values(report) == {"bits_per_dim": pytest.approx(expected, rel=1e-4)}
        assert "an estimate, exact trace, 25 Runge-Kutta steps" in report.source["likelihood"]

    def test_a_pipelines_own_likelihood_takes_precedence_over_the_schedulers(self, pipeline):
        pipe = pipeline()
        pipe.bits_per_dim = lambda images, class_labels=None, generator=None: torch.full((len(images),), 2.5)
        report = evaluate(pipe, image_data(), Protocol(**{**NO_BASELINES, "metrics": ["bits_per_dim"]}))
        assert values(report) == {"bits_per_dim": 2.5}

    def test_a_missing_likelihood_is_reported_before_an_image_is_drawn(self, pipeline, monkeypatch):
        gan = TinyDCGANPipeline(TinyDCGANGenerator(8, 1, 4, (8,)).eval())
        solver = pipeline()
        solver.scheduler = EulerDiscreteScheduler()
        drawn, sample = [], images.sample
        monkeypatch.setattr(images, "sample", lambda *args, **kwargs: drawn.append(1) or sample(*args, **kwargs))
        by_name = Protocol(**{**NO_BASELINES, "metrics": ["bits_per_dim"]})
        for pipe, why in ((gan, "a TinyDCGANPipeline has no"), (solver, "EulerD.*TinyDDIM"), (vae("mse"), "'mse'")):
            with pytest.raises(UserError, match=f"Leave out the metric bits_per_dim: .*{why}") as refusal:
                evaluate(pipe, image_data(), by_name)
            assert "\n" not in str(refusal.value)
        assert not drawn
        report = evaluate(gan, image_data(), Protocol(**{**NO_BASELINES, "sampling": {}, "metrics": list(METRICS)}))
        assert "bits_per_dim" not in report.figures and "precision" in report.figures
        assert "Bits/dim were not measured: a TinyDCGANPipeline has no likelihood." in report.warnings

    def test_reconstructions_are_of_the_first_of_the_reference(self, tmp_path, pipeline):
        pipe, reference = vae(), image_data()
        protocol = Protocol(**{**NO_BASELINES, "sampling": {}, "kind": "reconstructions"})
        report = evaluate(pipe, reference, protocol, output_dir=tmp_path)
        (path,) = (tmp_path / "cache" / "samples").glob("*/array.npy")
        first = reference.images[images.order_of(reference.images.numpy())[:24].copy()]
        expected = pipe.reconstruct(first / 255, output_type="np").images[..., 0]
        np.testing.assert_allclose(np.load(path)[:, 0], 255 * expected, atol=1)
        assert report.protocol["kind"] == "reconstructions"
        assert report.markdown().startswith("24 reconstructions, seed 0")
        assert "nothing about samples" in report.markdown()

        every = evaluate(
            pipe, reference, Protocol(**{**NO_BASELINES, "sampling": {}, "kind": "reconstructions", "num_images": 99})
        )
        assert every.measured_by["num_images"] == 60
        assert any("99 images were requested" in line for line in every.warnings)
        for given, what in ((pipeline(), "a TinyPipeline has none"), (reference, "images were given")):
            with pytest.raises(UserError, match=f"Reconstructions need .*: {what}"):
                evaluate(given, reference, protocol)
        with pytest.raises(UserError, match="Did you mean 'reconstructions'"):
            Protocol(kind="reconstruction")

    def test_every_metric_runs_together(self, pipeline):
        protocol = Protocol(**{**FAST, "metrics": list(METRICS), "likelihood_images": 4})
        report = evaluate(pipeline(steps=3), image_data(), protocol, training=image_data(seed=1))
        assert {"bits_per_dim", "nearest_neighbor", "near_copies"} <= set(report.figures)
        assert any("classifier" in warning for warning in report.warnings)  # pixels have none


class TestCompare:
    def test_makes_one_table(self):
        reports = {
            name: evaluate(image_data(seed=s), image_data(), Protocol(**FAST)) for s, name in ((1, "A"), (2, "B"))
        }
        table = compare(reports)
        assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:4] == ["A", "B"]

    @pytest.mark.parametrize("change", [{"num_images": 20}, {"reference": 3}])
    def test_refuses_different_protocols(self, change):
        reference = image_data(seed=change.pop("reference", 0))
        one = evaluate(image_data(seed=1), image_data(), Protocol(**NO_BASELINES))
        other = evaluate(image_data(seed=1), reference, Protocol(**{**NO_BASELINES, **change}))
        with pytest.raises(UserError, match="differ"):
            compare({"A": one, "B": other})

    def test_refuses_reconstructions_beside_samples_and_bits_of_other_levels(self):
        options = {
            **NO_BASELINES,
            "sampling": {},
            "likelihood_images": 4,
            "metrics": ["kernel_distance", "bits_per_dim"],
        }
        samples, binary = (evaluate(vae(num_levels=n), image_data(), Protocol(**options)) for n in (256, 2))
        with pytest.raises(UserError, match="likelihood_levels differ, 256 and 2"):
            compare({"A": samples, "B": binary})
        again = evaluate(vae(), image_data(), Protocol(**{**options, "kind": "reconstructions"}))
        with pytest.raises(UserError, match="kind differ, samples and reconstructions"):
            compare({"A": samples, "B": again})
        assert "24 reconstructions against" in compare({"A": again})

        gan = evaluate(image_data(seed=1), image_data(), Protocol(**{**options, "metrics": ["kernel_distance"]}))
        assert "Bits/dim" in compare({"A": samples, "GAN": gan})
        with pytest.raises(UserError, match="'A' and 'B'.*likelihood_levels"):
            compare({"GAN": gan, "A": samples, "B": binary})

    def test_says_that_bits_given_a_class_are_no_ranking_beside_those_without(self):
        protocol = Protocol(**{**NO_BASELINES, "sampling": {}, "likelihood_images": 4, "metrics": ["bits_per_dim"]})
        given, plain = (evaluate(vae(num_class_embeds=classes), image_data(), protocol) for classes in (2, None))
        assert given.measured_by["likelihood_given"] == ["class"] and "levels, given class." in given.markdown()
        assert "likelihood_given" not in plain.measured_by
        note = "Bits/dim are no ranking here, as what is given of each image differs: A class; B nothing."
        assert note in compare({"A": given, "B": plain})
        assert "no ranking" not in compare({"A": given, "B": given})


class TestBadInput:
    @pytest.mark.parametrize(
        ("given", "line"),
        [
            (torch.zeros(9, 3, 8, 8, dtype=torch.uint8), "8x8 color and the reference's are 8x8 gray"),
            (torch.zeros(9, 1, 6, 6, dtype=torch.uint8), "6x6 gray"),
            (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "at least two"),
            (torch.zeros(9, 1, 8, 8, dtype=torch.uint8), "identical"),
            (torch.full((9, 1, 8, 8), float("nan")), "NaN"),
            (torch.full((9, 1, 8, 8), 7.0), "floats in"),
            (torch.zeros(9, 8, 8), "shape"),
        ],
    )
    def test_images_that_no_metric_is_defined_for(self, given, line):
        with pytest.raises(UserError, match=line) as refusal:
            evaluate(given, image_data(), Protocol(**NO_BASELINES))
        assert "\n" not in str(refusal.value)

    def test_pil_images_and_bfloat16_tensors_are_images(self):
        reference = image_data()
        given = image_data(seed=1).images
        expected = values(evaluate(given, reference, Protocol(**NO_BASELINES)))
        pictures = [Image.fromarray(image) for image in given[:, 0].numpy()]
        assert values(evaluate(pictures, reference, Protocol(**NO_BASELINES))) == expected
        assert values(evaluate(pictures, image_data().images.bfloat16() / 255, Protocol(**NO_BASELINES)))
        halves = evaluate((given / 255).bfloat16(), reference, Protocol(**NO_BASELINES))
        assert values(halves)["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=0.1)
        for images_of, line in (
            ([], "sizes"),
            (pictures + [pictures[0].resize((4, 4))], "one size"),
            ([1], "type int"),
            (iter(pictures), "not a list_iterator: give a tensor"),
        ):
            with pytest.raises(UserError, match=line):
                evaluate(images_of, reference, Protocol(**NO_BASELINES))

    def test_names_that_are_not_known(self):
        with pytest.raises(UserError, match="Did you mean 'frechet_distance'"):
            Protocol(metrics=["frechet_distanse"])
        with pytest.raises(UserError, match="Unknown baseline 'nois'.*Did you mean 'noise'"):
            Protocol(baselines=["nois"])
        with pytest.raises(UserError, match="Unknown feature dtype 'float16'"):
            Protocol(feature_dtype="float16")

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"num_images": 1}, "num_images 1: it must be in .2, 10000000."),
            ({"batch_size": 0}, "batch_size 0: it must be a whole number of at least 1"),
            ({"max_neighbors": 9}, "max_neighbors 9: it must be a whole number of at least 10"),
            ({"likelihood_images": 0}, "likelihood_images 0: it must be a whole number of at least 1"),
            ({"num_jackknife": 3}, "num_jackknife 3: it must be 0, or 4 or more"),
        ],
    )
    def test_numbers_out_of_range(self, options, line):
        with pytest.raises(UserError, match=line):
            Protocol(**options)

    def test_folders(self, tmp_path):
        rng = np.random.default_rng(0)

        def folder(name, *sizes, mode="L"):
            path = tmp_path / name
            path.mkdir()
            for i, size in enumerate(sizes):
                shape = (size, size) if mode == "L" else (size, size, 3)
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path / f"{i}.png")
            return path

        with pytest.raises(UserError):
            images.read_folder(folder("empty"))
        with pytest.raises(UserError, match=f"no folder '{tmp_path / 'nowhere'}'") as refusal:
            images.read_folder(tmp_path / "nowhere")
        assert "--" not in str(refusal.value)
        with pytest.raises(UserError, match="differ in size"):
            images.read_folder(folder("sizes", 8, 6))
        mixed = folder("mixed", 8, 8)
        Image.new("RGB", (8, 8), "red").save(mixed / "red.png")
        with pytest.raises(UserError, match="mixes gray and color"):
            images.read_folder(mixed)
        broken = folder("broken", *[8] * 120)
        (broken / "77.png").write_bytes(b"no image")
        with pytest.raises(UserError, match="77.png"):
            images.read_folder(broken)
        assert len(images.read_folder(folder("good", 8, 8, 8))) == 3

    def test_reports(self, tmp_path):
        with pytest.raises(
            UserError, match=f"There is no report at '{tmp_path}': `tiny-diffusers evaluate` writes one"
        ):
            Report.load(tmp_path)
        path = tmp_path / "report.json"
        for content, line in (
            ("{", "not a report"),
            ('{"format": 99}', "version 99"),
            ("[]", "version None"),
            ('{"format": 1, "protocol": {}, "extra": 0}', r"lacks .*'figures'.* unknown keys \['extra'\]"),
        ):
            path.write_text(content)
            with pytest.raises(UserError, match=line):
                Report.load(path)

    def test_a_report_is_checked_before_it_is_used(self, tmp_path):
        report = evaluate(image_data(seed=1), image_data(), Protocol(**{**FAST, "baselines": ["noise"]}))
        path = report.save(tmp_path)
        content = json.loads(path.read_text())
        Report.load(path)
        changes = [(key,) for key in content if key != "format"]
        changes += [("protocol", "features"), ("protocol", "seed"), ("protocol", "kind"), ("protocol", "sampling")]
        changes += [("measured_by", key) for key in ("num_images", "features", "reference")]
        changes += [("measured_by", "reference", key) for key in ("name", "split", "images", "fingerprint", "load")]
        changes += [("measured_by", "features", key) for key in ("dtype", "resize")]
        changes += [("source", "kind"), ("source", "name"), ("source", "scheduler"), ("source", "sampling")]
        changes += [("figures", "recall", "value"), ("figures", "recall"), ("figures", "fid"), ("per_class", "left")]
        changes += [("baselines", "noise"), ("baselines", "noise", "figures"), ("baselines", "mine")]
        for place in changes:
            for value in (None, 7.5, [1], {"a": [1]}, "x", float("nan"), -(10**400), True):
                *parents, last = place
                broken = json.loads(path.read_text())
                functools.reduce(dict.__getitem__, parents, broken)[last] = value
                (tmp_path / "broken.json").write_text(json.dumps(broken))
                try:  # refused, or of the right type after all: then it is shown
                    loaded = Report.load(tmp_path / "broken.json")
                    loaded.markdown(), loaded.card_results(), compare({"a": loaded, "b": loaded})
                except UserError as refusal:
                    assert "\n" not in str(refusal) and "is not a report" in str(refusal)
        for text in ("[" * 100_000, '{"format": ' + "9" * 5000 + "}"):
            (tmp_path / "broken.json").write_text(text)
            with pytest.raises(UserError):
                Report.load(tmp_path / "broken.json")


class TestCommandLine:
    OPTIONS = (
        *("--dataset_name", "digits", "--features", "pixels", "--num_images", "40", "--num_inference_steps", "2"),
        *("--num_jackknife", "4", "--dtype", "float32", "--device", "cpu", "--batch_size", "16"),
    )

    @pytest.fixture(autouse=True)
    def few_digits(self, request, monkeypatch):
        """Leaves 300 of the embedded digits: an evaluation is mostly distances between all pairs of them."""
        if request.node.get_closest_marker("slow"):  # other processes would read all of them
            return
        read = loading.read_digits

        def read_few(split):
            source = read(split)
            return dataclasses.replace(source, rows=source.rows[:300], labels=source.labels[:300])

        monkeypatch.setattr(loading, "read_digits", read_few)

    @pytest.fixture
    def checkpoint(self, tmp_path, pipeline):
        folder = tmp_path / "checkpoint"
        pipeline().save_pretrained(folder)
        cards.write_card(folder, model_name="tiny", command="train", settings={}, data={"name": "digits"})
        return folder

    def run(self, *arguments):
        return cli.main([str(argument) for argument in arguments])

    def test_a_checkpoint_gets_a_report_and_its_card_the_metrics(self, checkpoint, capsys):
        from huggingface_hub import ModelCard

        assert self.run("evaluate", checkpoint, *self.OPTIONS, "--publish") == 0
        assert "Frechet distance" in capsys.readouterr().out
        report = Report.load(checkpoint)
        assert self.run("evaluate", checkpoint, *self.OPTIONS, "--publish") == 0  # the card's section is replaced
        card = ModelCard.load(checkpoint / "README.md")
        assert card.text.count("## Results") == 1
        assert card.text.index("## Results") < card.text.index("## What it is not good for")
        results = {result.metric_type: result for result in card.data.eval_results}
        assert results["frechet_distance"].metric_value == pytest.approx(
            report.figures["frechet_distance"]["value"], abs=1e-6
        )
        assert card.data.model_name == "tiny" and results["recall"].dataset_split == "train"

        path = checkpoint / "reports" / "ddim-2" / "report.json"
        assert self.run("evaluate", "--from_report", path, "--output", checkpoint / "again") == 0
        assert values(Report.load(checkpoint / "again")) == pytest.approx(values(report), rel=1e-6)
        assert self.run("compare", checkpoint, checkpoint / "again" / "report.json") == 0

    def test_a_report_is_repeated_with_the_steps_that_were_the_default_then(self, checkpoint):
        options = [*self.OPTIONS, "--metrics", "precision_recall", "--baselines", "none"]
        del options[(start := options.index("--num_inference_steps")) : start + 2]
        assert self.run("evaluate", checkpoint, *options, "--output", checkpoint / "old") == 0
        file = checkpoint / "old" / "report.json"
        report = json.loads(file.read_text())
        steps = report["source"]["sampling"]["num_inference_steps"]
        report["source"]["sampling"]["num_inference_steps"] = steps - 1
        file.write_text(json.dumps(report))
        assert self.run("evaluate", "--from_report", file, "--output", checkpoint / "new") == 0
        assert Report.load(checkpoint / "new").source["sampling"]["num_inference_steps"] == steps - 1

    def test_a_mistyped_folder_is_named(self, capsys):
        assert self.run("evaluate", "runs/ddpm-digit") == 2
        assert "There is no folder 'runs/ddpm-digit'" in capsys.readouterr().err

    def test_a_refused_evaluation_leaves_no_folder(self, checkpoint, tmp_path, monkeypatch, capsys):
        def refuse(*args, **kwargs):
            raise UserError("no")

        monkeypatch.setattr("tiny_diffusers.evaluation.evaluate", refuse)
        assert self.run("evaluate", checkpoint, *self.OPTIONS) == 2
        assert not (checkpoint / "reports").exists() and "error: no" in capsys.readouterr().err
        (tmp_path / "mine").mkdir()  # a folder that was there stays
        assert self.run("evaluate", checkpoint, *self.OPTIONS, "--output", tmp_path / "mine") == 2
        assert (tmp_path / "mine").is_dir()

    def test_a_report_of_an_older_version_is_repeated_with_a_note_and_not_compared(self, checkpoint, capsys):
        options = (*self.OPTIONS, "--baselines", "none", "--metrics", "precision_recall")
        assert self.run("evaluate", checkpoint, *options, "--output", checkpoint / "old") == 0
        file = checkpoint / "old" / "report.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
        assert self.run("evaluate", "--from_report", file, "--output", checkpoint / "new") == 0
        assert any("of version 1" in warning for warning in Report.load(checkpoint / "new").warnings)
        capsys.readouterr()
        assert self.run("compare", checkpoint / "old", checkpoint / "old") == 0
        assert self.run("compare", checkpoint / "old", checkpoint / "new") == 2
        assert "report version differ, 1 and 2" in capsys.readouterr().err

    def test_a_folder_of_images_is_measured_too(self, tmp_path):
        for i, image in enumerate(load_images().images[:50, 0].numpy()):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / "images" / f"{i:05}.png")
        output = tmp_path / "out"
        assert self.run("evaluate", "--images", tmp_path / "images", *self.OPTIONS, "--output", output) == 0
        assert values(Report.load(output))["precision"] == 1  # they are part of the reference

    def test_without_an_output_a_folder_of_images_is_reported_on_in_evaluation(self, tmp_path, monkeypatch):
        for i, image in enumerate(load_images().images[:50, 0].numpy()):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / "images" / f"{i:05}.png")
        monkeypatch.chdir(tmp_path)
        assert self.run("evaluate", "--images", "images", *self.OPTIONS) == 0
        assert Report.load(tmp_path / "evaluation").figures

    def test_reconstructions_leave_the_report_and_the_card_of_the_samples_alone(self, tmp_path, capsys):
        folder = tmp_path / "vae"
        vae().save_pretrained(folder)
        cards.write_card(folder, model_name="tiny", command="train", settings={}, data={"name": "digits"})
        steps = self.OPTIONS.index("--num_inference_steps")
        options = self.OPTIONS[:steps] + self.OPTIONS[steps + 2 :]
        assert self.run("evaluate", folder, *options, "--kind", "reconstructions") == 0
        assert "40 reconstructions" in capsys.readouterr().out
        assert "## Results" not in (folder / "README.md").read_text()
        report = folder / "reports" / "reconstructions" / "report.json"
        assert self.run("evaluate", "--from_report", report, "--output", tmp_path / "again") == 0
        assert Report.load(tmp_path / "again").kind == "reconstructions"

    def test_bad_input_is_one_line(self, checkpoint, tmp_path, capsys):
        def line(*arguments):
            assert self.run("evaluate", *arguments) == 2
            return capsys.readouterr().err.splitlines()[-1]

        assert "--dataset_name" in line(checkpoint)
        assert "either" in line("--dataset_name", "digits")
        assert "no report" in line("--from_report", tmp_path / "nothing.json")
        assert "There is no folder 'nowhere'" in line("--images", "nowhere", "--dataset_name", "digits")
        fid = line(checkpoint, "--dataset_name", "digits", "--metrics", "FID")
        assert "Did you mean 'frechet_distance with --features inception'" in fid
        for elsewhere in (["--publish"], ["--name", "a"]):
            given = (*self.OPTIONS, *elsewhere, "--output", tmp_path / "x")
            assert "--output puts the report elsewhere" in line(checkpoint, *given)
        assert "--publish is for" in line("--images", checkpoint, *self.OPTIONS, "--publish")
        for name in ("a/b", "..", "published"):
            assert "plain name" in line(checkpoint, *self.OPTIONS, "--name", name)
        assert "8x8 gray and the reference's are 9x9" in line(checkpoint, *self.OPTIONS, "--resolution", "9")
        assert "features" in line(checkpoint, *self.OPTIONS, "--features", "vgg")

    def test_a_trial_replaces_neither_the_published_report_nor_another(self, checkpoint, capsys):
        options = (*self.OPTIONS, "--baselines", "none")
        assert self.run("evaluate", checkpoint, *options, "--publish") == 0
        published, card = Report.load(checkpoint), (checkpoint / "README.md").read_text()
        assert self.run("evaluate", checkpoint, *options, "--scheduler", "sde_dpm") == 0
        assert self.run("evaluate", checkpoint, *options, "--seed", "9") == 0
        assert (
            self.run("evaluate", checkpoint, *options, "--seed", "9", "--batch_size", "7") == 0
        )  # the same one again
        assert self.run("evaluate", checkpoint, *options, "--seed", "3", "--name", "mine") == 0
        names = {path.parent.name for path in (checkpoint / "reports").glob("*/report.json")}
        assert names == {"ddim-2", "ddim-2-2", "sde-dpmsolver-2", "mine"}
        assert Report.load(checkpoint) == published and (checkpoint / "README.md").read_text() == card
        capsys.readouterr()
        assert self.run("evaluate", checkpoint, *options, "--name", "mine") == 2
        assert "mine holds a report of another protocol" in capsys.readouterr().err

        assert self.run("compare", checkpoint, checkpoint / "reports" / "sde-dpmsolver-2") == 0
        table = capsys.readouterr().out
        assert "TinyDDIMScheduler, " in table and "algorithm_type sde-dpmsolver++" in table
        (checkpoint / "reports" / "published").unlink()
        with pytest.raises(UserError, match=r"has 4 reports \(ddim-2, .*none is published"):
            Report.load(checkpoint)

    def test_a_gan_is_measured_with_classes_and_without(self, tmp_path):
        steps = self.OPTIONS.index("--num_inference_steps")
        options = self.OPTIONS[:steps] + self.OPTIONS[steps + 2 :]
        for name, classes in (("plain", None), ("conditional", 10)):
            torch.manual_seed(0)
            generator = TinyDCGANGenerator(8, 1, 4, (8,), num_class_embeds=classes).eval()
            names = {i: str(i) for i in range(10)} if classes else None
            TinyDCGANPipeline(generator, id2label=names).save_pretrained(tmp_path / name)
            assert self.run("evaluate", tmp_path / name, *options) == 0
            report = Report.load(tmp_path / name)
            assert "precision" in report.figures and ("class_agreement" in report.figures) == bool(classes)
            assert (tmp_path / name / "reports" / "samples").is_dir()

    def test_how_a_guided_model_is_sampled_is_in_its_report(self, tmp_path, tiny_unet):
        unet, names = tiny_unet("none", num_class_embeds=10), {i: str(i) for i in range(10)}
        pipe = TinyConditionalPipeline(unet, TinyDDIMScheduler(num_train_timesteps=10), id2label=names)
        pipe.save_pretrained(tmp_path / "guided")
        flags = ("--guidance_scale", 3, "--guidance_interval", 0.1, 0.9, "--dynamic_thresholding", 0.9)
        assert self.run("evaluate", tmp_path / "guided", *self.OPTIONS, "--baselines", "none", *flags) == 0
        report = Report.load(tmp_path / "guided")
        name = "ddim-2-guidance_scale-3-guidance_interval-0.1-0.9-dynamic_thresholding-0.9"
        assert (tmp_path / "guided" / "reports" / name).is_dir()
        assert "guidance_scale 3.0, guidance_interval [0.1, 0.9], dynamic_thresholding 0.9" in report.summary()
        again = ("--from_report", tmp_path / "guided" / "reports" / name, "--output", tmp_path / "again")
        assert self.run("evaluate", *again) == 0
        assert values(Report.load(tmp_path / "again")) == pytest.approx(values(report), rel=1e-6)

    def test_a_report_never_says_what_to_trust_or_where_to_write(self, checkpoint, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert self.run("evaluate", checkpoint, *self.OPTIONS, "--baselines", "none", "--output", tmp_path / "a") == 0
        theirs = json.loads((tmp_path / "a" / "report.json").read_text())
        theirs["protocol"] |= {
            **{"trust_remote_code": True, "checkpoint": "evil/model", "output": str(tmp_path / "theirs")},
            **{"device": "meta", "feature_weights": None, "publish": True, "from_report": "x", "images": "x"},
        }
        theirs["protocol"]["sampling"] |= {"trust_remote_code": True, "output": str(tmp_path / "theirs")}
        theirs["measured_by"]["reference"]["load"] |= {"train_split": "none", "trust_remote_code": True}
        (tmp_path / "theirs.json").write_text(json.dumps(theirs))
        asked, parse = [], shared.load_checkpoint
        monkeypatch.setattr(shared, "load_checkpoint", lambda args: asked.append(args) or parse(args))
        again = ("evaluate", checkpoint, "--from_report", tmp_path / "theirs.json", "--output", tmp_path / "again")
        assert self.run(*again) == 0
        (args,) = asked
        assert (args.checkpoint, args.trust_remote_code, args.output) == (str(checkpoint), False, str(again[-1]))
        assert (args.device, args.publish) == (None, False) and not (tmp_path / "theirs").exists()

        for place, value, words in (
            (("protocol", "metrics"), ["recall", "--trust_remote_code"], "theirs.json' is damaged"),
            (("protocol", "num_images"), "many", "theirs.json' is damaged"),
            (("protocol", "feature_weights"), "/etc/weights.pt", "say where they are with --feature_weights"),
            (
                ("measured_by", "reference", "load"),
                {"train_data_dir": "mine"},
                "say where they are with --dataset_name",
            ),
            (("measured_by", "reference", "load"), {"dataset_name": str(checkpoint)}, "with --dataset_name"),
            (("source", "name"), "/etc/model", "'/etc/model', which is not known here"),
        ):
            broken = json.loads(json.dumps(theirs))
            functools.reduce(dict.__getitem__, place[:-1], broken)[place[-1]] = value
            (tmp_path / "theirs.json").write_text(json.dumps(broken))
            arguments = again[2:] if place[0] == "source" else again[1:]
            assert self.run("evaluate", *arguments) == 2
            assert words in capsys.readouterr().err.splitlines()[-1]
        assert len(asked) == 1

    @pytest.mark.slow
    def test_two_processes_give_the_metrics_of_one(self, checkpoint, tmp_path):
        arguments = ("evaluate", str(checkpoint), *self.OPTIONS, "--output")
        assert self.run(*arguments, tmp_path / "one") == 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += ["-m", "tiny_diffusers.cli", *arguments, "two"]
        environment = {**os.environ, "TINY_DIFFUSERS_CACHE": str(tmp_path / "cache of two")}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("report: ") == 1  # only the main process prints
        assert values(Report.load(tmp_path / "two")) == pytest.approx(values(Report.load(tmp_path / "one")), rel=1e-6)


class TestRun:
    """The data of an evaluation are those of the run that trained the model."""

    OPTIONS = (
        *("--features", "pixels", "--num_images", "20", "--num_inference_steps", "2", "--num_jackknife", "0"),
        *("--metrics", "frechet_distance", "--baselines", "real", "--dtype", "float32", "--device", "cpu"),
    )

    @pytest.fixture
    def folder(self, tmp_path):
        """A local dataset: two splits of 24 images in each of two classes."""
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            for label, name in enumerate(("cat", "dog")):
                path = tmp_path / "data" / "pets" / split / name
                path.mkdir(parents=True)
                for i in range(24):
                    pixels = rng.integers(0, 128, (8, 10), dtype=np.uint8) + 127 * np.uint8(label)
                    Image.fromarray(pixels).save(path / f"{i}.png")
        return tmp_path / "data" / "pets"

    @pytest.fixture
    def trained(self, tmp_path, pipeline):
        """Writes what a run leaves: a checkpoint, its settings and facts."""

        def build(name="run", **settings):
            run = RunFolder(tmp_path / name)
            pipeline().save_pretrained(run.path)
            arguments = DiffusionArguments(**settings)
            run.write_config(saved_settings(arguments))
            keep_paths(run.path, split_paths(arguments)[1])
            names = ("dataset_name", "train_data_dir", "split", "classes", "resolution", "center_crop")
            data = load_images(**{name: getattr(arguments, name) for name in names})
            labels = list(data.id2label.values())
            facts = {"name": data.name, "split": data.split, "images": len(data), "classes": labels}
            run.write_facts({"data": {**facts, "fingerprint": data.fingerprint}})
            return run.path

        return build

    def run(self, *arguments):
        return cli.main([str(argument) for argument in ("evaluate", *arguments, *self.OPTIONS)])

    def test_its_config_says_what_to_measure_against(self, trained, folder, capsys):
        run = trained(dataset_name=str(folder), classes="cat", resolution=8, center_crop=True)
        assert self.run(run) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith("data: train_data_dir pets, classes cat, resolution 8, center_crop True, split test")
        assert line.endswith(f"as {run / 'config.yaml'} has it")
        report = Report.load(run)
        expected = load_images(str(folder), split="test", classes="cat", resolution=8, center_crop=True)
        assert report.measured_by["reference"]["fingerprint"] == expected.fingerprint
        assert report.measured_by["training"]["images"] == 24
        assert not [line for line in report.warnings if "trained on" in line or "training images" in line]

    def test_flags_win_and_other_classes_are_warned_of(self, trained, folder):
        run = trained(dataset_name=str(folder), classes="cat", resolution=8)
        assert self.run(run, "--classes", "cat,dog", "--center_crop") == 0
        report = Report.load(run)
        assert report.measured_by["reference"]["images"] == 48
        assert report.measured_by["reference"]["load"]["center_crop"] is True
        assert report.warnings[0].startswith(
            "The model was trained on the classes cat, and is measured against cat, dog"
        )

    def test_a_folder_under_another_name_is_another_dataset(self, trained, folder, tmp_path):
        """Also where the run's own name is a Hub id, or a path."""
        (tmp_path / "other").symlink_to(folder)
        for own in (str(folder), "owner/name"):
            assert not is_same_dataset(str(tmp_path / "other" / "cat"), own)
        assert is_same_dataset(str(tmp_path / "other"), str(folder))
        assert is_same_dataset(str(folder), folder.name)

    def test_names_in_a_report_are_escaped(self, trained, tmp_path):
        for name in ("<img src=x onerror=alert(1)>", "a\n# heading"):
            (tmp_path / "classes" / name).mkdir(parents=True)
            for i in range(8):
                Image.new("L", (8, 8), 30 * i).save(tmp_path / "classes" / name / f"{i}.png")
        run = trained(dataset_name="digits", resolution=8)
        assert self.run(run, "--dataset_name", tmp_path / "classes") == 0
        text = (run / "reports" / "ddim-2" / "report.md").read_text()
        assert "heading" in text and "<img" not in text and "\n# " not in text

    def test_no_link_in_the_reports_folder_is_written_through(self, trained, tmp_path):
        run = trained(dataset_name="digits", resolution=8)
        folder = run / "reports" / "ddim-2"
        folder.mkdir(parents=True)
        for name in ("report.md", "report.png", ".paths.json"):
            (tmp_path / name).write_text("precious")
            (folder / name).symlink_to(tmp_path / name)
        assert self.run(run) == 0 and (folder / "report.md").read_text().startswith("20 images")
        assert all((tmp_path / name).read_text() == "precious" for name in ("report.md", "report.png", ".paths.json"))

    def test_another_dataset_takes_nothing_of_the_runs(self, trained, folder):
        run = trained(dataset_name=str(folder), classes="cat", resolution=8)
        assert self.run(run, "--dataset_name", "digits") == 0
        report = Report.load(run)
        assert report.measured_by["reference"]["load"] == {
            "dataset_name": "digits",
            "split": "train",
            "train_split": "train",
        }
        assert "trained on the classes cat" in report.warnings[0]

    def test_the_training_split_is_said(self, trained):
        run = trained(dataset_name="digits", resolution=8)
        assert self.run(run) == 0
        report = Report.load(run)
        said = "its 1,797 images (train) are those that the model was trained on, or that it was validated on"
        assert any(line.startswith(f"The reference is the training split: {said}") for line in report.warnings)
        assert "The reference is the training split" in (run / "reports" / "ddim-2" / "report.md").read_text()
        assert report.baselines["real"]["images"] == 898  # halves: the training set is no other set

    def test_no_path_is_shared_and_the_report_is_repeated_with_those_kept(self, trained, folder, tmp_path, capsys):
        run = trained(dataset_name=str(folder), resolution=8)
        cards.write_card(run, model_name="tiny", command="train", settings={}, data={"name": "pets"})
        assert self.run(run, "--publish") == 0
        files = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")]
        texts = {path.name: path.read_text() for path in files if path.suffix in (".json", ".yaml", ".md")}
        assert not [name for name, text in texts.items() if str(tmp_path) in text]
        report = run / "reports" / "ddim-2" / "report.json"
        assert json.loads(report.read_text())["command"].startswith("tiny-diffusers evaluate run --publish")
        assert self.run("--from_report", report, "--output", tmp_path / "again") == 0

        for path in (report.parent, run):
            (path / ".paths.json").unlink()
        capsys.readouterr()
        assert self.run(run) == 2
        assert "config.yaml names the local folder 'pets', which is not here" in capsys.readouterr().err
        assert self.run(run, "--dataset_name", folder) == 0
        # a folder of that name is the run's, with the rest of its settings
        assert f"resolution 8, split test, train_split train ({folder}), as {run}" in capsys.readouterr().out
        (report.parent / ".paths.json").unlink()
        assert self.run("--from_report", report, "--output", tmp_path / "third") == 2
        assert "measured with files named 'pets': say where they are with --dataset_name" in capsys.readouterr().err
        again = ("--from_report", report, "--output", tmp_path / "third", "--dataset_name", folder)
        assert self.run(*again) == 0
        assert values(Report.load(tmp_path / "third")) == values(Report.load(report))

    def test_a_set_of_other_channels_is_warned_of(self, trained, tmp_path):
        rng = np.random.default_rng(0)
        for split in ("train", "validation"):
            (tmp_path / "color" / split).mkdir(parents=True)
            for i in range(12):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "color" / split / f"{i}.png")
        assert self.run(trained(dataset_name="digits"), "--dataset_name", tmp_path / "color") == 0
        report = Report.load(tmp_path / "run")
        assert report.measured_by["reference"]["split"] == "validation"  # there is no test split
        assert any("12 of 12 images were in color, converted to gray" in line for line in report.warnings)
        assert any(
            "are not those that the model was trained on (digits, train, 1797)" in line for line in report.warnings
        )

    def test_a_config_of_other_types_is_refused_in_a_line(self, trained, capsys):
        run = trained(dataset_name="digits", resolution=8)
        (run / "config.yaml").write_text("dataset_name: digits\nresolution: [a, b]\n")
        assert self.run(run) == 2
        assert "config.yaml does not say what the model was trained on" in capsys.readouterr().err


@pytest.mark.skipif("TINY_DIFFUSERS_DATA" not in os.environ, reason="TINY_DIFFUSERS_DATA is not set")
@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_on_real_images_noise_blur_and_fewer_classes_are_each_worse(name, monkeypatch):
    # random filters respond to edges and textures too, and are a thousand times faster than a large network
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU())
    network.extend([nn.AdaptiveAvgPool2d(2), nn.Flatten()])
    monkeypatch.setattr(features, "_REGISTERED", {})
    features.register("random", network, mean=0.5, std=0.25)
    data = load_images(str(Path(os.environ["TINY_DIFFUSERS_DATA"]) / name), split="test", max_samples=1200)
    pixels = data.images.numpy()
    real, judged, labels = pixels[:600], pixels[600:], data.labels.numpy()[600:]
    rng = np.random.default_rng(0)

    def distances(pixels):
        options = {"num_images": 600, "num_jackknife": 0, "baselines": []}
        protocol = Protocol(features="random", metrics=["frechet_distance", "kernel_distance"], **options)
        return list(values(evaluate(pixels, real, protocol)).values())

    def noisy(sigma):
        return (judged + rng.normal(0, sigma, judged.shape)).clip(0, 255).astype(np.uint8)

    def blurred(sigma):
        monkeypatch.setattr(images, "BLUR_SIGMA", sigma)
        return images.blurred(judged, np.arange(600))(0, 600)

    plain = distances(judged)
    for series in ([noisy(30), noisy(90)], [blurred(1), blurred(3)], [judged[labels < count] for count in (3, 1)]):
        assert (np.diff([plain, *map(distances, series)], axis=0) > 0).all()
