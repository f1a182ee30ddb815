"""The one rule for progress bars."""

import sys
from typing import Any

from tqdm.auto import tqdm


def bar_options() -> dict[str, Any]:
    """Returns tqdm's options for a bar that is redrawn twice a second on a terminal and every 15 seconds in a log."""
    return {"mininterval": 0.5 if sys.stderr.isatty() else 15, "dynamic_ncols": True}


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """Returns tqdm's bar, redrawn by the one rule."""
    return tqdm(*args, **bar_options(), **kwargs)
