"""Writes a whole case: constants, device functions, the kernel and its arguments."""

import itertools
import math
import random
import re

from tests.fuzz.casts import Casts
from tests.fuzz.constants import ConstantModule
from tests.fuzz.idioms import Idioms
from tests.fuzz.kinds import EXTRAS, KIND_STATEMENTS, KINDS, STATEMENTS
from tests.fuzz.parts import BLOCK, BLOCKS, GRIDS, MAX_THREADS, THREAD, WARP, Array, Expr, Function, Var
from tests.fuzz.recursion import Recursion, RecursionModule
from tests.fuzz.returns import ReturningModule, Returns
from tests.fuzz.rows import RowModule, Rows
from tests.fuzz.signatures import SignatureModule, Typed, Typing, wide_scalars
from tests.fuzz_cases import ArraySpec, Case, ScalarSpec

NUMBA_TYPES = frozenset(("float32", "float64", "int32", "int64", "uint32"))


class Body(Rows, Typing, Recursion, Returns, Casts, Idioms):
    """Writes the statements of one function."""


class Module(RowModule, SignatureModule, RecursionModule, ReturningModule, ConstantModule):
    """Writes a case: constants, device functions, the kernel."""

    def __init__(self, seed, size, without, features):
        self.rng = random.Random(f"kernel {seed}")
        self.seed, self.size, self.without = seed, size, frozenset(without)
        unknown = self.without - set(STATEMENTS) - set(EXTRAS)
        if unknown:
            raise ValueError(f"unknown features {sorted(unknown)}; known: {sorted({*STATEMENTS, *EXTRAS})}")
        unknown = set(features) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown features {sorted(unknown)}; known: {', '.join(KINDS)}")
        self.kinds = self.some(features)
        self.statements = {n: w for n, w in STATEMENTS.items() if n not in self.without}
        for kind in sorted(self.kinds):
            self.statements |= KIND_STATEMENTS.get(kind, {})
        blocks, weights = zip(*BLOCKS)
        self.block = self.rng.choices(blocks, weights)[0]
        self.threads = 1
        for n in self.block:
            self.threads *= n
        grids = [(g, w) for g, w in GRIDS if len(g) <= len(self.block) + 1]
        while True:
            self.grid = self.rng.choices([g for g, _ in grids], [w for _, w in grids])[0]
            self.blocks = 1
            for n in self.grid:
                self.blocks *= n
            if self.blocks * self.threads <= MAX_THREADS or self.blocks == 1:
                break
        self.total = self.blocks * self.threads
        self.pure_functions, self.warp_functions, self.block_functions = [], [], []
        self.row_functions, self.typed_functions = [], []
        self.constant_atoms, self.members = [], []
        self.imports, self.numba_names = set(), set()
        self.int_kinds = {name: weight for name, kind, weight in (
            ("typed", "signatures", 3), ("cast", "casts", 3), ("member", "constants", 3)) if kind in self.kinds}
        self.double_buffers = []
        self.shared_bytes = 0
        self.constants = set()
        self.specs = []
        self.sections = []
        self.numba_types = self.rng.random() < 0.3

    def on(self, name):
        return name not in self.without

    def has(self, kind):
        return kind in self.kinds

    def some(self, features):
        """One or two of the features: small kernels in which each of them has room, and meets each other one."""
        rng = random.Random(f"kinds {self.seed}")
        return frozenset(rng.sample(sorted(features), min(rng.choice([1, 2, 2]), len(features))))

    def chance(self, p):
        return self.rng.random() < p

    def dtype(self, name):
        return name if self.numba_types and name in NUMBA_TYPES else f"np.{name}"

    # -- device functions ---------------------------------------------------------------------------------------------
    def new_body(self, level):
        body = Body(self, level)
        body.atoms += self.constant_atoms
        return body

    def parameter(self, name, lo, hi, frac=0, kind="i", level=THREAD):
        return Var(name, kind, lo, hi, frac, level, fixed=True, reusable=False)

    def section(self, body, name, params, decoration="device=True"):
        self.sections.append("\n".join([f"@cuda.jit({decoration})", f"def {name}({', '.join(params)}):", *body.lines]))

    def device_functions(self):
        for kind, write, most in (("signatures", self.typed_function, 2), ("rows", self.row_function, 2),
                                  ("recursion", self.recursive_function, 2), ("returns", self.returning_function, 1)):
            if self.has(kind):
                for _ in range(self.rng.choice([1, 1, most])):
                    write()
        few = bool(self.kinds)      # those of the features take their place
        if self.on("device_pure"):
            for _ in range(self.rng.choices([0, 1, 2], [6, 4, 0] if few else [2, 3, 5])[0]):
                self.pure_function()
        if self.on("device_warp") and self.chance(0.2 if few else 0.4):
            self.warp_function()
        if self.on("device_block"):
            for _ in range(self.rng.choices([0, 1, 2], [8, 2, 0] if few else [5, 4, 1])[0]):
                self.block_function()

    def finish(self, body, name, params, function, functions, types=None):
        """Add a device function; `types` are those of its result and its parameters, for a signature."""
        self.section(body, name, params, self.decoration(types[0], types[1:]) if types else "device=True")
        functions.append(function)

    def types_of(self, result, kinds, choose=None):
        """Types for a signature of a function whose values are small: its result's and its parameters', or None."""
        if not self.has("signatures") or self.chance(0.5):
            return None
        choose = choose or self.narrow
        return [choose(kind) for kind in (result, *kinds)]

    def interval(self, kind):
        return (-64, 63, 0) if kind == "i" else (-32, 32, 3)

    def parameters(self, body, kinds, level=THREAD):
        names = []
        for k, kind in enumerate(kinds):
            lo, hi, frac = self.interval(kind)
            names.append(f"p{k}")
            body.show(Var(f"p{k}", kind, lo, hi, frac, level, fixed=body.rng.random() < 0.5, reusable=False))
        return names

    def result(self, body, kind, lo, hi, frac):
        def make(level=THREAD):
            if kind == "i":
                return body.fit(body.int_expr(2, level), lo, hi).text
            return body.fit_float(body.float_expr(2, level), hi, frac).text
        return make

    def pure_function(self):
        body = self.new_body(THREAD)
        kinds = ["i", *self.rng.choices("if", k=self.rng.randint(0, 2))]
        names = self.parameters(body, kinds)
        kind = self.rng.choice("if")
        body.returns = self.result(body, kind, *self.interval(kind))
        body.atoms.append(("i", Expr("cuda.threadIdx.x", 0, self.block[0] - 1), THREAD))
        body.depth = 1              # a function is shorter than a kernel
        body.statements(self.rng.randint(0, 1))
        if self.chance(0.3):
            body.emit(f"if {body.bool_expr(1)}:")
            body.emit(f"    return {body.returns()}")
            body.emit("else:")
            body.emit(f"    return {body.returns()}")
        else:
            body.emit(f"return {body.returns()}")
        name, text = f"dp{len(self.pure_functions)}", "\n".join(body.lines)
        uniform = "threadIdx" not in text and all(f.uniform or f.name not in text for f in self.pure_functions)
        types = self.types_of(kind, kinds)
        function = Function(name, kind, tuple(kinds), *self.interval(kind), uniform, body.cost,
                            bool(types) and kind == "i")
        self.finish(body, name, names, function, self.pure_functions, types)

    def warp_function(self):
        body = self.new_body(WARP)
        body.wn = "wn"
        kind = self.rng.choice("if")
        kinds = [kind, *self.rng.choices("if", k=self.rng.randint(0, 1))]
        names = [*self.parameters(body, kinds), "wn"]
        if self.chance(0.5):
            body.emit("lane = cuda.laneid")
            body.atoms.append(("i", Expr("lane", 0, 31), THREAD))
        first = [n for n in ("collective", "butterfly", "warp_down", "warp_scan") if self.on(n)]
        if first:
            getattr(body, f"s_{self.rng.choice(first)}")()
        body.depth = 1
        body.statements(self.rng.randint(0, 1))
        make = self.result(body, kind, *self.interval(kind))
        if self.chance(0.4):
            level = self.rng.choice([THREAD, WARP])
            body.emit(f"if {body.bool_expr(1, level)}:")
            body.lazy += level == THREAD    # lanes part here: no collectives from now on
            body.emit(f"    return {make()}")
        body.emit(f"return {make()}")
        function = Function("dw0", kind, tuple(kinds), *self.interval(kind), cost=body.cost)
        types = self.types_of(kind, [*kinds, "i"], self.shuffled)
        self.finish(body, "dw0", names, function, self.warp_functions, types)

    def shuffled(self, kind):
        """A type that can be shuffled."""
        return self.rng.choice(["int32", "int64"] if kind == "i" else ["float32", "float64"])

    def block_function(self):
        """A function that begins and ends with a barrier and works on a shared array of its caller or its own."""
        body = self.new_body(BLOCK)
        kind = self.rng.choice("if")
        dtype = self.rng.choice(["int32", "int64"] if kind == "i" else ["float32", "float64"])
        given = self.chance(0.6)
        kinds = (["s"] if given else []) + [kind] + (["u"] if self.chance(0.5) else [])
        array = Array("sm", kind, dtype, (self.padded(),), *self.shared_interval(kind), own=("tid",), mode="W",
                      warp_tile=True)
        names = []
        lo, hi, frac = self.interval(kind)
        for k in kinds:
            if k == "s":
                names.append("sm")
            elif k == "u":
                names.append("u")
                body.show(Var("u", "i", 0, 7, level=BLOCK, fixed=True, reusable=False))
            else:
                names.append("x")
                body.show(Var("x", kind, lo, hi, frac, fixed=self.chance(0.5), reusable=False))
        names += ["tid", "nt"]
        body.atoms += [("i", Expr("tid", 0, self.threads - 1), THREAD),
                       ("i", Expr("nt", self.threads, self.threads), BLOCK)]
        if not given:
            body.emit(f"sm = cuda.shared.array({self.padded()}, {self.dtype(dtype)})")
        body.shared.append(array)
        body.emit("wbase = tid // 32 * 32")
        body.emit("wn = min(32, nt - wbase)")
        body.wn = "wn"
        body.emit("cuda.syncthreads()")
        if not given:
            body.emit(f"for k in range(tid, {self.padded()}, nt):")
            body.emit(f"    sm[k] = {'k % 7' if kind == 'i' else 'k * 0.25 % 4.0'}")
        body.emit("sm[tid] = x")
        body.emit("cuda.syncthreads()")
        array.mode = body.pick("R", "W")
        body.depth = 1
        body.statements(self.rng.randint(1, 2))
        make = self.result(body, kind, lo, hi, frac)
        out = Var("result", kind, lo, hi, frac, fixed=True)
        if "u" in names and self.on("device_return_barrier") and self.chance(0.5):
            body.emit(f"if {body.compare(0, BLOCK)}:")
            mode = array.mode
            with body.nest(BLOCK):
                body.suite()
                body.emit(f"result = {make()}")
                body.emit("cuda.syncthreads()")
                body.emit("return result")
                array.mode = mode
        body.emit(f"{out.name} = {make()}")
        body.emit("cuda.syncthreads()")
        body.emit("return result" if kind == "f" else "return result + 0")
        name = f"db{len(self.block_functions)}"
        function = Function(name, kind, tuple(kinds), lo, hi, frac, cost=body.cost)
        types = self.types_of(kind, [kind, "i", *"ii"[:len(names) - len(kinds)]], self.shuffled)
        if types:
            places = {"sm": f"{dtype}[{self.rng.choice([':', '::1'])}]", "x": types[1], "u": types[2]}
            types = [types[0], *(places.get(n) or self.shuffled("i") for n in names)]
        self.finish(body, name, names, (function, dtype), self.block_functions, types)

    # -- the kernel ---------------------------------------------------------------------------------------------------
    def padded(self):
        return (self.threads + 31) // 32 * 32

    def shared_interval(self, kind):
        return {"i": (-(1 << 15), 1 << 15, 0), "f": (-2048, 2048, 3), "b": (0, 1, 0)}[kind]

    def kernel(self):
        body = self.new_body(BLOCK)
        body.is_kernel = True
        params, declared = [], {}
        self.inputs(body, params)
        signed = self.has("signatures") and self.chance(0.8)
        form = self.rng.choice(["string", "string", "tuple", "call", "list", "bare"]) if signed else None
        self.scalars(body, params)
        if self.has("signatures") or self.has("casts"):
            self.typed_scalars(body, params, declared, signed and form != "list")
        self.outputs(body, params)
        self.ids(body)
        self.shared_arrays(body)
        if self.on("const_array") and self.chance(0.25):
            kind = self.rng.choice("if")
            n = self.rng.choice([3, 8, 17])
            values = [self.rng.randint(-20, 20) for _ in range(n)]
            dtype = "int32" if kind == "i" else "float32"
            if kind == "f":
                values = [v / 4 for v in values]
            self.sections.insert(0, f"TABLE = np.array({values}, np.{dtype})")
            body.emit("table = cuda.const.array_like(TABLE)")
            body.inputs.append(Array("table", kind, dtype, (n,), -20, 20, 2 if kind == "f" else 0))
        for _ in range(1 if self.kinds else 2):
            body.s_assign()
        body.statements(max(self.size - self.kind_statements(body), 1))
        self.flush(body, params)
        self.rng.shuffle(params)
        self.specs = [spec for _, spec in params]
        names = ", ".join(name for name, _ in params)
        decorator = f"@cuda.jit({self.kernel_signature(params, declared, form)})" if signed else "@cuda.jit"
        self.sections.append("\n".join([decorator, f"def kernel({names}):", *body.lines]))

    def kind_statements(self, body):
        """At the kernel's top level, a statement of most features that it is to contain; returns how many it wrote."""
        names = [name for kind in sorted(self.kinds) for name in KIND_STATEMENTS.get(kind, ()) if self.chance(0.8)]
        self.rng.shuffle(names)
        return sum(any(getattr(body, f"s_{name}")() for _ in range(3)) for name in names)

    def array(self, params, name, dtype, shape, fill, *limits):
        params.append((name, ArraySpec(dtype, tuple(shape), fill, limits)))

    def inputs(self, body, params):
        choices = [("int32", "i"), ("int64", "i"), ("uint32", "i"), ("float32", "f"), ("float64", "f"), ("bool", "b"),
                   ("float16", "f")]
        weights = [4, 3, 2, 4, 3, 2, 2 if self.on("float16") else 0]
        if self.has("casts") or self.has("signatures"):
            choices += [(t, "i") for t in ("int8", "uint8", "int16", "uint16", "uint64")]
            weights += [3] * 5
        picked = self.rng.choices(choices, weights, k=self.rng.randint(2, 4))
        picked.append(self.rng.choice(choices[:2]))
        for k, (dtype, kind) in enumerate(picked):
            name, n = f"x{k}", self.rng.choice([5, 16, 33, 64, 100])
            shape = (n,) if self.chance(0.65) else (self.rng.choice([2, 3, 7]), self.rng.choice([4, 5, 9]))
            if kind == "i":
                lo, hi = (0, 1000) if dtype == "uint32" else self.rng.choice([(-100, 100), (0, 31), (-5, 5)])
                if dtype[0] == "u" and dtype != "uint32":
                    lo, hi = (0, 255)
                frac = 0
                self.array(params, name, dtype, shape, "ints", lo, hi)
            elif kind == "b":
                lo, hi, frac = 0, 1, 0
                self.array(params, name, dtype, shape, "bools")
            else:
                lo, hi, frac = (-8, 8, 2) if dtype == "float16" else (-16, 16, 2)
                self.array(params, name, dtype, shape, "dyadic", hi, frac)
            body.inputs.append(Array(name, kind, dtype, shape, lo, hi, frac))

    def scalars(self, body, params):
        for k in range(self.rng.randint(1, 2)):
            value = self.rng.randint(1, 4)
            params.append((f"na{k}", ScalarSpec(self.rng.choice(["int32", "int64", "int"]), value)))
            body.atoms.append(("i", Expr(f"na{k}", value, value), BLOCK))
        for k in range(self.rng.randint(0, 2)):
            value = self.rng.randint(-20, 20)
            params.append((f"nb{k}", ScalarSpec(self.rng.choice(["int32", "int"]), value)))
            body.atoms.append(("i", Expr(f"nb{k}", -20, 20), BLOCK))
        if self.chance(0.4):
            dtype = self.rng.choice(["float32", "float64", "float"])
            params.append(("fa0", ScalarSpec(dtype, self.rng.randint(-8, 8) / 4)))
            body.atoms.append(("f", Expr("fa0", -2, 2, 2), BLOCK))
        if self.chance(0.25):
            params.append(("ba0", ScalarSpec("bool", self.chance(0.5))))
            body.atoms.append(("b", Expr("ba0", 0, 1), BLOCK))
        params.append(("nn", ScalarSpec("int32", self.nn())))

    def typed_scalars(self, body, params, declared, converted):
        """Scalars of narrow types; where a signature converts them, of other types than they are given as."""
        for k, (dtype, given, value, after) in enumerate(wide_scalars(self.rng)):
            name = f"nc{k}"
            if converted:
                declared[name] = dtype
            params.append((name, ScalarSpec(given, value) if converted else ScalarSpec(dtype, after)))
            body.typed_atoms.append(Typed(name, dtype, after, after))
            body.raw.append(("i", name))
        if converted and self.chance(0.5):
            declared["fc0"] = self.rng.choice(["float32", "float64"])
            value = self.rng.choice([0.1, 1 / 3, -2.7, 1e-5, 3])
            given = "int" if value == 3 else self.rng.choice(["float", "float64", "float32"])
            params.append(("fc0", ScalarSpec(given, value)))
            body.raw.append(("f", "fc0"))
        for name, _ in params if converted else ():
            if name[:2] in ("na", "nb") and self.chance(0.6):
                declared[name] = self.shuffled("i")
            elif name == "nn":
                declared[name] = self.rng.choice(["int16", "int32", "int64"])
            elif name == "fa0":
                declared[name] = self.narrow("f")

    def nn(self):
        """The size of guarded outputs: a few threads have nothing to do."""
        if not hasattr(self, "_nn"):
            self._nn = max(1, self.total - self.rng.choice([0, 1, 5, self.threads // 2, self.threads]))
        return self._nn

    def outputs(self, body, params):
        types = [("int32", "i"), ("int64", "i"), ("uint32", "i"), ("float32", "f"), ("float64", "f"), ("bool", "b"),
                 ("float16", "f")]
        weights = [4, 3, 2, 4, 3, 1.5, 2 if self.on("float16") else 0]
        if self.has("casts"):
            types += [(t, "i") for t in ("int8", "uint8", "int16", "uint16", "uint64")]
            weights += [2.5] * 5
        total = self.total
        for k in range(self.rng.randint(3, 5)):
            dtype, kind = self.rng.choices(types, weights)[0]
            name, form = f"o{k}", self.rng.choices(["plain", "row", "guard", "stride", "grid2"], [4, 2, 3, 3, 2])[0]
            lo, hi, frac = {"i": (-512, 511, 0), "f": (-32, 32, 3), "b": (0, 1, 0)}[kind]
            if dtype[0] == "u":
                lo, hi = 0, 1023 if dtype != "uint8" or self.chance(0.5) else 255
            own, mode, guard = ("gid",), "own", None
            if form == "row":
                columns = self.rng.choice([2, 3])
                shape, own = (total, columns), tuple(f"gid, {j}" for j in range(columns))
            elif form == "guard":
                shape, guard = (self.nn(),), "gid < nn"
            elif form == "stride":
                shape, mode, own = (total + self.rng.choice([0, 3, total // 2 + 1, 2 * total]),), "stride", ("gid",)
            elif form == "grid2" and len(self.block) == 2 and len(self.grid) <= 2:
                gx, gy = (*self.grid, 1)[:2]
                shape, own = (self.block[1] * gy, self.block[0] * gx), ("gy, gx",)
            else:
                shape = (total,)
            a = Array(name, kind, dtype, shape, lo, hi, frac, own, mode, guard)
            body.globals.append(a)
            if guard is None and kind != "b":
                body.outputs.append(a)
            self.array(params, name, dtype, shape, "ints" if kind == "i" else "bools" if kind == "b" else "dyadic",
                       *((0, 9) if kind == "i" else () if kind == "b" else (4, 2)))
        for k in range(self.rng.randint(0, 2)):
            dtype = self.rng.choice(["int32", "int32", "int64", "uint32", "float32"])
            kind = "f" if dtype == "float32" else "i"
            op = self.rng.choice(["add", "max", "min"] + (["or_", "xor", "and_"] if kind == "i" else ["add"]))
            shape = self.rng.choice([(1,), (5,), (16,), (3, 4)])
            body.globals.append(Array(f"g{k}", kind, dtype, shape, 0, 0, mode="A", op=op))
            self.array(params, f"g{k}", dtype, shape, *(("ints", 0, 255) if kind == "i" else ("dyadic", 4, 2)))

    def ids(self, body):
        dims, grid = "xyz"[:len(self.block)], "xyz"[:len(self.grid)]
        lines = []

        def linear(index, size, axes):
            text = f"cuda.{index}.{axes[-1]}"
            for axis in reversed(axes[:-1]):
                text = f"({text}) * cuda.{size}.{axis} + cuda.{index}.{axis}" if "+" in text else \
                    f"{text} * cuda.{size}.{axis} + cuda.{index}.{axis}"
            return text

        lines.append(f"tid = {linear('threadIdx', 'blockDim', dims)}")
        lines.append(f"bid = {linear('blockIdx', 'gridDim', grid)}")
        lines.append(f"nt = {' * '.join(f'cuda.blockDim.{a}' for a in dims)}")
        plain = len(self.block) == len(self.grid) == 1
        lines.append("gid = cuda.grid(1)" if plain and self.chance(0.6) else "gid = bid * nt + tid")
        lines.append("gstride = cuda.gridsize(1)" if plain and self.chance(0.5)
                     else "gstride = nt * " + " * ".join(f"cuda.gridDim.{a}" for a in grid))
        lines.append(f"lane = {body.pick('tid % 32', 'cuda.laneid', 'tid & 31')}")
        lines.append(f"warp = tid // {body.pick('32', 'cuda.warpsize')}")
        lines.append("wbase = warp * 32")
        lines.append("wn = min(32, nt - wbase)")
        if any(a.own == ("gy, gx",) for a in body.globals):
            lines.append("gx, gy = cuda.grid(2)")
        for line in lines:
            body.emit(line)
        body.wn = "wn"
        t, b = self.threads, self.blocks
        body.atoms += [("i", Expr("tid", 0, t - 1), THREAD), ("i", Expr("gid", 0, self.total - 1), THREAD),
                       ("i", Expr("lane", 0, 31), THREAD), ("i", Expr("warp", 0, (t - 1) // 32), WARP),
                       ("i", Expr("bid", 0, b - 1), BLOCK), ("i", Expr("nt", t, t), BLOCK),
                       ("i", Expr("cuda.threadIdx.x", 0, self.block[0] - 1), THREAD),
                       ("i", Expr("cuda.blockIdx.x", 0, self.grid[0] - 1), BLOCK)]
        if len(self.block) > 1:
            body.atoms.append(("i", Expr("cuda.threadIdx.y", 0, self.block[1] - 1), THREAD))

    @staticmethod
    def unflat(shape):
        """The index of element number k of an array."""
        if len(shape) < 3:
            return "k" if len(shape) == 1 else f"k // {shape[1]}, k % {shape[1]}"
        return f"k // {shape[1] * shape[2]}, k // {shape[2]} % {shape[1]}, k % {shape[2]}"

    def shared_parts(self, types, add):
        """Shared arrays for the feature rows: of rank 3, and such that a row, or a plane, belongs to a thread."""
        t = self.threads
        dtype, kind = self.rng.choice(types)
        if self.chance(0.5):
            rows, columns = self.rng.choice([(2, 3), (3, 2), (2, 4), (4, 4)])
            planes = (t + rows * columns - 1) // (rows * columns) + self.rng.choice([0, 1])
            own = f"tid // {rows * columns}, tid // {columns} % {rows}, tid % {columns}"
            add("q0", kind, dtype, (planes, rows, columns), (own,))
        if self.chance(0.7):
            shape = self.rng.choice([(t, 2), (t, 3), (t, 2, 2)])
            ends = [", ".join(map(str, i)) for i in itertools.product(*map(range, shape[1:]))]
            add("w0", kind, dtype, shape, tuple(f"tid, {end}" for end in ends)).row_owned = True

    def shared_arrays(self, body):
        """Declares and fills the shared arrays; afterwards a barrier puts them into their modes."""
        t, pad = self.threads, self.padded()
        types = [("int32", "i"), ("int64", "i"), ("float32", "f"), ("float64", "f"), ("uint32", "i")]
        fills = []

        def add(name, kind, dtype, shape, own, *, declare=True, fill=None, **more):
            lo, hi, frac = self.shared_interval(kind)
            if more.get("op"):
                lo, hi = -(1 << 24), 1 << 24
            a = Array(name, kind, dtype, shape, 0 if dtype == "uint32" else lo, hi, frac, own, "W", **more)
            if declare:
                text = str(tuple(shape)) if len(shape) > 1 else str(shape[0])
                if len(shape) == 1 and self.chance(0.3):
                    text = f"NT_{shape[0]}"
                    self.constants.add(shape[0])
                body.emit(f"{name} = cuda.shared.array({text}, {self.dtype(dtype)})")
            value = body.pick("k % 11", "(k * 7) % 13") if kind == "i" else body.pick("k * 0.25 % 4.0", "(k % 9) / 8")
            fills.append((name, math.prod(shape), fill or self.unflat(shape), value))
            body.shared.append(a)
            return a

        for k in range(self.rng.choices([0, 1, 2, 3], [1, 4, 4, 2])[0]):
            dtype, kind = self.rng.choices(types, [4, 3, 4, 3, 1])[0]
            if self.chance(0.35):
                columns = self.rng.choice([4, 8, 33, max(1, t // 2)])
                rows = (t + columns - 1) // columns + self.rng.choice([0, 1])
                own = f"tid // {columns}, tid % {columns}"
                if len(self.block) == 2 and self.chance(0.6):
                    rows, columns, own = self.block[1], self.block[0], "cuda.threadIdx.y, cuda.threadIdx.x"
                add(f"t{k}", kind, dtype, (rows, columns), (own,))
            elif self.chance(0.25):     # two neighbours a thread
                add(f"c{k}", kind, dtype, (2 * t,), ("2 * tid", "2 * tid + 1"))
            elif self.chance(0.2):      # back to front
                add(f"r{k}", kind, dtype, (t,), ("nt - 1 - tid",))
            else:
                n = pad * self.rng.choice([1, 1, 2])
                add(f"s{k}", kind, dtype, (n,), ("tid",) if n == pad else ("tid", "tid + nt"), warp_tile=True)
        if self.has("rows"):
            self.shared_parts(types, add)
        for dtype in sorted({needs for _, needs in self.block_functions}):
            if not any(a.warp_tile and a.dtype == dtype for a in body.shared):
                add(f"s{len(body.shared)}", "i" if dtype[0] == "i" else "f", dtype, (pad,), ("tid",), warp_tile=True)
        if self.on("dynamic_shared") and self.chance(0.3):
            dtype, kind = self.rng.choice([("int32", "i"), ("float32", "f"), ("float64", "f")])
            body.emit(f"dy = cuda.shared.array(0, {self.dtype(dtype)})")
            self.shared_bytes = pad * (8 if dtype == "float64" else 4)
            add("dy", kind, dtype, (pad,), ("tid",), declare=False, warp_tile=True, offset=0)
            if self.on("dynamic_alias") and dtype != "float64" and self.chance(0.6):
                # the same bytes under a second name and type: its elements follow those of the first
                dtype, kind = ("int32", "i") if kind == "f" else ("float32", "f")
                body.emit(f"dz = cuda.shared.array(0, {self.dtype(dtype)})")
                self.shared_bytes *= 2
                add("dz", kind, dtype, (pad,), (f"{pad} + tid",), declare=False, fill=f"{pad} + k", offset=pad)
        if self.on("atomic") and self.chance(0.45):
            op = self.rng.choice(["add", "max", "min", "or_", "xor"])
            add("h0", "i", self.rng.choice(["int32", "int64", "uint32"]), (self.rng.choice([4, 16, 33]),), (), op=op)
        if self.on("double_buffer") and self.chance(0.25):
            body.emit(f"bf = cuda.shared.array((2, {t}), {self.dtype('int32')})")
            self.double_buffers.append(Array("bf", "i", "int32", (2, t), 0, 63))
        for name, count, index, value in fills:
            body.emit(f"for k in range(tid, {count}, nt):")
            body.emit(f"    {name}[{index}] = {value}")
        if fills:
            body.barrier()

    def flush(self, body, params):
        """Everything that is still alive goes to memory, so that no wrong value can hide."""
        ints, floats = [v for v in body.visible("ib")], [v for v in body.visible("fs")]
        ints += [name for kind, name in body.raw if kind == "i"]
        floats += [name for kind, name in body.raw if kind == "f"]
        for name, kept, dtype in (("fi", ints, "int64"), ("ff", floats, "float64")):
            if not kept:
                continue
            for j, v in enumerate(kept):
                body.emit(f"{name}[{j}, gid] = {v if isinstance(v, str) else v.name}")
            self.array(params, name, dtype, (len(kept), self.total), "ints" if name == "fi" else "dyadic",
                       0, 0)
        if body.shared:
            body.emit("cuda.syncthreads()")
            for a in body.shared:
                count = math.prod(a.shape)
                index = f"{a.offset} + k" if a.offset else self.unflat(a.shape)
                body.emit(f"for k in range(tid, {count}, nt):")
                body.emit(f"    e{a.name}[bid, k] = {a.name}[{index}]")
                self.array(params, f"e{a.name}", a.dtype, (self.blocks, count),
                           *(("ints", 0, 0) if a.kind == "i" else ("dyadic", 0, 0)))

    def used_sections(self):
        """The sections without the device functions that nobody calls."""
        kept = []
        for section in reversed(self.sections):     # callers stand behind what they call
            name = re.search(r"^def (d\w+)\(", section, re.MULTILINE)
            if not name or any(re.search(rf"\b{name[1]}\(", other) for other in kept):
                kept.insert(0, section)
        return kept

    def case(self):
        if self.has("constants") or self.has("class_constants"):
            self.constant_section()
        self.device_functions()
        self.kernel()
        ragged = "ragged" if self.threads % 32 else "full"
        dtypes = sorted({f"{s.dtype} array" for s in self.specs if isinstance(s, ArraySpec)})
        head = [f"# seed {self.seed}, size {self.size}: {self.threads} threads a block, the last warp is {ragged}",
                f"# {', '.join(dtypes)}", "import math", *sorted(self.imports), "", "import numpy as np",
                "from numba import cuda"]
        if self.numba_types:
            self.numba_names |= NUMBA_TYPES
        if self.numba_names:
            head[-1] += ", " + ", ".join(sorted(self.numba_names))
        head += ["", f"GRID = {self.grid}", f"BLOCK = {self.block}", "FULL = 0xFFFFFFFF"]
        text = "\n\n\n".join(self.used_sections())
        head += [f"NT_{n} = {n}" for n in sorted(self.constants)]
        return Case(self.seed, "\n".join(head) + "\n\n\n" + text + "\n", self.grid, self.block, self.shared_bytes,
                    tuple(self.specs), "wild" in self.kinds)
