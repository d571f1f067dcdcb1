"""The passes a kernel goes through, in order: from its source text to the text of a module that Numba compiles."""

import contextlib

from numba.core import types
from numba.core.errors import NumbaError

from . import runtime
from .device_code import device_modules, module_trees
from .emit import Emitter
from .errors import CompileError, KernelTypeError
from .fold import analyse
from .frontend import Program
from .infer import infer, stand_ins
from .module_text import module_text
from .webs import rename_webs


def generate(function, names, block_dim, arg_types, nonneg, check):
    """``(code, devices, modules, tables)`` of a kernel.

    code: the text of a module with the function ``run``. devices: {name in it: `DeviceModule`}. modules: full names of
    other modules whose functions it calls. tables: what there is to know about it. Files and lines of the source stand
    in the tables only: a kernel that has moved, or whose comments have changed, still has the same code.
    """
    program, uninlined = _program(function, names, block_dim, check)
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
    devices = device_modules(program)
    kinds = _infer(program, arg_types, devices)
    axes = {p: t.ndim for p, t in zip(params, arg_types) if isinstance(t, types.Array)}
    axes |= {key: len(shape or (0,)) for key, (shape, _) in [*program.shared.items(), *program.local.items()]}
    emitter = Emitter(program, analysis, kinds, check, axes)
    if uninlined:
        emitter.notice(program.kernel.tree, f"device functions are not looked into ({uninlined})")
    emitter.depth = 2
    emitter.block(program.body)
    code, tables = module_text(program, emitter, block_dim)
    return code, devices, sorted(program.modules), tables


def _infer(program, arg_types, devices):
    """Types of the kernel's variables. An error has the lines of the source, also where it is in a device function."""
    scope = {**runtime.namespace(), **stand_ins()}
    exec("\n".join(f"{k} = {v}" for k, v in program.consts.items()), scope)
    try:
        return infer(program, arg_types, scope | {key: device.dispatcher() for key, device in devices.items()})
    except (KernelTypeError, NumbaError):
        fresh = {key: device.fresh_dispatcher(module_trees(program, key)[0]) for key, device in devices.items()}
        return infer(program, arg_types, scope | fresh)


def _program(function, names, block_dim, check):
    """``(program, "")``, or the program without looking into device functions and the reason why it cannot be done."""
    if not check:
        return Program(function, names, block_dim, runtime.TABLES), ""
    if check in ("accesses", "memory"):
        with contextlib.suppress(CompileError):
            return Program(function, names, block_dim, runtime.TABLES, inline_accesses="all"), ""
    try:
        return Program(function, names, block_dim, runtime.TABLES, inline_accesses=True), ""
    except CompileError as error:
        return Program(function, names, block_dim, runtime.TABLES), error.what.partition(" of a device function")[0]
