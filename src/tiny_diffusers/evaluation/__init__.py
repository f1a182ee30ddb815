"""
Evaluation: figures that carry their protocol, and can be made again.

    report = evaluate(pipe, load_images("cifar10", split="test"), Protocol(num_images=10_000))
    print(report.markdown())

`features` says what images are compared by, `metrics` what is computed of that.
"""

from .evaluator import evaluate
from .report import BASELINES, METRICS, Protocol, Report, compare


__all__ = ["BASELINES", "METRICS", "Protocol", "Report", "compare", "evaluate"]
