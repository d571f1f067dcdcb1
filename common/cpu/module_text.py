"""The text of a generated module, and the tables that stand beside it."""

import ast

import numpy as np

from . import memlog, shadow
from .emit import STACK_BUDGET
from .emit_memory import declarations
from .errors import CompileError
from .fold import contains

CLAIMING = [  # a call that is done with its blocks takes others, which it shares with other threads' calls
    "    _next = _b0",
    "    while True:",
    "        if _next >= _b1:",
    "            _next, _b1 = _claim(_err)",
    "            if _next >= _b1:",
    "                break",
    "        _b = _next",
    "        _next += 1",
]
SHARED_LIMIT = 48 * 1024  # static shared memory of a block, as on every GPU


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


def module_text(program, emitter, block_dim):
    bx, by, bz = block_dim
    head = [
        f'"""{program.name}, blocks of {bx} x {by} x {bz}: generated, do not edit."""',
        "from common.cpu.runtime import *",
        *([f"from common.cpu.{'memlog' if emitter.memory else 'shadow'} import *"] if emitter.accesses else []),
        "",
        *(f"{k} = {v}" for k, v in program.consts.items()),
        "",
    ]
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
        tables |= {"NOTICES": emitter.notices, "FENCES": program.fences, "PARTS": sorted(emitter.parts_taken)}
    params = ", ".join(["_b0", "_b1", "_gx", "_gy", "_gz", "_dynamic", "_err", *program.params, *extra])
    body = [
        f"def run({params}):",
        *("    " + d for d in declare),
        *(["    for _b in range(_b0, _b1):"] if emitter.accesses or emitter.memory else CLAIMING),
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
    tables |= {"STATIC_SHARED_BYTES": static, "SITES": emitter.sites}
    tables["DYNAMIC_SHARED"] = any(shape is None for shape, _ in program.shared.values())
    return "\n".join([*head, "", *body, ""]), tables


def _array(key, shape, kind, dtype, used):
    if used <= STACK_BUDGET:
        return f"{key} = _stack({shape}, {kind})"
    name = kind.rsplit(".", 1)[1]
    return f"{key} = np.empty({shape}, dtype=np.{'bool_' if name == 'boolean' else name})"


def _itemsize(dtype):
    return max(1, getattr(dtype, "bitwidth", 8) // 8)


def _np_name(dtype):
    return f"np.{'bool_' if dtype.name in ('bool', 'boolean') else dtype.name}"
