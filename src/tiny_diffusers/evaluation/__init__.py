"""
Evaluation: metrics that are saved with their protocol and can be reproduced from it.

    report = evaluate(pipe, load_images("cifar10", split="test"), Protocol(num_images=10_000))
    print(report.markdown())

`features` has the networks that extract features, and `metrics` what is computed from them.
"""

from typing import TYPE_CHECKING

from .comparison import compare
from .report import BASELINES, METRICS, Protocol, Report


if TYPE_CHECKING:
    from .evaluator import evaluate

__all__ = ["BASELINES", "METRICS", "Protocol", "Report", "compare", "evaluate"]


def __getattr__(name: str):
    if name == "evaluate":  # it imports torch and diffusers, which a protocol or a report does not need
        from .evaluator import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
