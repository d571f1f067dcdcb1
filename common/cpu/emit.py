"""Fission: from a kernel body in normal form to a plain Python function that Numba compiles.

Three levels of code are written::

    block     barriers stand between regions; control flow around barriers must agree in all threads
    group     a region walks the block group by group (a warp or a row); loops and branches that are the same for
              the whole group stand here, and shuffles and votes are carried out here
    lane      everything else, inside `for lane in …`: one thread's code

A value that lives from one lane loop to another is kept for every thread in an array ``a_name[thread]``.
Divergent branches around shuffles run under masks, as on a GPU.
"""

import ast

from numba.core import types

from .analysis import copy_expr, exposed
from .emit_block import BlockLevel
from .emit_group import GroupLevel
from .emit_lane import LaneLevel
from .emit_memory import MemoryLevel, space_kind
from .emit_warp import WarpLevel
from .errors import CompileError
from .tree import name, undecided

ACCESS = {"READ": 0, "WRITE": 1, "ATOMIC": 2, "UPDATE": 3, "EXCHANGE": 4}  # as in shadow.py
NARROW = {  # casts whose argument is looked at: does it fit? (A uint8 of a float only: to cut an integer is common.)
    "int8": "-128, 127", "int16": "-32768, 32767", "int32": "-2147483648, 2147483647", "uint8": "-0.999999, 255.999999",
}  # fmt: skip
STACK_BUDGET = 1 << 19  # bytes of arrays on the stack of a worker; larger ones go to the heap


class Emitter(BlockLevel, GroupLevel, LaneLevel, WarpLevel, MemoryLevel):
    """Writes the generated function of one kernel. ``types``: variable -> Numba type.

    check: "" or "bounds" (``MINI_CHECK=1``) or "accesses": each access to an array goes through the functions of
    `shadow`, or "memory": through those of `memlog`. axes: number of axes of each array, then. debug: divisors are
    looked at.
    """

    def __init__(self, program, analysis, types, check="", axes=None, debug=False):
        self.p, self.a, self.types, self.check = program, analysis, types, check
        self.axes, self.debug = axes or {}, debug
        self.accesses, self.memory = check in ("accesses", "memory"), check == "memory"
        self.points, self.counters, self.quiet = [], [], set()  # of the memory report, see emit_memory
        self.access_sites = {}
        self.parts_taken = set()  # titles of arrays of which not all writes are looked at
        self.notices = []  # (filename, line, what) that the sanitizer cannot see
        nodes = (n for stmt in program.body for n in ast.walk(stmt))
        self.taken = {n.id for n in nodes if isinstance(n, ast.Name)} | {*program.consts, *program.device}
        self.lines, self.depth = [], 0
        self.stored = {}  # variable -> name of its per-thread array
        self.scratch = {}  # name -> (shape text, dtype text, bytes)
        self.sites = []  # (filename, line, what, fix) of every place that can fail
        self.remat = dict(analysis.remat)
        self.alive = analysis.returns_diverge
        self.scalars = set()
        self.need = set()
        self.lane_level = False
        self.counter = 0
        self.block_loops = 0
        # variables that some path reads before it assigns them (never in a valid run), or that groups carry
        self.preset = {v for v in exposed(program.body) if v in analysis.definitions and v not in analysis.varying}

    # -- writing --------------------------------------------------------------------------------------------
    def emit(self, text, extra=0):
        self.lines.append("    " * (self.depth + extra) + text)

    def fresh(self, stem):
        """A name that neither this emitter nor the front end has given to anything."""
        while True:
            self.counter += 1
            if f"_{stem}{self.counter}" not in self.taken:
                return f"_{stem}{self.counter}"

    def buffer(self, stem, shape, dtype, nbytes):
        key = self.fresh(stem)
        self.scratch[key] = (shape, dtype, nbytes)
        return key

    def site(self, node, what, fix):
        self.sites.append((*self.origin(node), what, fix))
        return len(self.sites) - 1

    def origin(self, node):
        """(file, line) that a node comes from: a device function that was inlined may stand in another file."""
        files = (n.filename for n in ast.walk(node) if hasattr(n, "filename"))
        return next(files, self.p.filename), getattr(node, "lineno", 0)

    def access_site(self, node, array):
        """Number of the site of an access to ``array`` on the line of ``node``: one a line and array."""
        key = (*self.origin(node), array)
        if key not in self.access_sites:
            self.access_sites[key] = self.site(node, self.p.titles.get(array, array.removeprefix("_arg_")), "")
        return self.access_sites[key]

    def notice(self, node, what):
        if (*self.origin(node), what) not in self.notices:
            self.notices.append((*self.origin(node), what))

    def touch(self, array, index, node, access, elements=1):
        """Text of the index of an access that is looked at first; None if it cannot be.

        index: AST, its parts as they are written here. access: "READ", "WRITE", "ATOMIC" or "UPDATE" of `shadow`.
        """
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        if not self.lane_level or array not in self.axes:
            return None
        if not parts:
            self.notice(node, "an array without axes; give it one, of length 1")
            return None
        if len(parts) != self.axes[array] or any(isinstance(p, ast.Slice) or _is_ellipsis(p) for p in parts):
            title = self.p.titles.get(array, array.removeprefix("_arg_"))
            self.notice(node, f"a part of {title} is taken as an array of its own: what is read and written there")
            self.parts_taken.add(title)
            return None
        self.need |= {"_tid", "_key"} if self.memory else {"_tid"}
        texts = [f"np.int64({ast.unparse(ast.fix_missing_locations(part))})" for part in parts]
        text = texts[0] if len(parts) == 1 else f"({', '.join(texts)})"
        for kind in ("READ", "WRITE") if self.memory and access == "UPDATE" else (access,):
            if self.memory:
                site, now = self.point(node, array, space_kind(self, array), kind, elements), "_key"
            else:
                site, now = self.access_site(node, array), "_ep, _low, _fl"
            constant = "{}" if self.memory else "np.int64({})"  # or Numba compiles a function for each literal
            where = f"_of_{array}, _z, {now}, _tid, _U({site}), {constant.format(ACCESS[kind])}"
            suffix = "1" if len(parts) == 1 else "n"
            if array in self.a.local:
                text = f"_local{suffix}(_ls_{array}, {text}, {where})"
            else:
                facts = f"{array}.shape, {array}.strides" if suffix == "n" else f"{array}.shape[0], {array}.strides[0]"
                facts = array if self.memory else facts
                text = f"_access{suffix}({facts}, {text}, {where}, {constant.format(elements)})"
        return text

    def divisor(self, operator, value, node):
        """``value``, as AST, as the right side of an operation: in a kernel with ``debug=True`` it must not be zero."""
        if not self.debug or not isinstance(operator, (ast.Div, ast.FloorDiv, ast.Mod)):
            return value
        what = "modulo by zero" if isinstance(operator, ast.Mod) else "division by zero"
        site = self.site(node, what, "test the divisor; without debug=True a GPU goes on with inf, nan or any number")
        if self.lane_level:
            self.need.add("_tid")
        rest = f"_err, _U({site}), _bx, _by, _bz, {'_tid' if self.lane_level else '-1'}"
        text = f"_nonzero({ast.unparse(ast.fix_missing_locations(value))}, {rest})"
        return ast.parse(text, mode="eval").body

    def fail(self, condition, node, what, fix, thread="0"):
        """Emit: if ``condition``, report an error at ``node``'s line and stop."""
        site = self.site(node, what, fix)
        self.emit(f"if {condition}:")
        self.emit(f"    _report(_err, _U({site}), _bx, _by, _bz, {thread})")
        self.emit("    return")

    # -- expressions ----------------------------------------------------------------------------------------
    def expr(self, node):
        """Source text of an expression at the present level."""
        node = copy_expr(node) if self.lane_level else self.expand(node)
        return ast.unparse(ast.fix_missing_locations(_Writer(self).visit(node)))

    def expand(self, node):
        keep, self.a.remat = self.a.remat, self.remat
        node = self.a.expand(node)
        self.a.remat = keep
        return node

    def storable(self, var):
        """Is a variable a number, which each thread can keep in an array? A view of an array is not."""
        return hasattr(self.types[var], "bitwidth") or self.types[var].name in ("bool", "boolean")

    def dtype_text(self, var):
        kind = self.types[var]
        if not self.storable(var):
            d = self.a.definitions[var][0]
            raise CompileError(
                f"{var} is a {kind} and lives across a barrier, shuffle or loop",
                self.p.filename,
                d.stmt.lineno,
                "use its parts (numbers) instead, or index the array where it is needed",
            )
        return "numba.types." + ("boolean" if kind.name in ("bool", "boolean") else kind.name)

    def size_of(self, var):
        return max(1, getattr(self.types[var], "bitwidth", 8) // 8)

    def storage(self, var):
        """Text of the per-thread array element of a variable."""
        if var not in self.stored:
            self.stored[var] = key = f"a_{var.lstrip('_')}" if not var.startswith("_") else f"a{var}"
            self.scratch[key] = (str(self.a.threads), self.dtype_text(var), self.a.threads * self.size_of(var))
        return self.stored[var]

    def in_place(self, var):
        """Is a variable an ordinary local of the generated function here?"""
        return var not in self.a.varying or var in self.scalars


def _is_ellipsis(node):
    return isinstance(node, ast.Constant) and node.value is ...


class _Writer(ast.NodeTransformer):
    """Rewrites an expression for the place where it is written: storage of variables, index signs, checks."""

    def __init__(self, emitter):
        self.e = emitter

    def visit_Name(self, node):
        e = self.e
        if node.id in e.a.local:
            e.need.add("_i")
            axes = ", ".join([":"] * len(e.p.local[node.id][0]) + ["_i"])
            return ast.parse(f"{node.id}[{axes}]", mode="eval").body
        if node.id in e.remat or node.id in ("_tx", "_ty", "_tz", "_lane", "_warp", "_tid"):
            e.need.add(node.id)
            return node
        if e.in_place(node.id):
            return node
        e.need.add("_i")
        return ast.Subscript(name(e.storage(node.id)), name("_i"), node.ctx)

    def visit_BinOp(self, node):
        self.generic_visit(node)
        node.right = self.e.divisor(node.op, node.right, node)
        return node

    def visit_Compare(self, node):
        return undecided(self.generic_visit(node))

    def visit_Call(self, node):
        if getattr(node.func, "id", "") == "len" and isinstance(node.args[0], ast.Subscript):
            node.args = [self.sized(node.args[0])]
            return node
        if self.e.debug and getattr(node.func, "id", "") == "divmod" and len(node.args) == 2:
            self.generic_visit(node)
            node.args[1] = self.e.divisor(ast.Mod(), node.args[1], node)
            return node
        if isinstance(node.func, ast.Name) and node.func.id.startswith("_atomic_"):
            array = node.args[0].id
            if self.e.accesses and node.func.id == "_atomic_compare_and_swap":
                node.func, node.args[1:1] = name("_atomic_cas"), [ast.Constant(0)]
            node.args[1:] = [self.visit(a) for a in node.args[1:]]
            if node.func.id != "_atomic_compare_and_swap":
                access = "EXCHANGE" if node.func.id == "_atomic_exch" and not self.e.memory else "ATOMIC"
                touched = self.touched(array, node.args[1], node, access)
                if touched is not None:
                    node.args[1] = ast.Call(name("_must1" if self.e.axes[array] == 1 else "_mustn"), [touched], [])
                else:
                    node.args[1] = self.index_of(array, node.args[1], node)
            if array in self.e.p.shared:
                node.func = name(node.func.id.replace("_atomic_", "_block_"))
            return node
        argument = copy_expr(node.args[0]) if node.args else None
        node.args = [self.visit(a) for a in node.args]
        registered = getattr(node, "registered", None)
        elements = getattr(registered, "elements", 0)
        if elements and self.e.check and ast.unparse(node.args[0]) in self.e.a.arrays:
            array, access = node.args[0].id, "WRITE" if registered.writes else "READ"
            touched = self.touched(array, node.args[1], node, access, elements)
            node.args[1] = touched or self.index_of(array, node.args[1], node, elements)
        kind = self.e.p.consts.get(getattr(node.func, "id", ""), "").rpartition(".")[2]
        narrow = kind in NARROW and (kind != "uint8" or isinstance(self.e.type_of(argument, {}), types.Float))
        if self.e.accesses and not self.e.memory and self.e.lane_level and narrow and len(node.args) == 1:
            site = self.e.access_site(node, kind)
            self.e.need.add("_tid")
            limits = NARROW[kind]
            value = ast.unparse(ast.fix_missing_locations(node.args[0]))
            text = f"_narrow({value}, {limits}, _z, _ep, _tid, _U({site}))"
            node.args = [ast.parse(text, mode="eval").body]
        return node

    def touched(self, array, index, node, access, elements=1):
        """As `Emitter.touch`, as AST; None also where accesses are not looked at."""
        text = self.e.touch(array, index, node, access, elements) if self.e.accesses else None
        return text and ast.parse(text, mode="eval").body

    def of_thread(self, array, index):
        """The index of a local array, or of a part of one, with the thread behind it: threads are its last axis."""
        self.e.need.add("_i")
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        if not any(map(_is_ellipsis, parts)):
            parts = [*parts, *(ast.Slice() for _ in range(len(self.e.p.local[array][0]) - len(parts)))]
        return ast.Tuple([*parts, name("_i")], ast.Load())

    def visit_Attribute(self, node):
        of_argument = isinstance(node.value, ast.Name) and node.value.id in self.e.p.params
        if of_argument:
            return node
        if isinstance(node.value, ast.Subscript):
            node.value = self.sized(node.value)
            return node
        return self.generic_visit(node)

    def sized(self, node):
        """A part of an array whose size is asked for: its elements are not."""
        return self.part(node) if isinstance(node.value, ast.Name) else self.generic_visit(node)

    def part(self, node):
        """A part of an array without its elements being looked at."""
        array = node.value.id
        if array not in self.e.a.arrays and array not in self.e.a.local:
            return self.generic_visit(node)
        index = self.index_of(array, self.shield(node.slice), node)
        return ast.Subscript(name(array), self.of_thread(array, index) if array in self.e.a.local else index, node.ctx)

    def visit_Subscript(self, node):
        e = self.e
        if isinstance(node.value, ast.Attribute):
            return self.generic_visit(node)
        if not isinstance(node.value, ast.Name):
            return self.generic_visit(node)
        array = node.value.id
        known = array in e.a.arrays or array in e.a.local
        if not known:
            return ast.Subscript(self.visit(node.value), self.visit(node.slice), node.ctx)
        shielded = self.shield(node.slice)
        touched = self.touched(array, shielded, node, "READ")
        if touched is not None:
            if getattr(e, "volatile", False) and array in e.a.params:
                return ast.Call(name("_volatile_load"), [name(array), touched], [])
            return ast.Subscript(name(array), self.with_thread(array, touched), node.ctx)
        index = self.index_of(array, shielded, node)
        if array in e.a.local:
            index = self.of_thread(array, index)
        if getattr(e, "volatile", False) and array in e.a.params and isinstance(node.ctx, ast.Load):
            return ast.Call(name("_volatile_load"), [name(array), index], [])
        return ast.Subscript(name(array), index, node.ctx)

    def with_thread(self, array, index):
        """The index of a local array with the thread behind it: ``index`` is what a function of `shadow` returns."""
        if array not in self.e.a.local:
            return index
        self.e.need.add("_i")
        if self.e.axes[array] == 1:
            return ast.Tuple([index, name("_i")], ast.Load())
        return ast.BinOp(index, ast.Add(), ast.parse("(_i,)", mode="eval").body)

    def shield(self, index):
        """The index with its sign noted before variables are replaced by their storage."""
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        new = []
        for part in parts:
            sign = self.e.a.is_nonneg(part) or self.e.a.is_nonneg(self.e.expand(part))
            visited = self.visit(part)  # of a slice, its parts
            visited.known_nonneg = sign
            new.append(visited)
        return ast.Tuple(new, ast.Load()) if isinstance(index, ast.Tuple) else new[0]

    def index_of(self, array, index, where, elements=1):
        """``index`` as it is written: checked or marked as never negative. ``elements`` are accessed from there on."""
        e = self.e
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        new = []
        behind = next((i for i, part in enumerate(parts) if _is_ellipsis(part)), len(parts))
        for axis, part in enumerate(parts):
            if axis > behind:  # counted from the last axis; a local array has one more, its threads'
                axis -= len(parts) + (array in e.a.local)
            if isinstance(part, ast.Slice) or _is_ellipsis(part):
                new.append(part)
            elif e.check:
                site = e.site(where, f"{array}", "")
                thread = "_tid" if e.lane_level else "-1"
                e.need.add("_tid")
                text = ast.unparse(ast.fix_missing_locations(part))
                text = f"_U({text})" if text.isdecimal() else text
                # _U(constant): Numba compiles a function anew for each literal that it is called with
                rest = f"{array}.shape[{axis}], _U({axis}), _err, _U({site}), _bx, _by, _bz, {thread})"
                text = f"_inside({text}, {rest}"
                if elements > 1 and axis == len(parts) - 1:
                    text = f"_inside({text} + {elements - 1}, {rest} - {elements - 1}"
                new.append(ast.parse(text, mode="eval").body)
            elif isinstance(part, ast.Constant) or not getattr(part, "known_nonneg", False):
                new.append(part)
            else:
                new.append(ast.Call(name("_U"), [part], []))
        return ast.Tuple(new, ast.Load()) if isinstance(index, ast.Tuple) else new[0]
