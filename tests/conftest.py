"""Shared by all tests: the backend is picked before Numba's cuda is imported, and tests that need a GPU are marked."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "ch14", ROOT / "tests" / "cpu"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# The CPU backend's own tests stay out of a process that runs on a GPU: they would teach Numba a second float16.
INSIDE = ("half", "scalars", "atomics", "errors", "compile")
collect_ignore = [] if common.BACKEND == "cpu" else [f"cpu/test_{name}.py" for name in INSIDE]


def pytest_report_header():
    return f"kernel backend: {common.BACKEND} ({common.choice.reason})"


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` look at the GPU itself. All others run the same on both backends."""
    if common.BACKEND == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="looks at the GPU backend itself; this run is on the CPU backend"))


@pytest.fixture
def rng():
    """A generator with a fixed seed, new for each test."""
    return np.random.default_rng(1234)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
