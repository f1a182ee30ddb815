"""
What a checkpoint holds beside the EMA networks: the networks that are trained, their optimizers, and where the run stands.

Tensors are saved in safetensors, all else in JSON: nothing that is read back can run code. How a checkpoint's folder is
published and found is in `runs.py`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file


# diffusers' name, so that `from_pretrained` reads a checkpoint's networks
WEIGHTS = "diffusion_pytorch_model.safetensors"


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
        """Loads the state; sums of another number of processes are averaged."""
        for f in dataclasses.fields(self):
            setattr(self, f.name, state[f.name])
        self.sums = {}
        for key, (totals, count) in state["sums"].items():
            totals = torch.tensor(totals, device=accelerator.device)  # one for each process
            is_same = len(totals) == accelerator.num_processes
            self.sums[key] = (totals[accelerator.process_index] if is_same else totals.mean(), count)


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


def load_weights(module: torch.nn.Module, folder: Path) -> None:
    """
    Loads a network's weights.

    Raises:
        RuntimeError: If they do not fit this network.
    """
    own = module.state_dict()
    weights = load_file(folder / WEIGHTS)
    if any(hasattr(tensor, "full_tensor") for tensor in own.values()):
        weights = {name: match_layout(value, own[name]) for name, value in weights.items()}
    module.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """
    Loads an optimizer's state. Its hyperparameters stay those of this run: a resumed run may change them.

    Raises:
        ValueError: If another kind of optimizer saved it.
    """
    saved = json.loads((folder / "optimizer.json").read_text())
    state: dict[int, dict] = {}
    for name, value in {**load_file(folder / "optimizer.safetensors"), **saved["scalars"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    own_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    for own, group in zip(own_groups, saved["param_groups"], strict=True):
        if not own.keys() >= group.keys() - {"params"}:
            raise ValueError(f"it was saved by another optimizer than {type(optimizer).__name__}")
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    for own, group in zip(own_groups, optimizer.param_groups, strict=True):
        group.update(own)
    # Fused optimizers need each moment in the memory format of its weight (such as channels-last).
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = match_layout(value, parameter)


def load_lr_scheduler(lr_scheduler: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any]) -> None:
    """Loads where a learning rate schedule stands, and sets the rate to this run's peak rate at that step."""
    base_lrs = lr_scheduler.base_lrs
    lr_scheduler.load_state_dict({**state, "base_lrs": base_lrs})
    rates = [lr * rate(lr_scheduler.last_epoch) for lr, rate in zip(base_lrs, lr_scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates
