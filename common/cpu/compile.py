"""From a kernel and the types of its arguments to a compiled function, kept on disk between runs."""

import ast
import contextlib
import faulthandler
import functools
import gc
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import llvmlite
import numba
import numpy as np
from numba.core import config, types
from numba.cpython import numbers

from . import memlog, runtime, shadow
from .emit import STACK_BUDGET, Emitter
from .emit_memory import declarations
from .errors import CompileError
from .fold import analyse, contains
from .frontend import Program
from .infer import infer, stand_ins
from .registry import equivalent_of
from .source import lookup, python_function
from .webs import rename_webs

JIT = "numba.njit(error_model='numpy', fastmath={'contract'}, nogil=True, cache=True)"
SHARED_LIMIT = 48 * 1024  # static shared memory of a block, as on every GPU


def cache_dir():
    """Where generated modules and machine code are kept: ``MINI_CACHE_DIR`` or a folder below the user's cache."""
    chosen = os.environ.get("MINI_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or (Path.home() / ".cache")
    return Path(base) / "kernel-by-kernel"


@functools.cache
def _backend_digest():
    """A hash of this backend's own source and of the versions it stands on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    digest.update(repr((sys.version_info[:2], numba.__version__, llvmlite.__version__, np.__version__)).encode())
    return digest.digest()


def source_digest(function):
    """A hash of all that decides what a kernel means: its text, its helpers' texts, the globals they name."""
    digest = hashlib.sha256(_backend_digest())
    seen = set()

    def add(value):
        inner = python_function(value)
        if inner is not None:
            return add_function(inner)
        if isinstance(value, np.ndarray):
            return digest.update(repr((value.shape, value.dtype.str)).encode() + value.tobytes())
        if isinstance(value, (list, tuple)):
            digest.update(b"(")
            for v in value:
                add(v)
            return digest.update(b")")
        if equivalent_of(value) is not None:  # what an intrinsic does stands in the module of its equivalent
            digest.update(_module_text(equivalent_of(value).function.__module__))
        if isinstance(value, types.Type):  # float32 and float64 are of one class
            return digest.update(str(value).encode())
        if isinstance(value, (bool, int, float, str, bytes, type(None), np.generic)):
            return digest.update(f"{type(value).__name__}:{value!r};".encode())
        return digest.update(
            f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}".encode()
        )

    def add_function(f):
        if f in seen:
            return
        seen.add(f)
        try:
            digest.update(inspect.getsource(f).encode())
            digest.update(f.__code__.co_filename.encode() + str(f.__code__.co_firstlineno).encode())
        except OSError:
            pass
        for identifier in sorted({*f.__code__.co_names, *f.__code__.co_freevars}):
            value = lookup(f, identifier)
            if inspect.ismodule(value):
                for attr in f.__code__.co_names:  # module.CONSTANT, module.helper
                    if hasattr(value, attr) and not inspect.ismodule(getattr(value, attr)):
                        digest.update(attr.encode())
                        add(getattr(value, attr))
                continue
            digest.update(identifier.encode())
            add(value)

    add_function(function)
    return digest.hexdigest()


def _code_digest(code, what):
    """A hash of all that decides what generated code does: kernels of one such hash share what is compiled."""
    digest = hashlib.sha256(_backend_digest() + repr((code, what)).encode())
    for module in sorted(set(re.findall(r"import_module\('([\w.]+)'\)", code))):  # of equivalents, see `registry`
        digest.update(_module_text(module))
    return digest.hexdigest()[:20]


def _module_text(name):
    """The bytes of an imported module's file; none if it has no file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file).read_bytes() if file else b""


class Compiled:
    """A kernel compiled for one block shape and one list of argument types.

    run: the compiled function. tables: what stands in the kernel's table file. paths: the files of the two.
    """

    def __init__(self, run, tables, paths):
        self.run, self.sites, self.paths = run, tables["SITES"], paths
        self.static_bytes, self.uses_dynamic = tables["STATIC_SHARED_BYTES"], tables["DYNAMIC_SHARED"]
        self.arrays = tables.get("ARRAYS", [])  # these six: where accesses are looked at
        self.shared_cells, self.stamps = tables.get("SHARED_CELLS", (0, 0)), tables.get("STAMPS", 0)
        self.lanes, self.in_order = tables.get("LANES", 0), tables.get("IN_ORDER", True)
        self.notices, self.fences = tables.get("NOTICES", []), tables.get("FENCES", False)
        self.points, self.counters = tables.get("POINTS", []), tables.get("COUNTERS", [])  # memory reports

    @property
    def source(self):
        return "\n".join(path.read_text(encoding="utf-8") for path in self.paths)


def generate(function, block_dim, arg_types, nonneg, check):
    """``(code, tables)``: the text of a module with the function ``run``, and what there is to know about it.

    Files and lines of the source stand in the tables only: a kernel that has moved, or whose comments have changed,
    still has the same code.
    """
    program, uninlined = _program(function, block_dim, check)
    params = program.params
    if len(params) != len(arg_types):
        raise CompileError(
            f"{program.name} takes {len(params)} arguments, not {len(arg_types)}",
            program.filename,
            program.kernel.tree.lineno,
            f"pass: {', '.join(p.removeprefix('_arg_') for p in params)}",
        )
    taken = {*program.shared, *program.local, *program.consts, *program.device}
    rename_webs(params, program.body, taken, program.filename)
    arrays = [p for p, t in zip(params, arg_types) if isinstance(t, types.Array)]
    nonneg_params = [p for p, known in zip(params, nonneg) if known]
    analysis = analyse(program, arrays, nonneg_params, loads_vary=check in ("accesses", "memory"))
    names = {**runtime.namespace(), **stand_ins()}
    exec("\n".join(f"{k} = {v}" for k, v in program.consts.items()), names)
    for key, tree in program.device.items():
        module = ast.Module([tree], [])
        exec(compile(module, tree.filename, "exec"), names)
        names[key] = numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True)(names[key])
    kinds = infer(program, arg_types, names)
    axes = {p: t.ndim for p, t in zip(params, arg_types) if isinstance(t, types.Array)}
    axes |= {key: len(shape or (0,)) for key, (shape, _) in [*program.shared.items(), *program.local.items()]}
    emitter = Emitter(program, analysis, kinds, check, axes)
    if uninlined:
        emitter.notice(program.kernel.tree, f"device functions are not looked into ({uninlined})")
    emitter.depth = 2
    emitter.block(program.body)
    return _texts(program, emitter, block_dim)


def _program(function, block_dim, check):
    """``(program, "")``, or the program without looking into device functions and the reason why it cannot be done."""
    if not check:
        return Program(function, block_dim, runtime.TABLES), ""
    if check in ("accesses", "memory"):
        with contextlib.suppress(CompileError):
            return Program(function, block_dim, runtime.TABLES, inline_accesses="all"), ""
    try:
        return Program(function, block_dim, runtime.TABLES, inline_accesses=True), ""
    except CompileError as error:
        return Program(function, block_dim, runtime.TABLES), error.what.partition(" of a device function")[0]


def _shadows(program, emitter, block_dim):
    """``(declarations, tables)`` of a module whose accesses are looked at, see `shadow`.

    Tables: ARRAYS, (name in the source, "global", "shared" or "local", shape, item size) by number; SHARED_CELLS (and
    cells a byte of dynamic shared memory); STAMPS of local arrays; LANES that ``syncwarp`` is about; IN_ORDER: could
    one see in which order its blocks run?
    """
    threads = block_dim[0] * block_dim[1] * block_dim[2]
    syncs = any(contains(s, "W") and "_c_syncwarp(" in ast.unparse(s) for s in program.body)
    atomics = any(getattr(n, "id", "").startswith("_atomic_") for stmt in program.body for n in ast.walk(stmt))
    trees = *program.body, *program.device.values()
    prints = any(getattr(n, "id", "") == "print" for tree in trees for n in ast.walk(tree))
    rest = f"np.int64({int(syncs)}), np.int64({int(atomics)})"
    lines, arrays, cells, stamps = ["_fl = _floor(_z)"], [], 0, 0

    def number(title, space, shape, size):
        arrays.append((title, space, shape, size))
        return len(arrays) - 1

    for p in program.params:
        if p in emitter.axes:
            k = number(p.removeprefix("_arg_"), "global", None, 0)
            facts = f"_cells + _meta[{k}, 0] * {shadow.CELL}, _meta[{k}, 1], _meta[{k}, 2]"
            lines.append(f"_of_{p} = ({facts}, np.int64({k}), np.int64(0), _meta[{k}, 3], {rest})")
    dynamic = [_itemsize(dtype) for shape, dtype in program.shared.values() if shape is None]
    static = sum(int(np.prod(shape)) for shape, _ in program.shared.values() if shape is not None)
    for key, (shape, dtype) in program.shared.items():
        k = number(program.titles.get(key, key), "shared", shape, _itemsize(dtype))
        granule = _itemsize(dtype) if shape else min(dynamic)  # arrays of dynamic shared memory lie over one another
        first, per = cells if shape else static, _itemsize(dtype) // granule
        cells += int(np.prod(shape)) if shape else 0
        facts = f"np.int64({per}), np.int64({granule.bit_length() - 1}), np.int64({k})"
        lines.append(f"_of_{key} = (_scells + {first * shadow.CELL}, {facts}, np.int64(1), np.int64(0), {rest})")
    for key, (shape, dtype) in program.local.items():
        k = number(program.titles.get(key, key), "local", shape, _itemsize(dtype))
        lines.append(f"_ls_{key} = ({', '.join(f'np.int64({d})' for d in shape)},)")
        lines.append(f"_of_{key} = (_stamps + {stamps * 8}, np.int64({k}), np.int64({threads}))")
        stamps += int(np.prod(shape)) * threads
    tables = {"ARRAYS": arrays, "SHARED_CELLS": (static, min(dynamic, default=0)), "STAMPS": stamps}
    tables |= {"LANES": -(-threads // 32) * 32 if syncs else 0, "IN_ORDER": bool(atomics or program.fences or prints)}
    return lines, tables


def _texts(program, emitter, block_dim):
    bx, by, bz = block_dim
    head = [
        f'"""{program.name}, blocks of {bx} x {by} x {bz}: generated, do not edit."""',
        "from common.cpu.runtime import *",
        *([f"from common.cpu.{'memlog' if emitter.memory else 'shadow'} import *"] if emitter.accesses else []),
        "",
        *(f"{k} = {v}" for k, v in program.consts.items()),
        "",
    ]
    for tree in program.device.values():
        head += ["", f"@{JIT}", ast.unparse(tree)]
    declare, used = [], 0
    static = 0
    for key, (shape, dtype) in program.shared.items():
        kind = f"numba.types.{dtype.name if dtype.name != 'bool' else 'boolean'}"
        if shape is None:
            declare.append(f"{key} = _dynamic.view({_np_name(dtype)})")
            continue
        nbytes = int(np.prod(shape)) * _itemsize(dtype)
        static += nbytes
        declare.append(_array(key, repr(shape), kind, dtype, used + nbytes))
        used += nbytes
    for key, (shape, dtype) in program.local.items():
        kind = f"numba.types.{dtype.name if dtype.name != 'bool' else 'boolean'}"
        full = (*shape, bx * by * bz)
        nbytes = int(np.prod(full)) * _itemsize(dtype)
        declare.append(_array(key, repr(full), kind, dtype, used + nbytes))
        used += nbytes
    for key, (shape, kind, nbytes) in emitter.scratch.items():
        declare.append(_array(key, f"({shape},)", kind, None, used + nbytes))
        used += nbytes
    if emitter.alive:
        declare.append(_array("_alive", f"({bx * by * bz},)", "numba.types.boolean", None, used))
    if static > SHARED_LIMIT:
        raise CompileError(
            f"{program.name} declares {static} bytes of shared memory; a block has {SHARED_LIMIT}",
            program.filename,
            program.kernel.tree.lineno,
            "use smaller tiles",
        )
    for v in sorted(emitter.preset):
        kind = emitter.types[v]
        if hasattr(kind, "bitwidth"):
            declare.append(f"{v} = numba.types.{kind.name}(0)")
        elif kind.name in ("bool", "boolean"):
            declare.append(f"{v} = False")
    tables, extra, first, last = {}, [], [], []
    if emitter.memory:
        lines, tables = declarations(program, emitter, _itemsize)
        declare += lines
        extra, first = list(memlog.PARAMETERS), [f"_block_starts(_z, {emitter.warps()})"]
    elif emitter.accesses:
        lines, tables = _shadows(program, emitter, block_dim)
        declare += lines
        extra = ["_z", "_cells", "_scells", "_stamps", "_meta"]
        first, last = ["_low = _ep = _block_starts(_z, _b)"], ["_flush(_z)"]
    if emitter.accesses:
        tables |= {"NOTICES": emitter.notices, "FENCES": program.fences}
    params = ", ".join(["_b0", "_b1", "_gx", "_gy", "_gz", "_dynamic", "_err", *program.params, *extra])
    body = [
        f"@{JIT}",
        f"def run({params}):",
        *("    " + d for d in declare),
        "    for _b in range(_b0, _b1):",
        "        if _err[0] != 0:",
        "            return",
        "        _bx = _b % _gx",
        "        _by = (_b // _gx) % _gy",
        "        _bz = _b // (_gx * _gy)",
        f"        _ox = _bx * {bx}",
        f"        _oy = _by * {by}",
        f"        _oz = _bz * {bz}",
        "        _done = False",
        *(["        _alive[:] = True"] if emitter.alive else []),
        *("        " + line for line in first),
        *emitter.lines,
        *("    " + line for line in last),
    ]
    told = {"SOURCE": program.filename, "STATIC_SHARED_BYTES": static}
    told |= {"DYNAMIC_SHARED": any(s is None for s, _ in program.shared.values()), "SITES": emitter.sites, **tables}
    return "\n".join([*head, "", *body, ""]), "".join(f"{key} = {value!r}\n" for key, value in told.items())


def _array(key, shape, kind, dtype, used):
    if used <= STACK_BUDGET:
        return f"{key} = _stack({shape}, {kind})"
    name = kind.rsplit(".", 1)[1]
    return f"{key} = np.empty({shape}, dtype=np.{'bool_' if name == 'boolean' else name})"


def _itemsize(dtype):
    return max(1, getattr(dtype, "bitwidth", 8) // 8)


def _np_name(dtype):
    return f"np.{'bool_' if dtype.name in ('bool', 'boolean') else dtype.name}"


@contextlib.contextmanager
def _compiler_settings():
    """What differs from Numba's ordinary compilation, for as long as one of our kernels is compiled.

    Signed integers wrap round, as they do on a GPU: Numba tells LLVM that they never overflow, and a hash like
    ``x * 6364136223846793005 >> 40`` then came out wrong (found by the random kernels). And no garbage collection:
    Numba makes millions of small objects that all live until it is done; looking through them costs a fifth.
    """
    enabled, flags = gc.isenabled(), numbers._int_arith_flags
    gc.disable()
    numbers._int_arith_flags = lambda result_type: []
    try:
        yield
    finally:
        numbers._int_arith_flags = flags
        if enabled:
            gc.enable()


@_compiler_settings()
def load(function, digest, block_dim, arg_types, nonneg, check):
    """The :class:`Compiled` kernel, from disk if it is there."""
    what = [str(t) for t in arg_types], check
    key = hashlib.sha256(repr((digest, block_dim, nonneg, *what)).encode()).hexdigest()[:20]
    folder = cache_dir()
    path = folder / f"kbk_{function.__name__}_{key}.py"
    tables, code_path = _read(path), None
    if tables is not None:
        code_path = folder / f"{tables['CODE']}.py"
    if code_path is None or not code_path.exists():
        code, told = generate(function, block_dim, arg_types, nonneg, check)
        code_path = folder / f"run_{function.__name__}_{_code_digest(code, what)}.py"
        if not code_path.exists():
            code_path = _write(folder, code_path, code)
        path = _write(folder, path, f"CODE = {code_path.stem!r}\n{told}")
        tables = _read(path)
    module = _module(code_path)
    signature = (*[types.int64] * 5, types.uint8[::1], types.int64[::1], *arg_types)
    if check == "accesses":
        shadow.prepare()
        signature += (*[types.int64] * 4, types.int64[:, ::1])
    elif check == "memory":
        signature += tuple(memlog.PARAMETERS.values())
    survived = True
    if not module.run.signatures and not list(code_path.parent.glob(f"__pycache__/{code_path.stem}.run-*.nbi")):
        if check == "memory":
            memlog.prepare()
        survived = _compile_in_child(module.run, signature)
    keep, config.LOOP_VECTORIZE = config.LOOP_VECTORIZE, int(survived)
    try:
        module.run.compile(signature)
    finally:
        config.LOOP_VECTORIZE = keep
    return Compiled(module.run, tables, (code_path, path))


def _read(path):
    """The tables of a file as a dict; None if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    tables = {}
    exec(compile(text, path, "exec"), tables)
    return tables


def _module(path):
    """The module in a file; the one that is there already if it has been imported from that file."""
    module = sys.modules.get(path.stem)
    if module is None or module.__file__ != str(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[path.stem] = module  # only when it is whole: another thread may look for it
    return module


def _compile_in_child(run, signature):
    """Compile in a forked process, which leaves the machine code in the disk cache; False if that process was killed.

    LLVM checks itself, and aborts the process when it fails: seen once in some hundreds of random kernels, always in
    its loop vectoriser ("VPlan cost model and legacy cost model disagreed"). A notebook must not die of it, so the
    first compilation happens where an abort does no harm; the kernel is then compiled here without the vectoriser.
    """
    if not sys.platform.startswith("linux"):
        return True  # forking is not safe or not there
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks in programs with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # LLVM's last words would only frighten
            run.compile(signature)
            code = 0
        except BaseException:
            pass  # an ordinary error is raised again, and reported, by the parent
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def _write(folder, path, text):
    """Write atomically; a folder that cannot be written falls back to a temporary one for this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as f:
            f.write(text)
        os.replace(f.name, path)
        return path
    except OSError:
        fallback = Path(tempfile.mkdtemp(prefix="kernel-by-kernel-")) / path.name
        fallback.write_text(text, encoding="utf-8")
        return fallback
