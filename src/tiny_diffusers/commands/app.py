"""`tiny-diffusers app`."""

import argparse
import os
import sys
from pathlib import Path

from ..errors import not_installed, say
from .shared import CHECKPOINT_HELP, checkpoint_name, make_parser, positive_number


def app_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "app", "Serves a web page to sample from checkpoints, interpolate and edit images, on this machine only."
    )
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        type=checkpoint_name,
        nargs="*",
        help=f"{CHECKPOINT_HELP} (default: all of those that are here)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=port_number, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="open a public link as well; give --auth with it")
    parser.add_argument(
        "--auth", type=user_and_password, metavar="USER:PASSWORD", help="the login that the page asks for"
    )
    parser.add_argument(
        *("--queue_size", "--queue-size"),
        type=positive_number,
        default=20,
        help="maximum number of waiting requests; others are refused (default: 20)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dataset_name",
        help="training images in which the page finds those nearest to a sample: a Hub id, a folder, or digits "
        "(default: digits, or the training images of a run on this machine)",
    )
    parser.add_argument(
        *("--export_space", "--export-space"),
        type=Path,
        metavar="DIR",
        help="write the app as a Hugging Face Space into a new folder instead, which `tiny-diffusers push` can push",
    )
    return parser


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port from 1 to 65535")
    return int(text)


def user_and_password(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and password):
        raise argparse.ArgumentTypeError("give USER:PASSWORD")
    return user, password


def app(args: argparse.Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        from ..app import models, server
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise not_installed("Gradio, which the app needs,", "app") from error

    listed = models.list_models(args.checkpoints or models.published_checkpoints())
    if args.export_space is not None:
        from ..app.space import export_space

        say(f"wrote the Space {export_space(listed, args.export_space)}")
        return
    if args.share and args.auth is None:
        say("warning: --share without --auth: whoever has the link can use this machine", sys.stderr)
    elif args.host not in ("127.0.0.1", "localhost") and args.auth is None and "SPACE_ID" not in os.environ:
        say(f"warning: --host {args.host} without --auth: whoever reaches it can use this machine", sys.stderr)
    page = server.launch(
        *(listed, args.host, args.port, args.share, args.auth, args.queue_size, args.device, args.dataset_name),
        block=False,
    )
    say(f"{page.local_url} (Ctrl-C ends it)")
    if page.share_url:
        say(page.share_url)
    page.block_thread()
