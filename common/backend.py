"""Which machine runs the kernels: an NVIDIA GPU through numba-cuda, or this computer's cores through the CPU backend.

``MINI_BACKEND`` decides: ``gpu``, ``cpu``, or ``auto`` (the default: the GPU if one answers, otherwise the CPU). A
third value, ``ptx``, is internal: real numba-cuda without a device, only good for compiling kernels to PTX.

The GPU is looked for without importing Numba or torch. If the driver library loads, a child process asks it for its
devices, because a process that has called ``cuInit`` can no longer fork children that use the GPU.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field

VARIABLE = "MINI_BACKEND"
PROBE_TIMEOUT = 30  # seconds; a GPU in a large server can take several to wake

CUINIT_MEANINGS = {
    0: "success",
    2: "out of memory",
    3: "not initialized",
    34: "the library is the toolkit's stub, not a driver: take the directory 'stubs' off LD_LIBRARY_PATH",
    46: "the device is in use by others or unavailable",
    100: "no CUDA device is visible: check CUDA_VISIBLE_DEVICES, nvidia-smi, and docker's --gpus",
    101: "invalid device: check CUDA_VISIBLE_DEVICES",
    304: "an operating system call failed: is the nvidia kernel module loaded, may this user open /dev/nvidia*?",
    802: "system not ready: on a server with NVSwitch, is nvidia-fabricmanager running?",
    803: "driver and kernel module are of different versions: reboot after a driver update",
    804: "the forward-compatibility library does not support this device: take cuda-compat off LD_LIBRARY_PATH",
    805: "connection to the MPS server failed",
    999: "unknown driver error: try nvidia-smi, reload the nvidia kernel module, or reboot",
}


_ABSENT = ("No such file", "Could not find module", "cannot find the file")  # the loader's words for "not there"


class BackendError(RuntimeError):
    """The backend asked for cannot be had, or the request makes no sense. The message says what to do."""


@dataclass(frozen=True)
class Choice:
    """The backend taken.

    ``name`` is ``"gpu"``, ``"cpu"`` or ``"ptx"``; ``reason`` one sentence why; ``device`` the device's name (empty if
    it was not asked for); ``warning`` is not empty where the user should be told: a GPU that goes unused for want
    of a package, or a version mismatch.
    """

    name: str
    reason: str
    device: str = ""
    warning: str = ""


@dataclass
class Probe:
    """What looking for a GPU found."""

    tried: dict = field(default_factory=dict)  # library names, each with the loader's error
    library: str = ""  # the one that loaded
    init: int | None = None  # the code cuInit(0) returned
    count: int = 0  # devices
    version: int = 0  # CUDA version of the driver: 1000 * major + 10 * minor
    devices: list = field(default_factory=list)  # names with compute capability
    error: str = ""  # what else went wrong
    visible: str | None = None  # CUDA_VISIBLE_DEVICES

    @property
    def driver_version(self):
        """The newest CUDA version the driver supports, such as ``"13.0"``."""
        return f"{self.version // 1000}.{self.version % 1000 // 10}"

    @property
    def problem(self):
        """Why there is no GPU to use, in a clause; "" if there is one."""
        if self.error:
            return self.error
        if not self.library:
            return f"no NVIDIA driver library ({next(iter(self.tried), 'none for this system')}) was found"
        if self.init != 0:
            return f"cuInit returned {self.init} ({CUINIT_MEANINGS.get(self.init, 'not a code known here')})"
        if self.count < 1:
            return "the driver names no device: check CUDA_VISIBLE_DEVICES and nvidia-smi"
        return ""


def choose(environ=os.environ):
    """Decide on the backend and return a :class:`Choice`.

    Raises :class:`BackendError` for an unknown value of ``MINI_BACKEND``, for a GPU asked for that cannot be used,
    and under ``NUMBA_ENABLE_CUDASIM=1``.
    """
    wish = environ.get(VARIABLE, "").strip().lower() or "auto"
    if wish not in ("auto", "cpu", "gpu", "ptx"):
        raise BackendError(f"{VARIABLE}={environ[VARIABLE]!r} is not a backend; use gpu, cpu or auto")
    if environ.get("NUMBA_ENABLE_CUDASIM", "").strip() not in ("", "0"):
        raise BackendError(
            "NUMBA_ENABLE_CUDASIM is set, but Numba's simulator is not one of the backends here; unset it "
            f"and use {VARIABLE}=cpu, which compiles the kernels"
        )
    if wish == "cpu":
        return Choice("cpu", f"{VARIABLE}=cpu")
    if wish == "ptx":
        problem = package_problem()
        if problem:
            raise BackendError(f"{VARIABLE}=ptx compiles with numba-cuda, but {problem}")
        return Choice("ptx", f"{VARIABLE}=ptx (compile only)", device="none (compile only)")
    if environ.get("NUMBA_DISABLE_CUDA", "").strip() not in ("", "0"):
        if wish == "gpu":
            raise BackendError(f"{VARIABLE}=gpu, but NUMBA_DISABLE_CUDA forbids Numba to use a GPU; unset it")
        return Choice("cpu", "NUMBA_DISABLE_CUDA is set")

    found = probe(environ)
    packages = package_problem(found.version)
    if not found.problem and not packages:
        reason = f"{VARIABLE}=gpu" if wish == "gpu" else "an NVIDIA GPU answered"
        return Choice("gpu", reason, found.devices[0], version_mismatch(found))
    if wish == "gpu":
        raise BackendError(_no_gpu_message(found, packages))
    if found.problem:
        return Choice("cpu", f"no GPU to use: {found.problem}")
    reason = f"there is a GPU ({found.devices[0]}), but {packages}"
    return Choice("cpu", reason, warning=reason)


def probe(environ=os.environ):
    """Look for a GPU and return a :class:`Probe`; raises nothing. Well under 50 ms where there is no driver."""
    found = Probe(visible=environ.get("CUDA_VISIBLE_DEVICES"))
    library, found.library, found.tried = _load_driver()
    if library is None:
        if not found.tried:
            found.error = "NVIDIA makes no driver for macOS"
        broken = [error for error in found.tried.values() if not any(text in error for text in _ABSENT)]
        if broken:
            found.error = f"the NVIDIA driver library does not load: {broken[0]}"
        return found
    for name, value in _ask(library, found.library, environ).items():
        setattr(found, name, value)
    return found


def package_problem(driver_version=0):
    """Why numba-cuda cannot be used, with the fix, in a clause; "" if it can.

    ``driver_version`` is what ``cuDriverGetVersion`` gives; 0 where there is no driver.
    """
    if 0 < driver_version < 12000:
        return (
            f"its driver supports CUDA {driver_version // 1000}.{driver_version % 1000 // 10} only and numba-cuda "
            "needs 12 or newer: update the NVIDIA driver"
        )
    install = f'pip install "numba-cuda[{"cu12" if 0 < driver_version < 13000 else "cu13"}]"'
    numba_cuda = _version("numba_cuda", "numba-cuda")
    if numba_cuda is None:
        return f"numba-cuda is not installed: {install}"
    if _version("cuda.bindings", "cuda-bindings") is None:
        return f"numba-cuda is installed without its CUDA bindings: {install}"
    numpy = _version("numpy", "numpy")
    # numba-cuda up to 0.30 looks up np.row_stack when it is imported; NumPy 2.5 has dropped it.
    if _numbers(numpy) >= (2, 5) and () < _numbers(numba_cuda) < (0, 31):
        return f'numba-cuda {numba_cuda} cannot be imported with NumPy {numpy}: pip install "numpy<2.5"'
    return ""


def version_mismatch(found):
    """A warning if the installed CUDA packages are newer than the driver of a :class:`Probe` can take; else ""."""
    bindings = _version("cuda.bindings", "cuda-bindings")
    if _numbers(bindings)[:1] > (found.version // 1000,):
        return (
            f"the installed CUDA packages are for CUDA {bindings.partition('.')[0]} (cuda-bindings {bindings}), the "
            f"driver supports CUDA {found.driver_version}: if kernels fail to load, update the driver or "
            f'pip install "numba-cuda[cu{found.version // 1000}]"'
        )
    return ""


def describe(choice=None):
    """The backend and the versions in use, as a dict of strings: what ``python -m common`` prints.

    Keys: ``backend``, ``reason``, ``device``, ``python``, ``numba``, ``numba-cuda``, ``numpy``, and ``warning`` if
    there is one. ``choice`` defaults to :func:`choose`.
    """
    choice = choose() if choice is None else choice
    device = choice.device
    if choice.name == "cpu":
        from .cpu import machine

        device = machine.device_name()
    facts = {
        "backend": choice.name,
        "reason": choice.reason,
        "device": device,
        "python": platform.python_version(),
        "numba": _version("numba", "numba") or "not installed",
        "numba-cuda": _version("numba_cuda", "numba-cuda") or "not installed",
        "numpy": _version("numpy", "numpy") or "not installed",
    }
    if choice.warning:
        facts["warning"] = choice.warning
    return facts


def _no_gpu_message(found, packages):
    """Everything that was looked for and found, for a user who asked for a GPU."""
    visible = "not set" if found.visible is None else repr(found.visible)
    lines = [f"{VARIABLE}=gpu, but no GPU can be used: {found.problem or packages}"]
    lines += [f"  driver library        {found.library or 'not found'} (tried {', '.join(found.tried) or 'nothing'})"]
    if found.init is not None:
        lines += [f"  cuInit(0)             {found.init}: {CUINIT_MEANINGS.get(found.init, 'not a code known here')}"]
    if found.init == 0:
        lines += [f"  devices               {found.count} {'; '.join(found.devices)}".rstrip()]
        lines += [f"  driver's CUDA         {found.driver_version}"]
    lines += [f"  CUDA_VISIBLE_DEVICES  {visible}"]
    lines += [f"  packages              {packages or 'numba-cuda ' + str(_version('numba_cuda', 'numba-cuda'))}"]
    lines += [f"Fix the above, or run on the CPU with {VARIABLE}=cpu (or leave {VARIABLE} unset)."]
    return "\n".join(lines)


def _candidates():
    """Where the NVIDIA driver library may be, best first."""
    if sys.platform == "win32":
        return ["nvcuda.dll"]
    if sys.platform == "darwin":
        return []
    names = ["libcuda.so.1", "libcuda.so"]  # the second may be the toolkit's stub
    return names + [f"/usr/{lib}/{name}" for lib in ("lib", "lib64") for name in names]


def _load_driver():
    """``(library, name, {name tried: error})``; the library is None if none of the candidates loads."""
    tried = {}
    for name in _candidates():
        try:
            return _open(name), name, {**tried, name: "loaded"}
        except OSError as error:
            tried[name] = str(error)
    return None, "", tried


def _open(name):
    return (ctypes.WinDLL if sys.platform == "win32" else ctypes.CDLL)(name)


def _ask(library, name, environ):
    """:func:`_query` in a child process, so that this one stays free to fork; a dict of :class:`Probe` fields."""
    inherited = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    if "CUDA_VISIBLE_DEVICES" in environ:
        inherited["CUDA_VISIBLE_DEVICES"] = environ["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--probe", name]
    try:
        child = subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=PROBE_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"the driver ({name}) did not answer within {PROBE_TIMEOUT} s: try nvidia-smi"}
    except (OSError, ValueError):  # no interpreter to start, as inside some applications: ask here
        return _query(library)
    try:
        return json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"asking the driver ({name}) ended with exit code {child.returncode}: {last}"}


def _query(library):
    """Initialise the driver and ask for its devices; a dict of :class:`Probe` fields."""
    try:
        version, count = ctypes.c_int(0), ctypes.c_int(0)
        library.cuDriverGetVersion(ctypes.byref(version))
        answer = {"init": library.cuInit(0), "version": version.value}
        if answer["init"] != 0:
            return answer
        code = library.cuDeviceGetCount(ctypes.byref(count))
        if code != 0:
            return {**answer, "error": f"cuDeviceGetCount returned {code}"}
        devices = [_device_name(library, number) for number in range(count.value)]
        return {**answer, "count": count.value, "devices": devices}
    except AttributeError as error:
        return {"error": f"the library is not an NVIDIA driver: {error}"}


def _device_name(library, number):
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), number)
    library.cuDeviceGetName(name, 256, device)
    library.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # ... _MINOR
    return f"{name.value.decode(errors='replace')}, sm_{major.value}{minor.value}"


def _version(module, distribution):
    """The version of an installed package, "unknown" without metadata, or None if its module cannot be found."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    except (ModuleNotFoundError, ValueError):  # the module's parent is missing, or the module is half-made
        return None


def _numbers(version):
    """``"2.5.0rc1"`` as ``(2, 5, 0)``; an empty tuple if the version does not begin with numbers."""
    match = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, match.group().split("."))) if match else ()


if __name__ == "__main__" and sys.argv[1:2] == ["--probe"]:
    print(json.dumps(_query(_open(sys.argv[2]))))
