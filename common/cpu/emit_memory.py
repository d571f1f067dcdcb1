"""What the emitter writes for the memory report only: points, rounds of loops, branches, counters. See `memlog`."""

import ast
import operator

from numba.core import errors, types
from numba.core.registry import cpu_target

from . import memlog
from .analysis import copy_expr
from .fold import has_exit, has_return

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
NO_WORK = {  # functions of math that only look at a number, or take part of it
    "floor", "ceil", "trunc", "rint", "round", "fabs", "isnan", "isinf", "isfinite", "copysign", "ldexp", "frexp",
    "modf", "fmin", "fmax",
}  # fmt: skip
HALF = {"hadd": 1, "hsub": 1, "hmul": 1, "hdiv": 1, "hfma": 2}
HALF_MATH = {f"h{stem}" for stem in "sqrt rsqrt exp exp2 exp10 log log2 log10 sin cos rcp".split()}


class MemoryLevel:
    """The part of the emitter that makes code count. Every method does nothing unless ``self.memory``."""

    def point(self, node, array, kind, access="READ", elements=1):
        """Number of a new point: (file, line, array as it is named inside, kind, access, elements)."""
        self.points.append((*self.origin(node), array, kind, memlog.__dict__[access], elements))
        return len(self.points) - 1

    def tick(self, node, what, times=1):
        """Emit: add ``times`` to the counter ``what`` of the node's line. what: "barrier", "math", "float32", …"""
        key = (*self.origin(node), what)
        if key not in self.counters:
            self.counters.append(key)
        self.emit(f"_ops[{self.counters.index(key)}] += {times}")

    # -- branches and loops
    def watched(self, stmt, test):
        """``test``, the text of a branch's condition in one lane, with what the lane does noted."""
        if not (self.memory and self.lane_level) or id(stmt) in self.quiet:
            return test
        self.need |= {"_key", "_tid"}
        return f"_branch({test}, _z, _key, _tid, _U({self.point(stmt, '', memlog.BRANCH)}))"

    def agreed(self, stmt, warps):
        """Emit that so many warps come to a branch in which all lanes agree."""
        if self.memory:
            self.tick(stmt, "branch", warps)

    def warps(self):
        return -(-self.a.threads // 32)

    def loop_start(self):
        """Emit what stands before a lane's loop; returns a token for the next two."""
        if not (self.memory and self.lane_level):
            return None
        self.need |= {"_key", "_tid"}
        key, rounds = self.fresh("key"), self.fresh("round")
        self.emit(f"{key} = _key")
        self.emit(f"{rounds} = 0")
        return key, rounds

    def loop_round(self, token, stmt=None):
        """Emit what stands first in the loop's body."""
        if token:
            key, rounds = token
            self.emit(f"{rounds} += 1")
            self.emit(f"_key = _inner({key}, {rounds})")
        if stmt is not None and self.memory:
            self.count(stmt.test, stmt)

    def loop_end(self, token, stmt):
        """Emit what stands behind the loop. Where lanes leave by break or return, those lines are told instead."""
        if token:
            key, rounds = token
            self.emit(f"_key = {key}")
            if not has_return(stmt) and not any(has_exit(s, (ast.Break,)) for s in stmt.body):
                self.emit(f"_rounds(_z, _key, _tid, _U({self.point(stmt, '', memlog.LOOP)}), {rounds})")

    # -- arithmetic
    def count_statement(self, stmt):
        """Emit the counting of the float operations of one thread's statement."""
        if not self.memory or isinstance(stmt, ast.While):
            return
        parts = {ast.If: ("test",), ast.For: ("iter",)}.get(type(stmt), ("targets", "target", "value"))
        if isinstance(stmt, ast.If) and id(stmt) in self.quiet:
            return
        if isinstance(stmt, ast.AugAssign):
            loaded = copy_expr(stmt.target)
            loaded.ctx = ast.Load()
            return self.count(ast.BinOp(loaded, stmt.op, stmt.value), stmt)
        for part in parts:
            for node in [n for n in [getattr(stmt, part, None)] if n is not None]:
                for n in node if isinstance(node, list) else [node]:
                    self.count(n, stmt)

    def count_group(self, stmt, ctx):
        """The same for a statement that is written once for a group: all its lanes do it."""
        if self.memory and self.operations(stmt.value):
            self.lanes(ctx, lambda: self.count(stmt.value, stmt))

    def count(self, node, stmt):
        threads = 1 if self.lane_level else self.a.threads
        for what, n in sorted(self.operations(node).items()):
            self.tick(stmt, what, n * threads)

    def operations(self, node):
        """{"float32": 2, "math": 1, …}: the float operations in an expression."""
        found = {}
        self.type_of(node, found)
        return found

    def type_of(self, node, found):
        """The Numba type of an expression (None if it is not known), its operations counted in ``found``."""
        handler = getattr(self, f"type_of_{type(node).__name__}", None)
        if handler:
            return handler(node, found)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.type_of(child, found)
        return types.boolean if isinstance(node, (ast.Compare, ast.BoolOp)) else None

    def type_of_Constant(self, node, found):
        return {bool: types.boolean, int: types.int64, float: types.float64}.get(type(node.value))

    def type_of_Name(self, node, found):
        if node.id in self.types:
            return types.unliteral(self.types[node.id])
        return types.int64 if node.id in ("_tx", "_ty", "_tz", "_bx", "_by", "_bz", "_lane", "_warp", "_tid") else None

    def type_of_Subscript(self, node, found):
        self.type_of(node.slice, found)
        held = self.type_of(node.value, found)
        return held.dtype if isinstance(held, types.Array) else types.int64

    def type_of_Attribute(self, node, found):
        return types.int64

    def type_of_UnaryOp(self, node, found):
        return self.type_of(node.operand, found)

    def type_of_IfExp(self, node, found):
        self.type_of(node.test, found)
        kinds = self.type_of(node.body, found), self.type_of(node.orelse, found)
        return kinds[0] or kinds[1]

    def type_of_BinOp(self, node, found):
        left, right = self.type_of(node.left, found), self.type_of(node.right, found)
        kind = self.combined(OPERATORS.get(type(node.op)), left, right)
        if isinstance(kind, types.Float):
            power = node.right.value if isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant) else None
            if isinstance(node.op, ast.Pow) and power not in (2, 3):
                found["math"] = found.get("math", 0) + 1
            else:
                found[kind.name] = found.get(kind.name, 0) + (power or 2) - 1
        return kind

    @staticmethod
    def combined(operation, left, right):
        """The type of ``left operation right``, by Numba's own rules."""
        if operation is None or left is None or right is None:
            return left or right
        if left == right and isinstance(left, types.Float):
            return left
        try:
            return cpu_target.typing_context.resolve_function_type(operation, (left, right), {}).return_type
        except (errors.NumbaError, AttributeError):
            return left if isinstance(left, types.Float) else right

    def type_of_Call(self, node, found):
        callee = getattr(node.func, "id", "")
        kinds = [self.type_of(a, found) for a in node.args]
        floats = [k for k in kinds if isinstance(k, types.Float)]
        widest = max(floats, key=lambda k: k.bitwidth, default=None)
        text = self.p.consts.get(callee, "")
        last = text.rpartition(".")[2]
        if callee.startswith("_atomic_") and node.args:
            kind = getattr(kinds[0], "dtype", None)
            if isinstance(kind, types.Float) and callee in ("_atomic_add", "_atomic_sub"):
                found[kind.name] = found.get(kind.name, 0) + 1
            return kind
        if isinstance(getattr(types, last, None), types.Type):
            return getattr(types, last)
        stem = callee[3:] if callee[:3] in ("_m_", "_s_", "_l_", "_h_", "_b_") else ""
        if text.startswith(("math.", "np.")):
            stem, callee = last, "_m_"
        if callee.startswith("_h_"):
            if stem in HALF:
                found["float16"] = found.get("float16", 0) + HALF[stem]
            elif stem in HALF_MATH:
                found["math"] = found.get("math", 0) + 1
            return types.float16 if stem.startswith("h") else None
        if "fma" in stem and widest:
            found[widest.name] = found.get(widest.name, 0) + 2
        elif callee.startswith(("_m_", "_l_")) and widest and stem.removesuffix("f") not in NO_WORK:
            found["math"] = found.get("math", 0) + 1
        if callee.startswith("_m_"):
            return types.float64 if any(k not in (types.float32, types.float16) for k in kinds) else types.float32
        named = {"int": types.int64, "float": types.float64, "len": types.int64}
        return named.get(callee, widest or (kinds or [None])[0])


def declarations(program, emitter, itemsize):
    """``(lines, tables)``: what a module under a memory report declares, and the tables that it keeps.

    tables: POINTS, see `MemoryLevel.point`, with the arrays' (name in the source, space, shape, item size) in place of
    their names, or for arguments (name, "global", position among the arrays, 0); COUNTERS: (file, line, what).
    """
    arrays, lines, first = {}, [], 0
    for p in program.params:
        if p in emitter.axes:
            lines.append(f"_of_{p} = (_meta[{len(arrays)}, 0],)")
            arrays[p] = (p.removeprefix("_arg_"), "global", len(arrays), 0)
    for key, (shape, dtype) in sorted(program.shared.items(), key=lambda entry: entry[1][0] is None):
        size = itemsize(dtype)
        lines.append(f"_of_{key} = (np.int64({first}),)")
        if shape:  # what is declared lies one after the other, from multiples of 128 on; dynamic memory behind it
            count = size
            for extent in shape:
                count *= extent
            first += -(-count // 128) * 128
        arrays[key] = (program.titles.get(key, key), "shared", shape, size)
    for key, (shape, dtype) in program.local.items():
        size = itemsize(dtype)
        lines += [f"_ls_{key} = 0", f"_of_{key} = (np.int64({size}), ({', '.join(f'np.int64({d})' for d in shape)},))"]
        arrays[key] = (program.titles.get(key, key), "local", shape, size)
    points = [(*p[:2], arrays.get(p[2]), *p[3:]) for p in emitter.points]
    return lines, {"POINTS": points, "COUNTERS": emitter.counters}


def space_kind(emitter, array):
    """The kind of a point that accesses ``array``."""
    return memlog.LOCAL if array in emitter.p.local else memlog.SHARED if array in emitter.p.shared else memlog.GLOBAL


def reads_elements(node):
    """Does an expression load elements of arrays?"""
    subscripts = (n for n in ast.walk(node) if isinstance(n, ast.Subscript))
    return any(not isinstance(n.value, (ast.Attribute, ast.Tuple)) for n in subscripts)


