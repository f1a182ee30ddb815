"""A sample of `tests/benchmarks/fuzz.py`; all of it takes minutes."""

import importlib.util
from pathlib import Path

import pytest


FUZZ = Path(__file__).parent / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.fuzzer() as fuzzer:
        yield fuzzer


@pytest.mark.parametrize("first", [0, pytest.param(12, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", [pytest.param("configs", marks=pytest.mark.slow), "flags", "commands"])
def test_wrong_and_hostile_inputs_succeed_or_are_refused_in_one_line(fuzz, kind, first):
    outcomes = [fuzz.give(kind, index) for index in range(first, first + 12)]
    assert [given for outcome, given in outcomes if outcome == "fault"] == []
    assert {outcome for outcome, _ in outcomes} == {"success", "refusal"}
