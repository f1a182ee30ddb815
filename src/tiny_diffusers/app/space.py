"""`tiny-diffusers app --export_space`: a folder that is a Hugging Face Space, which serves the app for given models."""

import base64
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import __name__ as PACKAGE
from ..errors import UserError
from ..files import staging_path
from ..runs import MODEL_INDEX, RunFolder
from .models import Model


# Parts of the package that lie elsewhere in its repository
MAPPED = ("pipelines", "schedulers", "model_cards", "train_scripts")
PINNED = ("gradio", "torch", "diffusers", "transformers", "huggingface_hub")

APP = '''"""Serves the models of this Space with tiny-diffusers."""

import os
import sys
from pathlib import Path

from tiny_diffusers.cli import main


MODELS = {models}

if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"  # a Space is reached from outside its container
    sys.exit(main(["app", *MODELS, "--host", host, *sys.argv[1:]]))
'''

README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
models: {models}
---

{listed}

Made by `tiny-diffusers app --export_space`. It runs on any machine as well: `pip install -r requirements.txt`, then
`python app.py`.
"""


def export_space(models: Sequence[Model], directory: str | Path) -> Path:
    """
    Writes a Space into a new folder: a README.md with its settings, app.py, requirements.txt, a wheel of this package, which
    is on no index yet, and the models' files. Models from the Hub are named instead.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the folder holds something.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--export_space: '{directory}' exists and is no empty folder: name a new one.")
    staging = staging_path(directory)
    staging.mkdir(parents=True)
    try:
        checkpoints = [_lay_out(model, i, staging) for i, model in enumerate(models)]
        wheel = write_wheel(staging)
        versions = {name: importlib.metadata.version(name).partition("+")[0] for name in PINNED}
        pins = "".join(f"{name}=={version}\n" for name, version in versions.items())
        (staging / "requirements.txt").write_text(f"./{wheel.name}\n{pins}", encoding="utf-8")
        (staging / "app.py").write_text(APP.format(models=json.dumps(checkpoints)), encoding="utf-8")
        settings = {
            "title": json.dumps(models[0].name),
            "gradio": versions["gradio"],
            "python": ".".join(platform.python_version_tuple()[:2]),
            "models": json.dumps([model.checkpoint for model in models if model.is_on_hub]),
            "listed": "\n".join(f"- `{checkpoint}`" for checkpoint in checkpoints),
        }
        (staging / "README.md").write_text(README.format(**settings), encoding="utf-8")
        os.replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _lay_out(model: Model, number: int, space: Path) -> str:
    """Copies a model's files into a Space; returns how its app.py names the model."""
    if model.is_on_hub:
        return model.checkpoint
    name = f"models/{number}-{Path(model.checkpoint).resolve().name}"
    for file in RunFolder(model.folder).list_shared():
        target = space / name / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.folder / file, target)
    return name


def write_wheel(folder: Path) -> Path:
    """Packs this package, as it is installed or lies in its repository, into a wheel."""
    distribution = importlib.metadata.distribution(PACKAGE)
    stem = f"{PACKAGE}-{distribution.version}"
    info = f"{stem}.dist-info"
    files = {name: path.read_bytes() for name, path in _package_files()}
    files |= {f"{info}/{name}": distribution.read_text(name).encode() for name in ("METADATA", "entry_points.txt")}
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: app\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def _package_files() -> Iterator[tuple[str, Path]]:
    """Yields the names of the package's files, and where each lies; without the published models."""
    found = {}
    for name in (PACKAGE, *(f"{PACKAGE}.{part}" for part in MAPPED)):
        folder = Path(importlib.import_module(name).__file__).parent
        for path in sorted(folder.rglob("*")):
            is_model = any((parent / MODEL_INDEX).exists() for parent in path.parents)
            if path.suffix in (".py", ".md", ".yaml") and not is_model:
                found[f"{name.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
    yield from found.items()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
