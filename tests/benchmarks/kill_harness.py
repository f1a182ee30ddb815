"""
Kills work (SIGKILL) at random moments, does it again each time, and compares the end with work left alone.

    python tests/benchmarks/kill_harness.py                           # 30 kills of each: training, evaluation, data, export
    python tests/benchmarks/kill_harness.py --work training --kills 3 --inside 1      # what the test suite runs

Of training a third of the kills come at a random moment of the start, a third at a random moment later, and a third while
a checkpoint is being written; log, weights, EMA, snapshots, optimizer and samples must be equal to the bit. Other work is
killed at any moment of its duration; the report, the decoded images or the exported model must be equal to the byte.
Needs os.fork, so no Windows: each start is a fork after the imports, which take most of the time.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure  # noqa: F401  imported before the forks, as the three below
import numpy as np
import sklearn.datasets  # noqa: F401
from PIL import Image

import tiny_diffusers.models.unet_tiny  # noqa: F401
from tiny_diffusers import TinyDDIMScheduler, TinyPipeline, TinyUNet2DModel, cli, hub, plots  # noqa: F401
from tiny_diffusers.data import load_images
from tiny_diffusers.evaluation import evaluator  # noqa: F401
from tiny_diffusers.files import STAGING
from tiny_diffusers.pipelines import pipeline_tiny  # noqa: F401
from tiny_diffusers.runs import RunFolder
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training.process import launch


STEPS_A_KILL = 8
SETTINGS = [
    *("--block_out_channels", "8", "8", "--norm_num_groups", "4", "--attention", "none", "--mid_attention", "none"),
    *("--layers_per_block", "1", "--dropout", "0.1", "--random_flip", "--max_train_samples", "64"),
    *("--train_batch_size", "8", "--eval_batch_size", "4", "--ddpm_num_inference_steps", "2"),
    *("--checkpointing_steps", "4", "--checkpoints_total_limit", "1", "--logging_steps", "3"),
    *("--posthoc_ema", "--save_images_epochs", "2", "--mixed_precision", "no", "--num_threads", "1"),
]


def start(work: Callable[[], int | None], log: Path) -> int:
    """Starts work in a process of its own and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        status = work() or 0
    finally:
        os._exit(status)


def start_training(folder: Path, steps: int) -> int:
    settings = [*SETTINGS, "--max_train_steps", str(steps), "--output_dir", str(folder)]
    arguments = [*settings, "--resume_from_checkpoint", "latest"]
    return start(lambda: launch(lambda: train_unconditional.main(arguments)), folder.with_suffix(".out"))


def runs_until(pid: int, condition: Callable[[], bool]) -> bool:
    """Waits for `condition`; returns whether the process is still running."""
    while not condition():
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    return True


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def is_writing(folder: Path) -> bool:
    return any(folder.glob(f"{STAGING}checkpoint-*"))


def kill_once(folder: Path, steps: int, kind: str) -> str | None:
    """Starts the run and kills it at a random moment of this kind; returns the kind, or None if the run had ended."""
    pid = start_training(folder, steps)
    log = folder / "train_log.jsonl"
    began, resumed = time.perf_counter(), log.stat().st_size if log.exists() else 0
    if kind == "start":
        moment = random.uniform(0, 0.6)
        alive = runs_until(pid, lambda: time.perf_counter() - began > moment)
    elif kind == "training":
        moment = random.uniform(0, 0.2)
        alive = runs_until(pid, lambda: log.exists() and log.stat().st_size > resumed + 10)
        time.sleep(moment)
    else:
        # Leftovers of an earlier kill are not written by this run.
        left = {path: path.stat().st_ino for path in folder.glob(f"{STAGING}checkpoint-*")}
        alive = runs_until(
            pid,
            lambda: any(left.get(path) != _inode(path) for path in folder.glob(f"{STAGING}checkpoint-*")),
        )
        time.sleep(random.uniform(0, 0.02))
    if not alive:
        return None
    kill(pid)
    return "inside a write" if kind == "write" and is_writing(folder) else kind


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:  # published at this very moment
        return None


def differences(one: Path, other: Path) -> list[str]:
    """Lists the files that differ between two runs or are in one only, except those that contain the folder's name."""
    files = sorted(
        {
            path.relative_to(run)
            for run in (one, other)
            for pattern in ("**/*.safetensors", "**/state.json", "**/optimizer.json", "train_log.jsonl", "**/*.png")
            for path in run.glob(pattern)
        }
    )
    return [
        str(name)
        for name in files
        if not (one / name).exists()
        or not (other / name).exists()
        or (one / name).read_bytes() != (other / name).read_bytes()
    ]


def kill_training(kills: int, inside: int, root: Path) -> int:
    """Kills a training run, resumes it, and returns 1 if its end differs from that of an uninterrupted one."""
    steps = STEPS_A_KILL * kills
    whole, killed = root / "whole", root / "killed"
    if os.waitpid(start_training(whole, steps), 0)[1]:
        print(whole.with_suffix(".out").read_text())
        return 1

    moments = []
    while len(moments) < kills or moments.count("inside a write") < inside:
        kind = ("write", "training", "start")[len(moments) % 3]
        if moments.count("inside a write") < inside and len(moments) >= kills:
            kind = "write"
        moment = kill_once(killed, steps, kind)
        if moment is None:
            print("the run ended before the last kill: increase STEPS_A_KILL, or give fewer --kills.")
            return 1
        moments.append(moment)
        newest = RunFolder(killed).find_checkpoint("latest")
        lines = len((killed / "train_log.jsonl").read_text().splitlines()) if newest else 0
        print(f"kill {len(moments):2}, {moment}: {newest.name if newest else 'no checkpoint yet'}, {lines} lines")

    status = os.waitpid(start_training(killed, steps), 0)[1]
    differ = differences(whole, killed)
    if status or differ:
        print(killed.with_suffix(".out").read_text())
    print(f"{len(moments)} kills: " + ", ".join(f"{moments.count(kind)} {kind}" for kind in sorted(set(moments))))
    print(f"exit status {status}; files that differ from the uninterrupted run: {', '.join(differ) or 'none'}")
    return int(bool(status or differ))


class Job(NamedTuple):
    """Work whose result is a folder of files."""

    name: str
    run: Callable[[Path], int | None]  # does the work in a folder; returns an exit status
    results: Callable[[Path], dict]  # reads the result from that folder, name -> content


def files(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Reads the files that match, but those in leftovers, which later writers delete after an hour."""
    paths = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if STAGING not in str(path)}


def jobs(root: Path) -> list[Job]:
    """Prepares a checkpoint and a folder of images; returns the work to be done with them."""
    unet = TinyUNet2DModel(sample_size=8, in_channels=1, block_out_channels=(8, 8), norm_num_groups=4)
    checkpoint = hub.export(TinyPipeline(unet, TinyDDIMScheduler()), root / "checkpoint")
    (root / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(root / "images" / f"{number:03}.png")

    def evaluate(folder: Path) -> int:
        os.environ["TINY_DIFFUSERS_CACHE"] = str(folder / "cache")
        options = ["--num_images", "64", "--batch_size", "8", "--num_inference_steps", "8", "--features", "pixels"]
        return cli.main(
            ["evaluate", str(checkpoint), "--dataset_name", "digits", *options, "--output", str(folder / "report")]
        )

    def read_report(folder: Path) -> dict:
        report = json.loads((folder / "report" / "report.json").read_text())
        return {name: report[name] for name in ("metrics", "baselines") if name in report}

    def load(folder: Path) -> None:
        load_images(train_data_dir=root / "images", cache_dir=folder)

    def export(folder: Path) -> int:
        return cli.main(["export", str(checkpoint), str(folder / "exported")])

    return [
        Job("evaluation", evaluate, read_report),
        Job("data", load, lambda folder: files(folder, "tiny_diffusers/*/*")),
        Job("export", export, lambda folder: files(folder, "exported/**/*")),
    ]


def kill_job(job: Job, kills: int, root: Path) -> int:
    """Kills work at random moments, does it again, and returns 1 if its result differs from that of work left alone."""
    whole, log = root / f"{job.name}-whole", root / f"{job.name}.out"
    whole.mkdir()
    began = time.perf_counter()
    status = os.waitpid(start(lambda: job.run(whole), log), 0)[1]
    duration, expected = time.perf_counter() - began, job.results(whole)
    done = ended = differ = 0
    folder = root / f"{job.name}-killed"
    while done < kills and not status:
        folder.mkdir(exist_ok=True)
        moment, began = random.uniform(0, 1.1 * duration), time.perf_counter()
        pid = start(lambda: job.run(folder), log)
        if runs_until(pid, lambda moment=moment, began=began: time.perf_counter() - began > moment):
            kill(pid)
            done += 1
        else:
            ended += 1
        if done % 5 == 0 or done == kills:  # it is left alone, and has to end well
            finished = job.name == "export" and (folder / "exported" / "model_index.json").exists()
            status = 0 if finished else os.waitpid(start(lambda: job.run(folder), log), 0)[1]
            differ += bool(status) or job.results(folder) != expected
            shutil.rmtree(folder)
    if status or differ:
        print(log.read_text())
    print(f"{job.name}: {done} kills, {ended} ended before; results that differ: {differ}")
    return int(bool(status or differ))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    names = ("training", "evaluation", "data", "export")
    parser.add_argument("--work", nargs="+", choices=names, default=names)
    parser.add_argument("--kills", type=int, default=30, help="of each kind of work")
    parser.add_argument(
        "--inside", type=int, default=10, help="least number of kills inside the write of a checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        failed = kill_training(args.kills, args.inside, root) if "training" in args.work else 0
        for job in jobs(root) if set(args.work) - {"training"} else []:
            if job.name in args.work:
                failed += kill_job(job, args.kills, root)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
