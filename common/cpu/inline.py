"""Collectives on lines of their own, and device functions that contain them inlined."""

import ast

from numba.core import types

from .resolve import type_text
from .tree import assign, at, call, has_special, name, strip_docstring


def _always_returns(stmts):
    if not stmts:
        return False
    last = stmts[-1]
    if isinstance(last, ast.Return):
        return True
    return isinstance(last, ast.If) and _always_returns(last.body) and _always_returns(last.orelse)


class Inlining:
    """The part of the front end that hoists collectives out of expressions and inlines device functions."""

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
            self.fail(
                node,
                "a barrier, shuffle or vote in a part of an expression that some threads skip",
                "compute it on a line of its own, before this one",
            )
        return node

    def flatten_list(self, nodes, out):
        last = max((i for i, n in enumerate(nodes) if has_special(n)), default=-1)
        result = []
        for i, node in enumerate(nodes):
            if (
                i < last
                and not has_special(node)
                and any(isinstance(n, (ast.Subscript, ast.Call)) for n in ast.walk(node))
            ):
                t = self.program.fresh()  # evaluated before the collective, so kept from before it
                out.append(assign(t, node, node))
                node = at(name(t), node)
            result.append(self.flatten(node, out))
        return result

    def expand(self, node, out):
        """Inline one call of a device function that contains collectives; returns its value's expression."""
        program, function = self.program, node.function
        program.inlined += 1
        front = type(self)(program, function, prefix=f"f{program.inlined}_")
        front.inline_stack = [*self.inline_stack, function]
        if len(node.args) != len(front.param_names):
            self.fail(node, f"{function.__name__} takes {len(front.param_names)} arguments, not {len(node.args)}")
        assigned = {n.id for n in ast.walk(front.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        casts, front.result_cast = self.casts(function, node)
        for p, value, cast in zip(front.param_names, node.args, casts):
            if cast:
                out.append(assign(front.rename(p), call(cast, value, like=node), node))
                continue
            stable = (
                isinstance(value, ast.Constant)
                or isinstance(value, ast.Name)
                and (
                    value.id in program.shared
                    or value.id in program.local
                    or value.id in program.consts
                    or value.id in self.stable_params()
                )
            )
            if stable and p not in assigned:
                front.bindings[p] = value
                if isinstance(value, ast.Name):
                    front.arrays[p] = value.id
            elif isinstance(value, ast.Tuple) and p not in assigned:  # an index: part by part, as the checks want it
                parts = []
                for i, part in enumerate(value.elts):
                    if not isinstance(part, ast.Constant):
                        out.append(assign(f"{front.rename(p)}_{i}", part, node))
                        part = at(name(f"{front.rename(p)}_{i}"), node)
                    parts.append(part)
                front.bindings[p] = at(ast.Tuple(parts, ast.Load()), node)
            else:
                out.append(assign(front.rename(p), value, node))
        body = []
        front.lower_device_block(strip_docstring(front.tree.body), body)
        out.extend(body)
        return front.result

    def casts(self, function, node):
        """``(names of casts, one an argument; that of the result)``, by its explicit signature; None for no cast."""
        given = self.program.names.signatures.get(function, ())
        if len(given) > 1:
            self.fail(
                node,
                f"{function.__name__} has several signatures and contains barriers or shuffles, which are part of "
                "each kernel",
                "give it one signature, or none",
            )
        if not given:
            return [None] * len(node.args), None
        result = None if isinstance(given[0], tuple) else given[0].return_type
        kinds = given[0] if isinstance(given[0], tuple) else given[0].args
        return [self.cast_to(kind) for kind in kinds], self.cast_to(result)

    def cast_to(self, kind):
        """The name of a function that casts to a number type; None for what is not a number."""
        scalar = isinstance(kind, (types.Number, types.Boolean))
        return self.program.const(type_text(kind), "ty") if scalar else None

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
                    self.fail(
                        n,
                        "return inside a loop of a device function that contains barriers or shuffles",
                        "break out of the loop and return after it",
                    )
        values = [r.value for r in returns if r.value is not None]
        self.result = None
        self.result_names = None
        if values:
            width = next((len(v.elts) for v in values if isinstance(v, ast.Tuple)), 0)
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
                    if len(self.result_names) > 1 and isinstance(value, ast.Call):  # of a function that gives a tuple
                        names = ast.Tuple([name(n, ast.Store()) for n in self.result_names], ast.Store())
                        out.append(ast.copy_location(ast.Assign([at(names, stmt)], value), stmt))
                        return
                    if len(parts) != len(self.result_names):
                        self.fail(stmt, "all returns of this device function must have the same number of values")
                    for n, v in zip(self.result_names, parts):
                        out.append(assign(n, call(self.result_cast, v, like=stmt) if self.result_cast else v, stmt))
                return
            if isinstance(stmt, ast.If) and any(isinstance(n, ast.Return) for n in ast.walk(stmt)):
                rest = stmts[i + 1 :]
                test = self.flatten(self.visit(stmt.test), out)
                body, orelse = [], []
                ends = [_always_returns(stmt.body), _always_returns(stmt.orelse)]
                if not any(ends) and rest:
                    self.fail(
                        stmt,
                        "this device function contains barriers or shuffles and returns in too nested a way",
                        "give it one return, at its end",
                    )
                self.lower_returns(stmt.body + ([] if ends[0] else rest), body)
                self.lower_returns(stmt.orelse + ([] if ends[1] else rest), orelse)
                out.append(ast.copy_location(ast.If(test, body or [at(ast.Pass(), stmt)], orelse), stmt))
                return
            self.lower_block([stmt], out)
