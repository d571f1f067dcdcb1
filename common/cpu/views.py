"""Parts of arrays that have a name: ``row = tile[i]`` and then ``row[j]`` becomes ``tile[i, j]``.

A kernel's threads take turns on the CPU, so what lives from one turn to the next is kept once a thread: numbers are,
arrays are not. A name for a part is therefore taken out of the program. The index that it was made with is kept
instead, as it was then, and the part is written out wherever the name stands::

    row = tile[i]              row_0 = i
    row[j] = row[0] + 1   ->   tile[row_0, j] = tile[row_0, 0] + 1

Bounds checks and the sanitizer then see which array it is. Chains such as ``tile[i][j]`` become one index as well.
"""

import ast

from numba.core import types

from .analysis import BASES, UNIFORM, copy_expr
from .errors import CompileError
from .tree import at, bodies, name


def parts_of(index):
    return list(index.elts) if isinstance(index, ast.Tuple) else [index]


def is_part(node, ranks):
    """Is an expression surely or possibly a part of an array of ``ranks`` (name -> axes), or such an array itself?"""
    if isinstance(node, ast.Name):
        return node.id in ranks
    if not isinstance(node, ast.Subscript):
        return isinstance(node, ast.IfExp) and (is_part(node.body, ranks) or is_part(node.orelse, ranks))
    if not isinstance(node.value, ast.Name):
        return is_part(node.value, ranks)
    parts = parts_of(node.slice)
    sliced = any(isinstance(p, ast.Slice) or isinstance(p, ast.Constant) and p.value is ... for p in parts)
    return node.value.id in ranks and (sliced or len(parts) < ranks[node.value.id])


def has_parts(stmts, ranks):
    """Does a program name parts of arrays, or index parts of them?"""
    for node in (n for stmt in stmts for n in ast.walk(stmt)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and is_part(node.value, ranks):
            return True
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Subscript) and is_part(node.value, ranks):
            return True
        if is_atomic(node) and isinstance(node.args[0], ast.Subscript):
            return True
    return False


def is_atomic(node):
    """Is it a call of an atomic operation? Its first argument is an array, its second an index."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("_atomic_")


def has_named_index(stmts):
    """Is something indexed by a variable alone, which could be a tuple?"""
    nodes = (n for stmt in stmts for n in ast.walk(stmt))
    return any(isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Name) for n in nodes)


def write_out(program, ranks, kinds):
    """Take names of parts out of a program, in place. kinds: {variable: Numba type}, by a first inference.

    A name that stands for parts of different arrays, or for parts taken in different ways, stays: it can be used until
    the next barrier or loop of the whole block, and is refused where it lives longer.
    """
    named = {v for v, kind in kinds.items() if isinstance(kind, types.Array) and v not in ranks and isinstance(v, str)}
    pass_ = _WriteOut(program, ranks, kinds, named)
    pass_.block(program.body)
    pass_.substitute(program.body)


def _moved(node, like):
    """``node`` as if it stood where ``like`` does: an error there is one of that line."""
    for sub in ast.walk(node):
        if isinstance(sub, ast.expr):
            ast.copy_location(sub, like)
            sub.filename = getattr(like, "filename", None) or getattr(sub, "filename", None)
            if sub.filename is None:
                del sub.filename
    return node


class _WriteOut:
    def __init__(self, program, ranks, kinds, named):
        self.ranks, self.kinds, self.filename = ranks, dict(kinds), program.filename
        self.definitions = {variable: [] for variable in named}
        plain = set()
        for stmt in (n for s in program.body for n in ast.walk(s)):
            if isinstance(stmt, ast.Assign) and isinstance(stmt.targets[0], ast.Name):
                plain.add(id(stmt.targets[0]))
                if stmt.targets[0].id in named:
                    self.definitions[stmt.targets[0].id].append(stmt)
        others = (n for s in program.body for n in ast.walk(s) if isinstance(n, ast.Name) and id(n) not in plain)
        mixed = {n.id for n in others if isinstance(n.ctx, ast.Store)}
        self.parts = dict.fromkeys(mixed & named)  # name -> a chain of indices on an array; None: it stays as it is
        for variable in sorted(named):
            self.part(variable, ())

    def part(self, variable, busy):
        """The expression that stands for a name, with names for the indices that are kept; None if there is none."""
        if variable in busy:
            return None
        if variable not in self.parts:
            found = [self.taken(stmt, (*busy, variable))[0] for stmt in self.definitions[variable]]
            same = None not in found and len({ast.dump(part) for part in found}) == 1
            self.parts[variable] = found[0] if same else None
        return self.parts[variable]

    def taken(self, stmt, busy):
        """``(part, kept)`` of a definition: what the name stands for, and the assignments that keep the indices."""
        variable, kept = stmt.targets[0].id, []
        once = len(self.definitions[variable]) == 1  # then a constant index needs no variable

        def chain(node):
            if isinstance(node, ast.Name):
                if node.id in self.ranks:
                    return copy_expr(node)
                part = self.part(node.id, busy) if node.id in self.definitions else None
                return part and copy_expr(part)
            if isinstance(node, ast.IfExp):
                one, other = chain(node.body), chain(node.orelse)
                return one and other and self.chosen(node.test, one, other)
            if not isinstance(node, ast.Subscript):
                return None
            base = chain(node.value)
            return base and ast.copy_location(ast.Subscript(base, copy_expr(node.slice), ast.Load()), node)

        def held(part):
            if part is None or isinstance(part, ast.Constant) and (type(part.value) is not int or once):
                return part
            if isinstance(part, ast.Slice):
                return ast.copy_location(ast.Slice(held(part.lower), held(part.upper), held(part.step)), part)
            key = f"_{variable.lstrip('_')}_part{len(kept)}"
            self.kinds[key] = types.int64 if self.integer(part) else types.none
            kept.append(at(ast.Assign([name(key, ast.Store())], part), stmt))
            return at(name(key), stmt)

        def keep(node):
            if isinstance(node, ast.Subscript):
                keep(node.value)
                parts = [held(part) for part in parts_of(node.slice)]
                node.slice = at(ast.Tuple(parts, ast.Load()), stmt) if isinstance(node.slice, ast.Tuple) else parts[0]

        part = chain(stmt.value)
        if part is not None:
            keep(part)
        return part, kept

    def chosen(self, test, one, other):
        """``t[i] if test else t[k]`` as ``t[i if test else k]``; None if the parts are not taken in the same way."""
        if isinstance(one, ast.Name) or isinstance(other, ast.Name):
            return one if ast.dump(one) == ast.dump(other) else None
        base, pairs = self.chosen(test, one.value, other.value), (parts_of(one.slice), parts_of(other.slice))
        if base is None or len(pairs[0]) != len(pairs[1]):
            return None
        parts = []
        for a, b in zip(*pairs):
            same = ast.dump(a) == ast.dump(b)
            if not same and not (self.integer(a) and self.integer(b)):
                return None
            parts.append(a if same else at(ast.IfExp(copy_expr(test), a, b), test))
        index = at(ast.Tuple(parts, ast.Load()), test) if isinstance(one.slice, ast.Tuple) else parts[0]
        return at(ast.Subscript(base, index, ast.Load()), test)

    def block(self, stmts):
        """Replace the definitions of names by what keeps their indices."""
        new = []
        for stmt in stmts:
            for below in bodies(stmt):
                self.block(below)
            target = stmt.targets[0] if isinstance(stmt, ast.Assign) else None
            if isinstance(target, ast.Name) and self.parts.get(target.id) is not None:
                new += self.taken(stmt, ())[1]
            else:
                new.append(stmt)
        if stmts:
            stmts[:] = new or [at(ast.Pass(), stmts[0])]

    def substitute(self, stmts):
        """Write the parts out wherever their names stand, and make one index of chains."""
        writer = self

        class Substitute(ast.NodeTransformer):
            def visit_Name(self, node):
                part = writer.parts.get(node.id) if isinstance(node.ctx, ast.Load) else None
                return node if part is None else _moved(copy_expr(part), node)

            def visit_Subscript(self, node):
                self.generic_visit(node)
                return writer.joined(writer.spelled(node))

            def visit_Call(self, node):
                self.generic_visit(node)
                part = is_atomic(node) and isinstance(node.args[0], ast.Subscript)
                return writer.atomic(node) if part else node

        for stmt in stmts:
            Substitute().visit(stmt)

    def atomic(self, node):
        """``atomic(x[i], j, value)`` as ``atomic(x, (i, j), value)``. Raises CompileError unless i is an integer."""
        if node.func.id == "_atomic_compare_and_swap":  # on the first element
            node.func.id, node.args[1:1] = "_atomic_cas", [at(ast.Constant(0), node)]
        element = self.joined(at(ast.Subscript(node.args[0], node.args[1], ast.Load()), node))
        if not isinstance(element.value, ast.Name):
            called = f"cuda.atomic.{node.func.id.removeprefix('_atomic_')}(array, index, …)"
            raise CompileError(
                "an atomic operation on a slice of an array",
                next((n.filename for n in ast.walk(node) if hasattr(n, "filename")), self.filename),
                node.lineno,
                f"give the array and the whole index: {called}",
            )
        node.args[:2] = [element.value, element.slice]
        return node

    def spelled(self, node):
        """``x[t]``, where t is a tuple, as ``x[t[0], t[1]]``: then each index can be looked at."""
        kind = self.kinds.get(getattr(node.slice, "id", None))
        if isinstance(kind, types.BaseTuple):
            parts = [ast.Subscript(name(node.slice.id), ast.Constant(k), ast.Load()) for k in range(len(kind))]
            node.slice = at(ast.Tuple(parts, ast.Load()), node)
        return node

    def joined(self, node):
        """``x[i][j]`` as ``x[i, j]``, where i is known to be an integer."""
        inner = node.value
        if not (isinstance(inner, ast.Subscript) and isinstance(inner.value, ast.Name)):
            return node
        first, second = parts_of(inner.slice), parts_of(node.slice)
        rank = self.ranks.get(inner.value.id, 0)
        if not all(map(self.integer, first)) or not len(first) < rank >= len(first) + len(second):
            return node
        index = ast.copy_location(ast.Tuple([*first, *second], ast.Load()), node)
        return at(ast.copy_location(ast.Subscript(inner.value, index, node.ctx), node), node)

    def integer(self, node):
        if isinstance(node, ast.Constant):
            return type(node.value) is int
        if isinstance(node, ast.Name):
            kind = self.kinds.get(node.id, types.int64 if node.id in BASES | UNIFORM else types.none)
            return isinstance(types.unliteral(kind), types.Integer)
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            return all(self.integer(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr))
        if isinstance(node, ast.IfExp):
            return self.integer(node.body) and self.integer(node.orelse)
        return False
