"""`tiny-diffusers doctor`."""

import argparse
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import install_command, say
from .shared import make_parser


if TYPE_CHECKING:
    from packaging.requirements import Requirement


PACKAGE = "tiny-diffusers"


def doctor_parser() -> argparse.ArgumentParser:
    return make_parser("doctor")


def doctor(args: argparse.Namespace) -> int:
    """Prints the machine, the versions and what is missing, as a Markdown table; returns 1 if a requirement is not met."""
    rows, is_unmet = _machine(), False
    for extra, requirements in _requirements().items():
        if extra is None:
            rows += [(requirement.name, _state(requirement)) for requirement in requirements]
            is_unmet = not all(map(_is_met, requirements))
            continue
        unmet = ", ".join(f"{part.name} {_state(part)}" for part in requirements if not _is_met(part))
        repair = f"{unmet}; {install_command(extra)}"
        rows.append((f"extra [{extra}]", repair if unmet else "installed"))
    say("\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]))
    return 1 if is_unmet else 0


def _requirements() -> dict[str | None, list["Requirement"]]:
    """Returns the packages that this machine needs, by None, and those that each extra adds, by its name."""
    from packaging.requirements import Requirement

    extras = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or ()
    found = {None: [], **{extra: [] for extra in extras}}
    for requirement in map(Requirement, importlib.metadata.requires(PACKAGE) or ()):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found[None].append(requirement)
        elif requirement.name != PACKAGE:  # an extra that takes another one
            for extra in extras:
                if marker.evaluate({"extra": extra}):
                    found[extra].append(requirement)
    return found


def _version(requirement: "Requirement") -> str | None:
    try:
        return importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_met(requirement: "Requirement") -> bool:
    version = _version(requirement)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _state(requirement: "Requirement") -> str:
    """Returns the version of a package, and what is wrong with it."""
    needed = f" ({requirement.specifier} is needed)" if requirement.specifier and not _is_met(requirement) else ""
    return (_version(requirement) or "is missing") + needed


def _machine() -> list[tuple[str, str]]:
    """Returns what a run depends on beside the packages."""
    import psutil

    from .. import __version__, hardware
    from ..data import cache_root

    device = hardware.default_device()
    dtype = str(hardware.default_dtype(device)).removeprefix("torch.")
    if device.type == "cpu" and dtype == "bfloat16":
        dtype += " (in a long training, if it is measured to be faster)"
    memory = psutil.virtual_memory().total / 2**30
    cache = cache_root()
    cached = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.is_dir() else 0
    home = str(Path.home())
    return [
        (PACKAGE, __version__),
        ("system", f"{platform.platform()}, Python {platform.python_version()}"),
        (
            "processor",
            f"{hardware.processor_name()}, physical cores: {hardware.physical_cores()}, memory: {memory:.1f} GiB",
        ),
        ("device", f"{hardware.device_name(device)}, {dtype}, threads: {hardware.default_num_threads()}"),
        ("cache of images and features", f"{str(cache).replace(home, '~', 1)}, {cached / 2**20:,.0f} MiB"),
    ]
