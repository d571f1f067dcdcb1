"""Compile the kernels a program launches for a GPU that is not there: a table of PTX, registers and shared memory.

    python -m common.ptx_check --arch sm_80
    python -m common.ptx_check --arch sm_90 --program "ch14_mini_llm/run.py --tokens=1,2 --max_new=1"

It works in two steps, each in a process of its own because a process has one backend:

1. record    runs the programs on the CPU backend and notes each kernel launched and its argument types,
2. compile   compiles exactly those with numba-cuda to PTX, and assembles the PTX with NVIDIA's nvJitLink.

Needs `pip install -e ".[gpu13]"`, but no GPU and no driver. Exit codes: 0 all kernels compile, 1 one does not,
2 the request makes no sense (an unknown architecture, numba-cuda not installed).
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from .archs import ARCHS, UsageError, parse_arch
from .backend import package_problem

ROOT = Path(__file__).resolve().parent.parent

# Each level of the engine with each way of choosing the next token, so that every kernel of the capstone is launched.
DRAWN = "--temperature=0.8 --top_k=40 --top_p=0.95 --seed=1"
PROGRAMS = (
    "ch14_mini_llm/run.py --tokens=15496 --max_new=1",
    f"ch14_mini_llm/run.py --tokens=15496 --max_new=1 {DRAWN}",
    "ch14_mini_llm/run.py --engine=kv --tokens=15496 --max_new=2",
    "ch14_mini_llm/run.py --engine=fast --tokens=15496,11 --max_new=2",
    f"ch14_mini_llm/run.py --engine=fast --tokens=15496,11 --max_new=2 {DRAWN}",
)

FIX = 'pip install -e ".[gpu13]" (or `make ch14 ARCH=sm_80`, which does it)'


# --- step 1, on the CPU backend ---------------------------------------------------------------------


def record(programs):
    """Run the programs and return their kernels: a list of dicts ``module``, ``qualname``, ``defined_at``, ``types``.

    ``types`` is a list of argument lists, one for each combination that was launched; an argument is
    ``["array", dtype, ndim, layout]`` or ``["scalar", name of the NumPy type]``. A kernel that a module
    beside a program holds and that was not launched has no types. Raises RuntimeError if a program fails.
    """
    from .trace import defined_at, trace

    with trace() as launches:
        for program in programs:
            _run(program)
    kernels = {launch.kernel: None for launch in launches}
    kernels |= {kernel: None for kernel in _held_beside(programs)}
    found = []
    for kernel in kernels:
        types = sorted({json.dumps([_describe(kind, kernel) for kind in kinds]) for kinds in kernel.signatures})
        found.append(
            {
                "module": kernel.py_func.__module__,
                "qualname": kernel.py_func.__qualname__,
                "defined_at": defined_at(kernel),
                "types": [json.loads(text) for text in types],
            }
        )
    return sorted(found, key=lambda one: (one["defined_at"].split(":")[0], int(one["defined_at"].rsplit(":")[-1])))


def _run(program):
    """Run one program as ``python program arguments`` would, in this process."""
    path, *arguments = shlex.split(program)
    path = ROOT / path
    if not path.is_file():
        raise RuntimeError(f"there is no file {path}")
    saved = sys.argv, sys.path[:]
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"`{program}` ended with exit code {end.code}") from None
    finally:
        sys.argv, sys.path[:] = saved


def _held_beside(programs):
    """The kernels that a module in a program's folder has a name for."""
    folders = _folders(programs)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).resolve().parent in folders:
            for value in vars(module).values():
                if hasattr(value, "inspect_cpu") and not value.device:
                    yield value


def _folders(programs):
    """The folders the programs lie in, each once; Python looks for a program's imports in its own folder first."""
    return list(dict.fromkeys((ROOT / shlex.split(program)[0]).resolve().parent for program in programs))


def _describe(kind, kernel):
    """A type of the CPU dispatcher's ``signatures`` in words that JSON can carry."""
    from numba.core import types

    if isinstance(kind, types.Array):  # a device array can always be written to
        return ["array", kind.dtype.name, kind.ndim, kind.layout]
    if isinstance(kind, (types.Number, types.Boolean)):
        return ["scalar", kind.name]
    raise RuntimeError(f"{kernel.__name__} takes a {kind}, which cannot be checked here")


# --- step 2, with numba-cuda ------------------------------------------------------------------------


def compile_all(kernels, cc):
    """Compile what :func:`record` found for the compute capability ``cc``; yields one dict a kernel and its types.

    Keys: ``kernel``, ``defined_at``, ``lines`` and ``bytes`` of PTX, ``seconds``, from the assembler ``registers``,
    ``shared`` and ``spilled`` (bytes; None where nvJitLink is missing), and ``error`` if it failed.
    """
    _stand_in_device(cc)
    for entry in kernels:
        for kinds in entry["types"] or [None]:
            start = time.perf_counter()
            row = {"kernel": entry["qualname"], "defined_at": entry["defined_at"]}
            try:
                if kinds is None:
                    raise RuntimeError("it was not launched, so its types are not known: add a --program that does")
                row |= _compile(entry, kinds, cc)
            except Exception as error:  # whatever a compiler raises is the answer
                row["error"] = f"{type(error).__name__}: {error}".strip()
            yield row | {"seconds": time.perf_counter() - start}


def _stand_in_device(cc):
    """Answer numba-cuda when it compiles a device function and asks the current GPU, not us, for the architecture."""
    from numba.cuda import dispatcher

    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc[:2])


def _compile(entry, kinds, cc):
    from numba import cuda

    kernel = importlib.import_module(entry["module"])
    for part in entry["qualname"].split("."):
        kernel = getattr(kernel, part)
    given = kernel.targetoptions
    options = {name: given[name] for name in ("fastmath", "launch_bounds") if given.get(name)}
    ptx, _ = cuda.compile_ptx(kernel.py_func, tuple(map(_numba_type, kinds)), cc=cc, **options)
    return {"lines": ptx.count("\n") + 1, "bytes": len(ptx)} | assemble(ptx, cc)


def _numba_type(kind):
    import builtins

    import numba
    import numpy as np
    from numba.core import types
    from numba.np import numpy_support

    if kind[0] == "array":
        _, dtype, ndim, layout = kind
        return types.Array(numpy_support.from_dtype(np.dtype(dtype)), ndim, layout)
    make = getattr(builtins, kind[1], None) or getattr(np, kind[1])
    return numba.typeof(make(1))  # as the launch of numba-cuda does


def assemble(ptx, cc):
    """Assemble PTX text into machine code; a dict of ``registers`` a thread, ``shared`` and ``spilled`` bytes.

    All three are None if nvJitLink is not installed. Raises RuntimeError with the assembler's words if it refuses.
    """
    try:
        from cuda.bindings import nvjitlink
    except ImportError:
        return {"registers": None, "shared": None, "spilled": None}
    options = ["-arch=sm_" + "".join(map(str, cc)), "-verbose", "-Xptxas=-v"]
    link = nvjitlink.create(len(options), options)
    try:
        data = ptx.encode()
        nvjitlink.add_data(link, nvjitlink.InputType.PTX, data, len(data), "kernel")
        nvjitlink.complete(link)
        log = bytearray(nvjitlink.get_info_log_size(link))
        nvjitlink.get_info_log(link, log)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(link))
        nvjitlink.get_error_log(link, log)
        words = log.decode(errors="replace").strip("\0\n ") or error
        raise RuntimeError(f"the assembler refuses the PTX: {words}") from None
    finally:
        nvjitlink.destroy(link)
    return read_assembler_log(log.decode(errors="replace"))


def read_assembler_log(log):
    """The figures in what ``ptxas -v`` prints: ``registers``, ``shared`` bytes, ``spilled`` bytes; None if not said."""
    registers = re.search(r"[Uu]sed (\d+) registers", log)
    shared = re.search(r"(\d+) bytes smem", log)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", log)]
    return {
        "registers": int(registers[1]) if registers else None,
        "shared": int(shared[1]) if shared else None,
        "spilled": sum(spills) if spills else None,
    }


# --- the command ------------------------------------------------------------------------------------

COLUMNS = ("kernel", "defined at", "PTX lines", "bytes", "registers", "shared", "spilled", "seconds")
LAYOUT = "{:26} {:42} {:>9} {:>7} {:>9} {:>6} {:>7} {:>7}"


def format_row(row):
    """One line of the table for a row of :func:`compile_all`; for a failed one the error below it, indented."""
    if "error" in row:
        what = "\n".join("    " + line for line in row["error"].splitlines())
        return f"{LAYOUT.format(row['kernel'], row['defined_at'], 'FAILED', *[''] * 5).rstrip()}\n{what}"
    cells = [row[key] for key in ("lines", "bytes", "registers", "shared", "spilled")]
    cells = ["-" if cell is None else cell for cell in cells]
    return LAYOUT.format(row["kernel"], row["defined_at"], *cells, f"{row['seconds']:.2f}")


def check(arch, programs, out):
    """Record, compile, print the table to ``out``; returns the exit code 0 or 1. Raises :class:`UsageError`."""
    parse_arch(arch)
    problem = package_problem()
    if problem:
        raise UsageError(f"the check compiles with numba-cuda, but {problem.partition(': ')[0]}: {FIX}")
    with tempfile.TemporaryDirectory() as folder:
        types = Path(folder, "types.json")
        print("running the kernels once on the CPU to see their types ...", file=out, flush=True)
        arguments = [word for program in programs for word in ("--program", program)]
        done = subprocess.run(
            _child("--record", str(types), *arguments),
            env=_environ("cpu"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode:
            print(done.stderr.strip(), file=sys.stderr)
            return 1
        with subprocess.Popen(
            _child("--compile", str(types), "--arch", arch, *arguments),
            env=_environ("ptx"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        ) as child:  # fmt: skip
            rows = _print_table(arch, child.stdout, out)
    if child.returncode:
        return 2 if child.returncode == 2 else 1
    failed = sum("error" in row for row in rows)
    verdict = f"{failed} failed" if failed else f"all compile for {arch} ({ARCHS[arch]})"
    print(f"{len(rows)} kernels: {verdict}" if rows else "no kernel was launched", file=out, flush=True)
    return 1 if failed or not rows else 0


def _print_table(arch, lines, out):
    """Print the rows as they come from the compiling process; returns them."""
    rows = []
    for line in lines:
        row = json.loads(line)
        if "compiler" in row:
            units = "registers of a thread; shared memory of a block and registers spilled to memory in bytes"
            print(f"PTX for {arch} by {row['compiler']}; {units}", file=out)
            print(LAYOUT.format(*COLUMNS), file=out, flush=True)
        else:
            rows.append(row)
            print(format_row(row), file=out, flush=True)
    return rows


def _compile_step(path, arch):
    """The compiling process: JSON lines on stdout, the compiler's name first."""
    import numba_cuda
    from numba.cuda.cudadrv import nvrtc

    cc = parse_arch(arch)
    known = nvrtc.get_supported_ccs()
    if cc[:2] not in known:
        names = ", ".join(f"sm_{major}{minor}" for major, minor in known)
        raise UsageError(f"the CUDA compiler installed here does not know {arch}; it knows {names}")
    toolkit = importlib.metadata.version("cuda-toolkit")
    print(json.dumps({"compiler": f"numba-cuda {numba_cuda.__version__} with CUDA {toolkit}"}), flush=True)
    for row in compile_all(json.loads(Path(path).read_text(encoding="utf-8")), cc):
        print(json.dumps(row), flush=True)


def _child(*arguments):
    return [sys.executable, "-m", "common.ptx_check", *arguments]


def _environ(backend):
    """The environment for a step: its backend, this checkout first on the path, nothing that changes the target."""
    drop = ("NUMBA_FORCE_CUDA_CC", "NUMBA_CUDA_DEFAULT_PTX_CC", "NUMBA_DISABLE_CUDA", "NUMBA_ENABLE_CUDASIM")
    environ = {key: value for key, value in os.environ.items() if key not in drop}
    path = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    return environ | {"MINI_BACKEND": backend, "PYTHONPATH": os.pathsep.join(path)}


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m common.ptx_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="", help="the architecture: " + ", ".join(ARCHS))
    parser.add_argument("--program", action="append", help="a program with its arguments whose kernels are checked "
                        "(again for more); default: the capstone, greedy and sampling")  # fmt: skip
    parser.add_argument("--record", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--compile", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    programs = options.program or list(PROGRAMS)
    try:
        if options.record:
            with contextlib.redirect_stdout(sys.stderr):
                kernels = record(programs)
            Path(options.record).write_text(json.dumps(kernels), encoding="utf-8")
            return 0
        if not options.arch:
            raise UsageError("name an architecture, such as --arch sm_80; known are " + ", ".join(ARCHS))
        if options.compile:
            sys.path += map(str, _folders(programs))
            _compile_step(options.compile, options.arch)
            return 0
        return check(options.arch, programs, sys.stdout)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
