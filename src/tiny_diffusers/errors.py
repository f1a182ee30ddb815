"""What a user reads when something asked for cannot be done: one line that names what was given, what is allowed, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked for. Scripts and the command line print it as one line and exit with status 2."""


def unknown(kind: str, given: object, allowed: Iterable[object]) -> UserError:
    """
    The error for a name that is not known.

    Args:
        kind (`str`): What the name stands for, such as `"class"` or `"--loss_type"`.
        given (`object`): The name that was given.
        allowed (`Iterable[object]`): The names that are known.

    Returns:
        [`UserError`]: To be raised by the caller; names the nearest known one where one is near.
    """
    allowed = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"Unknown {kind} '{given}': it must be one of {', '.join(allowed)}.{hint}")
