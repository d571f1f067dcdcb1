"""GPU architectures by name, and what `make` has to do about them on this machine.

    python common/archs.py --arch sm_80      # prints shell variables; see `plan`

This file imports nothing but the standard library (and loads backend.py, which is alike by its path), because `make`
runs it before anything is installed.
"""

import argparse
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

ARCHS = {
    "sm_75": "Turing: T4, RTX 20",
    "sm_80": "Ampere: A100, A30",
    "sm_86": "Ampere: A10, A40, RTX 30",
    "sm_87": "Ampere: Jetson Orin",
    "sm_89": "Ada: L4, L40S, RTX 40",
    "sm_90": "Hopper: H100, H200",
    "sm_90a": "Hopper, with the instructions only it has",
    "sm_100": "Blackwell: B200, GB200",
    "sm_100a": "Blackwell, with the instructions only it has",
    "sm_103": "Blackwell: B300, GB300",
    "sm_110": "Blackwell: Jetson Thor",
    "sm_120": "Blackwell: RTX 50, RTX PRO",
    "sm_121": "Blackwell: DGX Spark",
}
OLD_ARCHS = ("sm_50", "sm_52", "sm_53", "sm_60", "sm_61", "sm_62", "sm_70", "sm_72")


class UsageError(ValueError):
    """The user's mistake: one line, exit code 2."""


def parse_arch(text):
    """``"sm_80"`` as numba-cuda's compute capability ``(8, 0)``; ``"sm_90a"`` as ``(9, 0, "a")``.

    Raises :class:`UsageError` for a name that is not in ``ARCHS``, listing those that are.
    """
    if text in OLD_ARCHS:
        raise UsageError(f"ARCH={text} is older than CUDA 13's compiler knows; the oldest is {next(iter(ARCHS))}")
    if text not in ARCHS:
        known = "\n".join(f"  {name:8} {meaning}" for name, meaning in ARCHS.items())
        raise UsageError(f"ARCH={text} is not an architecture known here; known are\n{known}")
    major, minor, letter = re.fullmatch(r"sm_(\d+)(\d)(a?)", text).groups()
    return (int(major), int(minor), letter) if letter else (int(major), int(minor))


def plan(arch, found, backend=""):
    """What ``make`` has to do on this machine: a dict of strings, with "" for nothing.

    arch: a name from ``ARCHS``, or "" if the user named none. found: a ``common.backend.Probe``.
    backend: the value of ``MINI_BACKEND``. Returns ``EXTRA``: the extra of pyproject.toml to install; ``CHECK``: the
    architecture to compile the kernels for without running them; ``FORCE``: the compute capability for
    ``NUMBA_FORCE_CUDA_CC``, which makes numba-cuda compile for an older architecture than the GPU's;
    ``NOTE``: a sentence for the user. Raises :class:`UsageError` for an unknown architecture.
    """
    cc = parse_arch(arch) if arch else None
    on_gpu = not found.problem and found.version >= 12000 and backend.strip().lower() != "cpu"
    if not on_gpu:
        return {"EXTRA": "gpu13" if arch else "", "CHECK": arch, "FORCE": "", "NOTE": ""}
    todo = {"EXTRA": "gpu12" if found.version < 13000 else "gpu13", "CHECK": "", "FORCE": "", "NOTE": ""}
    device_cc = tuple(map(int, re.search(r"sm_(\d+)(\d)$", found.devices[0]).groups()))
    if arch and (cc[:2] > device_cc or len(cc) == 3 and cc[:2] != device_cc):
        own = "sm_{}{}".format(*device_cc)
        todo["CHECK"] = arch
        todo["NOTE"] = f"this GPU is {own} and cannot run {arch} code: kernels are checked for {arch}, run as {own}"
    elif arch and len(cc) == 2:  # numba-cuda uses the GPU's own instructions (the "a" in sm_90a) by itself
        todo["FORCE"] = f"{cc[0]}.{cc[1]}"
    return todo


def _probe():
    """`common.backend.probe()` without importing the package `common`, which needs Numba."""
    spec = importlib.util.spec_from_file_location("_backend", Path(__file__).with_name("backend.py"))
    backend = sys.modules["_backend"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    return backend.probe()


def main(arguments=None):
    """The command line; returns the exit code: 2 for an architecture that is not known."""
    parser = argparse.ArgumentParser(description="print what make has to do on this machine, as shell variables")
    parser.add_argument("--arch", default="", help="the architecture to compile for: " + ", ".join(ARCHS))
    try:
        todo = plan(parser.parse_args(arguments).arch, _probe(), os.environ.get("MINI_BACKEND", ""))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{key}={shlex.quote(value)}" for key, value in todo.items()))
    return 0


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))  # its modules are not to be found without the name `common`
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    sys.exit(main())
