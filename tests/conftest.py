"""Shared by all tests: the backend is picked before Numba's cuda is imported, and tests that need a GPU are marked."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "ch14", ROOT / "tests" / "cpu"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import sets  # noqa: E402

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# The CPU backend's own tests stay out of a process that runs on a GPU: they would teach Numba a second float16.
INSIDE = ("half", "scalars", "atomics", "errors", "compile", "cache", "guard", "crash", "interrupt")
collect_ignore = [] if common.BACKEND == "cpu" else [f"cpu/test_{name}.py" for name in INSIDE]


# A shell's background job, `make test &` in a script, starts with Ctrl-C ignored, and its children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOG = pytest.StashKey()  # of the folder with the log of compilations


def pytest_report_header(config):
    lines = [f"kernel backend: {common.BACKEND} ({common.choice.reason})"]
    if config.getoption("--set") == "quick":
        lines.append("a quick part of the tests; all, and comparisons with PyTorch: make test-all")
    return lines


def pytest_addoption(parser):
    parser.addoption("--set", choices=sets.NAMES, default="all", help="a part of the tests, see tests/sets.py")
    parser.addoption("--sanitize", action="store_true", help="look at every access; tests with findings fail")
    parser.addoption("--one-size", action="store_true", help="of each test, one case for each kernel (slow tools)")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--set") == "quick" and collection_path.name.startswith("test_"):
        return not sets.has_quick_tests(collection_path.relative_to(ROOT).as_posix()) or None
    return None


def pytest_collection_modifyitems(config, items):
    """Tests marked ``gpu`` look at the GPU itself. All others run the same on both backends."""
    if config.getoption("--one-size"):
        items[:] = sets.one_size(items)
    chosen = sets.choose(items, config.getoption("--set"))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    if common.BACKEND == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="looks at the GPU backend itself; this run is on the CPU backend"))


@pytest.fixture(scope="session")
def torch():
    """PyTorch, to compare with; a test that asks for it is skipped where it is not installed."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def transformers(torch):
    """Hugging Face transformers, to compare with."""
    return pytest.importorskip("transformers")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that starts the workers, or the only one
        config.stash[LOG] = tempfile.TemporaryDirectory(prefix="compilations")
        os.environ["MINI_COMPILE_LOG"] = os.path.join(config.stash[LOG].name, "log")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pytest_terminal_summary(terminalreporter, config):
    path = Path(config.stash[LOG].name, "log")
    spent = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    compiled, loaded, seconds = (sum(entry[key] for entry in spent) for key in ("compiled", "loaded", "seconds"))
    if spent:
        terminalreporter.write_line(
            f"{compiled} functions compiled and {loaded} loaded from disk, in {seconds:.0f} s of processor time"
        )


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
