"""The inside of :mod:`tests.numba_suite`: a process that runs the tests of one module of a CUDA test suite.

The suites are those that the wheels of Numba and of numba-cuda carry. Either is loaded from its files as the package
``numba.cuda.tests``, on top of the CPU backend's ``numba.cuda``; :func:`prepare` does what this takes:

- the finder by which numba-cuda puts itself in the place of ``numba.cuda`` is taken away;
- ``numba.cuda.testing`` is a module made here: ``CUDATestCase``, and the decorators that skip tests;
- *while a test module is imported*, each name of ``numba.cuda`` that the backend lacks is an :class:`Absent`, so that
  one missing name at the top of a file does not take all of its tests along. Afterwards the backend is as it is: a
  test that uses such a name gets :class:`AbsentError`, and one that imports it gets what any program would get;
- for numba-cuda's suite, the modules that numba-cuda has copied from Numba (``numba.cuda.types``, …) are Numba's, where
  the backend has none of that name. Its tests cannot be written down without them.

Processes that a test starts (``multiprocessing``, ``subprocess``) are prepared the same way, by a ``sitecustomize``.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import linecache
import os
import subprocess
import sys
import traceback
import types as pytypes
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = {"numba": ("numba", "cuda/tests"), "numba-cuda": ("numba_cuda", "numba/cuda/tests")}
VARIABLE = "NUMBA_SUITE"  # the suite's name, for the processes that a test starts
SITE = "NUMBA_SUITE_SITE"  # the folder with their sitecustomize
SOURCES = "NUMBA_SUITE_SOURCES"  # set: kernels in texts that a test runs, by `exec` or `python -c`, have a source
SANITIZE = "NUMBA_SUITE_SANITIZE"  # set: each test runs under the sanitizer
TEXT_LIMIT = 20000  # characters of an error's message that are kept

OPTIONAL = ("cffi", "ml_dtypes")  # packages that whole test modules import, and few of their tests need
COPIED = {
    "numba.cuda.config": "numba.core.config",
    "numba.cuda.types": "numba.core.types",
    "numba.cuda.typing": "numba.core.typing",
    "numba.cuda.typing.templates": "numba.core.typing.templates",
    "numba.cuda.typing.typeof": "numba.core.typing.typeof",
    "numba.cuda.utils": "numba.core.utils",
    "numba.cuda.core.config": "numba.core.config",
    "numba.cuda.core.errors": "numba.core.errors",
    "numba.cuda.core.ir": "numba.core.ir",
    "numba.cuda.core.ir_utils": "numba.core.ir_utils",
    "numba.cuda.core.analysis": "numba.core.analysis",
    "numba.cuda.core.sigutils": "numba.core.sigutils",
    "numba.cuda.np.numpy_support": "numba.np.numpy_support",
    "numba.cuda.tests.support": "numba.tests.support",
}
SETTINGS = {"CUDA_ENABLE_NRT": 0, "CUDA_NRT_STATS": 0, "CUDA_DEBUG_POLY": 0, "CUDA_DEBUG_POLY_USE_TYPED_CONST": 0}

_loading = 0  # how many test modules are being imported, one inside the other


def suite_folder(suite):
    """The folder with the tests of a suite, which is a key of ``SUITES`` or a folder; None if there is no such one."""
    if suite not in SUITES:
        return Path(suite).resolve() if Path(suite).is_dir() else None
    package, below = SUITES[suite]
    spec = importlib.util.find_spec(package)
    folder = Path(spec.submodule_search_locations[0]) / below if spec and spec.submodule_search_locations else None
    return folder if folder and folder.is_dir() else None


# --- names that the backend does not have ---------------------------------------------------------------------------


class AbsentError(AttributeError):
    """A test has used a name that was not there when its module was imported."""


class Absent:
    """What a missing name is while a test module is imported. To use it later raises :class:`AbsentError`."""

    def __init__(self, path):
        self.__dict__["_path"] = path

    def __repr__(self):
        return f"<absent {self._path}>"

    def _more(self, suffix):
        if _loading:
            return Absent(self._path + suffix)
        raise AbsentError(f"{self._path}: there is no such name")

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__") and name != "__name__":
            raise AttributeError(name)
        return self._more(f".{name}")

    def __call__(self, *args, **kwargs):
        if _loading and len(args) == 1 and _is_test(args[0]):
            return args[0]  # used as a decorator: the test stays, to be counted
        return self._more("(…)")

    def __getitem__(self, key):
        return self._more("[…]")

    def __iter__(self):
        self._more("")
        return iter(())

    def __enter__(self):
        return self._more("")

    def __exit__(self, *raised):
        return None

    def __mro_entries__(self, bases):
        return ()


def _is_test(thing):
    if isinstance(thing, type):
        return issubclass(thing, unittest.TestCase)
    return isinstance(thing, pytypes.FunctionType) and thing.__name__.startswith("test")


class AbsentModule(pytypes.ModuleType):
    """A module that is not there, while a test module is imported."""

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class CopiedModule(pytypes.ModuleType):
    """A module of numba-cuda that is a copy of one of Numba's: Numba's, with what the copy has more being absent."""

    def __init__(self, name, original):
        super().__init__(name)
        self.__dict__.update(original=original, __path__=[])

    def __getattr__(self, name):
        if hasattr(self.original, name):
            return getattr(self.original, name)
        if not _loading or name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        return Absent(f"{self.__name__}.{name}")

    def __setattr__(self, name, value):
        if name.startswith("__") or isinstance(value, pytypes.ModuleType):
            self.__dict__[name] = value
        else:
            setattr(self.original, name, value)


class SuiteFinder:
    """Finds the suite's modules; they are imported with missing names being :class:`Absent`."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("numba.cuda.tests."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = SuiteLoader(spec.loader.name, spec.loader.path)
        return spec


class SuiteLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        if os.environ.get(SOURCES):
            module.exec = exec_with_source
        with loading():
            super().exec_module(module)


class AbsentFinder:
    """The first finder: what no other finds is absent, while a test module is imported."""

    def find_spec(self, name, path=None, target=None):
        if not _loading or name.startswith("numba.cuda.tests."):
            return None
        if not name.startswith("numba.cuda.") and not (name.partition(".")[0] in OPTIONAL and self.test_imports()):
            return None
        for finder in sys.meta_path:
            try:
                spec = None if finder is self else finder.find_spec(name, path, target)
            except Exception:  # a finder may have words of its own for what is not there
                spec = None
            if spec is not None:
                return spec
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def test_imports(self):
        """Whether it is a test module that imports, not a package that can do without."""
        frame = sys._getframe(2)
        while frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        return frame.f_globals.get("__name__", "").startswith("numba.cuda.tests.")

    def create_module(self, spec):
        return AbsentModule(spec.name)

    def exec_module(self, module):
        pass


class loading:
    """The context in which missing names are :class:`Absent`."""

    def __enter__(self):
        global _loading
        from numba import cuda

        self.cuda, self.before = cuda, vars(cuda).get("__getattr__")
        _loading, cuda.__getattr__ = _loading + 1, self.lookup

    def lookup(self, name):
        if self.before:
            try:
                return self.before(name)
            except Exception:  # whatever it says of a name that is not there
                pass
        if name.startswith("__"):
            raise AttributeError(name)
        if os.environ[VARIABLE] == "numba-cuda":
            from numba.core import types

            if hasattr(types, name):  # `from numba.cuda import float32`
                return getattr(types, name)
        return Absent(f"numba.cuda.{name}")

    def __exit__(self, *raised):
        global _loading
        _loading -= 1
        del self.cuda.__getattr__
        if self.before:
            self.cuda.__getattr__ = self.before
        if _loading:
            return
        for name in [name for name, module in sys.modules.items() if isinstance(module, AbsentModule)]:
            parent, _, last = name.rpartition(".")
            vars(sys.modules.get(parent, self.cuda)).pop(last, None)
            del sys.modules[name]


def exec_with_source(code, *scopes):
    """``exec``, with the text put where tracebacks and the backend read source text."""
    if isinstance(code, str):
        filename = f"<exec {len(linecache.cache)} of a test>"
        show_source(filename, code)
        code = compile(code, filename, "exec")
    caller = sys._getframe(1)
    exec(code, *(scopes or (caller.f_globals, caller.f_locals)))


def show_source(filename, text):
    linecache.cache[filename] = len(text), None, text.splitlines(True), filename


# --- numba.cuda.testing ---------------------------------------------------------------------------------------------

NO_SKIP_BY_REASON = (  # decorators with a reason: as on a machine with one new GPU
    "skip_on_cudasim skip_if_external_memmgr skip_under_cuda_memcheck skip_with_nvdisasm skip_on_arm skip_on_wsl2 "
    "skip_if_mvc_enabled skip_with_cuda_python skip_if_nvjitlink_missing skip_on_nvjitlink_13_1_sm_120"
).split()
NO_SKIP = (
    "skip_unless_cc_50 skip_unless_cc_53 skip_unless_cc_60 skip_unless_cc_75 skip_unless_cc_90 "
    "skip_if_cudadevrt_missing skip_if_cuda_includes_missing skip_if_curand_kernel_missing "
    "skip_on_standalone_numba_cuda"
).split()


def make_testing(folder):
    """The stand-in for ``numba.cuda.testing``: this machine has a GPU of the newest kind, and is no simulator."""
    from numba.core import config
    from numba.tests.support import SerialMixin, TestCase

    class CUDATestCase(SerialMixin, TestCase):
        FLOAT16_RTOL = 2.0**-10

        def setUp(self):
            self._kept = config.CUDA_LOW_OCCUPANCY_WARNINGS, config.CUDA_WARN_ON_IMPLICIT_COPY
            config.CUDA_LOW_OCCUPANCY_WARNINGS = config.CUDA_WARN_ON_IMPLICIT_COPY = 0

        def tearDown(self):
            config.CUDA_LOW_OCCUPANCY_WARNINGS, config.CUDA_WARN_ON_IMPLICIT_COPY = self._kept

        def skip_if_lto(self, reason):
            pass

        def assertFileCheckAsm(self, *args, **kwargs):
            self.skipTest("compares the text of PTX or LLVM")

        assertFileCheckLLVM = assertFileCheckMatches = assertFileCheckAsm

    class ForeignArray:
        def __init__(self, arr):
            self._arr = arr
            self.__cuda_array_interface__ = arr.__cuda_array_interface__

    testing = pytypes.ModuleType("numba.cuda.testing")
    testing.CUDATestCase, testing.ForeignArray, testing.SerialMixin = CUDATestCase, ForeignArray, SerialMixin
    testing.ContextResettingTestCase = type("ContextResettingTestCase", (CUDATestCase,), {})
    testing.unittest, testing.test_data_dir, testing.numba_cuda_dir = unittest, folder / "data", folder.parent
    testing.ensure_supported_ccs_initialized = lambda: None
    testing.cc_X_or_above, testing.cudadevrt_missing = lambda major, minor: True, lambda: False
    for name in NO_SKIP_BY_REASON:
        setattr(testing, name, lambda reason: lambda test: test)
    for name in NO_SKIP:
        setattr(testing, name, lambda test: test)
    testing.skip_unless_cudasim = lambda reason: unittest.skip("of the simulator")
    testing.skip_unless_conda_cudatoolkit = lambda reason: unittest.skip("looks for CUDA's libraries")
    testing.skip_without_nvdisasm = lambda reason: unittest.skip("compares the text of SASS")
    testing.skip_if_mvc_libraries_unavailable = unittest.skip("links with NVIDIA's tools")
    testing.xfail_unless_cudasim = unittest.expectedFailure
    return testing


# --- preparing a process --------------------------------------------------------------------------------------------


def prepare(suite):
    """Make this process one that can import the suite's modules, as ``numba.cuda.tests.…``."""
    os.environ[VARIABLE] = suite
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "NumbaCudaFinder"]
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import common  # noqa: F401  (the backend, before Numba's cuda)

    # isort: split
    from numba import cuda

    if os.environ.get(SOURCES) and "-c" in sys.orig_argv:  # a test's own `python -c`
        show_source("<string>", sys.orig_argv[sys.orig_argv.index("-c") + 1])
    folder = suite_folder(suite)
    sys.meta_path[:0] = [AbsentFinder(), SuiteFinder()]
    cuda.tests = sys.modules["numba.cuda.tests"] = pytypes.ModuleType("numba.cuda.tests")
    cuda.tests.__path__, cuda.tests.load_testsuite = [str(folder)], None
    cuda.testing = sys.modules["numba.cuda.testing"] = make_testing(folder)
    if suite == "numba-cuda":
        prepare_copies(cuda)


def prepare_copies(cuda):
    """Numba's own modules, settings and types in the place of numba-cuda's copies of them."""
    from numba.core import config

    for name, value in SETTINGS.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    for name, original in COPIED.items():
        if name in sys.modules:
            continue
        parts = name.split(".")
        for depth in range(3, len(parts)):  # numba.cuda.core, before numba.cuda.core.config
            package = ".".join(parts[:depth])
            if package not in sys.modules:
                sys.modules[package] = CopiedModule(package, pytypes.ModuleType(package))
                setattr(sys.modules[package.rpartition(".")[0]], parts[depth - 1], sys.modules[package])
        module = CopiedModule(name, importlib.import_module(original))
        sys.modules[name] = module
        vars(sys.modules[name.rpartition(".")[0]])[parts[-1]] = module


# --- running --------------------------------------------------------------------------------------------------------


def describe_error(error, depth=0):
    """What the rules ask of an exception, as a dict for JSON."""
    kind = type(error)
    record = {
        "type": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
        "bases": [base.__name__ for base in kind.__mro__],
        "text": str(error)[:TEXT_LIMIT],
        "frames": [
            [frame.filename, frame.lineno, frame.name, frame.line or ""]
            for frame in traceback.extract_tb(error.__traceback__)
        ],
    }
    if isinstance(error, AttributeError) and getattr(error, "name", None):
        owner = error.obj if isinstance(error.obj, (type, pytypes.ModuleType)) else type(error.obj)
        is_module = isinstance(owner, pytypes.ModuleType)
        record["attribute"] = error.name
        record["owner"] = owner.__name__ if is_module else f"{owner.__module__}:{owner.__qualname__}"
    if isinstance(error, ImportError):
        record["attribute"] = error.name
    if isinstance(error, subprocess.CalledProcessError):
        streams = (error.stderr or b"", error.stdout or b"")
        record["child"] = next((t if isinstance(t, str) else t.decode(errors="replace") for t in streams if t), "")
    if hasattr(error, "_suite_expected"):
        record["expected"] = error._suite_expected
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth < 4:
        record["cause"] = describe_error(cause, depth + 1)
    return record


def watch_expectations(caught):
    """Watch ``assertRaises``: errors that it waited for go to the list ``caught``; an error of another kind remembers
    what was waited for; and to wait for an :class:`Absent` error is to use it."""
    context, base = unittest.case._AssertRaisesContext, unittest.case._AssertRaisesBaseContext
    leave_original, handle_original = context.__exit__, base.handle

    def leave(self, kind, error, trace):
        wanted = self.expected if isinstance(self.expected, tuple) else (self.expected,)
        if isinstance(error, wanted):
            caught.append(describe_error(error))
        elif error is not None:
            error._suite_expected = [w.__name__ for w in wanted]
        return leave_original(self, kind, error, trace)

    def handle(self, name, args, kwargs):
        if isinstance(self.expected, Absent):
            self.expected._more("")
        return handle_original(self, name, args, kwargs)

    context.__exit__, base.handle = leave, handle


def guard_run():
    """A test class whose own ``run`` fails is an error of that test, and not the end of the run."""
    import common

    def call(self, result):
        try:
            if not os.environ.get(SANITIZE):
                return self.run(result)
            with common.sanitize() as report:
                self.run(result)
            result.send(
                {"event": "findings", "id": result.names[self], "findings": [f.message for f in report.findings]}
            )
        except Exception:
            result.startTest(self)
            result.addError(self, sys.exc_info())
            result.stopTest(self)

    unittest.TestCase.__call__ = call


class Result(unittest.TestResult):
    """Sends an event when a test begins and one when it has ended."""

    def __init__(self, send, names, caught):
        super().__init__()
        self.send, self.names, self.caught, self.current = send, names, caught, None

    def startTest(self, test):
        super().startTest(test)
        self.caught.clear()
        self.current = {"id": self.names[test], "outcome": "ok", "errors": [], "caught": self.caught}
        self.send({"event": "start", "id": self.names[test]})

    def stopTest(self, test):
        super().stopTest(test)
        self.send({"event": "end", **self.current})
        self.current = None

    def _problem(self, test, raised, outcome):
        if type(raised[1]).__name__ == "Skipped":  # pytest.skip, pytest.importorskip
            self.addSkip(test, str(raised[1]))
        elif self.current is None:  # setUpClass or setUpModule: no test of the class runs
            self.send({"event": "fixture", "where": str(test), "errors": [describe_error(raised[1])]})
        else:
            self.current["outcome"] = outcome
            self.current["errors"].append(describe_error(raised[1]))

    def addError(self, test, err):
        self._problem(test, err, "error")

    def addFailure(self, test, err):
        self._problem(test, err, "failure")

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self._problem(test, err, "error")

    def addSkip(self, test, reason):
        if self.current is None:
            self.send({"event": "fixture", "where": str(test), "skip": reason})
        else:
            self.current["outcome"], self.current["skip"] = "skip", reason

    def addExpectedFailure(self, test, err):
        self.current["outcome"] = "xfail"
        self.current["errors"].append(describe_error(err[1]))

    def addUnexpectedSuccess(self, test):
        self.current["outcome"] = "xpass"


def flatten(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def load_module(name):
    """Import the suite's module ``name`` (``cudapy.test_atomics``): its tests, as ``{id: test}``."""
    module = importlib.import_module(f"numba.cuda.tests.{name}")
    vars(module).pop("load_tests", None)
    tests = {
        f"{name}.{type(test).__qualname__}.{test._testMethodName}": test
        for test in flatten(unittest.TestLoader().loadTestsFromModule(module))
    }
    for key, function in vars(module).items():  # written for pytest
        if _is_test(function) and not isinstance(function, type) and not inspect.signature(function).parameters:
            tests[f"{name}.{key}"] = unittest.FunctionTestCase(function)
    return tests


def main(suite, name, plan, descriptor):
    """Run tests of a module and write events, one JSON object a line, to ``descriptor``.

    ``plan`` is a dict: ``pattern`` is a part of the ids of tests to run, ``but`` a list of ids that are not to be run.
    """
    channel = os.fdopen(descriptor, "w", buffering=1)

    def send(event):
        channel.write(json.dumps(event) + "\n")

    prepare(suite)
    try:
        tests = load_module(name)
    except BaseException as error:
        skipped = isinstance(error, unittest.SkipTest) or type(error).__name__ == "Skipped"
        send({"event": "load", **({"skip": str(error)} if skipped else {"errors": [describe_error(error)]})})
        return
    tests = {key: test for key, test in tests.items() if plan["pattern"] in key}
    send({"event": "tests", "classes": {key: type(test).__qualname__ for key, test in tests.items()}})
    caught = []
    watch_expectations(caught)
    guard_run()
    result = Result(send, {test: key for key, test in tests.items()}, caught)
    unittest.TestSuite(test for key, test in tests.items() if key not in plan["but"]).run(result)
    send({"event": "done"})


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get(SITE), os.environ.get("PYTHONPATH")]))
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[4]), int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # threads that a test has left waiting do not keep the process
