"""
What fits into `--max_train_minutes`. The minutes are those that a user waits: from the start of the command, without
Python's imports, to the saved model.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


# Shares of the minutes
TRIAL_SHARE, MAX_TRIAL_SECONDS = 0.05, 30.0  # of the trial steps, which are undone
FIRST_STEP_SHARE = 0.2  # a first step, which fills caches, counts alone if it takes longer
VALIDATION_SHARE = 0.01  # of one validation in about twenty, if the number of its images is open
GRID_SHARE = 0.01  # of one sample grid in about ten, if the number of its images is open
_SPARE_SHARE = 0.03  # of checkpoints, snapshots, logs and what was not foreseen

_FINISH_SECONDS = 3.0  # the saved pipeline, the loss curves, the card
_GRACE_SHARE, _GRACE_SECONDS = 0.05, 10.0  # that a run may take longer before it is cut short
_UNUSED_SHARE = 0.2  # that a run may leave over before it is worth a word


@dataclass
class TimePlan:
    """
    The times of a run, in seconds.

    Attributes:
        total (`float`): From the start of the command to the saved model.
        step (`float`), validation (`float`), grid (`float`), last_grid (`float`): One of each.
        measurement (`float`): What is measured on training images before the model is saved.
    """

    total: float
    step: float
    validation: float
    grid: float
    last_grid: float
    measurement: float = 0.0

    @property
    def finish(self) -> float:
        """Seconds from the last step to the saved model."""
        return self.measurement + self.last_grid + _FINISH_SECONDS

    def num_steps(self, elapsed: float, extra: Callable[[int], float]) -> int:
        """
        Computes the number of steps that fit, at least 1.

        Args:
            elapsed (`float`): Seconds since the start of the command.
            extra (`Callable`): Number of steps -> seconds of what comes between so many, such as validations.
        """
        left = self.total * (1 - _SPARE_SHARE) - elapsed - self.finish
        steps = max(1, int(left / self.step))
        while steps > 1 and steps * self.step + extra(steps) > left:
            steps -= math.ceil(steps / 100)
        return steps

    @property
    def deadline(self) -> float:
        """Seconds from the start of the command after which no step begins: the machine has become slower."""
        return self.total * (1 + _GRACE_SHARE) + _GRACE_SECONDS - self.measurement - self.last_grid

    def unused(self, elapsed: float) -> float:
        """Computes the seconds that a run leaves over after its last step; 0 if they are few."""
        left = self.total - elapsed - self.finish
        return left if left > _UNUSED_SHARE * self.total else 0.0

    def describe(self, elapsed: float) -> str:
        """Describes what the minutes hold, for the summary of the run."""
        return (
            f"{spell_minutes(self.total / 60)} from the start of the command to the saved model: {elapsed:.3g} s until now, "
            f"{self.step:.3g} s a step, {self.validation:.3g} s a validation, {self.grid:.3g} s a sample grid, "
            f"{self.finish:.3g} s for the last one and saving"
        )


def typical_seconds(times: Sequence[float]) -> float:
    """
    Returns the seconds of a typical step, from those of some trial steps in their order: the median of the later half,
    as the first steps fill caches, and a few that another process slowed down say nothing about those to come.
    """
    return statistics.median_low(times[-max(2, math.ceil(len(times) / 2)) :])


def spell_minutes(minutes: float) -> str:
    """Returns a number of minutes in words: "1 minute", "2.5 minutes"."""
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"
