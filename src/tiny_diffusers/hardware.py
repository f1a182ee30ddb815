"""The machine: its device, its physical cores, the dtype that it multiplies fastest, and how torch is set up for it."""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from .errors import UserError, first_line


_SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch and torchrun


def default_device() -> torch.device:
    """Returns the accelerator that torch finds (CUDA, MPS, XPU, ...), or else the CPU."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type)
    return torch.device("cpu")


def processor_name() -> str:
    """Returns the name of the processor, if the system tells."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return next(
                line.partition(":")[2].strip() for line in [*lines, ":"] if line.startswith(("model name", ":"))
            )
        if sys.platform == "darwin":
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor()


def machine_name(device: torch.device) -> str:
    """Returns the name of what computes on a device: of the GPU, or of the processor."""
    return device_name(device) if device.type == "cuda" else processor_name()


def device_name(device: torch.device) -> str:
    """Returns the name of an NVIDIA GPU, or the type of any other device, such as `"cpu"`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def physical_cores() -> int:
    """
    Counts the physical cores that this process may run on: hyper-threads slow convolutions down.

    On Linux they are counted from the CPU topology, within the process's affinity mask; elsewhere by psutil.
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
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def memory_limit() -> int:
    """Returns the bytes of memory that this process may take: the machine's, or those of its control group on Linux."""
    import psutil

    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for _, controllers, path in groups:
            root, name = Path("/sys/fs/cgroup"), "memory.max"  # version 2, whose line names no controller
            if controllers:
                root, name = root / "memory", "memory.limit_in_bytes"
            parts = path.strip("/").split("/")
            for folder in (
                root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)
            ):  # each limits those below
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    limits.append(int((folder / name).read_text()))
    return min(limits)


def default_dtype(device: torch.device) -> torch.dtype:
    """
    Returns bfloat16 if `device` has it in hardware (AMX or AVX512-BF16 on a CPU, a GPU of compute capability 8.0 or
    more), else float32. Emulated bfloat16 is slower than float32.

    It is the dtype of sampling: the same images come from the same command. Long trainings on a CPU that has bfloat16
    measure whether it is faster (`training/precision.py`).
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


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of that name in torch; `"auto"` is [`default_dtype`]."""
    return default_dtype(device) if name == "auto" else getattr(torch, name)


def default_num_threads() -> int:
    """
    Returns the CPU threads of this process: those of `OMP_NUM_THREADS` where the user set it, else the physical cores,
    shared by the local processes.

    accelerate's launcher and torchrun set `OMP_NUM_THREADS=1` where the user did not, which would leave all cores but one
    idle. So a 1 in a process that they started stands for no number.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given and not (given == "1" and any(name in os.environ for name in _SET_BY_LAUNCHERS)):
        return torch.get_num_threads()  # torch has read the variable
    return max(1, physical_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def setup_torch(num_threads: int | None = None, device: str | None = None) -> torch.device:
    """
    Sets up torch in this process: its CPU threads, its memory allocator, its device.

    Args:
        num_threads (`int`, *optional*): CPU threads; [`default_num_threads`] if not given.
        device (`str`, *optional*): Such as `"cuda:1"`; the accelerator if there is one, else the CPU, if not given.

    Returns:
        `torch.device`: The device; one that was named is known to work.

    Raises:
        UserError: If the device cannot be used, or has fewer units than there are processes on this machine.
    """
    torch.set_num_threads(num_threads or default_num_threads())
    try:
        chosen = torch.device(device) if device else default_device()
        if device:
            torch.empty(1, device=chosen)  # not otherwise: each process of a launch has an accelerator of its own
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"The device '{device}' can't be used here: {first_line(error)}") from error
    if chosen.type == "cpu":
        keep_freed_memory()
    elif not device and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.accelerator.device_count()
        if processes > devices:
            raise UserError(
                f"{processes} processes were started on this machine, which has {devices} of the device {chosen.type}: "
                "start one for each. With CUDA_VISIBLE_DEVICES= before the command, they compute on the CPU."
            )
    return chosen


def keep_freed_memory() -> None:
    """
    Makes glibc's allocator keep freed memory for the rest of the process. By default it returns large blocks to the
    system, which clears every page again in each step. Other allocators are left alone.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def release_memory() -> None:
    """Returns the memory of an accelerator that this process no longer uses, for other processes."""
    if torch.accelerator.is_available():
        gc.collect()
        torch.get_device_module().empty_cache()


def last_barrier(group: "torch.distributed.ProcessGroup | None" = None) -> None:
    """
    Waits for all processes of a gloo group that is about to be destroyed; the default one if none is given.

    Threads of gloo free the work that is done, for which they need the GIL. Whoever frees the group, such as a network in
    data parallel, holds the GIL and waits for these threads: now and then for ever. So the last work is kept.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_backend(group) == "gloo":
            work = torch.distributed.barrier(group, async_op=True)
            work.wait()
            _last_work.append(work)


_last_work: "list[torch.distributed.Work]" = []


def compile_failure(device: torch.device) -> str | None:
    """
    Returns why the networks are not compiled on `device`, or None if they can be.

    On a CPU `torch.compile` gains nothing (docs/speed.md); elsewhere a trial shows whether a compiler is missing.
    """
    if device.type == "cpu":
        return "on a CPU it gains nothing"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each backend, platform and version of torch has its own
        return first_line(getattr(error, "inner_exception", error))
    return None
