"""An average that is rebuilt from snapshots is the one that would have been kept during training."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from tiny_diffusers import TinyPipeline, cli
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation.references import flags_of_run
from tiny_diffusers.files import publish
from tiny_diffusers.runs import RunFolder
from tiny_diffusers.training import posthoc_ema
from tiny_diffusers.training.ema import PowerEMA, gamma_of
from tiny_diffusers.training.posthoc_ema import SIGMA_RELS, inner_product, solve_coefficients
from tiny_diffusers.training.trainer import Trainer


WEIGHTS = "diffusion_pytorch_model.safetensors"
LENGTHS = (0.07, 0.1, 0.2)


# ------------------------------------------------------------------------------------------------------ the averages


def test_gamma_is_the_papers():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-9)  # the uniform distribution's


def test_a_power_average_by_hand():
    module = nn.Linear(3, 2).double()
    average, trajectory = PowerEMA(module, 0.2), []
    for step in range(1, 8):
        nn.init.normal_(module.weight)
        average.update(module, step)
        trajectory.append(module.weight.detach().clone())
    power = average.gamma + 1
    shares = [(step / 7) ** power - ((step - 1) / 7) ** power for step in range(1, 8)]  # of s^gamma within each step
    expected = sum(share * weight for share, weight in zip(shares, trajectory, strict=True))
    torch.testing.assert_close(average.module.weight, expected)


@pytest.mark.parametrize(
    ("t_a", "gamma_a", "t_b", "gamma_b"), [(7, 2.0, 7, 5.5), (3, 6.94, 8, 16.97), (8, 1.5, 5, 0.2)]
)
def test_the_inner_product_is_the_integral(t_a, gamma_a, t_b, gamma_b):
    s = (np.arange(200_000) + 0.5) / 200_000 * min(t_a, t_b)
    profiles = [(gamma + 1) / t * (s / t) ** gamma for t, gamma in ((t_a, gamma_a), (t_b, gamma_b))]
    assert inner_product(t_a, gamma_a, t_b, gamma_b) == pytest.approx(
        np.mean(np.prod(profiles, 0)) * s.max(), rel=1e-4
    )


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.1, 0.15, 0.2])
def test_a_rebuilt_average_is_the_kept_one(sigma_rel):
    """Of a random walk whose steps shrink, beside a large constant; to 1% of the distance from the last weights."""
    steps = np.arange(1, 513)
    walk = np.cumsum(np.random.default_rng(0).normal(size=(512, 50)) * (1 - steps / 513)[:, None], 0) + 1000

    def average(sigma_rel, step):
        shares = np.diff((np.arange(step + 1) / step) ** (gamma_of(sigma_rel) + 1))
        return shares @ walk[:step]

    snapshots = [(s, kept) for s in steps if posthoc_ema.is_snapshot_due(s, 512) for kept in SIGMA_RELS]
    assert len(snapshots) == 64
    at, gammas = np.array([s for s, _ in snapshots]), np.array([gamma_of(kept) for _, kept in snapshots])
    coefficients, error = solve_coefficients(at, gammas, 512, gamma_of(sigma_rel))
    assert coefficients.sum() == pytest.approx(1, abs=1e-12) and error < 0.01
    rebuilt = coefficients @ [average(kept, s) for s, kept in snapshots]
    expected = average(sigma_rel, 512)
    assert np.linalg.norm(rebuilt - expected) < 0.01 * np.linalg.norm(expected - walk[-1])


@pytest.mark.parametrize(("num_steps", "count"), [(5, 5), (32, 32), (50, 32), (10_007, 32)])
def test_a_run_has_32_snapshots_or_one_a_step_with_the_last(num_steps, count):
    due = [step for step in range(1, num_steps + 1) if posthoc_ema.is_snapshot_due(step, num_steps)]
    assert len(due) == count and due[-1] == num_steps


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 16 steps, each with a snapshot; the averages that were kept directly beside it; the last weights."""
    kept, last, update = {}, {}, Trainer._update_emas

    def updating(trainer, step):
        update(trainer, step)
        module = trainer.modules["unet"]
        for sigma_rel in LENGTHS:
            kept.setdefault(sigma_rel, PowerEMA(module, sigma_rel)).update(module, step)
        last.update(module.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update_emas", updating)
        flags = ("--posthoc_ema", "--save_images_steps", "0", "--validation_split", "0")
        folder = tiny.train(tmp_path_factory.mktemp("posthoc") / "run", *flags, steps=16)
    return folder, {sigma_rel: average.module.state_dict() for sigma_rel, average in kept.items()}, last


def distance(weights, others):
    return sum((weights[name].double() - others[name].double()).square().sum() for name in weights) ** 0.5


def ema(*argv):
    return cli.main(["ema", *map(str, argv)])


@pytest.mark.slow
def test_the_command_rebuilds_lengths_as_pipelines(run, capsys):
    folder, kept, last = run
    assert ema(folder, "--sigma_rel", *LENGTHS) == 0
    assert f"tiny-diffusers evaluate {folder}/ema/sigma_rel-0.2" in capsys.readouterr().out
    for sigma_rel in LENGTHS:
        average = folder / "ema" / f"sigma_rel-{sigma_rel}"
        pipe = TinyPipeline.from_pretrained(average)
        error = distance(pipe.unet.state_dict(), kept[sigma_rel]) / distance(kept[sigma_rel], last)
        assert error < 0.02, sigma_rel
        assert flags_of_run(RunFolder(average), {})["dataset_name"] == "digits"  # what `evaluate` measures against


def test_it_rebuilds_at_an_earlier_snapshot(run):
    folder, *_ = run
    assert ema(folder, "--sigma_rel", "0.1", "--step", 12) == 0
    rebuilt = load_file(folder / "ema" / "sigma_rel-0.1-step-12" / "unet" / WEIGHTS)
    snapshot = load_file(folder / "snapshots" / "step-12" / "unet_sigma_rel-0.1.safetensors")
    for name, value in snapshot.items():
        torch.testing.assert_close(rebuilt[name], value, rtol=1e-6, atol=1e-7)


def test_pruning_leaves_the_snapshots(run):
    folder, *_ = run
    assert len(RunFolder(folder).list_checkpoints()) == 2
    assert [RunFolder.snapshot_step(path) for path in RunFolder(folder).list_snapshots()] == [*range(1, 17)]
    assert not any(name.startswith(("snapshots", "ema")) for name in RunFolder(folder).list_shared())


def test_mistakes_are_one_line(run, train, tmp_path, capsys):
    folder, *_ = run

    def refused(*argv):
        capsys.readouterr()
        assert ema(*argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    for value in ("0", "0.29", "-0.1", "nan", "long"):
        assert "above 0 and up to 0.28" in refused(folder, "--sigma_rel", value)
    assert "of steps 1 to 16, the nearest of step 16" in refused(folder, "--step", "17")
    assert "train with --posthoc_ema" in refused(tmp_path)
    foreign = folder / "ema" / "sigma_rel-0.123"
    foreign.mkdir(parents=True)
    (foreign / "model_index.json").write_text("{}")
    assert "sigma_rel-0.123" in refused(folder, "--sigma_rel", "0.123")
    assert [path.name for path in foreign.iterdir()] == ["model_index.json"]
    with pytest.raises(UserError, match="leave --use_ema on"):
        train("--posthoc_ema", "--no_use_ema")


def test_a_damaged_snapshot_is_named_and_left_out(tmp_path, capsys):
    run = RunFolder(tmp_path)
    for step in (1, 2):
        run.publish_snapshot(step, lambda folder: (folder / "x").write_text("x"))
    (run.snapshot(2) / "x").write_text("y")
    assert posthoc_ema.find_snapshots(run) == [run.snapshot(1)]
    assert "step-2 is damaged" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the run's files


def test_going_back_deletes_the_later_snapshots_of_the_run_and_no_others(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 10, 30):
        run.publish_snapshot(step, lambda folder: (folder / "x").write_text("x"))
    publish(run.snapshot(20), lambda folder: (folder / "x").write_text("a stranger's"))
    run.trim_snapshots(2)
    assert sorted(path.name for path in run.snapshots.iterdir()) == ["step-2", "step-20"]
    assert run.list_snapshots() == [run.snapshot(2)]


def test_an_overwritten_run_takes_its_snapshots_and_averages_along(tmp_path):
    run = RunFolder(tmp_path)
    with run.claim(resume=False, overwrite=False):
        run.write_config({})
        run.publish_snapshot(2, lambda folder: (folder / "x").write_text("x"))
        run.confirm()
    own, foreign = run.average(0.1), run.average(0.2)
    RunFolder(own).place(lambda folder: (folder / "config.yaml").write_text(""))
    foreign.mkdir()
    with pytest.raises(UserError), RunFolder(tmp_path).claim(resume=False, overwrite=True):
        raise UserError("before the first step")
    assert run.list_snapshots() == [run.snapshot(2)] and (own / "config.yaml").exists()  # put back
    later = RunFolder(tmp_path)
    with later.claim(resume=False, overwrite=True):
        later.confirm()
    assert not run.snapshots.exists() and not own.exists() and foreign.exists()


def test_a_strangers_snapshot_is_refused(tmp_path):
    publish(tmp_path / "snapshots" / "step-5", lambda folder: (folder / "x").write_text("x"))
    with pytest.raises(UserError, match="snapshots/step-5"), RunFolder(tmp_path).claim(resume=False, overwrite=False):
        pass
    (tmp_path / ".files.json").write_text(json.dumps(["snapshots/../step-5", "ema/../x", "ema/sigma_rel-0.1/x"]))
    assert RunFolder(tmp_path).list_files() == []
