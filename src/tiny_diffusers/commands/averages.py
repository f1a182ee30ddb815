"""`tiny-diffusers ema`."""

import argparse
import shlex
from pathlib import Path

from ..errors import UserError, say
from .shared import load_checkpoint, make_parser, positive_number


def ema_parser() -> argparse.ArgumentParser:
    parser = make_parser("ema")
    parser.add_argument("run", metavar="RUN", type=Path, help="output folder of a run with --posthoc_ema")
    parser.add_argument(
        "--sigma_rel",
        nargs="+",
        type=_length,
        default=[0.05, 0.1, 0.15, 0.2],
        help="lengths of the averages: the standard deviation of the steps that they cover, as a share of all steps, "
        "from above 0 to 0.28 (default: 0.05 0.1 0.15 0.2)",
    )
    parser.add_argument(
        "--step", type=positive_number, metavar="N", help="average up to the snapshot of this step (default: the last)"
    )
    return parser


def ema(args: argparse.Namespace) -> None:
    """Rebuilds each average, and saves it as a pipeline with the settings that `evaluate` finds its real images by."""
    from .. import hub
    from ..paths import kept_paths
    from ..runs import RunFolder
    from ..training import posthoc_ema

    run = RunFolder(args.run)
    snapshots = posthoc_ema.find_snapshots(run, args.step)
    lengths = list(dict.fromkeys(args.sigma_rel))
    targets = {sigma_rel: run.average(sigma_rel, args.step) for sigma_rel in lengths}
    for target in targets.values():
        run.check_average(target)

    # A run that is not finished has no pipeline yet, but its checkpoints are some.
    source = run.path if run.model_index.exists() else run.find_checkpoint("latest")
    if source is None:
        raise UserError(f"{run.path} has no checkpoint yet, which says what the networks are: wait for the first.")
    pipe = load_checkpoint(argparse.Namespace(checkpoint=str(source), trust_remote_code=False))
    modules = {name: part for name, part in pipe.components.items() if hasattr(part, "named_parameters")}
    say(f"rebuilding from {len(snapshots)} snapshots, of steps up to {run.snapshot_step(snapshots[-1]):,} ...")
    for sigma_rel, error in posthoc_ema.rebuild(modules, run, snapshots, lengths):
        target = targets[sigma_rel]
        hub.export(pipe, target)
        folder = RunFolder(target)
        folder.write_config(run.read_config())
        folder.keep_paths(kept_paths(run.path))
        say(f"wrote {target} (its profile over the steps is off by {error:.2%})")
    say("next:")
    for target in targets.values():
        say(f"  {shlex.join(['tiny-diffusers', 'evaluate', str(target)])}")


def _length(text: str) -> float:
    from ..training.posthoc_ema import MAX_SIGMA_REL

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_SIGMA_REL:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0 and up to {MAX_SIGMA_REL}")
    return value
