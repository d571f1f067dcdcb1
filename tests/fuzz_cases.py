"""Cases for differential testing: what one is, how to load, run, compare and shrink one, and the command line.

A Case is a complete module text with one kernel named ``kernel``, a launch geometry and a recipe for the arguments.
``run_case`` compares a backend with the oracle, exactly. ``shrink`` deletes statements from a failing case for as long
as it keeps failing and stays valid.
"""
import argparse
import ast
import copy
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
import types
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.fuzz.kinds import DEFAULT_KINDS, GPU_KINDS, KINDS
from tests.oracle import OracleError, run


@dataclass(frozen=True)
class ArraySpec:
    """An array argument. fill: "ints" (limits lo, hi), "dyadic" (size, frac: multiples of 2**-frac) or "bools"."""

    dtype: str
    shape: tuple
    fill: str
    limits: tuple = ()

    def make(self, rng):
        if self.fill == "ints":
            lo, hi = self.limits
            return rng.integers(lo, hi + 1, self.shape).astype(self.dtype)
        if self.fill == "dyadic":
            size, frac = self.limits
            return (rng.integers(-size << frac, (size << frac) + 1, self.shape) / (1 << frac)).astype(self.dtype)
        return rng.integers(0, 2, self.shape).astype(self.dtype)


@dataclass(frozen=True)
class ScalarSpec:
    """A scalar argument: a NumPy dtype's name, or int, float or bool for the Python type."""

    dtype: str
    value: float

    def make(self, rng):
        python = {"int": int, "float": float, "bool": bool}.get(self.dtype)
        return python(self.value) if python else np.dtype(self.dtype).type(self.value)


@dataclass(frozen=True)
class Case:
    """One kernel to run: `source` is a module that defines `kernel`, `specs` are its arguments in order."""

    seed: int
    source: str
    grid: tuple
    block: tuple
    shared_bytes: int
    specs: tuple
    wild: bool = False  # casts and shifts out of range are meant, with the answers that PTX gives

    def make_args(self):
        """Fresh arguments (NumPy arrays and scalars), the same every time."""
        rng = np.random.default_rng([11, self.seed])
        return [spec.make(rng) for spec in self.specs]

    def parameters(self):
        """The names of the kernel's parameters."""
        kernel = next(n for n in ast.parse(self.source).body if isinstance(n, ast.FunctionDef) and n.name == "kernel")
        return [a.arg for a in kernel.args.args]

    def to_text(self):
        """The case as one Python file: the source, and the rest as a JSON comment in the last line."""
        rest = {"seed": self.seed, "grid": self.grid, "block": self.block, "shared_bytes": self.shared_bytes,
                "specs": [vars(s) for s in self.specs]} | ({"wild": True} if self.wild else {})
        return f"{self.source.rstrip()}\n\n# case: {json.dumps(rest)}\n"

    @classmethod
    def from_text(cls, text):
        """The inverse of to_text. Raises ValueError if the last line is not a case."""
        source, mark, rest = text.rpartition("\n# case: ")
        if not mark:
            raise ValueError("the file does not end with a line '# case: {...}'")
        rest = json.loads(rest)
        specs = tuple(ArraySpec(s["dtype"], tuple(s["shape"]), s["fill"], tuple(s["limits"])) if "shape" in s
                      else ScalarSpec(**s) for s in rest["specs"])
        return cls(rest["seed"], source, tuple(rest["grid"]), tuple(rest["block"]), rest["shared_bytes"], specs,
                   rest.get("wild", False))


# ---------------------------------------------------------------------------------------------------------------------
# Loading and comparing
# ---------------------------------------------------------------------------------------------------------------------
def _stub_jit(function_or_signatures=None, **_):
    """`cuda.jit` as a decorator, with or without signatures, that keeps the function and its signatures."""
    if inspect.isfunction(function_or_signatures):
        return types.SimpleNamespace(py_func=function_or_signatures, signatures=[])
    given = function_or_signatures
    signatures = given if isinstance(given, list) else [] if given is None else [given]
    return lambda function: types.SimpleNamespace(py_func=function, signatures=signatures)


@contextmanager
def stub_cuda():
    """`from numba import cuda` gives a module whose `jit` only keeps the function: enough for the oracle."""
    stub = types.ModuleType("numba.cuda")
    stub.jit = _stub_jit
    try:
        import numba
    except ImportError:
        numba = types.ModuleType("numba")
        for name in ("int32", "int64", "uint32", "float32", "float64"):
            setattr(numba, name, np.dtype(name).type)
    missing = object()
    saved = {name: sys.modules.get(name, missing) for name in ("numba", "numba.cuda")}
    attribute = vars(numba).get("cuda", missing)
    sys.modules["numba"], sys.modules["numba.cuda"], numba.cuda = numba, stub, stub
    try:
        yield stub
    finally:
        for name, module in saved.items():
            if module is missing:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        if attribute is missing:
            del numba.cuda
        else:
            numba.cuda = attribute


_FOLDER = None


def load_case(case):
    """The case's module, imported from a file named by its hash (so that inspect.getsource works)."""
    global _FOLDER
    if _FOLDER is None:
        _FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-kernels-")
    digest = hashlib.sha256(case.source.encode()).hexdigest()[:16]
    path = Path(_FOLDER.name) / f"case_{digest}.py"
    if not path.exists():
        path.write_text(case.source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module     # pickling and numba's cache look modules up by name
    spec.loader.exec_module(module)
    return module


def oracle_args(case, **options):
    """The arguments as the oracle leaves them. Raises OracleError if the case is not valid."""
    with stub_cuda():
        module = load_case(case)
        args = case.make_args()
        run(module.kernel.py_func, case.grid, case.block, args, case.shared_bytes,
            signatures=module.kernel.signatures, wild=case.wild, **options)
    return args


def check_valid(case):
    """Raises OracleError for races and undefined behaviour, AssertionError if the order of the threads matters."""
    forwards = oracle_args(case, checked=True)
    compare(case, oracle_args(case, checked=True, backwards=True), forwards, "threads run last to first")


def compare(case, got, expected, what="the backend"):
    """Raises AssertionError, with the source and the first element that differs, unless the arrays are equal."""
    for name, spec, g, e in zip(case.parameters(), case.specs, got, expected):
        if not isinstance(spec, ArraySpec):
            continue
        g = np.asarray(g)
        if g.dtype != e.dtype or g.shape != e.shape:
            raise AssertionError(f"seed {case.seed}: {name} became {g.dtype}{g.shape}, was {e.dtype}{e.shape}")
        if np.array_equal(g, e, equal_nan=e.dtype.kind == "f"):
            continue
        different = np.argwhere(g != e)
        where = tuple(int(i) for i in different[0])
        raise AssertionError(
            f"{case.source}\nseed {case.seed}, grid {case.grid}, block {case.block}, {case.shared_bytes} shared bytes: "
            f"{name}[{', '.join(map(str, where))}] is {g[where]!r}, should be {e[where]!r} ({what}; {len(different)} "
            f"of {e.size} elements differ)")


def launch(module, case, args):
    """Runs the case on whatever backend `numba.cuda` is."""
    module.kernel[case.grid, case.block, 0, case.shared_bytes](*args)


def run_case(case, backend_run=launch):
    """Compares a backend with the oracle.

    backend_run(module, case, args) launches ``module.kernel`` with the NumPy arguments, which it changes in place.
    Raises AssertionError, with the source and the first differing element, unless all arrays agree exactly; whatever
    the backend raises goes through.
    """
    expected = oracle_args(case)
    module, args = load_case(case), case.make_args()
    backend_run(module, case, args)
    compare(case, args, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Shrinking
# ---------------------------------------------------------------------------------------------------------------------
def failure_of(case, backend_run=launch):
    """None if the backend agrees with the oracle, else what is wrong in one line: the same text for the same defect."""
    try:
        run_case(case, backend_run)
    except AssertionError:
        return "wrong result"
    except OracleError:
        raise
    except Exception as error:  # whatever a backend raises is a finding
        first = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {re.sub(r'[0-9]+', '0', re.sub(r'[^ ]*[/][^ ]*', '', first))[:100]}"
    return None


def refusal_of(case, arch):
    """None if numba-cuda compiles the case's kernel for an architecture such as sm_80, else what it says."""
    from common.archs import parse_arch
    from tests.fuzz.ptx import compile_case

    try:
        compile_case(case, parse_arch(arch))
    except Exception as error:  # whatever a compiler raises is the answer
        return f"{type(error).__name__}: {' | '.join(filter(None, map(str.strip, str(error).splitlines())))[:400]}"
    return None


def _suites(tree):
    """Every list of statements inside the functions, innermost last."""
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                for field in ("body", "orelse"):
                    if isinstance(getattr(node, field, None), list) and getattr(node, field):
                        yield node, field


def _smaller(tree):
    """Trees with something taken away, biggest cuts first."""
    count = len(list(_suites(tree)))
    for number in range(count):
        length = len(getattr(*list(_suites(tree))[number]))
        step = length
        while step >= 1:
            for start in range(length - step, -1, -step):
                candidate = copy.deepcopy(tree)
                node, field = list(_suites(candidate))[number]
                suite = getattr(node, field)
                kept = suite[:start] + suite[start + step:]
                if kept != suite and (kept or field == "orelse" or step == length):
                    setattr(node, field, kept or ([] if field == "orelse" else [ast.Pass()]))
                    yield candidate
            step //= 2
        for position in range(length):      # an `if` or a loop gives way to its body
            statement = getattr(*list(_suites(tree))[number])[position]
            if isinstance(statement, (ast.If, ast.For, ast.While)):
                candidate = copy.deepcopy(tree)
                suite = getattr(*list(_suites(candidate))[number])
                inner = suite[position]
                first = [ast.Assign([inner.target], ast.Constant(0))] if isinstance(inner, ast.For) else []
                suite[position:position + 1] = first + inner.body
                yield candidate


def shrink(case, still_fails, rounds=400):
    """The case with as many statements deleted as possible; `still_fails(case)` says whether a candidate will do.

    Candidates that are not valid for the oracle in checked mode (races, unwritten memory) are never tried.
    """
    best = case
    progress = True
    while progress and rounds > 0:
        progress = False
        for tree in _smaller(ast.parse(best.source)):
            rounds -= 1
            if rounds <= 0:
                break
            candidate = replace(best, source=ast.unparse(ast.fix_missing_locations(tree)) + "\n")
            if len(candidate.source) >= len(best.source):
                continue
            try:
                check_valid(candidate)
                fails = still_fails(candidate)
            except Exception:  # not valid any more: a SyntaxError, an OracleError, ...
                continue
            if fails:
                best, progress = candidate, True
                break
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
ASSEMBLER = "a GPU's, not ours: ptxas takes a warp for whole behind a recursive call"


def is_the_assemblers_fault(case):
    """Whether a kernel is right as soon as the threads of a warp wait for each other where a recursion returns, or as
    ptxas (of CUDA 13.0) does not know that its full masks are full.

    They come back from a recursive device function one by one. For a shuffle with a mask that it does not know, ptxas
    first has them wait for each other (WARPSYNC); for a mask that it finds to be all lanes it takes that as done, and
    lanes are read that are not there yet, also behind a syncwarp() or a syncthreads().
    """
    number = next((name for name, spec in zip(case.parameters(), case.specs)
                   if isinstance(spec, ScalarSpec) and spec.dtype.startswith("int")), None)
    unknown = re.sub(r"_sync\((0xFFFFFFFF|FULL|-1)", f"_sync((0xFFFFFFFF if {number} != 123456 else 0)", case.source)
    together = returning_together(case.source)
    sources = [together, *([unknown] if number else [])] if together != case.source else []
    return any(source != case.source and failure_of(replace(case, source=source)) is None for source in sources)


def returning_together(source):
    """A kernel in which a recursive function's threads wait for those that return at the same place."""
    lines = source.split("\n")
    for function in ast.parse(source).body:
        returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
        for node in returns:
            calls = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
            if any(getattr(called, "id", None) == function.name for called in calls):  # in one line, as all here
                line = lines[node.lineno - 1]
                indent, value = line[: node.col_offset], line[node.col_offset + len("return ") :]
                wait = "cuda.syncwarp(cuda.activemask())"
                lines[node.lineno - 1] = f"{indent}together = {value}\n{indent}{wait}\n{indent}return together"
    return "\n".join(lines)


def _examine(task):
    """(seed, what is wrong or None, the case as text, the shrunk case as text or None)."""
    seed, size, without, features, how, make_small = task
    if how != "oracle":
        import common  # chooses the backend before numba.cuda is imported
    from tests.fuzz_kernels import generate

    case = generate(seed, size, without, features)
    if how.startswith("sm_"):
        return seed, refusal_of(case, how), case.to_text(), None
    if how == "oracle":
        try:
            check_valid(case)
        except (OracleError, AssertionError) as error:
            return seed, str(error).splitlines()[-1], case.to_text(), None
        return seed, None, None, None
    try:
        problem = failure_of(case)
    except OracleError as error:
        return seed, f"not a valid kernel: {str(error).splitlines()[-1]}", case.to_text(), None
    if problem == "wrong result" and common.BACKEND == "gpu" and is_the_assemblers_fault(case):
        problem = ASSEMBLER
    if problem is None or problem == ASSEMBLER:
        return seed, problem, None, None
    small = shrink(case, lambda c: failure_of(c) == problem).to_text() if make_small else None
    return seed, problem, case.to_text(), small


def _seeds(text):
    start, _, stop = text.partition(":")
    seeds = range(int(start), int(stop)) if stop else range(int(start), int(start) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text} names no seed; write FIRST:END, for example 0:100")
    return seeds


def _names(text):
    return {"gpu": GPU_KINDS, "all": tuple(KINDS)}.get(text, tuple(filter(None, text.split(","))))


def main(generate, argv=None):
    """The command line of tests/fuzz_kernels.py. Ends by SystemExit: 0 all agree, 1 something failed, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_kernels",
                                     description="Random kernels: the oracle against itself, or against the backend.")
    parser.add_argument("--seeds", type=_seeds, default=range(100), metavar="FIRST:END", help="default 0:100")
    parser.add_argument("--backend", action="store_true", help="compare the backend that common/ chooses")
    parser.add_argument("--ptx", metavar="ARCH", help="only compile with numba-cuda, for an architecture such as sm_80")
    parser.add_argument("--features", type=_names, metavar="NAME,...",
                        help="kinds of the language, of which each kernel takes some; `gpu`: all that a GPU runs, "
                        f"`all`: all of them: {', '.join(KINDS)}; default: {','.join(DEFAULT_KINDS)} in every second")
    parser.add_argument("--wild", action="store_true", help="the feature wild: casts and shifts out of range")
    parser.add_argument("--shrink", action="store_true", help="also write a shrunk version of a failing case")
    parser.add_argument("--size", type=int, default=5, help="statements at the top level of a kernel (default 5)")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="kinds of statements to leave out")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no more kernels after this time")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="folder for failing cases")
    parser.add_argument("--print", action="store_true", help="only print the sources")
    options = parser.parse_args(argv)
    features = options.features
    if options.wild:
        features = (*(features or ()), "wild")
    try:
        generate(0, options.size, options.without, features)
    except ValueError as error:
        parser.error(str(error))
    if options.print:
        for seed in options.seeds:
            print(generate(seed, options.size, options.without, features).to_text())
        raise SystemExit(0)
    if options.ptx:
        os.environ["MINI_BACKEND"] = "ptx"  # before common is imported, which chooses then
        try:
            from common.archs import parse_arch

            parse_arch(options.ptx)
        except (ValueError, RuntimeError) as error:  # a UsageError; a BackendError: numba-cuda is not installed
            parser.error(str(error))
    how = options.ptx or ("backend" if options.backend else "oracle")
    from tqdm import tqdm

    tasks = [(seed, options.size, tuple(options.without), features, how, options.shrink) for seed in options.seeds]
    problems, tried, end = Counter(), 0, time.monotonic() + options.seconds
    with tqdm(total=len(tasks), unit="kernel", disable=None) as bar:
        def note(result):
            nonlocal tried
            seed, problem, text, small = result
            tried += 1
            bar.update()
            if problem is None:
                return
            problems[problem] += 1
            options.out.mkdir(parents=True, exist_ok=True)
            for suffix, content in (("", text), ("_small", small)):
                if content:
                    (options.out / f"seed{seed}{suffix}.py").write_text(content, encoding="utf-8")
            bar.write(f"seed {seed}: {problem}")

        if options.jobs <= 1:
            for task in tasks:
                if time.monotonic() > end:
                    break
                note(_examine(task))
        else:
            with ProcessPoolExecutor(options.jobs) as pool:
                for result in pool.map(_examine, tasks):
                    note(result)
                    if time.monotonic() > end:
                        pool.shutdown(cancel_futures=True)
                        break
    for problem, count in problems.most_common():
        print(f"{count:6d}  {problem}")
    failed = sum(problems.values()) - problems[ASSEMBLER]
    where = f"; failures in {options.out}{os.sep}" if failed else ""
    skipped = f" ({len(tasks) - tried} not tried, for time)" if tried < len(tasks) else ""
    print(f"{tried - failed} of {tried} kernels agree{skipped}{where}")
    raise SystemExit(1 if failed else 0)


