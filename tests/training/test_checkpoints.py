"""The state of a run survives a save and a load, to the bit."""

from dataclasses import fields

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from tiny_diffusers.errors import UserError
from tiny_diffusers.training import checkpoints
from tiny_diffusers.training.checkpoints import RunState, read_step
from tiny_diffusers.training.muon import Muon


def test_every_field_of_the_state_is_saved_and_loaded():
    accelerator = Accelerator(cpu=True)
    state = RunState(7, {}, 2, 1, {"step": 5, "val_loss": 0.25}, 3)
    for value in (1.0, 2.0):
        state.add("loss", torch.tensor(value))
    saved = state.state_dict(accelerator)
    assert saved.keys() == {field.name for field in fields(RunState)}
    assert saved["sums"] == {"loss": [[3.0], 2]}
    again = RunState()
    again.load_state_dict(saved, accelerator)
    assert again == state


def test_sums_of_another_number_of_processes_are_averaged():
    accelerator, state = Accelerator(cpu=True), RunState()
    saved = state.state_dict(accelerator) | {"sums": {"loss": [[1.0, 3.0], 4]}}
    state.load_state_dict(saved, accelerator)
    assert state.sums == {"loss": (torch.tensor(2.0), 4)}


def _make_muon(parameters):
    weight, bias = parameters
    return Muon([weight], [bias], fused=True)


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam, _make_muon]
)
def test_optimizer_state_survives_to_the_bit(tmp_path, make):
    module = nn.Linear(4, 3)
    optimizer = make(module.parameters())
    for _ in range(3):
        module(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    checkpoints.save(checkpoints.collect(module, optimizer), tmp_path, tmp_path)
    other = make(module.parameters())
    checkpoints.load_optimizer(other, tmp_path)
    for key, value in optimizer.state_dict()["state"].items():
        for name, tensor in value.items():
            assert torch.equal(torch.as_tensor(other.state_dict()["state"][key][name]), torch.as_tensor(tensor))


@pytest.mark.parametrize("makers", [(torch.optim.AdamW, _make_muon), (_make_muon, torch.optim.Adam)])
def test_the_state_of_another_optimizer_is_refused(tmp_path, makers):
    module = nn.Linear(4, 3)
    saved, other = (make(module.parameters()) for make in makers)
    checkpoints.save(checkpoints.collect(module, saved), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="saved by another optimizer"):
        checkpoints.load_optimizer(other, tmp_path)


def test_moments_of_the_other_kind_are_refused(tmp_path):
    """As Muon has two kinds of weights."""
    module = nn.Linear(4, 3)
    optimizer = _make_muon(module.parameters())
    checkpoints.save(checkpoints.collect(module, optimizer), tmp_path, tmp_path)
    save_file({"1.momentum_buffer": torch.zeros(3)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match="its optimizer's state 1 has momentum_buffer"):
        checkpoints.load_optimizer(optimizer, tmp_path)


def test_moments_lie_in_memory_as_their_weights_do(tmp_path):
    module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.randn(2, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    checkpoints.save(checkpoints.collect(module, optimizer), tmp_path, tmp_path)
    other = torch.optim.AdamW(module.parameters(), fused=True)
    checkpoints.load_optimizer(other, tmp_path)
    assert other.state[module.weight]["exp_avg"].stride() == module.weight.stride()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.exp_avg", lambda value: value[:1]),
        ("0.exp_avg_sq", lambda value: value[:, :2]),
        ("0.exp_avg_sq", lambda value: value.long()),
        ("0.exp_avg", lambda value: value * float("nan")),
        ("0.step", lambda value: torch.ones(3)),
        ("0.exp_avg", None),
        ("9.exp_avg", lambda value: torch.ones(3)),
        ("0.other", lambda value: torch.ones(3, 4)),
    ],
)
def test_moments_that_do_not_fit_their_weight_are_refused(tmp_path, name, change):
    """torch's fused optimizers end in a segmentation fault, or read what lies behind them in memory."""
    module = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    checkpoints.save(checkpoints.collect(module, optimizer), tmp_path, tmp_path)
    tensors = load_file(tmp_path / "optimizer.safetensors")
    value = tensors.pop(name, None)
    if change is not None:
        tensors[name] = change(value).contiguous()
    save_file(tensors, tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match="its optimizer"):
        checkpoints.load_optimizer(torch.optim.AdamW(module.parameters(), fused=True), tmp_path)


@pytest.mark.parametrize(
    "values",
    [{"step": "7"}, {"step": -1}, {"step": None}, {"sums": [1]}, {"best": 3}, {"best": {"step": []}}, {"skipped": {}}],
)
def test_a_state_of_other_types_is_refused(values):
    accelerator, state = Accelerator(cpu=True), RunState()
    with pytest.raises((ValueError, TypeError, LookupError)):
        state.load_state_dict(state.state_dict(accelerator) | values, accelerator)


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"step": null}', '{"step": [1]}', "[" * 100_000])
def test_a_checkpoint_that_does_not_say_its_step_is_refused(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match="does not say its step"):
        read_step(tmp_path)
