"""
What a checkpoint holds beside the EMA networks: the networks that are trained, their optimizers, and where the run stands.

Tensors are saved in safetensors, all else in JSON: nothing that is read back can run code. How a checkpoint's folder is
published and found is in `files.py` and `runs.py`.
"""

import dataclasses
import inspect
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from ..errors import UserError
from ..files import load_json, read_text
from ..runs import MAX_STEP


# diffusers' name, so that `from_pretrained` reads a checkpoint's networks
WEIGHTS = "diffusion_pytorch_model.safetensors"


# Types of the state's fields in JSON, where they are not numbers of steps
_STATE_TYPES = {"sums": dict, "best": (dict, type(None))}
_ADAM_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # a number, and two tensors of the weight's shape


@dataclass
class RunState:
    """
    Where a run stands.

    Attributes:
        step (`int`): Optimizer steps taken.
        sums (`dict[str, tuple[torch.Tensor, int]]`): Running (sum, count) of what the next log line averages.
        skipped (`int`): Steps whose loss or gradient was not finite.
        bad_steps (`int`): Those in a row, up to this step.
        best (`dict`, *optional*): Step and loss of the best validation.
        bad_validations (`int`): Validations in a row that did not improve on it.
    """

    step: int = 0
    sums: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    skipped: int = 0
    bad_steps: int = 0
    best: dict[str, float] | None = None
    bad_validations: int = 0

    def add(self, key: str, value: torch.Tensor) -> None:
        """Adds a value to the running sum of `key`."""
        total, count = self.sums.get(key, (0.0, 0))
        self.sums[key] = (total + value.float(), count + 1)

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """Returns the state for JSON. Every process must call it: each has sums over its own images."""
        sums = {key: [accelerator.gather(total.reshape(1)).tolist(), n] for key, (total, n) in self.sums.items()}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"sums": sums}

    def load_state_dict(self, state: dict[str, Any], accelerator: Accelerator) -> None:
        """
        Loads the state; sums of another number of processes are averaged.

        Raises:
            ValueError: If a value has the wrong type.
        """
        for f in dataclasses.fields(self):
            value = state[f.name]
            if f.name not in _STATE_TYPES:
                _check_count(f.name, value)
            elif not isinstance(value, _STATE_TYPES[f.name]):
                raise ValueError(f"{f.name} is {value!r:.40}")
            setattr(self, f.name, value)
        if self.best is not None:
            _check_count("step of the best", self.best["step"])
            self.best = {"step": self.best["step"], "val_loss": float(self.best["val_loss"])}
        self.sums = {}
        for key, (totals, count) in state["sums"].items():
            totals = torch.tensor(totals, device=accelerator.device)  # one for each process
            is_same = len(totals) == accelerator.num_processes
            self.sums[key] = (totals[accelerator.process_index] if is_same else totals.mean(), count)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_STEP:
        raise ValueError(f"{name} is {value!r:.40}")


def read_step(checkpoint: Path) -> int:
    """
    Returns the step of a checkpoint.

    Raises:
        UserError: If its state is damaged.
    """
    try:
        step = load_json(read_text(checkpoint / "state.json"))["step"]
        _check_count("step", step)
        return step
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} does not say its step ({error}); take another."
        ) from error


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the full tensor; one that FSDP has sharded is gathered, for which every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def match_layout(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Copies `value` to the device, memory format and sharding of `tensor`."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    return torch.empty_like(tensor).copy_(value)


def collect(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Collects what [`save`] writes of a network and its optimizer, on the CPU. Every process must call it."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = gather_full(value.detach()).contiguous().cpu()
            else:
                scalars[f"{index}.{key}"] = value
    groups = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
    weights = {name: gather_full(value.detach()).contiguous().cpu() for name, value in module.state_dict().items()}
    return {"weights": weights, "tensors": tensors, "rest": {"scalars": scalars, "param_groups": groups}}


def save(collected: dict[str, Any], network: Path, optimizer: Path) -> None:
    """Writes what [`collect`] returned into two folders: tensors in safetensors, hyperparameters in JSON."""
    for folder in (network, optimizer):
        folder.mkdir(parents=True, exist_ok=True)
    save_file(collected["weights"], network / WEIGHTS, metadata={"format": "pt"})
    save_file(collected["tensors"], optimizer / "optimizer.safetensors")
    (optimizer / "optimizer.json").write_text(json.dumps(collected["rest"]))


def check_config(network: ModelMixin, folder: Path, measured: Collection[str] = ()) -> None:
    """
    Checks that a saved network has the same options as this one, dropout aside: the weights of some others fit it as well.

    Args:
        network (`ModelMixin`): This network.
        folder (`Path`): The saved one's. Without a config, nothing is checked.
        measured (`Collection[str]`): Options that may differ, as they were measured rather than chosen.

    Raises:
        ValueError: If they differ; it names each option.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    saved, own = load_json(read_text(path)), json.loads(network.to_json_string())
    defaults = inspect.signature(type(network).__init__).parameters  # of options that an older network lacks
    before = {
        name: saved[name] if name in saved else json.loads(json.dumps(defaults[name].default))
        for name in own
        if name in defaults
    }
    differing = [
        f"{name} {before[name]}, not {own[name]}"
        for name in before.keys() - {"dropout", *measured}
        if before[name] != own[name]
    ]
    if differing:
        raise ValueError(f"its {folder.name} has {', '.join(sorted(differing))}")


def load_weights(module: torch.nn.Module, folder: Path) -> None:
    """
    Loads a network's weights.

    Raises:
        RuntimeError: If they do not fit this network.
    """
    own = module.state_dict()
    weights = load_file(folder / WEIGHTS)
    damaged = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if damaged:
        raise RuntimeError(f"{folder.name} has values that are not finite in {damaged[0]}")
    if any(hasattr(tensor, "full_tensor") for tensor in own.values()):
        weights = {name: match_layout(value, own[name]) for name, value in weights.items()}
    module.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """
    Loads an optimizer's state. Its hyperparameters stay those of this run: a resumed run may change them.

    Raises:
        ValueError: If another kind of optimizer saved it, or if a tensor is not as its weight needs it: torch's fused
            optimizers check nothing, and would read beyond its end.
    """
    saved = load_json(read_text(folder / "optimizer.json"))
    state: dict[int, dict] = {}
    for name, value in {**load_file(folder / "optimizer.safetensors"), **saved["scalars"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    own_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    groups = saved["param_groups"]
    is_same = len(own_groups) == len(groups) and all(
        own.keys() >= group.keys() - {"params"} for own, group in zip(own_groups, groups, strict=True)
    )
    if not is_same:
        raise ValueError(f"it was saved by another optimizer than {type(optimizer).__name__}")
    if [group["params"] for group in groups] != [group["params"] for group in optimizer.state_dict()["param_groups"]]:
        raise ValueError("its optimizer's weights have another order")
    _check_moments(state, optimizer)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for own, group in zip(own_groups, optimizer.param_groups, strict=True):
        group.update(own)
    # Fused optimizers need each moment in the memory format of its weight (such as channels-last).
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = match_layout(value, parameter)


def _check_moments(state: dict[int, dict], optimizer: torch.optim.Optimizer) -> None:
    """
    Checks the saved state: that all weights have one or none has, its names, shapes, dtypes, and that all values are
    finite, those of squares positive, and those of steps numbers of steps.
    """
    parameters, moments = [], []
    for group in optimizer.param_groups:
        parameters += group["params"]
        moments += [{"momentum_buffer"} if "momentum" in group else _ADAM_MOMENTS] * len(group["params"])
    for index, entries in state.items():
        if not 0 <= index < len(parameters) or entries.keys() != moments[index]:
            raise ValueError(f"its optimizer's state {index} has {', '.join(entries)}")
        for name, value in entries.items():
            value = torch.as_tensor(value)
            shape = () if name == "step" else parameters[index].shape
            lowest = {"step": 1, "exp_avg_sq": 0}.get(name, -math.inf)
            in_range = torch.isfinite(value).all() and (value >= lowest).all()
            if value.shape != shape or not value.is_floating_point() or not in_range:
                raise ValueError(
                    f"{index}.{name} of its optimizer is {value.dtype} of shape {tuple(value.shape)}, or out of range; its "
                    f"weight has {tuple(parameters[index].shape)}"
                )
    if state and len(state) != len(parameters):
        raise ValueError(f"its optimizer has a state for {len(state)} of {len(parameters)} weights")


def set_lr_step(lr_scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Sets a learning rate schedule to where it stands after `step` steps: this run's peak rate, as it is then."""
    lr_scheduler.last_epoch, lr_scheduler._step_count = step, step + 1
    base_lrs = lr_scheduler.base_lrs
    rates = [lr * rate(step) for lr, rate in zip(base_lrs, lr_scheduler.lr_lambdas, strict=True)]
    lr_scheduler._last_lr = rates
    for group, rate in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates
