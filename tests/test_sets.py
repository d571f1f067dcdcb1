"""The parts that the tests are run in, `make test` and the rest, are all tests and none twice."""

import subprocess
import sys

import pytest
import sets
from conftest import ROOT

pytest.importorskip("torch")
pytest.importorskip("nbformat")


def collected(part):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:xdist", f"--set={part}"]
    done = subprocess.run([*command, "-o", "addopts=--import-mode=importlib"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = (line.rpartition(": ") for line in done.stdout.splitlines() if line.startswith("tests/"))
    return {path: int(count) for path, _, count in counts}


def test_the_quick_part_and_the_rest_are_all_tests():
    everything, quick, rest = map(collected, sets.NAMES)
    assert {path: quick.get(path, 0) + rest.get(path, 0) for path in everything} == everything
    assert sum(quick.values()) > 1500 and all(sets.has_quick_tests(path) for path in quick)


@pytest.mark.parametrize("patterns", [sets.WHOLE, sets.ONE_SIZE, sets.EACH_TENTH])
def test_each_pattern_names_tests(patterns):
    for pattern in patterns:
        assert list(ROOT.glob(pattern)), pattern
