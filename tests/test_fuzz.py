"""Random kernels: the backend of this process against the per-thread interpreter, element by element.

A fixed set of seeds, small kernels, in every run; ``make fuzz`` runs thousands of larger ones. On a GPU the same test
runs a sample of the same kernels: three answers, one truth.
"""

import os

import pytest

import common
from tests.fuzz_cases import run_case
from tests.fuzz_kernels import generate

DEFAULT = "0:200" if common.BACKEND == "cpu" else "0:80"
FIRST, LAST = map(int, os.environ.get("FUZZ_SEEDS", DEFAULT).split(":"))
SIZE = int(os.environ.get("FUZZ_SIZE", "2"))


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_random_kernel(seed):
    run_case(generate(seed, SIZE))
