"""Statements: a kernel's body brought into normal form, one statement kind at a time."""

import ast
import copy

import numpy as np
from numba.core import types as nbtypes
from numba.np import numpy_support

from .resolve import type_text
from .source import MISSING
from .stubs import Stub
from .tree import assign, at, call, has_special, name, strip_docstring


def _as_load(place):
    return ast.copy_location(ast.Subscript(place.value, place.slice, ast.Load()), place)


class Lowering:
    """Lowers statements (``lower_X``), and resolves those of device functions (``visit_X``)."""

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
        parts = getattr(arguments.get("shape"), "elts", [arguments.get("shape")])
        if any(isinstance(part, (ast.BinOp, ast.UnaryOp)) for part in parts):
            self.fail(
                node,
                f"the shape of cuda.{stub.name} is an expression; numba-cuda takes literals and names only",
                "give the result a name outside the kernel: PADDED = TILE + 1",
            )
        if isinstance(shape, int):
            shape = (shape,)
        if not isinstance(shape, tuple) or not all(isinstance(d, (int, np.integer)) for d in shape):
            self.fail(
                node,
                f"the shape of cuda.{stub.name} must be a compile-time constant, as on a GPU",
                "use a literal or a global constant; for a size known at launch, cuda.shared.array(0, dtype) "
                "and the fourth launch argument",
                on_gpu_too=True,
            )
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
        program.titles[unique] = target.id

    def dtype(self, node, where):
        value = self.static(node) if node is not None else MISSING
        if isinstance(value, nbtypes.Type):
            return value
        try:
            return numpy_support.from_dtype(np.dtype(value))
        except Exception:
            self.fail(
                where,
                f"{ast.unparse(node) if node else 'nothing'} is not a data type",
                "use numba.float32, np.float32, …",
                on_gpu_too=True,
            )

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
        if isinstance(stmt.iter, (ast.Name, ast.Subscript)):
            return self.lower_For_array(stmt, out)
        if not (isinstance(stmt.iter, ast.Call) and self.static(stmt.iter.func) is range and not stmt.iter.keywords):
            self.fail(
                stmt,
                f"a kernel's for loop runs over range(…), not over {ast.unparse(stmt.iter)}",
                "for i in range(n): value = array[i]",
            )
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
        self.loop_over_positions(stmt, self.value_node(values, stmt), ast.Constant(len(values)), out)

    def lower_For_array(self, stmt, out):
        """``for value in m[i]:`` becomes a loop over the positions of the row, or of an array with one axis."""
        row = self.flatten(self.visit(stmt.iter), out)
        if isinstance(row, ast.Subscript):  # it is taken once, whatever becomes of i
            named = self.program.fresh("row")
            out.append(assign(named, row, stmt))
            row = name(named)
        self.loop_over_positions(stmt, row, ast.Call(name("len"), [copy.copy(row)], []), out)

    def loop_over_positions(self, stmt, values, length, out):
        """A loop whose variable is each element of ``values`` in turn."""
        position = self.program.fresh("at")
        element = ast.Subscript(values, name(position), ast.Load())
        body = [at(ast.Assign([self.visit(stmt.target)], element), stmt)]
        self.lower_block(stmt.body, body)
        loop = ast.Call(name("range"), [length], [])
        out.append(at(ast.copy_location(ast.For(name(position, ast.Store()), loop, body, []), stmt), stmt))

    def lower_Break(self, stmt, out):
        out.append(stmt)

    lower_Continue = lower_Break

    def lower_Return(self, stmt, out):
        if stmt.value is not None and not (isinstance(stmt.value, ast.Constant) and stmt.value.value is None):
            self.fail(stmt, "a kernel returns nothing", "write results into an array argument")
        out.append(ast.copy_location(ast.Return(None), stmt))

    # -- device functions compiled on their own: only resolve
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
                new = call(
                    "_stack",
                    at(ast.Tuple([ast.Constant(d) for d in shape], ast.Load()), stmt),
                    name(self.program.const(type_text(dtype), "ty")),
                    like=stmt,
                )
                return at(ast.Assign([name(self.rename(target.id), ast.Store())], new), stmt)
        return self.generic_visit(stmt)

    def visit_Expr(self, stmt):
        return None if isinstance(stmt.value, ast.Constant) else self.generic_visit(stmt)

    def visit_For(self, stmt):
        if isinstance(self.static(stmt.iter), tuple):
            stmt.iter = self.value_node(self.static(stmt.iter), stmt.iter)
        elif isinstance(stmt.iter, ast.Call) and self.static(stmt.iter.func) is range:
            stmt.iter = at(ast.Call(name("range"), [self.visit(a) for a in stmt.iter.args], []), stmt.iter)
        elif isinstance(stmt.iter, (ast.Name, ast.Subscript)):
            stmt.iter = self.visit(stmt.iter)
        else:
            self.fail(stmt, "a device function's for loop runs over range(…), an array or a tuple")
        stmt.target = self.visit(stmt.target)
        stmt.body = [s for s in (self.visit(s) for s in stmt.body) if s is not None] or [ast.Pass()]
        return stmt
