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
INSIDE = ("half", "scalars", "atomics", "errors", "compile", "guard", "crash", "interrupt")
collect_ignore = [] if common.BACKEND == "cpu" else [f"cpu/test_{name}.py" for name in INSIDE]


def pytest_report_header():
    return f"kernel backend: {common.BACKEND} ({common.choice.reason})"


def pytest_addoption(parser):
    parser.addoption("--sanitize", action="store_true", help="look at every access; tests with findings fail")
    parser.addoption("--one-size", action="store_true", help="of each test, one case for each kernel (slow tools)")


def one_size(items):
    """The last case of each test for each kernel: sizes and shapes are dropped, kernels are not."""
    kept = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kernel = next((str(params[name]) for name in ("kernel", "version", "op") if name in params), "")
        kept[item.nodeid.split("[")[0], kernel] = item
    return list(kept.values())


def pytest_collection_modifyitems(config, items):
    """Tests marked ``gpu`` look at the GPU itself. All others run the same on both backends."""
    if config.getoption("--one-size"):
        items[:] = one_size(items)
    if common.BACKEND == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="looks at the GPU backend itself; this run is on the CPU backend"))


@pytest.fixture(autouse=True)
def sanitized(request):
    """With ``--sanitize``, each test runs under the sanitizer and fails if there is a finding."""
    provoked = request.node.get_closest_marker("provokes")  # errors are what the test is about
    if not request.config.getoption("--sanitize") or provoked:
        yield
        return
    with common.sanitize() as report:
        yield
    assert report.clean, f"the sanitizer has findings\n\n{report}"


@pytest.fixture
def rng():
    """A generator with a fixed seed, new for each test."""
    return np.random.default_rng(1234)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
