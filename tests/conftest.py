"""Shared by all tests: the backend is picked before Numba's cuda is imported, and tests that need a GPU are marked."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ch09", "ch12", "ch13", "ch14", "ch14/server", "cpu", "data")
for folder in (ROOT, ROOT / "tests", *(ROOT / "tests" / name for name in FOLDERS)):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import sets  # noqa: E402

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# The CPU backend's own tests stay out of a process that runs on a GPU: they would teach Numba a second float16.
INSIDE = ("half", "scalars", "atomics", "errors", "compile", "cache", "guard", "crash", "interrupt", "team", "replay")
collect_ignore = [] if common.BACKEND == "cpu" else [f"cpu/test_{name}.py" for name in INSIDE]


# A shell's background job, `make test &` in a script, starts with Ctrl-C ignored, and its children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOG = pytest.StashKey()  # of the folder with the log of compilations and, a file a process, what kernels were run
LACKING = pytest.StashKey()  # of the lines about kernels whose tests lack something
SEEN = "kernels/seen"  # of pytest's cache

if common.BACKEND == "cpu":
    import kernel_table

    table = kernel_table.Table()
    table.watch()


def pytest_report_header(config):
    lines = [f"kernel backend: {common.BACKEND} ({common.choice.reason})"]
    if config.getoption("--set") == "quick":
        lines.append("a quick part of the tests; all, and comparisons with PyTorch: make test-all")
    return lines


def pytest_addoption(parser):
    parser.addoption("--set", choices=sets.NAMES, default="all", help="a part of the tests, see tests/sets.py")
    parser.addoption("--sanitize", action="store_true", help="look at every access; tests with findings fail")
    parser.addoption("--kernel-table", action="store_true", help="fail if a kernel's tests lack something")
    parser.addoption("--one-size", action="store_true", help="of each test, one case for each kernel (slow tools)")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--sanitize") and "server" in collection_path.parts:
        return True  # whose engine is in another process, where nobody looks
    if config.getoption("--set") == "quick" and collection_path.name.startswith("test_"):
        return not sets.has_quick_tests(collection_path.relative_to(ROOT).as_posix()) or None
    return None


def pytest_collection_modifyitems(config, items):
    """Tests marked ``gpu`` look at the GPU itself, on a GPU. All others run the same on both backends."""
    if config.getoption("--one-size"):
        items[:] = sets.one_size(items)
    chosen = sets.choose(items, config.getoption("--set"))
    if common.BACKEND != "gpu":
        chosen = [item for item in chosen if not item.get_closest_marker("gpu")]
    kept = set(map(id, chosen))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen


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
    if config.stash.get(LACKING, None) is not None:
        lines = config.stash[LACKING]
        terminalreporter.write_line(
            "each kernel of the book has a reference, an odd size, a second block shape and a sanitized run"
            if not lines
            else "\n".join(["what the tests of the kernels lack (see tests/kernel_table.py):", *lines])
        )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    if common.BACKEND == "gpu" or pyfuncitem.get_closest_marker("provokes"):
        return (yield)
    table.begin()
    result = yield
    again = not pyfuncitem.config.getoption("--sanitize") and not getattr(pyfuncitem.obj, "is_hypothesis_test", False)
    if again and table.launched:
        names = pyfuncitem._fixtureinfo.argnames
        table.again(lambda: pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return result


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A worker leaves what it saw to the process that started it, which adds it to what earlier runs saw."""
    config = session.config
    if common.BACKEND == "gpu":
        return
    folder = Path(os.environ["MINI_COMPILE_LOG"]).parent
    (folder / f"{os.getpid()}.json").write_text(json.dumps(table.dump()))
    if hasattr(config, "workerinput") or exitstatus != pytest.ExitCode.OK or not hasattr(config, "cache"):
        return
    digest, earlier = kernel_table.sources_digest(ROOT), config.cache.get(SEEN, {})
    parts = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    rows = kernel_table.merged([*parts, earlier.get("rows", {}) if earlier.get("digest") == digest else {}])
    config.cache.set(SEEN, {"digest": digest, "rows": rows})
    if config.getoption("--kernel-table"):
        config.stash[LACKING] = kernel_table.missing(rows, kernel_table.all_kernels())
        if config.stash[LACKING]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
