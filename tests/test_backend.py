"""The choice of the backend. The NVIDIA driver is a fake throughout: no test here needs a GPU or uses one."""

import ctypes.util
import os
import shutil
import subprocess
import sys
import time

import pytest

from common import backend
from common.backend import BackendError, Choice


class FakeDriver:
    """The five driver functions that the probe calls, as ctypes would see them."""

    def __init__(self, devices=("NVIDIA A100",), init=0, version=13000, count_code=0):
        self.devices, self.init, self.version, self.count_code = devices, init, version, count_code

    def cuDriverGetVersion(self, out):
        out._obj.value = self.version
        return 0

    def cuInit(self, flags):
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, out):
        out._obj.value = len(self.devices)
        return self.count_code

    def cuDeviceGet(self, out, number):
        out._obj.value = number
        return 0

    def cuDeviceGetName(self, out, length, device):
        out.value = self.devices[device.value].encode()[: length - 1]
        return 0

    def cuDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = {75: 9, 76: 0}[attribute]
        return 0


@pytest.fixture
def machine(monkeypatch):
    """``machine(driver, **versions)`` sets up a computer with that driver (None: none) and these packages."""

    def set_up(driver, **versions):
        packages = {"numba_cuda": "0.30.4", "cuda.bindings": "13.0.1", "numpy": "2.4.0", "numba": "0.68.0"}
        packages |= {name.replace("__", "."): version for name, version in versions.items()}
        absent = {"libcuda.so.1": "libcuda.so.1: cannot open shared object file: No such file or directory"}
        found = (None, "", absent) if driver is None else (driver, "libcuda.so.1", {"libcuda.so.1": "loaded"})
        monkeypatch.setattr(backend, "_load_driver", lambda: found)
        monkeypatch.setattr(backend, "_ask", lambda library, name, environ: backend._query(library))
        monkeypatch.setattr(backend, "_version", lambda module, distribution: packages[module])

    return set_up


# --- auto -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, {"MINI_BACKEND": "auto"}, {"MINI_BACKEND": ""}, {"MINI_BACKEND": " AUTO "}])
def test_auto_takes_the_gpu_that_answers(machine, environ):
    machine(FakeDriver(["NVIDIA H100 80GB HBM3", "other"]))
    choice = backend.choose(environ)
    assert choice == Choice("gpu", "an NVIDIA GPU answered", "NVIDIA H100 80GB HBM3, sm_90", "")


def test_auto_without_driver_takes_the_cpu(machine):
    machine(None)
    choice = backend.choose({})
    assert choice.name == "cpu" and choice.warning == ""
    assert "no NVIDIA driver library (libcuda.so.1)" in choice.reason


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (FakeDriver(init=100), "cuInit returned 100 (no CUDA device is visible"),
        (FakeDriver(init=803), "reboot"),
        (FakeDriver(init=12345), "cuInit returned 12345 (not a code known here)"),
        (FakeDriver(devices=()), "names no device"),
        (FakeDriver(count_code=3), "cuDeviceGetCount returned 3"),
    ],
)
def test_auto_with_a_driver_but_no_device_says_why(machine, driver, words):
    machine(driver)
    choice = backend.choose({})
    assert choice.name == "cpu" and words in choice.reason and choice.warning == ""


@pytest.mark.parametrize(
    ("version", "extra"), [(12000, "cu12"), (12040, "cu12"), (12090, "cu12"), (13000, "cu13"), (13010, "cu13")]
)
def test_gpu_without_numba_cuda_warns_how_to_install_it_for_the_driver(machine, version, extra):
    machine(FakeDriver(version=version), numba_cuda=None)
    choice = backend.choose({})
    assert choice.name == "cpu"
    assert f'pip install "numba-cuda[{extra}]"' in choice.warning and "NVIDIA A100" in choice.warning


def test_gpu_without_cuda_bindings(machine):
    machine(FakeDriver(), cuda__bindings=None)
    choice = backend.choose({})
    assert choice.name == "cpu" and "without its CUDA bindings" in choice.warning


def test_driver_older_than_cuda_12(machine):
    machine(FakeDriver(version=11040))
    choice = backend.choose({})
    assert choice.name == "cpu" and "CUDA 11.4 only" in choice.warning and "update" in choice.warning


@pytest.mark.parametrize(
    ("numba_cuda", "numpy", "usable"),
    [
        ("0.30.4", "2.5.0", False),
        ("0.30.4", "2.10.1", False),
        ("0.30.4", "2.5.0rc1", False),
        ("0.29", "3.0", False),
        ("0.30.4", "2.4.9", True),
        ("0.31.0", "2.5.0", True),
        ("unknown", "2.5.0", True),
    ],
)
def test_numpy_that_numba_cuda_cannot_import(machine, numba_cuda, numpy, usable):
    machine(FakeDriver(), numba_cuda=numba_cuda, numpy=numpy)
    choice = backend.choose({})
    assert choice.name == ("gpu" if usable else "cpu")
    assert ('pip install "numpy<2.5"' in choice.warning) == (not usable)


@pytest.mark.parametrize(("bindings", "driver", "warns"), [("13.5.0", 12080, True), ("12.9.2", 13000, False)])
def test_cuda_packages_newer_than_the_driver_warn(machine, bindings, driver, warns):
    machine(FakeDriver(version=driver), cuda__bindings=bindings)
    choice = backend.choose({})
    assert choice.name == "gpu"
    assert ('pip install "numba-cuda[cu12]"' in choice.warning) == warns


# --- by hand --------------------------------------------------------------------------------------


def test_cpu_by_hand_does_not_look_for_a_gpu(machine, monkeypatch):
    machine(FakeDriver())
    monkeypatch.setattr(backend, "probe", lambda environ: pytest.fail("looked for a GPU"))
    assert backend.choose({"MINI_BACKEND": "cpu"}) == Choice("cpu", "MINI_BACKEND=cpu")


def test_gpu_by_hand(machine):
    machine(FakeDriver())
    choice = backend.choose({"MINI_BACKEND": "gpu"})
    assert choice.name == "gpu" and choice.reason == "MINI_BACKEND=gpu"


def test_gpu_by_hand_without_driver_says_what_was_looked_for(machine):
    machine(None, numba_cuda=None)
    with pytest.raises(BackendError) as error:
        backend.choose({"MINI_BACKEND": "gpu", "CUDA_VISIBLE_DEVICES": "2"})
    text = str(error.value)
    for words in ("libcuda.so.1", "not found", "CUDA_VISIBLE_DEVICES  '2'", "numba-cuda is not installed", "=cpu"):
        assert words in text
    assert "cuInit" not in text  # it was not called


def test_gpu_by_hand_without_device_says_what_the_driver_answered(machine):
    machine(FakeDriver(init=100))
    with pytest.raises(BackendError) as error:
        backend.choose({"MINI_BACKEND": "gpu"})
    text = str(error.value)
    for words in ("libcuda.so.1", "100: no CUDA device", "CUDA_VISIBLE_DEVICES  not set", "numba-cuda 0.30.4"):
        assert words in text


def test_gpu_by_hand_without_package(machine):
    machine(FakeDriver(version=12060), numba_cuda=None)
    with pytest.raises(BackendError, match=r'pip install "numba-cuda\[cu12\]"') as error:
        backend.choose({"MINI_BACKEND": "gpu"})
    assert "1 NVIDIA A100, sm_90" in str(error.value) and "12.6" in str(error.value)


def test_ptx_needs_numba_cuda_but_no_device(machine):
    machine(None)
    assert backend.choose({"MINI_BACKEND": "ptx"}).name == "ptx"
    machine(None, numba_cuda=None)
    with pytest.raises(BackendError, match="numba-cuda is not installed"):
        backend.choose({"MINI_BACKEND": "ptx"})


@pytest.mark.parametrize("value", ["cuda", "1", "gpu,cpu"])
def test_unknown_backend_names_the_value_and_the_allowed_ones(machine, value):
    machine(FakeDriver())
    with pytest.raises(BackendError, match=f"'{value}'.*gpu, cpu or auto"):
        backend.choose({"MINI_BACKEND": value})


@pytest.mark.parametrize("wish", ["auto", "cpu", "gpu"])
def test_numba_simulator_is_refused(machine, wish):
    machine(FakeDriver())
    with pytest.raises(BackendError, match="NUMBA_ENABLE_CUDASIM.*unset"):
        backend.choose({"MINI_BACKEND": wish, "NUMBA_ENABLE_CUDASIM": "1"})
    assert backend.choose({"MINI_BACKEND": "cpu", "NUMBA_ENABLE_CUDASIM": "0"}).name == "cpu"


def test_numba_disable_cuda(machine):
    machine(FakeDriver())
    assert backend.choose({"NUMBA_DISABLE_CUDA": "1"}).name == "cpu"
    assert backend.choose({"NUMBA_DISABLE_CUDA": "0"}).name == "gpu"
    with pytest.raises(BackendError, match="NUMBA_DISABLE_CUDA"):
        backend.choose({"MINI_BACKEND": "gpu", "NUMBA_DISABLE_CUDA": "1"})


# --- the probe itself -----------------------------------------------------------------------------


def test_absent_library_is_found_out_quickly(monkeypatch):
    monkeypatch.setattr(backend, "_candidates", lambda: ["libno-such-cuda.so.1", "/usr/lib/libno-such-cuda.so"])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = backend.probe({})
        times.append(time.perf_counter() - start)
    assert list(found.tried) == ["libno-such-cuda.so.1", "/usr/lib/libno-such-cuda.so"]
    assert found.problem and found.init is None
    assert min(times) < 0.05


def test_library_that_is_there_but_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "libcuda.so.1"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(backend, "_candidates", lambda: [str(broken)])
    assert "does not load" in backend.probe({}).problem


def test_library_that_is_no_driver(monkeypatch):
    c_library = ctypes.util.find_library("c") or "kernel32.dll"
    monkeypatch.setattr(backend, "_candidates", lambda: [c_library])
    assert "not an NVIDIA driver" in backend.probe({}).problem


def test_driver_that_crashes_or_hangs_takes_only_the_child_down(monkeypatch):
    answer = backend._ask(FakeDriver(), "libno-such-cuda.so.1", {})
    assert "ended with exit code 1" in answer["error"] and "libno-such-cuda.so.1" in answer["error"]

    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(backend.subprocess, "run", hang)
    assert "did not answer" in backend._ask(FakeDriver(), "libcuda.so.1", {})["error"]


def test_without_an_interpreter_to_start_the_probe_asks_in_this_process(monkeypatch):
    monkeypatch.setattr(backend.sys, "executable", os.path.join(os.sep, "no", "such", "python"))
    answer = backend._ask(FakeDriver(), "libcuda.so.1", {})
    assert answer["init"] == 0 and answer["devices"] == ["NVIDIA A100, sm_90"]


FAKE_LIBCUDA = """
#include <stdlib.h>
#include <string.h>
static int initialised = 0;
int was_initialised(void) { return initialised; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { initialised = 1; return getenv("CUDA_VISIBLE_DEVICES") ? 100 : 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, device ? "B" : "A", length); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute; return 0; }
"""


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("cc"), reason="needs a C compiler named cc")
def test_a_real_library_is_asked_in_a_child_process(monkeypatch, tmp_path):
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text(FAKE_LIBCUDA)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(backend, "_candidates", lambda: ["libno-such-cuda.so.1", str(library)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = backend.probe({})  # the mapping given counts, not the process's environment
    assert (found.init, found.count, found.version, found.problem) == (0, 2, 12080, "")
    assert found.devices == ["A, sm_7576", "B, sm_7576"] and found.driver_version == "12.8"
    assert found.library == str(library)
    hidden = backend.probe({"CUDA_VISIBLE_DEVICES": "-1"})
    assert hidden.init == 100 and hidden.visible == "-1"
    in_this_process, _, _ = backend._load_driver()
    assert in_this_process.was_initialised() == 0  # so this process may still fork


def test_probe_does_not_import_numba_or_torch():
    code = "import sys, runpy; runpy.run_path(sys.argv[1])['probe'](); print([*sys.modules])"
    out = subprocess.run([sys.executable, "-c", code, backend.__file__], capture_output=True, text=True, check=True)
    assert "'ctypes'" in out.stdout
    assert not any(f"'{name}'" in out.stdout for name in ("numba", "numba_cuda", "numba.cuda", "torch", "numpy"))


# --- describe -------------------------------------------------------------------------------------


def test_describe_on_the_cpu():
    facts = backend.describe(Choice("cpu", "because"))
    assert facts["backend"] == "cpu" and facts["reason"] == "because"
    assert facts["device"].startswith("CPU (") and "core" in facts["device"]
    import numba
    import numpy

    assert facts["numba"] == numba.__version__ and facts["numpy"] == numpy.__version__
    assert "numba-cuda" in facts and "warning" not in facts


def test_describe_keeps_the_device_and_the_warning(machine):
    machine(FakeDriver(version=12080))
    facts = backend.describe(backend.choose({}))
    assert facts["device"] == "NVIDIA A100, sm_90" and "CUDA 13" in facts["warning"]


def test_a_system_without_any_driver_library(monkeypatch):
    monkeypatch.setattr(backend, "_candidates", list)
    assert backend.probe({}).problem == "NVIDIA makes no driver for macOS"


def test_version_of_packages_that_are_missing():
    assert backend._version("no_such_package_here", "no-such-package-here") is None
    assert backend._version("no_such_parent_here.child", "x") is None
    assert backend._version("json", "no-such-distribution-json") == "unknown"
    assert backend._numbers("2.5.0rc1") == (2, 5, 0) and backend._numbers("unknown") == ()
