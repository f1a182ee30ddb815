"""
Runs the code blocks of the README and the docs, page by page and from the first block to the last, at a tiny size: `-m docs`.

Bash itself reads a block, with programs in its path that only note how they were called. What was noted is then run in this
process, in a folder in which everything exists that the page doesn't make itself (`GIVEN`), and shortened by flags
(`SHORTER`); sampling takes eight steps at most.
A block under a comment `<!-- not run: why -->`, and the scripts in tests/benchmarks, are read by their parsers alone.
"""

import argparse
import contextlib
import importlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from test_docs import DOCS, ROOT

from tiny import TINY_NETWORK
from tiny_diffusers import TinyPipeline, cli
from tiny_diffusers.errors import UserError
from tiny_diffusers.flags import FlagParser


pytestmark = pytest.mark.docs

PAGES = ["README.md", *sorted(page.relative_to(ROOT).as_posix() for page in DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>bash|python)\n(?P<code>(?:.*\n)*?)```", re.M
)
PROGRAMS = ("tiny-diffusers", "accelerate", "torchrun", "python", "taskset", "pip", "pytest", "jupyter")
NOTE = r"""#!/bin/bash
[ "$1" = - ] && set -- -c "$(cat)"
printf '%s\0' "${0##*/}" "$@" $'\n' >> "$NOTES"
"""

TRAINING = "--max_train_steps 2 --train_batch_size 4 --max_train_samples 40 --eval_batch_size 20".split()
TRAINING += "--mixed_precision no --num_threads 1".split()
DIFFUSION = [*TRAINING, *TINY_NETWORK, "--ddpm_num_inference_steps", "2"]
SHORTER = {  # script or command -> flags that win over those of the page
    "unconditional": DIFFUSION,
    "conditional": DIFFUSION,
    "consistency": TRAINING,
    "autoencoder": [*TRAINING, "--block_out_channels", "8", "8"],
    "pixelcnn": [*TRAINING, *"--hidden_channels 12 --num_layers 3".split()],
    "vae": [*TRAINING, *"--block_out_channels 8 8 --latent_dim 4".split()],
    "dcgan": [*TRAINING, *"--generator_channels 8 8 --discriminator_channels 8 8 --latent_dim 4".split()],
    "evaluate": "--num_images 20 --features pixels --baselines none --num_jackknife 4 --likelihood_images 4".split(),
}
MNIST = "--dataset_name ylecun/mnist --resolution 32".split()
GIVEN = {  # run -> its script and flags
    "runs/ddpm-digits": ["unconditional"],
    "runs/a": ["unconditional"],
    "runs/b": ["unconditional", "--learning_rate", "1e-4"],
    "runs/c": ["unconditional", "--optimizer", "adamw"],
    "runs/mnist": ["unconditional", *MNIST],
    "runs/mnist-short": ["unconditional", *MNIST],
    "runs/ddpm-mnist": ["unconditional", *MNIST],
    "runs/ddpm-cifar10": ["unconditional", "--dataset_name", "uoft-cs/cifar10"],
    "runs/ddpm-depth": ["unconditional", "--dataset_name", "depth.npz", "--value_range", "0", "65535"],
    "runs/conditional-digits": ["conditional"],
    "runs/conditional-mnist": ["conditional", *MNIST],
    "runs/pixelcnn-mnist": ["pixelcnn", "--dataset_name", "ylecun/mnist"],
    "runs/vae-mnist": ["vae", *MNIST],
    "runs/vae-digits": ["vae"],
    "runs/vae-cifar10": ["vae", "--dataset_name", "uoft-cs/cifar10"],
}


def read_calls(code: str, folder: Path) -> list[list[str]]:
    """Lets bash read a block; returns how it called the programs, each with what it was given as its input."""
    notes, programs = folder / "notes", folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in PROGRAMS:
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)
    notes.write_text("")
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "NOTES": str(notes)}
    subprocess.run(["bash", "-eu", "-c", code], env=environment, check=True)
    return [call.split("\0") for call in notes.read_text().split("\0\n\0")[:-1]]


def make_data(folder: Path) -> None:
    """Writes a small dataset under each name that the pages use, and the pictures that they edit."""
    rng = np.random.default_rng(0)

    def save(name: str, *shape: int) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)

    for i in range(20):
        for split in ("train", "test"):
            save(f"ylecun/mnist/{split}/{i % 10}/{i}.png", 28, 28)
            save(f"uoft-cs/cifar10/{split}/{('cat', 'frog')[i % 2]}/{i}.png", 8, 8, 3)
        save(f"path/to/pets/{('cat', 'dog')[i % 2]}/{i}.png", 40, 48, 3)
        for name in ("images/{}", "photos/{}", "faces/{}", "pairs/photos/{}", "pairs/drawings/{}"):
            save(f"path/to/{name.format(i)}.png", 40, 48, 3)
    faces = [f"{i}.png,{20 + 2 * i},{i % 2}" for i in range(20)]
    (folder / "path/to/faces/metadata.csv").write_text("\n".join(["file_name,age,smiling", *faces]))
    pairs = [f"photos/{i}.png,drawings/{i}.png" for i in range(20)]
    (folder / "path/to/pairs/metadata.csv").write_text("\n".join(["file_name,conditioning_image", *pairs]))
    np.savez(folder / "depth.npz", images=rng.integers(0, 65536, (40, 8, 8)).astype(np.uint16))
    for name, size in (("digit", 32), ("mask", 32), ("16x16", 16), ("small/0", 16)):  # gray
        save(f"{name}.png", size, size)
    for name in ("face", "photo", *(f"samples/{i}" for i in range(20))):
        save(f"{name}.png", *((8, 8, 3) if "/" in name else (32, 32, 3)))


class Page:
    """Folder in which the blocks of one page run."""

    def __init__(self, given: Path, scratch: Path):
        self.given, self.scratch, self.names = given, scratch, {}

    def provide(self, text: str) -> None:
        """Copies the runs and published models to this folder that are mentioned and not there yet."""
        for name in set(re.findall(r"(?<![\w/-])model_cards/[\w-]+", text)):
            if not Path(name).exists():
                shutil.copytree(ROOT / name, name)
        for name, (script, *flags) in GIVEN.items():
            if re.search(rf"(?<!--output_dir )(?<![\w/-]){name}(?![\w-])", text) and not Path(name).exists():
                if not (self.given / name).exists():
                    with contextlib.chdir(self.given):
                        train(script, [*flags, "--output_dir", name])
                shutil.copytree(self.given / name, name)

    def run(self, block: re.Match) -> None:
        is_run = block["reason"] is None
        if block["language"] == "bash":
            for call in read_calls(block["code"], self.scratch):
                if is_run:
                    self.provide(" ".join(call))
                run_call(call, is_run)
        else:
            code = compile(block["code"], "block", "exec")
            if is_run:
                self.provide(block["code"])
                exec(code, self.names)


def run_call(call: list[str], is_run: bool) -> None:
    """Runs what a program was called for, in this process, or lets its parser read the arguments."""
    call = [word for word in call if is_run or word != "..."]
    match call:
        case ["taskset", "-c", _, *call]:
            run_call(call, is_run)
        case ["accelerate", "launch", "--config_file", _, *call] | ["torchrun", "--nproc_per_node", _, *call]:
            run_call(["python", *call], is_run)
        case ["accelerate", "launch", *call]:
            run_call(["python", *call], is_run)
        case ["python", "-m", "tiny_diffusers.cli", *call]:
            run_call(["tiny-diffusers", *call], is_run)
        case ["python", "-c", code]:
            code = compile(code, "input", "exec")
            if is_run:
                exec(code, {})
        case ["python", file, *argv] if file.startswith("train_scripts/"):
            train(Path(file).stem.removeprefix("train_"), argv, is_run)
        case ["python", file, *argv]:
            parse_benchmark(ROOT / file, argv)
        case ["tiny-diffusers", "train", script, *argv]:
            train(script, argv, is_run)
        case ["tiny-diffusers", command, *argv] if is_run:
            assert cli.main([command, *argv, *SHORTER.get(command, [])]) == 0, call
        case ["tiny-diffusers", command, *argv]:
            cli.COMMANDS[command].parser().parse_args(argv)
        case ["pip", "install", *argv]:
            extras = {extra for word in argv for found in re.findall(r"\[(.+)\]", word) for extra in found.split(",")}
            assert (
                extras
                <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
            )
        case _:
            assert call[0] in ("pytest", "mkdocs", "jupyter")


class ParsedError(Exception):
    """The arguments were read, and nothing is to follow."""


def train(script: str, argv: list[str], is_run: bool = True) -> None:
    module = importlib.import_module(f"tiny_diffusers.train_scripts.train_{script}")
    if is_run:
        module.main([*argv, *SHORTER[script]])
        return

    def read(arguments_class, argv, doc=None):
        FlagParser(arguments_class).given(argv)
        raise ParsedError

    with mock.patch.object(module, "parse_arguments", read), pytest.raises(ParsedError):
        module.main(argv)


def parse_benchmark(file: Path, argv: list[str]) -> None:
    """Lets the parser of a script read its arguments: all of them take minutes."""
    parse = argparse.ArgumentParser.parse_known_args

    def read_all(parser, args=None, namespace=None):
        assert parse(parser, args, namespace)[1] == []
        raise ParsedError

    def read_known(parser, args=None, namespace=None):  # a training script takes the rest
        parse(parser, args, namespace)
        raise ParsedError

    with (
        mock.patch.object(sys, "argv", [str(file), *argv]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", read_all),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", read_known),
        pytest.raises(ParsedError),
    ):
        runpy.run_path(str(file), run_name="__main__")


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    make_data(folder)
    return folder


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Samples in no more than eight steps, whatever a page asks for."""
    set_timesteps = TinyPipeline._set_timesteps

    def set_few(self, scheduler, num_inference_steps, timesteps):
        return set_timesteps(self, scheduler, min(num_inference_steps, 8), timesteps)

    monkeypatch.setattr(TinyPipeline, "_set_timesteps", set_few)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, given, tmp_path, monkeypatch):
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for path in (ROOT / "train_scripts", ROOT / "docs", *given.iterdir()):
        if path.name not in ("runs", "model_cards"):
            shutil.copyfile(path, path.name) if path.is_file() else Path(path.name).symlink_to(path)
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(given.parent / "cache"))
    text, here = (ROOT / page).read_text(encoding="utf-8"), Page(given, tmp_path)
    blocks = list(BLOCK.finditer(text))
    assert text.count("<!-- not run:") == sum(block["reason"] is not None for block in blocks)  # each stands above one
    for block in blocks:
        here.run(block)


def test_a_block_is_read_as_bash_reads_it(tmp_path):
    code = "A='x y'; tiny-diffusers plot $A \"$A\" \\\n  '' # no\npip install . && python - <<'END'\nprint()\nEND"
    plot, install, printed = read_calls(code, tmp_path)
    assert plot == ["tiny-diffusers", "plot", "x", "y", "x y", ""] and install == ["pip", "install", "."]
    assert printed == ["python", "-c", "print()"]


@pytest.mark.parametrize(
    "call", [["tiny-diffusers", "sample", "a", "--sed", "1"], ["python", "train_scripts/train_vae.py", "--b"]]
)
def test_a_wrong_flag_is_noticed_where_nothing_is_run(call):
    with pytest.raises(UserError):
        run_call(call, is_run=False)
