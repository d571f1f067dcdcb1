"""Parts of arrays as values: rows, planes, columns and slices of local arrays, named, passed on, read and written."""

from contextlib import nullcontext
from typing import NamedTuple

from tests.fuzz.parts import THREAD, Array, Expr, enclosed


class Part(NamedTuple):
    """An array or a part of it: the text that names it, its shape, and what its elements are."""

    text: str
    shape: tuple
    kind: str       # i or f
    dtype: str
    name: str = ""  # of the variable, if it is one
    fixed: bool = False     # may only be read here


class Rows:
    """Statements on parts of arrays; a part of Body. lengths_known: not of a parameter, which may be longer."""

    lengths_known = True

    def s_rows(self):
        """A local array of rank 2 or 3, filled and used by its parts, and summed up."""
        if len(self.locals) > 3 or self.depth > 2 or self.mult > 5:
            return False
        kind = self.pick("i", "i", "f")
        shape = self.pick((2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (2, 2, 2), (2, 3, 2), (3, 2, 2))
        narrow = ["int8", "uint8", "int16", "uint16"] if self.has("casts") else ["int16"]
        dtype = self.pick("int32", "int64", *narrow) if kind == "i" else self.pick("float32", "float64")
        wanted = [f.dtype for f in self.m.row_functions if f.dtype and f.kind == kind]
        if wanted and self.chance(0.6):
            dtype = self.rng.choice(wanted)
        name = self.name(reuse=False).replace("v", "l")
        self.emit(f"{name} = cuda.local.array({shape}, {self.m.dtype(dtype)})")
        whole = Part(name, shape, kind, dtype, name)
        self.fill_by_parts(whole)
        parts = [whole]
        for _ in range(self.rng.randint(2, 4)):
            self.part_statement(parts)
            if self.has("rows_across"):
                self.statements(1)
        return self.summed_up(whole)

    def s_array_rows(self):
        """Parts of arguments and of shared arrays: what anybody may read, and the rows that this thread owns."""
        options = [Part(a.name, a.shape, a.kind, a.dtype, a.name, True) for a in self.inputs if self.is_kernel]
        for a in self.shared:
            if a.mode == "R" and a.offset is None:
                options.append(Part(a.name, a.shape, a.kind, a.dtype, a.name, True))
            elif a.mode == "W" and a.row_owned:
                options += [Part(f"{a.name}[tid]", a.shape[1:], a.kind, a.dtype)] * 3
        options += [Part(f"{a.name}[gid]", a.shape[1:], a.kind, a.dtype) for a in self.globals
                    if a.mode == "own" and a.own[0] == "gid, 0"]
        options = [a for a in options if len(a.shape) > a.fixed and a.kind != "b" and a.dtype != "float16"]
        if not options or self.depth > 2 or self.mult > 8:
            return False
        parts = [self.rng.choice(options)]
        for _ in range(self.rng.randint(1, 3)):
            self.part_statement(parts)
        return True

    # -- values: an int64 or a float64 that any element holds
    def part_value(self, kind, size=100):
        with nullcontext() if self.has("rows_across") else self.without_collectives():
            if kind == "i":
                return self.fit(self.int_expr(1), 0, size).text
            return self.fit_float(self.float_expr(1), 16, 2).text

    def tuple_values(self, kind, count):
        """Values of one type, as numba-cuda wants them in a tuple that is assigned to a part."""
        if self.chance(0.25):
            numbers = [self.rng.randint(0, 9) for _ in range(count)]
            return [str(n if kind == "i" else n / 4) for n in numbers]
        wide = " + 0" if kind == "i" else " * 1.0"
        return [f"{enclosed(self.part_value(kind))}{wide}" for _ in range(count)]

    # -- statements
    def fill_by_parts(self, a):
        """Give every element a value: all at once, plane by plane, or row by row, from scalars and tuples."""
        how = self.rng.randrange(4)
        if how == 0:
            self.emit(f"{a.text}[{self.pick(':', ', '.join(':' * len(a.shape)))}] = {self.part_value(a.kind)}")
        elif how == 1:
            for i in range(a.shape[0]):
                self.emit(f"{a.text}[{i}] = {self.part_value(a.kind)}")
        elif how == 2 and len(a.shape) == 2:
            for j in range(a.shape[1]):
                self.emit(f"{a.text}[:, {j}] = {self.row_source(a.kind, a.shape[0])}")
        else:
            self.in_loops(a.shape[:-1], lambda index: self.emit(
                f"{a.text}[{index}] = {self.row_source(a.kind, a.shape[-1])}"))

    def row_source(self, kind, length):
        """A tuple or a scalar to assign to a row."""
        with self.simple(), self.without_collectives():
            if self.chance(0.6):
                return ", ".join(self.tuple_values(kind, length))
            return self.part_value(kind)

    def in_loops(self, shape, write):
        """`write(index)` inside a loop over each axis."""
        counters = [self.new("i", 0, n - 1, fixed=True) for n in shape]
        for counter, n in zip(counters, shape):
            self.emit(f"for {counter.name} in range({n}):")
            self.indent += 1
        write(", ".join(c.name for c in counters))
        self.indent -= len(shape)
        self.dead += [c.name for c in counters]

    def part_of(self, a, rank=None):
        """Some part of `a` of at least one dimension, or of exactly `rank`: its text and shape."""
        while True:
            how = self.rng.choices(["index", "all", "slice"], [5, 1, 2], k=self.rng.randint(1, len(a.shape)))
            left = len(a.shape) - how.count("index")
            if left and rank in (None, left):
                break
        cuts, shape = [], []
        for cut, n in zip(how, a.shape):
            if cut == "index":
                with self.simple():
                    index = self.index(n, THREAD)
                cuts.append(self.pick(str(self.rng.randrange(n)), index, f"-{self.rng.randint(1, n)}"))
                continue
            text, length = self.cut(n) if cut == "slice" else (":", n)
            cuts.append(text)
            shape.append(length)
        shape += a.shape[len(cuts):]
        return a._replace(text=f"{a.text}[{', '.join(cuts)}]", shape=tuple(shape), name="")

    def cut(self, n):
        """A slice of an axis of length n, and its length; at least 1."""
        forms = [("::-1", n), (f":{n - 1}", n - 1), ("1:", n - 1), ("::2", (n + 1) // 2), (f"-{n}:", n)]
        if n > 2:
            forms += [(f"1:{n - 1}", n - 2), (f"{n - 2}:", 2)]
        return self.rng.choice([f for f in forms if f[1] > 0])

    def place(self, a):
        """The text of one element of the part, by one index or by several subscripts."""
        with self.simple():
            sizes = [f"{a.text}.shape[{k}]" if a.name else None for k in range(len(a.shape))]
            indices = [self.index(n, THREAD, size) for n, size in zip(a.shape, sizes)]
        if self.chance(0.35):
            return a.text + "".join(f"[{i}]" for i in indices)
        return f"{a.text}[{', '.join(indices)}]"

    def part_statement(self, parts):
        a = self.rng.choice(parts)
        kinds = {"name": 6, "element": 4, "augment": 2, "scalar": 3, "tuple": 3, "call": 7, "read": 3, "loop": 2,
                 "choose": 3, "shape": 2, "pair": 2}
        if self.has("iterate"):
            kinds |= {"iterate": 6, "unpack": 4}
        if a.fixed:
            kinds = {k: w for k, w in kinds.items() if k in ("name", "call", "read", "shape", "iterate", "unpack")}
        getattr(self, f"part_{self.rng.choices(list(kinds), list(kinds.values()))[0]}")(parts, a)

    def row_name(self):
        return self.name(reuse=False).replace("v", "row")

    def part_name(self, parts, a):
        part = self.part_of(a)
        name = self.row_name()
        self.emit(f"{name} = {part.text}")
        parts.append(part._replace(text=name, name=name))

    def part_element(self, parts, a):
        self.emit(f"{self.place(a)} = {self.part_value(a.kind)}")

    def part_augment(self, parts, a):
        self.emit(f"{self.place(a)} {self.pick('+=', '-=') if a.kind == 'f' else '^='} {self.part_value(a.kind, 15)}")

    def part_scalar(self, parts, a):
        self.emit(f"{self.part_of(a).text} = {self.part_value(a.kind)}")

    def part_tuple(self, parts, a):
        if not self.lengths_known:
            return self.part_scalar(parts, a)
        row = self.part_of(a, 1)
        self.emit(f"{row.text} = {', '.join(self.tuple_values(a.kind, row.shape[0]))}")

    def part_read(self, parts, a):
        self.result_of(a.kind, self.place(a))

    def result_of(self, kind, text):
        """A variable with what a part gave: any value of an element's type."""
        if kind == "i":
            var = self.new("i", 0, 255)
            self.emit(f"{var.name} = {text} & 255")
        else:
            var = self.new("f", -32, 32, 3)
            self.emit(f"{var.name} = {self.fit_float(Expr(text, -1 << 12, 1 << 12, 8)).text}")
        self.show(var)

    def part_call(self, parts, a):
        functions = [f for f in self.m.row_functions if f.kind == a.kind]
        part = self.part_of(a, 1) if len(a.shape) > 1 or self.chance(0.5) else a
        functions = [f for f in functions if f.rank == len(part.shape) and min(part.shape) >= f.least
                     and f.dtype in ("", a.dtype)]
        functions = [f for f in functions if f.reads_only or not a.fixed]
        if not functions:
            return self.part_read(parts, a) if a.fixed else self.part_element(parts, a)
        f = self.rng.choice(functions)
        with self.simple():
            text = f"{f.name}({part.text}, {self.fit(self.int_expr(1), 0, 63).text})"
        if self.chance(0.3) and f.reads_only:
            other = self.part_of(a, 1) if f.rank == 1 else part
            if min(other.shape) >= f.least:
                text = f"({text} - {f.name}({other.text}, {self.rng.randint(0, 5)}))"
        self.result_of(a.kind, text)

    def part_loop(self, parts, a):
        counter, row = self.new("i", 0, a.shape[0] - 1, fixed=True), self.row_name()
        self.emit(f"for {counter.name} in range({a.shape[0]}):")
        self.indent += 1
        self.show(counter)
        if len(a.shape) > 1:
            self.emit(f"{row} = {a.text}[{counter.name}]")
            part = a._replace(text=row, name=row, shape=a.shape[1:])
            with self.simple(), self.without_collectives():
                self.emit(f"{self.place(part)} = {self.part_value(a.kind)}")
        else:
            with self.simple(), self.without_collectives():
                self.emit(f"{a.text}[{counter.name}] = {self.part_value(a.kind)}")
        self.indent -= 1
        self.vars.remove(counter)
        self.dead.append(counter.name)

    def part_choose(self, parts, a):
        """One name for either of two parts of equal shape, by an expression or by a branch."""
        first, second = self.part_of(a, 1), self.part_of(a, 1)
        if first.shape != second.shape:
            second = first
        name, test = self.row_name(), self.bool_expr(0)
        if self.chance(0.5):
            self.emit(f"{name} = {first.text} if {test} else {second.text}")
        else:
            self.emit(f"{name} = {first.text}")
            self.emit(f"if {test}:")
            self.emit(f"    {name} = {second.text}")
        part = first._replace(text=name, name=name)
        self.emit(f"{self.place(part)} = {self.part_value(a.kind)}")

    def part_shape(self, parts, a):
        part = self.part_of(a)
        var = self.new("i", 0, 1000)
        if len(part.shape) == 2 and self.chance(0.5):
            rows, columns = self.new("i", 0, 8), self.new("i", 0, 8)
            self.emit(f"{rows.name}, {columns.name} = {part.text}.shape")
            self.show(rows)
            self.show(columns)
            return
        size = self.pick(f"{part.text}.shape[{self.rng.randrange(len(part.shape))}]", f"len({part.text})",
                         f"{part.text}.size", f"{part.text}.ndim")
        self.emit(f"{var.name} = {size} * {self.rng.randint(1, 9)} + {a.text}.shape[0]")
        self.show(var)

    def part_pair(self, parts, a):
        """Two parts in a tuple."""
        first, second = self.part_of(a, 1), self.part_of(a, 1)
        name = self.row_name()
        self.emit(f"{name} = ({first.text}, {second.text})")
        with self.simple(), self.without_collectives():
            which = self.rng.randrange(2)
            index = self.index((first, second)[which].shape[0], THREAD)
            self.emit(f"{name}[{which}][{index}] = {self.part_value(a.kind)}")

    def part_iterate(self, parts, a):
        row = self.part_of(a, 1)
        var, element = self.new(a.kind, 0, 255, 3, fixed=True), self.name(reuse=False)
        self.emit(f"{var.name} = {'0' if a.kind == 'i' else '0.0'}")
        self.emit(f"for {element} in {row.text}:")
        self.emit(f"    {var.name} += {f'{element} & 31' if a.kind == 'i' else element}")
        text = f"{var.name} & 255" if a.kind == "i" else self.fit_float(Expr(var.name, -1 << 12, 1 << 12, 8)).text
        self.emit(f"{var.name} = {text}")
        if a.kind == "f":
            var.lo, var.hi = -32, 32
        self.show(var)

    def part_unpack(self, parts, a):
        row = self.part_of(a, 1)
        if row.shape[0] > 8 or not self.lengths_known:
            return self.part_read(parts, a)
        names = [self.name(reuse=False) for _ in range(row.shape[0])]
        self.emit(f"{', '.join(names)}{',' if len(names) == 1 else ''} = {row.text}")
        self.result_of(a.kind, f"({' + '.join(names)})")

    def summed_up(self, a):
        """Every element, each with a weight of its own, in one variable."""
        total = self.new(a.kind, fixed=True)
        self.emit(f"{total.name} = {'0' if a.kind == 'i' else '0.0'}")
        strides = {2: (7, 1), 3: (11, 5, 1)}[len(a.shape)]

        def add(index):
            weight = " + ".join(f"{c} * {s}" for c, s in zip(index.split(", "), strides))
            self.emit(f"{total.name} += {a.text}[{index}] * ({weight} + 1)")

        self.in_loops(a.shape, add)
        if a.kind == "i":
            total.lo, total.hi, total.fixed = -1 << 30, 1 << 30, True
        else:
            total.lo, total.hi, total.frac = -32, 32, 3
            self.emit(f"{total.name} = {self.fit_float(Expr(total.name, -1 << 16, 1 << 16, 8)).text}")
        self.show(total)
        return True


class RowFunction(NamedTuple):
    name: str
    kind: str       # of the elements and of the result
    rank: int
    least: int      # length of every axis, at least
    reads_only: bool
    dtype: str      # of the elements, if a signature names it


class RowModule:
    """Device functions that take a part of an array; a part of Module."""

    def row_function(self):
        """A function of a row or a plane, of any length, and a small number; it reads it or changes it."""
        body = self.new_body(THREAD)
        kind, rank = self.rng.choice("iif"), self.rng.choice([1, 1, 2])
        name, least = f"dr{len(self.row_functions)}", self.rng.choice([1, 2])
        array = Array("row", kind, "any", (least,) * rank,
                      *((-(1 << 15), 1 << 16, 0) if kind == "i" else (-256, 256, 4)), mode="live")
        body.locals.append(array)
        body.vars.append(self.parameter("n", 0, 63))
        body.depth = 1
        reads_only = self.chance(0.4)
        whole, body.lengths_known = Part("row", (least,) * rank, kind, "any", "row"), False
        if not reads_only:
            for _ in range(self.rng.randint(1, 2)):
                body.part_statement([whole])
        elif self.chance(0.5):
            body.statements(1)
        body.emit(f"total = {'0' if kind == 'i' else '0.0'}")
        size = self.rng.choice(["row.shape[0]", "len(row)", "row.shape[0]"])
        body.emit(f"for k in range({size}):")
        inner = [f for f in self.row_functions if (f.kind, f.rank, f.least, f.dtype) == (kind, 1, 1, "")]
        if rank == 2 and inner and self.chance(0.6):
            body.emit(f"    total += {self.rng.choice(inner).name}(row[k], k)")
        elif rank == 2:
            body.emit("    for j in range(row.shape[1]):")
            body.emit(f"        total += row[k, j] * ({'k + j' if kind == 'i' else '0.5'})")
        else:
            body.emit(f"    total += row[k] * {'(k + n)' if kind == 'i' else self.rng.choice(['0.5', 'k', '2.0'])}")
        if rank == 1 and self.chance(0.3):
            body.emit("if row.shape[0] > n % 4:")
            body.emit(f"    return row[n % 4] + {'0' if kind == 'i' else '0.0'}")
        text = "total & 4095" if kind == "i" else body.fit_float(Expr("total", -1 << 13, 1 << 13, 8)).text
        body.emit(f"return {text}")
        dtype, decoration = "", "device=True"
        if self.has("signatures") and self.chance(0.6):
            dtype = self.rng.choice(["int32", "int64"] if kind == "i" else ["float32", "float64"])
            array = f"{dtype}[{', '.join(':' * rank)}]"
            result = self.rng.choice(["int32", "int64", "int16"] if kind == "i" else ["float32", "float64"])
            decoration = self.decoration(result, [array, self.rng.choice(["int64", "int32", "uint8"])])
        self.row_functions.append(RowFunction(name, kind, rank, least, reads_only, dtype))
        self.section(body, name, ["row", "n"], decoration)
