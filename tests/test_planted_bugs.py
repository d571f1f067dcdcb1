"""The bank of planted bugs: our sanitizer names each at its line, and keeps silent about correct kernels."""

import contextlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

import common
from common.backend import package_problem
from tests.planted_bugs import BUGS, CASES, KINDS, NEAR_MISSES, disagreements, functions, marked
from tests.planted_bugs.on_gpu import read_report

ROOT = Path(__file__).resolve().parent.parent

needs_the_sanitizer = pytest.mark.skipif(
    common.BACKEND != "cpu", reason="the sanitizer is a mode of the CPU backend; this run is on a GPU"
)


def names(cases):
    return {"argvalues": cases, "ids": [case.name for case in cases]}


@contextlib.contextmanager
def several_cores(ran=None):
    """Small launches, too, run on several cores; to ``ran`` goes, for each, whether all was well there."""
    from common.cpu import launch, sanitizer

    def all_well(run, *args):
        well = on_several(run, *args)
        if ran is not None:
            ran.append(well)
        return well

    on_several = sanitizer._Run.all_well
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanitizer, "SMALL", 0)
        patch.setattr(sanitizer, "SPARSE", 1 << 30)
        patch.setattr(launch, "workers", lambda: 3)
        patch.setattr(sanitizer._Run, "all_well", all_well)
        yield


# --- the bank itself ------------------------------------------------------------------------------------------------


def test_the_bank_covers_every_kind():
    assert len(BUGS) >= 30 and len(NEAR_MISSES) >= 30
    for kind in KINDS:
        assert sum(case.kind == kind for case in BUGS) >= 3, kind
        assert any(case.kind == kind for case in NEAR_MISSES), kind


@pytest.mark.parametrize("case", **names(BUGS))
def test_a_bug_is_marked_once_and_its_array_is_there(case):
    assert len(marked(case, "BUG")) == 1
    source = "\n".join(inspect.getsource(function) for function in functions(case.kernel))
    for name in case.arrays or ():
        assert re.search(rf"\b{name}\b", source), name


@pytest.mark.parametrize("case", **names(NEAR_MISSES))
def test_a_near_miss_is_right(case):
    assert not marked(case, "BUG")
    got, expected = case.run()
    np.testing.assert_array_equal(got, expected)


# --- our sanitizer --------------------------------------------------------------------------------------------------


def sanitized(case):
    with common.sanitize() as report:
        result = case.run()
    return report, result


def facts(report):
    """All that a report says, to be compared with another one."""
    fields = ("kind", "file", "line", "array", "index", "access", "block", "thread", "count", "message")
    fields += ("other_file", "other_line", "other_access", "other_block", "other_thread")
    return [[getattr(one, name) for name in fields] for one in report.findings], list(report.notices)


@needs_the_sanitizer
@pytest.mark.parametrize("case", **names(BUGS))
def test_a_bug_is_found_at_its_line(case):
    report, _ = sanitized(case)
    assert not disagreements(case, report), f"{case.note}\n{report}"
    again, _ = sanitized(case)
    assert facts(again) == facts(report)
    with several_cores():
        again, _ = sanitized(case)
    assert facts(again) == facts(report)


@needs_the_sanitizer
@pytest.mark.parametrize("case", **names(NEAR_MISSES))
def test_a_near_miss_is_silent(case):
    report, (got, expected) = sanitized(case)
    assert not disagreements(case, report), f"{case.note}\n{report}"
    np.testing.assert_array_equal(got, expected)
    with several_cores():
        report, (got, expected) = sanitized(case)
    assert not disagreements(case, report), f"{case.note}\n{report}"
    np.testing.assert_array_equal(got, expected)


@cuda.jit
def add_one(x, seen, everyone):
    i = cuda.grid(1)
    if i < x.size:
        x[i] += 1
        if everyone:
            seen[i] = x[64]  # which a thread of one block writes


@needs_the_sanitizer
def test_a_launch_on_several_cores():
    ran = []

    def launch(everyone):
        x, seen = cuda.to_device(np.arange(640)), cuda.to_device(np.zeros(640, np.int64))
        with several_cores(ran), common.sanitize() as report:
            add_one[10, 64](x, seen, everyone)
        return x.copy_to_host(), report

    x, report = launch(False)
    assert ran == [True] and not report.findings and report.accesses == 640  # an update is one
    np.testing.assert_array_equal(x, np.arange(640) + 1)
    x, report = launch(True)
    assert ran == [True, False], "what two cores met at is looked at again, block after block"
    assert {one.kind for one in report.findings} == {"global-race"} and report.accesses == 640 * 3
    np.testing.assert_array_equal(x, np.arange(640) + 1)  # and not 2


# --- the same kernels on a GPU --------------------------------------------------------------------------------------

# numba-cuda without a device: arrays stay on the host, and a launch compiles for the types of its arguments.
COMPILE = """
import numpy as np
import common.ptx_check as check
from numba import cuda, typeof
from numba.cuda.dispatcher import CUDADispatcher

class Host(np.ndarray):
    def copy_to_host(self):
        return np.asarray(self)
    def copy_to_device(self, other):
        self[...] = other

def getitem(kernel, launch):
    def compile(*args):
        types = tuple(typeof(np.asarray(a) if isinstance(a, np.ndarray) else a) for a in args)
        ptx, _ = cuda.compile_ptx(kernel.py_func, types, cc=(8, 0))
        check.assemble(ptx, (8, 0))
        compiled.add(kernel.py_func.__name__)
    return compile

check._stand_in_device((8, 0))
cuda.to_device = lambda array: array.copy().view(Host)
cuda.device_array = lambda shape, dtype: np.zeros(shape, dtype).view(Host)
cuda.device_array_like = np.zeros_like
CUDADispatcher.__getitem__ = getitem
compiled = set()
from tests.planted_bugs import CASES
for case in CASES.values():
    try:
        case.run()
    except Exception as error:
        raise SystemExit(f"{case.name}: {type(error).__name__}: {error}")
print(*sorted(compiled))
"""


@pytest.mark.skipif(bool(package_problem()), reason="numba-cuda is not installed")
def test_every_kernel_compiles_for_a_gpu():
    environ = os.environ | {"MINI_BACKEND": "ptx"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(CASES) <= set(done.stdout.split())


REPORTS = {
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    "=========     at no_guard+0x1a0\n=========     by thread (2,0,0) in block (1,0,0)\n"
    "=========     Saved host backtrace up to driver entry point at kernel launch time\n"
    "========= Invalid __global__ read of size 4 bytes\n========= Target application returned an error\n"
    "========= ERROR SUMMARY: 2 errors\n": (2, ["Invalid __global__ read of size 4 bytes"]),
    "========= COMPUTE-SANITIZER\n========= Error: Race reported between Write access at f+0x80 in a.py:3\n"
    "=========     and Read access at f+0x90 in a.py:4 [124 hazards]\n=========\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n": (
        1,
        ["Race reported between Write access at f+0x80 in a.py:3"],
    ),
    "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n": (0, []),
    "killed\n": (None, []),
}


@pytest.mark.parametrize("text", REPORTS, ids=["memcheck", "racecheck", "clean", "no summary"])
def test_reports_of_compute_sanitizer_are_read(text):
    assert read_report(text) == REPORTS[text]
