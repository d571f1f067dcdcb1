"""Random kernels: the backend of this process against the per-thread interpreter, element by element.

A fixed set of seeds, small kernels, in every run, the same on a GPU and without: three answers, one truth. More of
them take minutes to compile: ``make fuzz`` runs thousands of larger ones.
"""

import os

import pytest

from tests.fuzz_cases import run_case
from tests.fuzz_kernels import DEFAULT_KINDS, generate

FIRST, LAST = map(int, os.environ.get("FUZZ_SEEDS", "0:80").split(":"))
SIZE = int(os.environ.get("FUZZ_SIZE", "2"))
FEATURES = tuple(filter(None, os.environ.get("FUZZ_FEATURES", ",".join(DEFAULT_KINDS)).split(",")))


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_random_kernel(seed):
    run_case(generate(seed, SIZE, features=FEATURES))
