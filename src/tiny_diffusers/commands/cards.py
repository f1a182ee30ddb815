"""`tiny-diffusers card`."""

import argparse
from typing import TYPE_CHECKING

from ..errors import UserError, say, unknown
from .shared import add_checkpoint_argument, load_checkpoint, make_parser


if TYPE_CHECKING:
    from ..evaluation.report import Report


def card_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "card",
        description="Writes the model card, README.md, from the files of the folder: the model and how to load it, "
        "the command and the settings of its training, its data, and the metrics of a report. Text that "
        "you added outside of the marked parts of the card is kept, and so is metadata that you added.",
    )
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--report",
        metavar="NAME",
        help="show the report of reports/NAME (default: the published one, or the only one)",
    )
    return parser


def card(args: argparse.Namespace) -> None:
    from .. import cards, zoo
    from ..evaluation.report import Report
    from ..runs import MODEL_INDEX, RunFolder

    folder = RunFolder(args.checkpoint)
    if not folder.model_index.is_file():
        raise UserError(f"'{args.checkpoint}' has no {MODEL_INDEX}: give the folder of a run, or of a saved pipeline.")
    if zoo.is_installed(args.checkpoint):
        raise UserError(f"'{folder.path.name}' is published with the package, as its card is: write that of a copy.")
    names = sorted(path.parent.name for path in folder.reports.glob("*/report.json"))
    if args.report is not None and args.report not in names:
        raise (
            unknown(f"report in {folder.reports}", args.report, names)
            if names
            else UserError(
                f"--report {args.report}: {folder.path} has no reports; `tiny-diffusers evaluate {folder.path}` writes one."
            )
        )
    name = args.report or (folder.find_report().parent.name if names else None)
    report = None if name is None else Report.load(folder.reports / name)
    if report is not None:
        _check_weights(report, args, name)

    settings, facts = folder.read_config(), folder.read_facts()
    path = cards.write_card(
        folder.path,
        model_name=settings.get("hub_model_id") or folder.path.resolve().name,
        command=facts.get("command"),
        settings=settings,
        data=facts.get("data"),
        hub_model_id=settings.get("hub_model_id"),
        license=settings.get("license"),
        base_model=settings.get("pretrained_model_name_or_path"),
    )
    if report is not None:
        folder.publish_report(name)
        cards.add_results(folder.path, report, name)
    say(f"{path}, {'without a report' if report is None else f'with the report {name}'}")


def _check_weights(report: "Report", args: argparse.Namespace, name: str) -> None:
    """Checks that a report measured the weights that the checkpoint holds: a resumed run has others."""
    import torch

    from ..evaluation.features import digest

    pipe, dtype = load_checkpoint(args), getattr(torch, str(report.source.get("dtype")), None)
    networks = {part: value for part, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    if isinstance(dtype, torch.dtype):
        pipe.to(dtype)  # that they were measured in
    if report.source.get("weights_sha256") != {part: digest(network) for part, network in networks.items()}:
        raise UserError(
            f"The report {name} measured other weights than '{args.checkpoint}' has now: evaluate again, by "
            f"`tiny-diffusers evaluate --from_report {args.checkpoint}/reports/{name} --name NAME`."
        )
