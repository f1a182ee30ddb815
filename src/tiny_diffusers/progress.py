"""The one rule for progress bars."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """Returns tqdm's bar, redrawn twice a second on a terminal and every 15 seconds in a log."""
    return tqdm(*args, mininterval=0.5 if sys.stderr.isatty() else 15, dynamic_ncols=True, **kwargs)
