"""The passes a kernel goes through, in order: from its source text to the text of a module that Numba compiles."""

import contextlib
from functools import partial

from numba.core import types
from numba.core.errors import NumbaError

from . import runtime
from .device_code import device_modules, module_trees
from .emit import Emitter
from .errors import ArgumentError, CompileError, KernelTypeError
from .fold import analyse
from .frontend import Program
from .infer import infer, numba_error, stand_ins
from .module_text import module_text
from .views import has_named_index, has_parts, write_out
from .webs import rename_webs


def generate(function, names, block_dim, arg_types, nonneg, check, debug):
    """``(code, devices, modules, tables)`` of a kernel.

    code: the text of a module with the function ``run``. devices: {name in it: `DeviceModule`}. modules: full names of
    other modules whose functions it calls. tables: what there is to know about it. Files and lines of the source stand
    in the tables only: a kernel that has moved, or whose comments have changed, still has the same code.
    """
    program, uninlined = _program(function, names, block_dim, check)
    params = _normalised(program, arg_types)
    devices = device_modules(program)
    axes = {p: t.ndim for p, t in zip(params, arg_types) if isinstance(t, types.Array)}
    axes |= {key: len(shape or (0,)) for key, (shape, _) in [*program.shared.items(), *program.local.items()]}
    if has_parts(program.body, axes) or check and has_named_index(program.body):
        write_out(program, axes, _infer(program, arg_types, devices))
    arrays = [p for p, t in zip(params, arg_types) if isinstance(t, types.Array)]
    nonneg_params = [p for p, known in zip(params, nonneg) if known]
    analysis = analyse(program, arrays, nonneg_params, loads_vary=check in ("accesses", "memory"))
    kinds = _infer(program, arg_types, devices)
    emitter = Emitter(program, analysis, kinds, check, axes, debug)
    if uninlined:
        emitter.notice(program.kernel.tree, f"device functions are not looked into ({uninlined})")
    for why in program.unseen:
        emitter.notice(program.kernel.tree, f"a device function is not looked into: {why}")
    emitter.depth = 2
    emitter.block(program.body)
    code, tables = module_text(program, emitter, block_dim)
    return code, devices, sorted(program.modules), tables


def check_kernel(function, names, arg_types):
    """Infer the types of a kernel's variables, for its errors. Raises KernelTypeError, CompileError."""
    program, _ = _program(function, names, (32, 1, 1), "")
    _normalised(program, arg_types)
    _infer(program, arg_types, device_modules(program))


def check_device(function, names, signatures):
    """Compile a device function for its explicit signatures, for its errors. Raises KernelTypeError, CompileError."""
    names.signatures[function] = signatures
    program = Program(function, names, (32, 1, 1), runtime.TABLES, device=True)
    if not program.traits(function)[0]:  # what has barriers is part of each kernel that calls it
        key = program.kernel.device_function(function)
        _fresh(program, {key: device_modules(program)[key]})


def _normalised(program, arg_types):
    """Give each value of a program a name of its own; returns its parameters."""
    params = program.params
    if len(params) != len(arg_types):
        raise ArgumentError(
            f"{program.name} takes {len(params)} arguments, not {len(arg_types)}",
            program.filename,
            program.kernel.tree.lineno,
            f"pass: {', '.join(p.removeprefix('_arg_') for p in params)}",
        )
    taken = {*program.shared, *program.local, *program.consts, *program.device}
    rename_webs(params, program.body, taken, program.filename)
    return params


def _infer(program, arg_types, devices):
    """Types of the kernel's variables. An error has the lines of the source, also where it is in a device function."""
    scope = {**runtime.namespace(), **stand_ins()}
    exec("\n".join(f"{k} = {v}" for k, v in program.consts.items()), scope)
    try:
        kinds = infer(program, arg_types, scope | {key: device.dispatcher() for key, device in devices.items()})
    except (KernelTypeError, NumbaError):
        return infer(program, arg_types, scope | _fresh(program, devices))
    for function in program.recursive:
        devices[program.device_names[function]].check_recursion(partial(_recursion_error, function))
    return kinds


def _recursion_error(function, _, own, called):
    raise KernelTypeError(
        f"{function.__name__} gets ({', '.join(map(str, own))}) and calls itself with ({', '.join(map(str, called))})",
        function.__code__.co_filename,
        function.__code__.co_firstlineno,
        "numba-cuda compiles recursion only with the same types at each step: np.int64(5) for 5, or a signature "
        "for the function",
    )


def _fresh(program, devices):
    try:
        return {key: device.fresh_dispatcher(module_trees(program, key)[0]) for key, device in devices.items()}
    except NumbaError as error:  # with explicit signatures, they are compiled at once
        raise numba_error(error, program) from None


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
