"""Front end: Python source of a kernel -> AST in a normal form.

After it, a kernel body has only assignments, stores, ``if``, ``for … in range``, ``while``, ``break``,
``continue``, ``return``, ``print`` and calls; every ``cuda.*`` name is resolved; device functions that contain
collectives are inlined; a collective (barrier, shuffle, vote) stands alone, as
``Assign(name, Call)`` or ``Expr(Call)``.

Internal names start with an underscore: ``_tx _ty _tz`` thread, ``_bx _by _bz`` block, ``_gx _gy _gz`` grid,
``_lane`` lane. A user's name that starts with one is renamed.
"""

import ast
import builtins
import inspect
import math
import textwrap
import types as pytypes

import numba
import numpy as np
from numba.core import types as nbtypes
from numba.np import numpy_support

from .errors import CompileError
from .registry import equivalent_of
from .stubs import Namespace, Stub

POSITION = {
    **{f"threadIdx.{a}": f"_t{a}" for a in "xyz"},
    **{f"blockIdx.{a}": f"_b{a}" for a in "xyz"},
    **{f"gridDim.{a}": f"_g{a}" for a in "xyz"},
    "laneid": "_lane",
}
HIDDEN = ["_tx", "_ty", "_tz", "_bx", "_by", "_bz", "_gx", "_gy", "_gz"]  # passed on to device functions
PLAIN_BUILTINS = {"abs", "int", "float", "bool", "len", "round", "divmod", "pow", "print"}
MISSING = object()


def name(identifier, ctx=None):
    return ast.Name(id=identifier, ctx=ctx or ast.Load())


def call(function, *args, like=None):
    node = ast.Call(func=name(function), args=list(args), keywords=[])
    return at(node, like)


def at(node, like):
    """``node`` with the source position of ``like`` on it and everything new below it."""
    if like is not None:
        for sub in ast.walk(node):
            if not hasattr(sub, "lineno") and isinstance(sub, (ast.expr, ast.stmt)):
                ast.copy_location(sub, like)
    return node


def assign(target, value, like):
    return at(ast.Assign(targets=[name(target, ast.Store())], value=value), like)


def bodies(stmt):
    """The statement lists directly below a statement."""
    return [getattr(stmt, f) for f in ("body", "orelse") if getattr(stmt, f, None)]


def source_tree(function):
    """``(FunctionDef, filename)`` of a Python function, with the line numbers of its file."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise CompileError(
            f"the source of {function.__name__} cannot be read",
            mend="the CPU backend compiles source text: define kernels in a file or a notebook cell, not with exec",
        ) from None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        raise CompileError("a kernel must be a plain function", function.__code__.co_filename, first,
                           "write it with def, at the top of a file or cell")  # fmt: skip
    return node, function.__code__.co_filename


def lookup(function, identifier):
    """What a global, free or builtin name of ``function`` stands for (``MISSING`` if nothing)."""
    code = function.__code__
    if identifier in code.co_freevars:
        try:
            return function.__closure__[code.co_freevars.index(identifier)].cell_contents
        except ValueError:
            return MISSING
    if identifier in function.__globals__:
        return function.__globals__[identifier]
    return getattr(builtins, identifier, MISSING)


def python_function(value):
    """The Python function behind a device function (ours, or one made by ``numba.njit``), or None."""
    inner = getattr(value, "py_func", None)
    return inner if isinstance(inner, pytypes.FunctionType) else None


class Program:
    """A kernel in normal form, with all that its generated module needs."""

    def __init__(self, function, block_dim, tables):
        self.block_dim = block_dim  # (x, y, z)
        self.tables = tables  # names of the scalar equivalents, see runtime.py
        self.shared = {}  # name -> (shape or None for dynamic, numba dtype, line)
        self.local = {}  # name -> (shape, numba dtype)
        self.consts = {}  # name -> python text
        self.device = {}  # generated njit device functions: name -> FunctionDef, in order of need
        self.device_names = {}  # python function -> name
        self.inlined = 0
        self.temps = 0
        self.uses = {}  # python function -> (inline?, needs positions?)
        self.kernel = FunctionFront(self, function)
        self.name, self.filename = function.__name__, self.kernel.filename
        self.params, self.body = self.kernel.lower_kernel()

    def fresh(self, stem="t"):
        self.temps += 1
        return f"_{stem}{self.temps}"

    def const(self, text, stem="k"):
        for key, value in self.consts.items():
            if value == text:
                return key
        key = f"_{stem}{len(self.consts)}"
        self.consts[key] = text
        return key

    def traits(self, function):
        """``(contains collectives or shared arrays, uses thread positions)``, through all it calls."""
        if function in self.uses:
            return self.uses[function]
        self.uses[function] = (False, False)  # recursion ends here
        tree, _ = source_tree(function)
        inline = position = False
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Name, ast.Attribute)):
                continue
            value = static_value(node, function, ())
            if isinstance(value, Stub):
                inline |= value.role in ("block", "warp") or value.name == "shared.array"
                position |= value.role in ("position", "grid")
            elif python_function(value):
                sub = self.traits(python_function(value))
                inline, position = inline or sub[0], position or sub[1]
            elif value is not MISSING and equivalent_of(value) is not None:
                inline |= equivalent_of(value).level == "warp"
        self.uses[function] = (inline, position)
        return inline, position


def static_value(node, function, local_names):
    """The compile-time value of a name or dotted name, ``MISSING`` if it has none."""
    if isinstance(node, ast.Name):
        return MISSING if node.id in local_names else lookup(function, node.id)
    if isinstance(node, ast.Attribute):
        base = static_value(node.value, function, local_names)
        if base is MISSING or isinstance(base, (np.ndarray, Stub)):
            return MISSING
        return getattr(base, node.attr, MISSING)
    return MISSING


class FunctionFront(ast.NodeTransformer):
    """Resolves and normalises one function (the kernel, or a device function being inlined)."""

    def __init__(self, program, function, prefix="", bindings=None):
        self.program, self.function, self.prefix = program, function, prefix
        self.tree, self.filename = source_tree(function)
        self.bindings = dict(bindings or {})  # parameter -> AST it stands for (inlining)
        args = self.tree.args
        if args.vararg or args.kwarg or args.kwonlyargs or args.defaults:
            self.fail(self.tree, "a kernel takes positional parameters only, without defaults",
                      "list the parameters one by one")  # fmt: skip
        self.param_names = [a.arg for a in args.posonlyargs + args.args]
        self.locals = set(self.param_names)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.locals.add(node.id)
        self.inline_stack = [function]
        self.hoisting = True  # False for device functions compiled on their own
        self.arrays = {}  # local name -> unique name of a shared or local array

    # -- errors ---------------------------------------------------------------------------------------------
    def fail(self, node, what, mend=None):
        raise CompileError(what, self.filename, getattr(node, "lineno", None), mend)

    # -- names ----------------------------------------------------------------------------------------------
    def rename(self, identifier):
        if self.prefix:
            return f"{self.prefix}{identifier.lstrip('_') or 'u'}"
        return f"u{identifier}" if identifier.startswith("_") else identifier

    def static(self, node):
        """Compile-time value: global constants, modules, stubs; also arithmetic on global constants."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Name, ast.Attribute)):
            value = static_value(node, self.function, self.locals)
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
            return at(ast.Constant(value), node)
        if isinstance(value, float):
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
        self.fail(node, f"{ast.unparse(node)} ({shown}) cannot be used inside a kernel",
                  "pass it to the kernel as an argument, or make it a number or a tuple of numbers")  # fmt: skip

    def const_array(self, value, node):
        if value.nbytes > 65536:
            self.fail(node, f"a constant array of {value.nbytes} bytes; constant memory holds 65536",
                      "pass it to the kernel as an argument")  # fmt: skip
        data = np.ascontiguousarray(value)
        return self.program.const(
            f"np.frombuffer(bytes.fromhex({data.tobytes().hex()!r}), dtype=np.{data.dtype.name})"
            f".reshape({data.shape!r})", "const"
        )  # fmt: skip

    def visit_Name(self, node):
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            return at(name(self.rename(node.id), ast.Store()), node)
        if node.id in self.bindings:
            return _copy_at(self.bindings[node.id], node)
        if node.id in self.locals:
            return at(name(self.arrays.get(node.id) or self.rename(node.id)), node)
        value = lookup(self.function, node.id)
        if value is MISSING:
            self.fail(node, f"the name {node.id!r} is not defined", "define it before the kernel, or check its spelling")
        return self.value_node(value, node)

    def visit_Attribute(self, node):
        value = static_value(node, self.function, self.locals)
        if value is not MISSING:
            return self.value_node(value, node)
        if isinstance(node.value, (ast.Name, ast.Attribute)):
            base = static_value(node.value, self.function, self.locals)
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
        self.fail(node, f"{type(node).__name__} is not supported in a kernel",
                  "kernels are made of assignments, if, for … in range, while and calls")  # fmt: skip

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _no
    visit_Await = visit_Yield = visit_YieldFrom = visit_Dict = visit_Set = visit_JoinedStr = visit_Starred = visit_List = _no

    # -- calls ----------------------------------------------------------------------------------------------
    def visit_Call(self, node):
        callee = self.static(node.func)
        if callee is MISSING:
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("view", "item", "bit_count"):
                return self.generic_visit(node)
            self.fail(node, f"{ast.unparse(node.func)} cannot be called inside a kernel",
                      "call a @cuda.jit(device=True) function, math.*, or a cuda.* function")  # fmt: skip
        if isinstance(callee, Stub):
            return self.stub_call(callee, node)
        if python_function(callee):
            return self.device_call(python_function(callee), node)
        registered = equivalent_of(callee)
        if registered is not None:
            new = call(self.program.const(registered.text, "fn"), *[self.visit(a) for a in node.args], like=node)
            if registered.level == "warp":
                new.special = "W"
                new.registered = registered
            return new
        args = [self.visit(a) for a in node.args]
        if node.keywords:
            self.fail(node, "keyword arguments are not supported here", "pass the arguments by position")
        tables = self.program.tables
        if getattr(math, getattr(callee, "__name__", ""), None) is callee:
            key = callee.__name__
            return call(tables["math"].get(key) or self.program.const(f"math.{key}", "m"), *args, like=node)
        if isinstance(callee, nbtypes.Type) or isinstance(callee, type) and issubclass(callee, np.generic):
            return call(self.program.const(_type_text(callee), "ty"), *args, like=node)
        if isinstance(callee, np.ufunc) or getattr(np, getattr(callee, "__name__", ""), None) is callee:
            return call(self.program.const(f"np.{callee.__name__}", "np"), *args, like=node)
        if callee is range:
            self.fail(node, "range stands only in a for loop")
        key = getattr(callee, "__name__", "")
        if getattr(builtins, key, None) is callee and (key in PLAIN_BUILTINS or key in ("min", "max")):
            return call(tables["builtin"].get(key, key), *args, like=node)
        self.fail(node, f"{ast.unparse(node.func)} cannot be called inside a kernel",
                  "call a @cuda.jit(device=True) function, math.*, or a cuda.* function")  # fmt: skip

    def stub_call(self, stub, node):
        role, short = stub.role, stub.name.split(".")[-1]
        if role == "array":
            self.fail(node, f"cuda.{stub.name}(…) must be assigned to a name on a line of its own",
                      f"write: tile = cuda.{stub.name}(…)")  # fmt: skip
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
            return call("_nothing", like=node)
        if role == "atomic":
            if not args or not isinstance(args[0], ast.Name):
                self.fail(node, f"cuda.{stub.name} takes an array's name first", f"cuda.{stub.name}(array, index, value)")
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
            self.fail(node, f"cuda.{short} takes the literal 1, 2 or 3", f"cuda.{short}(1)")
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
        inline, position = self.program.traits(function)
        args = [self.visit(a) for a in node.args]
        if inline:
            if function in self.inline_stack:
                self.fail(node, f"{function.__name__} calls itself and contains barriers or shuffles",
                          "write the recursion as a loop")  # fmt: skip
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
        front = FunctionFront(program, function)
        front.hoisting = False
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
            name=key, args=ast.arguments([], [ast.arg(p) for p in params], None, [], [], None, []),
            body=body or [ast.Pass()], decorator_list=[], returns=None, type_params=[],
        )  # fmt: skip
        program.device[key] = ast.fix_missing_locations(ast.copy_location(new, tree))
        program.device[key].filename = front.filename
        return key

    # -- statements -----------------------------------------------------------------------------------------
    def lower_kernel(self):
        params = [self.rename(p) for p in self.param_names]
        body = []
        assigned = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for i, p in enumerate(self.param_names):
            if p in assigned:  # a reassigned parameter becomes an ordinary variable
                body.append(assign(params[i], name(f"_arg_{p.lstrip('_')}"), self.tree.body[0]))
                params[i] = f"_arg_{p.lstrip('_')}"
        self.lower_block(strip_docstring(self.tree.body), body)
        return params, body

    def lower_block(self, stmts, out):
        for stmt in stmts:
            method = getattr(self, f"lower_{type(stmt).__name__}", None)
            if method is None:
                self._no(stmt)
            method(stmt, out)

    def lower_Pass(self, stmt, out):
        pass

    def lower_Assert(self, stmt, out):
        pass  # as on a GPU: assertions are checked only in a debug build

    def lower_Raise(self, stmt, out):
        self.fail(stmt, "a kernel cannot raise exceptions", "return early, or write a status into an array")

    def lower_Expr(self, stmt, out):
        if isinstance(stmt.value, ast.Constant):
            return
        if not isinstance(stmt.value, ast.Call):
            self.visit(stmt.value)  # for its errors
            return
        value = self.flatten(self.visit(stmt.value), out, top=True)
        if isinstance(value, ast.Call) and not (isinstance(value.func, ast.Name) and value.func.id == "_nothing"):
            out.append(at(ast.Expr(value), stmt))

    def lower_AnnAssign(self, stmt, out):
        if stmt.value is not None:
            self.lower_Assign(ast.copy_location(ast.Assign([stmt.target], stmt.value), stmt), out)

    def lower_Assign(self, stmt, out):
        if len(stmt.targets) > 1:  # a = b = value
            t = self.program.fresh()
            out.append(assign(t, self.flatten(self.visit(stmt.value), out), stmt))
            for target in stmt.targets:
                self.store(target, at(name(t), stmt), stmt, out)
            return
        target = stmt.targets[0]
        if isinstance(stmt.value, ast.Call) and isinstance(target, ast.Name):
            callee = self.static(stmt.value.func)
            if isinstance(callee, Stub) and callee.role == "array":
                return self.declare_array(target, callee, stmt.value)
        self.store(target, self.visit(stmt.value), stmt, out)

    def store(self, target, value, stmt, out):
        """Append what ``target = value`` becomes; ``value`` is resolved, not yet flattened."""
        if isinstance(target, ast.Name):
            if target.id in self.arrays:
                self.fail(stmt, f"{target.id} already names a shared or local array", "use another name")
            value = self.flatten(value, out, top=True)
            out.append(at(ast.Assign([self.visit(target)], value), stmt))
        elif isinstance(target, ast.Subscript):
            value = self.flatten(value, out)
            place = self.flatten(self.visit(target), out)
            out.append(at(ast.Assign([place], value), stmt))
        elif isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, ast.Tuple):
                if len(value.elts) != len(target.elts):
                    self.fail(stmt, f"{len(value.elts)} values for {len(target.elts)} names")
                temps = []
                for v in value.elts:
                    if isinstance(v, ast.Constant) or len(value.elts) == 1:
                        temps.append(v)
                        continue
                    temps.append(at(name(self.program.fresh()), stmt))
                    out.append(assign(temps[-1].id, self.flatten(v, out), stmt))
                for t, v in zip(target.elts, temps):
                    self.store(t, v, stmt, out)
                return
            value = self.flatten(value, out, top=True)
            if isinstance(value, ast.Tuple):
                return self.store(target, value, stmt, out)
            temps = [self.program.fresh() for _ in target.elts]
            names = ast.Tuple([name(t, ast.Store()) for t in temps], ast.Store())
            out.append(at(ast.Assign([names], value), stmt))
            for t, v in zip(target.elts, temps):
                self.store(t, at(name(v), stmt), stmt, out)
        else:
            self.fail(stmt, f"cannot assign to {ast.unparse(target)} in a kernel")

    def lower_AugAssign(self, stmt, out):
        if isinstance(stmt.target, ast.Name):
            load = ast.copy_location(ast.Name(stmt.target.id, ast.Load()), stmt.target)
            value = self.visit(ast.copy_location(ast.BinOp(load, stmt.op, stmt.value), stmt))
            return self.store(stmt.target, value, stmt, out)
        if not isinstance(stmt.target, ast.Subscript):
            self.fail(stmt, f"cannot assign to {ast.unparse(stmt.target)} in a kernel")
        place = self.flatten(self.visit(stmt.target), out)
        value = self.visit(stmt.value)
        if has_special(value):  # a[i] += shuffle(…): the old a[i] is read first, as Python does
            t = self.program.fresh()
            out.append(assign(t, _as_load(place), stmt))
            value = ast.BinOp(name(t), stmt.op, self.flatten(value, out))
            out.append(at(ast.Assign([place], at(value, stmt)), stmt))
            return
        out.append(at(ast.AugAssign(place, stmt.op, value), stmt))

    def declare_array(self, target, stub, node):
        program, kind = self.program, stub.name.split(".")[0]
        arguments = {k.arg: k.value for k in node.keywords}
        names = ("ndarray",) if kind == "const" else ("shape", "dtype", "alignment")
        arguments.update(zip(names, node.args))
        if kind == "const":
            value = self.static(arguments.get("ndarray", ast.Constant(None)))
            if not isinstance(value, np.ndarray):
                self.fail(node, "cuda.const.array_like takes a NumPy array that is global to the kernel")
            self.arrays[target.id] = self.const_array(value, node)
            return
        shape = self.static(arguments.get("shape", ast.Constant(None)))
        if isinstance(shape, int):
            shape = (shape,)
        if not isinstance(shape, tuple) or not all(isinstance(d, (int, np.integer)) for d in shape):
            self.fail(node, f"the shape of cuda.{stub.name} must be a compile-time constant, as on a GPU",
                      "use a literal or a global constant; for a size known at launch, cuda.shared.array(0, dtype) "
                      "and the fourth launch argument")  # fmt: skip
        dtype = self.dtype(arguments.get("dtype"), node)
        unique = program.fresh(f"{kind[0]}_{target.id.strip('_')}_") if self.prefix else self.rename(target.id)
        entry = (tuple(int(d) for d in shape), dtype)
        table = program.shared if kind == "shared" else program.local
        if target.id in self.arrays and table.get(self.arrays[target.id], entry)[:2] != entry:
            self.fail(node, f"{target.id} is declared twice with different shapes or types", "use two names")
        if kind == "shared" and shape == (0,):
            table[unique] = (None, dtype)
        elif any(d <= 0 for d in shape):
            self.fail(node, f"cuda.{stub.name} with shape {shape}: every size must be at least 1")
        else:
            table[unique] = entry
        self.arrays[target.id] = unique

    def dtype(self, node, where):
        value = self.static(node) if node is not None else MISSING
        if isinstance(value, nbtypes.Type):
            return value
        try:
            return numpy_support.from_dtype(np.dtype(value))
        except Exception:
            self.fail(where, f"{ast.unparse(node) if node else 'nothing'} is not a data type",
                      "use numba.float32, np.float32, …")  # fmt: skip

    def lower_If(self, stmt, out):
        test = self.flatten(self.visit(stmt.test), out)
        if isinstance(test, ast.Constant):  # a branch on a compile-time constant
            return self.lower_block(stmt.body if test.value else stmt.orelse, out)
        body, orelse = [], []
        self.lower_block(stmt.body, body)
        self.lower_block(stmt.orelse, orelse)
        if body or orelse:
            out.append(ast.copy_location(ast.If(test, body or [at(ast.Pass(), stmt)], orelse), stmt))

    def lower_While(self, stmt, out):
        if stmt.orelse:
            self.fail(stmt.orelse[0], "while … else is not supported in a kernel")
        test, body = self.visit(stmt.test), []
        if has_special(test):
            test = self.flatten(test, body)
            stop = at(ast.UnaryOp(ast.Not(), test), stmt)
            body.append(ast.copy_location(ast.If(stop, [ast.copy_location(ast.Break(), stmt)], []), stmt))
            test = ast.copy_location(ast.Constant(True), stmt)
        self.lower_block(stmt.body, body)
        out.append(ast.copy_location(ast.While(test, body or [at(ast.Pass(), stmt)], []), stmt))

    def lower_For(self, stmt, out):
        if stmt.orelse:
            self.fail(stmt.orelse[0], "for … else is not supported in a kernel")
        if isinstance(stmt.iter, (ast.Tuple, ast.Name, ast.Attribute)) and isinstance(self.static(stmt.iter), tuple):
            return self.lower_For_tuple(stmt, out)
        if not (isinstance(stmt.iter, ast.Call) and self.static(stmt.iter.func) is range and not stmt.iter.keywords):
            self.fail(stmt, f"a kernel's for loop runs over range(…), not over {ast.unparse(stmt.iter)}",
                      "for i in range(n): value = array[i]")  # fmt: skip
        if not isinstance(stmt.target, ast.Name):
            self.fail(stmt, "the loop variable must be a plain name")
        args = self.flatten_list([self.visit(a) for a in stmt.iter.args], out)
        loop = at(ast.Call(name("range"), args, []), stmt.iter)
        body = []
        target = self.visit(stmt.target)
        self.lower_block(stmt.body, body)
        out.append(ast.copy_location(ast.For(target, loop, body or [at(ast.Pass(), stmt)], []), stmt))

    def lower_For_tuple(self, stmt, out):
        """``for offset in (16, 8, 4):`` becomes a loop over the positions of the tuple."""
        values = self.static(stmt.iter)
        position = self.program.fresh("at")
        element = ast.Subscript(self.value_node(values, stmt), name(position), ast.Load())
        body = [at(ast.Assign([self.visit(stmt.target)], element), stmt)]
        self.lower_block(stmt.body, body)
        loop = ast.Call(name("range"), [ast.Constant(len(values))], [])
        out.append(at(ast.copy_location(ast.For(name(position, ast.Store()), loop, body, []), stmt), stmt))

    def lower_Break(self, stmt, out):
        out.append(stmt)

    lower_Continue = lower_Break

    def lower_Return(self, stmt, out):
        if stmt.value is not None and not (isinstance(stmt.value, ast.Constant) and stmt.value.value is None):
            self.fail(stmt, "a kernel returns nothing", "write results into an array argument")
        out.append(ast.copy_location(ast.Return(None), stmt))

    # -- device functions compiled on their own: only resolve ------------------------------------------------
    def visit_Assign(self, stmt):
        target = stmt.targets[0]
        if isinstance(stmt.value, ast.Call) and isinstance(target, ast.Name):
            callee = self.static(stmt.value.func)
            if isinstance(callee, Stub) and callee.role == "array":
                keep = dict(self.program.local)
                self.declare_array(target, callee, stmt.value)
                unique = self.arrays[target.id]
                if unique in self.program.consts:
                    return None
                shape, dtype = self.program.local.pop(unique)
                self.program.local.update(keep)
                self.arrays.pop(target.id)
                new = call("_stack", at(ast.Tuple([ast.Constant(d) for d in shape], ast.Load()), stmt),
                           name(self.program.const(_type_text(dtype), "ty")), like=stmt)  # fmt: skip
                return at(ast.Assign([name(self.rename(target.id), ast.Store())], new), stmt)
        return self.generic_visit(stmt)

    def visit_Expr(self, stmt):
        return None if isinstance(stmt.value, ast.Constant) else self.generic_visit(stmt)

    def visit_For(self, stmt):
        if isinstance(self.static(stmt.iter), tuple):
            stmt.iter = self.value_node(self.static(stmt.iter), stmt.iter)
        elif isinstance(stmt.iter, ast.Call) and self.static(stmt.iter.func) is range:
            stmt.iter = at(ast.Call(name("range"), [self.visit(a) for a in stmt.iter.args], []), stmt.iter)
        else:
            self.fail(stmt, "a device function's for loop runs over range(…)")
        stmt.target = self.visit(stmt.target)
        stmt.body = [s for s in (self.visit(s) for s in stmt.body) if s is not None] or [ast.Pass()]
        return stmt

    visit_With = visit_Try = visit_FunctionDef = visit_ClassDef = visit_Raise = visit_Global = visit_Import = _no

    # -- hoisting and inlining ------------------------------------------------------------------------------
    def flatten(self, node, out, top=False):
        """``node`` without collectives: each goes to ``out`` as a statement, in order of evaluation."""
        if not self.hoisting or not has_special(node):
            return node
        special = getattr(node, "special", None)
        if special:
            node.args = self.flatten_list(node.args, out)
            if special == "I":
                return self.expand(node, out)
            if top:
                return node
            t = self.program.fresh()
            out.append(assign(t, node, node))
            return at(name(t), node)
        if isinstance(node, ast.BoolOp):
            skipped, node.values[0] = node.values[1:], self.flatten(node.values[0], out)
        elif isinstance(node, ast.IfExp):
            skipped, node.test = [node.body, node.orelse], self.flatten(node.test, out)
        elif isinstance(node, ast.Compare) and len(node.comparators) > 1:
            skipped = node.comparators[1:]
            node.left, node.comparators[0] = self.flatten_list([node.left, node.comparators[0]], out)
        else:
            fields = [(f, v) for f, v in ast.iter_fields(node) if isinstance(v, ast.expr)]
            lists = [(f, v) for f, v in ast.iter_fields(node) if isinstance(v, list)]
            flat = [v for _, v in fields] + [e for _, vs in lists for e in vs if isinstance(e, ast.expr)]
            done = iter(self.flatten_list(flat, out))
            for f, _ in fields:
                setattr(node, f, next(done))
            for _, vs in lists:
                vs[:] = [next(done) if isinstance(e, ast.expr) else e for e in vs]
            return node
        if any(has_special(s) for s in skipped):
            self.fail(node, "a barrier, shuffle or vote in a part of an expression that some threads skip",
                      "compute it on a line of its own, before this one")  # fmt: skip
        return node

    def flatten_list(self, nodes, out):
        last = max((i for i, n in enumerate(nodes) if has_special(n)), default=-1)
        result = []
        for i, node in enumerate(nodes):
            if i < last and not has_special(node) and any(isinstance(n, (ast.Subscript, ast.Call)) for n in ast.walk(node)):
                t = self.program.fresh()  # evaluated before the collective, so kept from before it
                out.append(assign(t, node, node))
                node = at(name(t), node)
            result.append(self.flatten(node, out))
        return result

    def expand(self, node, out):
        """Inline one call of a device function that contains collectives; returns its value's expression."""
        program, function = self.program, node.function
        program.inlined += 1
        front = FunctionFront(program, function, prefix=f"f{program.inlined}_")
        front.inline_stack = [*self.inline_stack, function]
        if len(node.args) != len(front.param_names):
            self.fail(node, f"{function.__name__} takes {len(front.param_names)} arguments, not {len(node.args)}")
        assigned = {n.id for n in ast.walk(front.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for p, value in zip(front.param_names, node.args):
            stable = isinstance(value, ast.Constant) or isinstance(value, ast.Name) and (
                value.id in program.shared or value.id in program.local or value.id in program.consts
                or value.id in self.stable_params()
            )  # fmt: skip
            if stable and p not in assigned:
                front.bindings[p] = value
                if isinstance(value, ast.Name):
                    front.arrays[p] = value.id
            else:
                out.append(assign(front.rename(p), value, node))
        body = []
        front.lower_device_block(strip_docstring(front.tree.body), body)
        out.extend(body)
        return front.result

    def stable_params(self):
        """Parameters of the kernel that are never reassigned (they may be substituted, arrays above all)."""
        kernel = getattr(self.program, "kernel", self)
        assigned = {n.id for n in ast.walk(kernel.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return {kernel.rename(p) for p in kernel.param_names if p not in assigned}

    def lower_device_block(self, stmts, out):
        returns = [n for s in stmts for n in ast.walk(s) if isinstance(n, ast.Return)]
        for loop in (n for s in stmts for n in ast.walk(s) if isinstance(n, (ast.For, ast.While))):
            for n in ast.walk(loop):
                if isinstance(n, ast.Return):
                    self.fail(n, "return inside a loop of a device function that contains barriers or shuffles",
                              "break out of the loop and return after it")  # fmt: skip
        values = [r.value for r in returns if r.value is not None]
        self.result = None
        self.result_names = None
        if values:
            width = len(values[0].elts) if isinstance(values[0], ast.Tuple) else 0
            stem = self.program.fresh("r")
            self.result_names = [f"{stem}_{i}" for i in range(width)] or [stem]
            load = [at(name(n), values[0]) for n in self.result_names]
            self.result = at(ast.Tuple(load, ast.Load()), values[0]) if width else load[0]
        self.lower_returns(stmts, out)

    def lower_returns(self, stmts, out):
        """Lower statements in which ``return`` may occur in branches: what follows moves into the other branch."""
        for i, stmt in enumerate(stmts):
            if isinstance(stmt, ast.Return):
                if stmt.value is not None:
                    value = self.flatten(self.visit(stmt.value), out)
                    parts = value.elts if len(self.result_names) > 1 and isinstance(value, ast.Tuple) else [value]
                    if len(parts) != len(self.result_names):
                        self.fail(stmt, "all returns of this device function must have the same number of values")
                    for n, v in zip(self.result_names, parts):
                        out.append(assign(n, v, stmt))
                return
            if isinstance(stmt, ast.If) and any(isinstance(n, ast.Return) for n in ast.walk(stmt)):
                rest = stmts[i + 1 :]
                test = self.flatten(self.visit(stmt.test), out)
                body, orelse = [], []
                ends = [_always_returns(stmt.body), _always_returns(stmt.orelse)]
                if not any(ends) and rest:
                    self.fail(stmt, "this device function contains barriers or shuffles and returns in too nested a way",
                              "give it one return, at its end")  # fmt: skip
                self.lower_returns(stmt.body + ([] if ends[0] else rest), body)
                self.lower_returns(stmt.orelse + ([] if ends[1] else rest), orelse)
                out.append(ast.copy_location(ast.If(test, body or [at(ast.Pass(), stmt)], orelse), stmt))
                return
            self.lower_block([stmt], out)


def _always_returns(stmts):
    if not stmts:
        return False
    last = stmts[-1]
    if isinstance(last, ast.Return):
        return True
    return isinstance(last, ast.If) and _always_returns(last.body) and _always_returns(last.orelse)


def has_special(node):
    return any(getattr(n, "special", None) for n in ast.walk(node))


def strip_docstring(stmts):
    first = stmts[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return stmts[1:]
    return stmts


def _type_text(kind):
    if isinstance(kind, nbtypes.Type):
        return "numba.types.boolean" if kind == numba.types.boolean else f"numba.types.{kind.name}"
    return f"np.{kind.__name__}" if kind.__name__ != "bool" else "np.bool_"


def _as_load(place):
    return ast.copy_location(ast.Subscript(place.value, place.slice, ast.Load()), place)


def _copy_at(node, like):
    new = ast.Constant(node.value) if isinstance(node, ast.Constant) else ast.Name(node.id, ast.Load())
    return ast.copy_location(new, like)


def _with_values(node, front):
    """A copy of constant arithmetic with names replaced by their values, for evaluation."""
    if isinstance(node, ast.BinOp):
        return ast.BinOp(_with_values(node.left, front), node.op, _with_values(node.right, front))
    if isinstance(node, ast.UnaryOp):
        return ast.UnaryOp(node.op, _with_values(node.operand, front))
    return ast.Constant(front.static(node))
