"""Expressions: every name and call of a kernel replaced by what it means."""

import ast
import builtins
import enum
import math
import types as pytypes

import numba
import numpy as np
from numba.core import types as nbtypes
from numba.core.registry import CPUDispatcher

from . import machine_code
from .registry import equivalent_of
from .source import MISSING, python_function
from .stubs import Namespace, Stub
from .tree import at, call, name, strip_docstring

POSITION = {
    **{f"threadIdx.{a}": f"_t{a}" for a in "xyz"},
    **{f"blockIdx.{a}": f"_b{a}" for a in "xyz"},
    **{f"gridDim.{a}": f"_g{a}" for a in "xyz"},
    "laneid": "_lane",
}
HIDDEN = ["_tx", "_ty", "_tz", "_bx", "_by", "_bz", "_gx", "_gy", "_gz"]  # passed on to device functions
PLAIN_BUILTINS = {"abs", "int", "float", "bool", "len", "round", "divmod", "pow", "print"}


def type_text(kind):
    if isinstance(kind, nbtypes.Type):
        return "numba.types.boolean" if kind == numba.types.boolean else f"numba.types.{kind.name}"
    return f"np.{kind.__name__}" if kind.__name__ != "bool" else "np.bool_"


def _copy_at(node, like):
    if isinstance(node, ast.Tuple):
        return at(ast.Tuple([_copy_at(part, like) for part in node.elts], ast.Load()), like)
    new = ast.Constant(node.value) if isinstance(node, ast.Constant) else ast.Name(node.id, ast.Load())
    return ast.copy_location(new, like)


def _with_values(node, front):
    """A copy of constant arithmetic with names replaced by their values, for evaluation."""
    if isinstance(node, ast.BinOp):
        return ast.BinOp(_with_values(node.left, front), node.op, _with_values(node.right, front))
    if isinstance(node, ast.UnaryOp):
        return ast.UnaryOp(node.op, _with_values(node.operand, front))
    return ast.Constant(front.static(node))


class Resolver(ast.NodeTransformer):
    """The part of the front end that resolves expressions."""

    def rename(self, identifier):
        if self.prefix:
            return f"{self.prefix}{identifier.lstrip('_') or 'u'}"
        return f"u{identifier}" if identifier.startswith("_") else identifier

    def static(self, node):
        """Compile-time value: global constants, modules, stubs; also arithmetic on global constants."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Name, ast.Attribute)):
            value = self.program.names.static_value(node, self.function, self.locals)
            if isinstance(value, Stub) and value.role == "position":
                if value.name.startswith("blockDim."):
                    return MISSING  # not a compile-time constant on a GPU: shared.array(blockDim.x) must fail
                if value.name == "warpsize":
                    return MISSING
            return value
        if isinstance(node, ast.Tuple):
            values = [self.static(e) for e in node.elts]
            return MISSING if any(v is MISSING for v in values) else tuple(values)
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            kids = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
            if any(self.static(k) is MISSING or not isinstance(self.static(k), (int, float)) for k in kids):
                return MISSING
            spelled = ast.Expression(ast.fix_missing_locations(_with_values(node, self)))
            try:
                return eval(compile(spelled, "<constant>", "eval"), {"__builtins__": {}})
            except Exception:
                return MISSING
        if isinstance(node, ast.Subscript):
            base, index = self.static(node.value), self.static(node.slice)
            if isinstance(base, tuple) and isinstance(index, int) and -len(base) <= index < len(base):
                return base[index]
        return MISSING

    def value_node(self, value, node):
        """An expression for a compile-time value."""
        if isinstance(value, Stub) and value.role == "position":
            axis = value.name[-1]
            if value.name.startswith("blockDim."):
                return at(ast.Constant(self.program.block_dim["xyz".index(axis)]), node)
            if value.name == "warpsize":
                return at(ast.Constant(32), node)
            if value.name.startswith("threadIdx.") and self.program.block_dim["xyz".index(axis)] == 1:
                return at(ast.Constant(0), node)
            return at(name(POSITION[value.name]), node)
        if isinstance(value, (bool, int, str)) or value is None:
            return at(ast.Constant(int(value) if isinstance(value, enum.IntEnum) else value), node)
        if isinstance(value, float) and not isinstance(value, np.generic):
            if math.isfinite(value):
                return at(ast.Constant(value), node)
            return at(name(self.program.const(f"float('{value}')")), node)
        if isinstance(value, np.generic):
            text = f"np.{value.dtype.name}({value.item()!r})"
            if isinstance(value, np.floating) and not np.isfinite(value):
                text = f"np.{value.dtype.name}(float('{value.item()}'))"
            return at(name(self.program.const(text)), node)
        if isinstance(value, tuple):
            return at(ast.Tuple([self.value_node(v, node) for v in value], ast.Load()), node)
        if isinstance(value, np.ndarray):
            return at(name(self.const_array(value, node)), node)
        if isinstance(value, Stub):
            self.fail(node, f"cuda.{value.name} is used as a value", f"call it: cuda.{value.name}(…)")
        shown = getattr(value, "__name__", type(value).__name__)
        self.fail(
            node,
            f"{ast.unparse(node)} ({shown}) cannot be used inside a kernel",
            "pass it to the kernel as an argument, or make it a number or a tuple of numbers",
        )

    def const_array(self, value, node):
        if value.nbytes > 65536:
            self.fail(
                node,
                f"a constant array of {value.nbytes} bytes; constant memory holds 65536",
                "pass it to the kernel as an argument",
            )
        if value.dtype.kind not in "biufc":
            self.fail(node, f"a constant array of {value.dtype}; the CPU backend has arrays of numbers only")
        data = np.ascontiguousarray(value)
        return self.program.const(
            f"np.frombuffer(bytes.fromhex({data.tobytes().hex()!r}), dtype=np.{data.dtype.name})"
            f".reshape({data.shape!r})",
            "const",
        )

    def visit_Name(self, node):
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            return at(name(self.rename(node.id), ast.Store()), node)
        if node.id in self.bindings:
            return _copy_at(self.bindings[node.id], node)
        if node.id in self.locals:
            return at(name(self.arrays.get(node.id) or self.rename(node.id)), node)
        value = self.program.names.lookup(self.function, node.id)
        if value is MISSING:
            self.fail(
                node,
                f"the name {node.id!r} is not defined",
                "define it before the kernel, or check its spelling",
                on_gpu_too=True,
            )
        return self.value_node(value, node)

    def visit_Attribute(self, node):
        value = self.program.names.static_value(node, self.function, self.locals)
        if value is not MISSING:
            return self.value_node(value, node)
        if isinstance(node.value, (ast.Name, ast.Attribute)):
            base = self.program.names.static_value(node.value, self.function, self.locals)
            if isinstance(base, (Namespace, pytypes.ModuleType)):
                self.fail(node, f"{ast.unparse(node)} does not exist on the CPU backend")
        if node.attr in ("shape", "size", "ndim", "strides", "dtype", "T", "real", "imag"):
            array = node.value.id if isinstance(node.value, ast.Name) else None
            known = self.program.local.get(self.arrays.get(array))
            if known and node.attr == "shape":
                return at(ast.Tuple([ast.Constant(d) for d in known[0]], ast.Load()), node)
            if known and node.attr == "size":
                return at(ast.Constant(math.prod(known[0])), node)
            return at(ast.Attribute(self.visit(node.value), node.attr, ast.Load()), node)
        self.fail(node, f"the attribute {node.attr!r} cannot be used inside a kernel")

    def visit_BinOp(self, node):
        value = self.static(node)
        if type(value) in (int, float):
            return self.value_node(value, node)
        return self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, (complex, bytes)):
            self.fail(node, f"a {type(node.value).__name__} constant cannot be used inside a kernel")
        return node

    def visit_NamedExpr(self, node):
        self.fail(node, "the walrus operator := is not supported in a kernel", "assign on a line of its own")

    def _no(self, node):
        self.fail(
            node,
            f"{type(node).__name__} is not supported in a kernel",
            "kernels are made of assignments, if, for … in range, while and calls",
        )

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _no
    visit_Await = visit_Yield = visit_YieldFrom = visit_Dict = visit_Set = visit_JoinedStr = visit_Starred = (
        visit_List
    ) = _no
    visit_With = visit_Try = visit_FunctionDef = visit_ClassDef = visit_Raise = visit_Global = visit_Import = _no

    def visit_Call(self, node):
        callee = self.static(node.func)
        if callee is MISSING:
            own = isinstance(node.func, ast.Name) and node.func.id == self.function.__name__
            if own and not self.hoisting:  # an explicit signature is compiled before the name is there
                return self.device_call(self.function, node)
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("view", "item", "bit_count"):
                return self.generic_visit(node)
            self.fail(
                node,
                f"{ast.unparse(node.func)} cannot be called inside a kernel",
                "call a @cuda.jit(device=True) function, math.*, or a cuda.* function",
            )
        if isinstance(callee, Stub):
            return self.stub_call(callee, node)
        if isinstance(callee, CPUDispatcher) and not callee._can_compile:
            self.fail(
                node,
                f"{ast.unparse(node.func)} was compiled for the CPU by numba.jit with a signature",
                "decorate it with @cuda.jit(device=True), or leave its signature out",
                on_gpu_too=True,
            )
        if python_function(callee):
            return self.device_call(python_function(callee), node)
        registered = equivalent_of(callee)
        if registered is not None:
            new = call(self.program.const(registered.text, "fn"), *[self.visit(a) for a in node.args], like=node)
            new.registered = registered
            self.program.modules.add(registered.function.__module__)
            machine_code.keep(registered.function)
            if registered.level == "warp":
                new.special = "W"
            return new
        args = [self.visit(a) for a in node.args]
        if node.keywords:
            self.fail(node, "keyword arguments are not supported here", "pass the arguments by position")
        tables = self.program.tables
        if getattr(math, getattr(callee, "__name__", ""), None) is callee:
            key = callee.__name__
            return call(tables["math"].get(key) or self.program.const(f"math.{key}", "m"), *args, like=node)
        if isinstance(callee, nbtypes.Type) or isinstance(callee, type) and issubclass(callee, np.generic):
            return call(self.program.const(type_text(callee), "ty"), *args, like=node)
        if isinstance(callee, np.ufunc) or getattr(np, getattr(callee, "__name__", ""), None) is callee:
            return call(self.program.const(f"np.{callee.__name__}", "np"), *args, like=node)
        if callee is round:
            return call("_round" if len(args) == 1 else "_round_digits", *args, like=node)
        if callee is range:
            self.fail(node, "range stands only in a for loop")
        key = getattr(callee, "__name__", "")
        if getattr(builtins, key, None) is callee and (key in PLAIN_BUILTINS or key in ("min", "max")):
            return call(tables["builtin"].get(key, key), *args, like=node)
        self.fail(
            node,
            f"{ast.unparse(node.func)} cannot be called inside a kernel",
            "call a @cuda.jit(device=True) function, math.*, or a cuda.* function",
        )

    def stub_call(self, stub, node):
        role, short = stub.role, stub.name.split(".")[-1]
        if role == "array":
            self.fail(
                node,
                f"cuda.{stub.name}(…) must be assigned to a name on a line of its own",
                f"write: tile = cuda.{stub.name}(…)",
            )
        if node.keywords:
            self.fail(node, f"cuda.{stub.name} takes its arguments by position")
        args = [self.visit(a) for a in node.args]
        if role == "grid":
            return self.grid_call(short, node)
        if role in ("block", "warp"):
            new = call(f"_c_{short}", *args, like=node)
            new.special = "B" if role == "block" else "W"
            return new
        if role == "fence":
            self.program.fences |= short in ("threadfence", "threadfence_system")
            return call("_nothing", like=node)
        if role == "atomic":
            if not args or not isinstance(args[0], (ast.Name, ast.Subscript)):
                self.fail(node, f"cuda.{stub.name} takes an array first", f"cuda.{stub.name}(array, index, value)")
            return call(f"_atomic_{short.rstrip('_')}", *args, like=node)
        if role in ("scalar", "fp16", "libdevice"):
            key = self.program.tables[role].get(short)
            if key is None:
                self.fail(node, f"cuda.{stub.name} has no equivalent on the CPU backend yet")
            if short == "lanemask_lt":
                args = [at(name("_lane"), node)]
            return call(key, *args, like=node)
        self.fail(node, f"cuda.{stub.name} cannot be called")

    def grid_call(self, short, node):
        ndim = self.static(node.args[0]) if len(node.args) == 1 else None
        if ndim not in (1, 2, 3):
            self.fail(node, f"cuda.{short} takes the literal 1, 2 or 3", f"cuda.{short}(1)", on_gpu_too=True)
        parts = []
        for axis, extent in zip("xyz"[:ndim], self.program.block_dim):
            if short == "grid":
                one = ast.BinOp(name(f"_o{axis}"), ast.Add(), name(f"_t{axis}")) if extent > 1 else name(f"_o{axis}")
            else:
                one = ast.BinOp(name(f"_g{axis}"), ast.Mult(), ast.Constant(extent))
            parts.append(at(one, node))
        if not self.hoisting and short == "grid":  # device functions get the block index, not the offset
            parts = [
                at(ast.BinOp(ast.BinOp(name(f"_b{a}"), ast.Mult(), ast.Constant(e)), ast.Add(), name(f"_t{a}")), node)
                for a, e in zip("xyz"[:ndim], self.program.block_dim)
            ]
        return parts[0] if ndim == 1 else at(ast.Tuple(parts, ast.Load()), node)

    def device_call(self, function, node):
        if node.keywords:
            self.fail(node, "device functions take their arguments by position")
        inline, position, _ = self.program.traits(function)
        if function in self.inline_stack:
            if function is not self.function or inline:
                self.fail(
                    node,
                    f"{function.__name__} calls itself by way of another function, or contains barriers or shuffles",
                    "write the recursion as a loop",
                    on_gpu_too=not inline,
                )
            self.program.recursive.add(function)
        args = [self.visit(a) for a in node.args]
        if inline:
            new = call("_inline", *args, like=node)
            new.special, new.function = "I", function
            return new
        key = self.device_function(function)
        if position:
            args += [at(name(h), node) for h in HIDDEN]
        return call(key, *args, like=node)

    def device_function(self, function):
        """The name of the njit function generated for a device function without collectives."""
        program = self.program
        if function in program.device_names:
            return program.device_names[function]
        key = f"_d{len(program.device_names)}_{function.__name__}"
        program.device_names[function] = key
        front = type(self)(program, function)
        front.hoisting, front.inline_stack = False, [*self.inline_stack, function]
        params = [front.rename(p) for p in front.param_names]
        if program.traits(function)[1]:
            params += HIDDEN
        tree = front.tree
        body = [s for s in (front.visit(s) for s in strip_docstring(tree.body)) if s is not None]
        lane = any(isinstance(n, ast.Name) and n.id == "_lane" for s in body for n in ast.walk(s))
        if lane:
            bx, by, _ = program.block_dim
            body.insert(0, at(ast.parse(f"_lane = (_tx + {bx} * (_ty + {by} * _tz)) % 32").body[0], tree))
        new = ast.FunctionDef(
            name=key,
            args=ast.arguments([], [ast.arg(p) for p in params], None, [], [], None, []),
            body=body or [ast.Pass()],
            decorator_list=[],
            returns=None,
            type_params=[],
        )
        program.device[key] = ast.fix_missing_locations(ast.copy_location(new, tree))
        program.device[key].filename = front.filename
        return key
