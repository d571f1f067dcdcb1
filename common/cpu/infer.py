"""Types of a kernel's variables, by Numba's own inference on a variant of the kernel without barriers.

Shared and local arrays become extra arguments, collectives become stand-ins with the types that numba-cuda
gives them. The variant keeps the file name and line numbers of the kernel, so Numba's typing errors point at the
student's source.
"""

import ast
import re

from numba.core import compiler, errors, ir, types
from numba.core.registry import cpu_target
from numba.core.typed_passes import type_inference_stage
from numba.core.typing import signature
from numba.extending import intrinsic

from .analysis import copy_expr, special
from .errors import KernelTypeError
from .tree import bodies

SHUFFLED = (types.int32, types.int64, types.float32, types.float64)


def _stand_in(rule):
    """An intrinsic that only has a type: ``rule(*argument types)`` returns the result type or raises TypingError."""

    def make(count):
        arguments = ", ".join(f"a{i}" for i in range(count))
        namespace = {"rule": rule, "signature": signature}
        exec(
            f"def stand_in(typingctx, {arguments}):\n    return signature(rule({arguments}), {arguments}), None\n",
            namespace,
        )
        return intrinsic(namespace["stand_in"])

    return make


def _shuffle(mask, value, offset):
    _mask(mask)
    if types.unliteral(value) not in SHUFFLED:
        raise errors.TypingError(f"a shuffle moves int32, int64, float32 or float64 values, not {value}")
    if not isinstance(offset, types.Integer):
        raise errors.TypingError(f"the lane or offset of a shuffle must be an integer, not {offset}")
    return types.unliteral(value)


def _mask(mask):
    if not isinstance(types.unliteral(mask), types.Integer):
        raise errors.TypingError(f"a warp mask must be an integer, not {mask}")


def _vote(result):
    def rule(mask, predicate):
        _mask(mask)
        if not isinstance(types.unliteral(predicate), (types.Integer, types.Boolean)):
            raise errors.TypingError(f"a vote's predicate must be an integer or a boolean, not {predicate}")
        return result

    return rule


def _matched(result):
    def rule(mask, value):
        _mask(mask)
        if types.unliteral(value) not in SHUFFLED:
            raise errors.TypingError(f"match takes int32, int64, float32 or float64 values, not {value}")
        return result

    return rule


def _count(predicate):
    if not isinstance(types.unliteral(predicate), types.Integer):
        raise errors.TypingError(
            f"the predicate of syncthreads_count/and/or must be an integer, not {predicate}"
            " (on a GPU too): write int(condition)"
        )
    return types.int32


def _nothing(*args):
    return types.none


def stand_ins():
    """Typing stand-ins for all collectives, by the name they have in normal form."""
    table = {
        f"_c_{n}": _stand_in(_shuffle)(3) for n in ("shfl_sync", "shfl_up_sync", "shfl_down_sync", "shfl_xor_sync")
    }
    for n, result in (
        ("all_sync", types.boolean),
        ("any_sync", types.boolean),
        ("eq_sync", types.boolean),
        ("ballot_sync", types.int32),
    ):
        table[f"_c_{n}"] = _stand_in(_vote(result))(2)
    table["_c_match_any_sync"] = _stand_in(_matched(types.int32))(2)
    table["_c_match_all_sync"] = _stand_in(_matched(types.Tuple((types.int32, types.boolean))))(2)
    for n in ("count", "and", "or"):
        table[f"_c_syncthreads_{n}"] = _stand_in(_count)(1)

    @intrinsic
    def activemask(typingctx):
        return signature(types.uint32), None

    table["_c_activemask"] = activemask
    return table


class _Plain(ast.NodeTransformer):
    """Drops calls that have no type of their own, and names what later needs a type."""

    def __init__(self):
        self.extra = []

    def visit_Expr(self, stmt):
        if special(stmt) and stmt.value.func.id in ("_c_syncthreads", "_c_syncwarp"):
            return ast.copy_location(ast.Pass(), stmt)
        return stmt


def infer(program, arg_types, namespace):
    """``{variable: Numba type}`` for a program in normal form.

    ``namespace``: what the names in it stand for. Also has an entry ``("value", id(stmt))`` for the value of a match
    and ``("argument", id(stmt), i)`` for those of a registered warp intrinsic. Raises KernelTypeError.
    """
    extra_params, extra_types = [], []
    for key, (shape, dtype) in program.shared.items():
        extra_params.append(key)
        extra_types.append(types.Array(dtype, len(shape or (0,)), "C"))
    for key, (shape, dtype) in program.local.items():
        extra_params.append(key)
        extra_types.append(types.Array(dtype, len(shape), "A"))
    bases = ["_tx", "_ty", "_tz", "_bx", "_by", "_bz", "_gx", "_gy", "_gz", "_ox", "_oy", "_oz", "_lane", "_warp"]
    params = [*program.params, *extra_params, *bases]
    named = {}
    body = _copy(program.body, named)
    body = [_Plain().visit(s) for s in body] or [ast.Pass()]
    first = program.body[0].lineno if program.body else 1
    tree = ast.FunctionDef(
        name=program.name,
        args=ast.arguments([], [ast.arg(p) for p in params], None, [], [], None, []),
        body=body,
        decorator_list=[],
        returns=None,
        type_params=[],
        lineno=first,
        col_offset=0,
    )
    module = ast.fix_missing_locations(ast.Module([tree], []))
    for node in ast.walk(module):  # one line each: nodes from different places now stand inside one another
        if hasattr(node, "lineno"):
            node.end_lineno, node.end_col_offset = node.lineno, node.col_offset
    scope = dict(namespace)
    exec(compile(module, program.filename, "exec"), scope)
    function = scope[program.name]
    typing, target = cpu_target.typing_context, cpu_target.target_context
    typing.refresh()
    target.refresh()
    try:
        ir = compiler.run_frontend(function)
        result = type_inference_stage(typing, target, ir, (*arg_types, *extra_types, *[types.int64] * len(bases)), None)
    except errors.NumbaError as error:
        raise numba_error(error, program) from None
    _refuse_whole_arrays(result.calltypes, program)
    table = {}
    for key, kind in result.typemap.items():
        if isinstance(key, str) and not key.startswith("$"):
            stem = re.sub(r"\.\d+$", "", key)
            kind = types.unliteral(kind)
            if stem in table and table[stem] != kind:
                unified = typing.unify_types(table[stem], kind)
                kind = types.unliteral(unified) if unified is not None else kind
            table[stem] = kind
    for key, variable in named.items():
        table[key] = table[variable]
    return table


def numba_error(error, program):
    """A KernelTypeError with the words and the line of an error of Numba's."""
    line = getattr(getattr(error, "loc", None), "line", None) or _line_in(str(error), program)
    maybe = re.search(r"'(\w+)[.\d]*' cannot be determined, operation: phi\(incoming_values=\[Undefined", str(error))
    fix = "the same kernel would fail to compile on a GPU; the message above is Numba's"
    if maybe:  # numba-cuda has its own copy of this pass, which knows better
        fix = f"give {maybe[1]} a value before the branch that sets it; a GPU's compiler may do without"
    return KernelTypeError(
        _shorten(error),
        program.filename,
        line or (program.body[0].lineno if program.body else program.kernel.tree.lineno),
        fix,
    )


def _refuse_whole_arrays(calls, program):
    """Arithmetic on whole arrays, and copies of one to another, need memory that a GPU's thread cannot ask for."""
    for node, call in calls.items():
        if call is None:
            continue
        stores = isinstance(node, (ir.SetItem, ir.StaticSetItem)) and isinstance(call.args[-1], types.Array)
        computes = isinstance(node, ir.Expr) and node.op in ("binop", "inplace_binop", "unary")
        if stores or computes and any(isinstance(kind, types.Array) for kind in call.args):
            raise KernelTypeError(
                "an array is assigned to a part of another" if stores else "arithmetic on a whole array",
                program.filename,
                node.loc.line,
                "numba-cuda does not compile it: write a loop over the elements",
            )


def _copy(stmts, named):
    """A copy of statements; arguments of match and of warp intrinsics get variables, so that they get types."""
    result = []
    for stmt in stmts:
        call = getattr(stmt, "value", None)
        if special(stmt) == "W" and getattr(call, "registered", None):
            result += _intrinsic_types(stmt, call, named)
            continue
        new = copy_expr(stmt)
        for field, b in zip([f for f in ("body", "orelse") if getattr(stmt, f, None)], bodies(stmt)):
            setattr(new, field, _copy(b, named))
        if special(stmt) == "W" and call.func.id.startswith("_c_match"):
            variable = f"_v{len(named)}"
            named["value", id(stmt)] = variable
            result.append(
                ast.copy_location(ast.Assign([ast.Name(variable, ast.Store())], copy_expr(call.args[1])), stmt)
            )
        result.append(new)
    return result


def _intrinsic_types(stmt, call, named):
    lines = []
    for i, a in enumerate(call.args):
        variable = f"_v{len(named)}"
        named["argument", id(stmt), i] = variable
        lines.append(ast.copy_location(ast.Assign([ast.Name(variable, ast.Store())], copy_expr(a)), stmt))
    returns = call.registered.returns
    returns = returns if isinstance(returns, tuple) else (returns,)
    if isinstance(stmt, ast.Assign):
        target = stmt.targets[0]
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        for part, kind in zip(parts, returns):
            value = ast.parse(f"np.{kind}(0)", mode="eval").body
            lines.append(ast.copy_location(ast.Assign([copy_expr(part)], value), stmt))
    return lines


def _line_in(message, program):
    found = re.findall(
        re.escape(program.filename) + r'", line (\d+)|' + re.escape(program.filename) + r" \((\d+)\)", message
    )
    return int(next(filter(None, found[-1]))) if found else None


def _shorten(error):
    """Numba's message without the parts that only help its developers."""
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    for i, line in enumerate(lines):
        if "raised a specific error:" in line:  # the reason, deep inside a list of candidates
            return re.sub(r"^\s*\w+: ", "", lines[i + 1])
    keep = []
    for line in lines:
        if line.startswith(("This is not usually a problem", "There are", 'File "', "To see Python/NumPy features")):
            break
        if line and not line.startswith(("Failed in", "During: ")):
            keep.append(line)
    return " ".join(part.strip() for part in keep[:6]) or type(error).__name__
