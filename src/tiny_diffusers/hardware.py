"""What this machine has: its device, its physical cores, and the number format that its hardware multiplies fastest."""

import contextlib
import ctypes
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


def dtype_called(name: str, device: torch.device) -> torch.dtype:
    """A number format by its name in torch; `"auto"` is [`default_dtype`]."""
    return default_dtype(device) if name == "auto" else getattr(torch, name)


def keep_freed_memory() -> None:
    """
    Keeps what tensors on the CPU leave behind for the next ones, for the rest of the process. glibc's allocator hands large
    blocks back to the system at once, which then clears each page anew, in every step. Other allocators are left alone.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def compile_failure(device: torch.device) -> str | None:
    """Why `torch.compile` can't work on `device` (no C++ compiler, no Triton, ...), or None where a trial succeeds."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each backend, platform and version of torch has its own
        error = getattr(error, "inner_exception", error)
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
