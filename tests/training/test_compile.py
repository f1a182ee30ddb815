"""`--compile` compiles the repeated blocks and changes nothing else; where nothing can be compiled, one line says so."""

import functools

import pytest
import torch
from safetensors.torch import load_file

from tiny import train
from tiny_diffusers import hardware
from tiny_diffusers.training import trainer


def run(folder, steps, *flags):
    train(folder, "--block_out_channels", "8", "8", "--attention", "none", "full", *flags, steps=steps)
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def eager_backend(monkeypatch):
    """Graphs are captured and run as they are; no compiler is needed. Counts what was compiled."""
    compiled = []
    compile_ = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiled.append(f) or compile_(f, **kwargs))
    monkeypatch.setattr(trainer, "compile_failure", lambda device: None)
    yield compiled
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_training_resumes_and_saves_as_plain_training_does(tmp_path, eager_backend):
    plain = run(tmp_path / "plain", 4)
    assert not eager_backend
    compiled = run(tmp_path / "compiled", 4, "--compile")
    # every residual block and every attention, and nothing around them
    blocks = {type(call.__self__).__name__ for call in eager_backend}
    assert blocks == {"ResidualBlock", "AttentionBlock"}
    assert compiled.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-5, rtol=1e-4)

    # a checkpoint of a compiled run goes on without, and the other way round
    resume = ("--resume_from_checkpoint", "latest")
    compiled, plain = run(tmp_path / "plain", 6, *resume, "--compile"), run(tmp_path / "compiled", 6, *resume)
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-5, rtol=1e-4)


def test_on_a_cpu_it_declines_with_a_line(tmp_path, capsys):
    run(tmp_path / "run", 2, "--compile")
    assert "--compile: the networks run uncompiled (on a CPU it gains nothing)" in capsys.readouterr().err


def test_without_a_compiler_it_trains_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "compile_failure", lambda device: "No working C++ compiler found")
    plain = run(tmp_path / "plain", 2)
    fallen_back = run(tmp_path / "compiled", 2, "--compile")
    assert all(torch.equal(fallen_back[name], weight) for name, weight in plain.items())
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--compile" in line]
    assert len(warnings) == 1
    assert "No working C++ compiler found" in warnings[0]


def test_a_failing_compiler_is_named(monkeypatch):
    def fails(function):
        raise RuntimeError("no g++ here\nand much more")

    monkeypatch.setattr(torch, "compile", fails)
    assert hardware.compile_failure(torch.device("meta")) == "no g++ here"  # any device but a CPU
