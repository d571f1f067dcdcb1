"""Random kernels: the backend of this process against the per-thread interpreter, element by element.

A fixed set of seeds, small kernels, in every run, the same on a GPU and without: three answers, one truth. More of
them take minutes to compile: ``make fuzz`` runs thousands of larger ones.
"""

import os

import pytest

from tests.fuzz_cases import run_case
from tests.fuzz_kernels import generate

FIRST, LAST = map(int, os.environ.get("FUZZ_SEEDS", "0:80").split(":"))
SIZE = int(os.environ.get("FUZZ_SIZE", "2"))
NAMES = os.environ.get("FUZZ_FEATURES")  # of tests/fuzz/kinds.py, with commas; unset: some, in every second kernel
FEATURES = None if NAMES is None else tuple(filter(None, NAMES.split(",")))


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_random_kernel(seed):
    run_case(generate(seed, SIZE, features=FEATURES))
