"""
Checks that the published models are as good as their cards say: measures each anew, from its files alone.

    python tests/benchmarks/check_zoo.py [mnist-32 ...]

Each published report is repeated by `tiny-diffusers evaluate --from_report`, which draws the same number of images from
the same seeds and needs the same real images. Prints both values of each figure, and exits with 1 if one is further from
the published one than three of its standard errors, or than 1% where it has none. The dataset is what the report names:
digits, a folder of that name in the working directory, or else a Hub id.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tiny_diffusers import zoo
from tiny_diffusers.cli import main as run_command
from tiny_diffusers.evaluation.report import Report
from tiny_diffusers.runs import RunFolder


def check(name: str) -> bool:
    """Measures a published model anew; returns whether all figures are as published."""
    published = RunFolder(zoo.find_published(name)).find_report()
    if not published.is_file():
        print(f"{name}: it has no published report")
        return True
    report = Report.load(published)
    load = report.measured_by["reference"]["load"]
    data = load.get("train_data_dir", load.get("dataset_name"))  # where files of that name lie is not in a report
    with tempfile.TemporaryDirectory() as folder:
        status = run_command(["evaluate", "--from_report", str(published), "--dataset_name", data, "--output", folder])
        if status:
            return False
        measured = Report.load(Path(folder))
    agrees = True
    for figure, entry in report.figures.items():
        value, expected = measured.figures[figure]["value"], entry["value"]
        limit = 3 * entry["error"] if entry["error"] else 0.01 * abs(expected)
        within = abs(value - expected) <= limit
        agrees &= within
        print(f"{name}: {figure} {value:.6g}, published {expected:.6g} ± {limit:.2g}{'' if within else ': DIFFERS'}")
    return agrees


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    agree = [check(name) for name in parser.parse_args().names or zoo.NAMES]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
