"""What this machine has: its device, its physical cores, and the number format that its hardware multiplies fastest."""

import os
import sys
from pathlib import Path

import torch


def default_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU, ...), or else the CPU."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type)
    return torch.device("cpu")


def physical_cores() -> int:
    """
    The physical cores that this process may run on; hyper-threads only get in each other's way in convolutions.

    Counted from Linux's topology within the process's affinity mask; elsewhere from psutil where it is installed
    (accelerate depends on it), and else all logical processors.
    """
    if sys.platform == "linux":
        topology = Path("/sys/devices/system/cpu")
        cores = set()
        for cpu in os.sched_getaffinity(0):
            try:
                siblings = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text()
            except OSError:
                siblings = str(cpu)
            cores.add(siblings)
        return len(cores)
    try:
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    except ImportError:
        return os.cpu_count() or 1


def default_dtype(device: torch.device) -> torch.dtype:
    """
    bfloat16 where `device` has it in hardware (AMX or AVX512-BF16 on a CPU, a GPU of compute capability 8.0 or
    more), float32 elsewhere. Emulated bfloat16 is slower than float32, so support alone is not enough.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu":
        has_bfloat16 = (
            getattr(torch.cpu, "_is_amx_tile_supported", bool)()
            or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        )
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.float32
