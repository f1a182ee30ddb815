"""
Kills a training process (SIGKILL) at random moments, resumes it each time, and compares the end with an uninterrupted
run: log, weights, EMA, optimizer, samples, to the bit.

    python tests/benchmarks/kill_harness.py                           # 30 kills, 10 or more of them inside a write
    python tests/benchmarks/kill_harness.py --kills 3 --inside 1      # what the test suite runs

A third of the kills come at a random moment of the start, a third at a random moment of the training, and a third
while a checkpoint is being written. Needs os.fork, so no Windows: each start is a fork after the imports, which take
most of the time.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiny_diffusers.models.unet_tiny  # noqa: F401  imported before the forks
from tiny_diffusers import hub, plots  # noqa: F401
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
    *("--save_images_epochs", "2", "--mixed_precision", "no", "--num_threads", "1"),
]


def start(folder: Path, steps: int) -> int:
    """Starts a training process and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    settings = [*SETTINGS, "--max_train_steps", str(steps), "--output_dir", str(folder)]
    status = 1
    try:
        status = launch(lambda: train_unconditional.main([*settings, "--resume_from_checkpoint", "latest"]))
    finally:
        os._exit(status)


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
    pid = start(folder, steps)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--inside", type=int, default=10, help="least number of kills inside a write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    random.seed(args.seed)
    steps = STEPS_A_KILL * args.kills

    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root, "whole"), Path(root, "killed")
        if os.waitpid(start(whole, steps), 0)[1]:
            print(whole.with_suffix(".out").read_text())
            return 1

        moments = []
        while len(moments) < args.kills or moments.count("inside a write") < args.inside:
            kind = ("write", "training", "start")[len(moments) % 3]
            if moments.count("inside a write") < args.inside and len(moments) >= args.kills:
                kind = "write"
            moment = kill_once(killed, steps, kind)
            if moment is None:
                print("the run ended before the last kill: increase STEPS_A_KILL, or give fewer --kills.")
                return 1
            moments.append(moment)
            newest = RunFolder(killed).find_checkpoint("latest")
            lines = len((killed / "train_log.jsonl").read_text().splitlines()) if newest else 0
            print(f"kill {len(moments):2}, {moment}: {newest.name if newest else 'no checkpoint yet'}, {lines} lines")

        status = os.waitpid(start(killed, steps), 0)[1]
        differ = differences(whole, killed)
        if status or differ:
            print(killed.with_suffix(".out").read_text())
    print(f"{len(moments)} kills: " + ", ".join(f"{moments.count(kind)} {kind}" for kind in sorted(set(moments))))
    print(f"exit status {status}; files that differ from the uninterrupted run: {', '.join(differ) or 'none'}")
    return int(bool(status or differ))


if __name__ == "__main__":
    sys.exit(main())
