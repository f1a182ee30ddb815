"""A checkpoint is whole or it is passed over."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tiny_diffusers.errors import UserError
from tiny_diffusers.training import checkpoints


def write(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_bytes(bytes(range(256)))
    (folder / "state.json").write_text('{"step": 1}')


def publish(output_dir, *steps):
    for step in steps:
        checkpoints.publish(output_dir / f"checkpoint-{step}", write)


def test_latest_is_the_highest_step_not_the_last_name(tmp_path):
    publish(tmp_path, 900, 1000, 50)
    assert checkpoints.find_checkpoint(tmp_path, "latest", print).name == "checkpoint-1000"


def test_none_yet(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path, "latest", print) is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["unet/weights", "state.json", checkpoints.MANIFEST]),
    kind=st.sampled_from(["delete", "truncate", "flip", "empty"]),
    position=st.integers(0, 10),
)
def test_every_kind_of_damage_to_every_file_is_seen(tmp_path_factory, name, kind, position):
    output_dir = tmp_path_factory.mktemp("run")
    publish(output_dir, 1, 2)
    path = output_dir / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        content[position] ^= 0x10
        path.write_bytes(content)
    told = []
    assert checkpoints.find_checkpoint(output_dir, "latest", told.append).name == "checkpoint-1"
    assert len(told) == 1 and "checkpoint-2" in told[0]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    publish(tmp_path, 1)

    def fails(folder):
        (folder / "half").write_text("...")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        checkpoints.publish(tmp_path / "checkpoint-2", fails)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-1"]
    publish(tmp_path, 3)
    checkpoints.prune(tmp_path / "checkpoint-3", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_what_a_kill_between_the_two_renames_left_is_no_obstacle(tmp_path):
    publish(tmp_path, 1)
    old = tmp_path / ".staging-old-checkpoint-1"
    write(old.mkdir() or old)
    publish(tmp_path, 1)  # over the one that is there
    assert checkpoints.damage(tmp_path / "checkpoint-1") is None


def test_a_named_one_that_is_damaged_or_missing_is_refused(tmp_path):
    publish(tmp_path, 1)
    with pytest.raises(UserError, match="checkpoint-1"):
        checkpoints.find_checkpoint(tmp_path, "checkpoint-7", print)
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    with pytest.raises(UserError, match="state.json is missing"):
        checkpoints.find_checkpoint(tmp_path, "checkpoint-1", print)
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        checkpoints.find_checkpoint(tmp_path, "latest", print)


def test_a_manifest_cannot_point_outside(tmp_path):
    publish(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    manifest = tmp_path / "checkpoint-1" / checkpoints.MANIFEST
    manifest.write_text(json.dumps({"../secret": {"size": 1, "sha256": "0"}}))
    assert "outside" in checkpoints.damage(tmp_path / "checkpoint-1")


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    publish(tmp_path, 1, 2, 3, 4)
    checkpoints.prune(tmp_path / "checkpoint-4", 2, keep=tmp_path / "checkpoint-1")
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam]
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


def test_moments_lie_in_memory_as_their_weights_do(tmp_path):
    module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.randn(2, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    checkpoints.save(checkpoints.collect(module, optimizer), tmp_path, tmp_path)
    other = torch.optim.AdamW(module.parameters(), fused=True)
    checkpoints.load_optimizer(other, tmp_path)
    assert other.state[module.weight]["exp_avg"].stride() == module.weight.stride()
