"""Expressions of random kernels: the text, and the interval that its value stays in."""

from tests.fuzz.body import Writer
from tests.fuzz.constants import member_expression
from tests.fuzz.parts import BLOCK, MAX_COST, MAX_FLOAT_BITS, THREAD, WARP, Expr, enclosed
from tests.fuzz.recursion import exact_argument


class Expressions(Writer):
    # -- integer expressions ------------------------------------------------------------------------------------------
    def fit(self, e, lo, hi):
        """`e` forced into [lo, hi]."""
        if lo <= e.lo and e.hi <= hi:
            return e
        span = hi - lo + 1
        if lo == 0 and span & (span - 1) == 0 and self.chance(0.5):
            return Expr(f"({e.text} & {hi})", 0, hi)
        if self.chance(0.2):
            return Expr(f"min(max({e.text}, {lo}), {hi})", lo, hi)
        text = f"{e.text} % {span}"
        return Expr(f"({text} {'+' if lo > 0 else '-'} {abs(lo)})" if lo else f"({text})", lo, hi)

    def small(self, e, limit=1 << 16):
        return e if e.size <= limit else self.fit(e, *self.pick((0, 1023), (-500, 499), (0, 996)))

    def literal(self):
        value = self.pick(0, 1, 2, 3, 4, 5, 7, 8, 10, 13, 31, 32, 63, 100, -1, -2, -3, -7)
        return Expr(str(value) if value >= 0 else f"({value})", value, value)

    def int_atom(self, level):
        options = [(self.literal, 2)]
        for v in self.visible("i", level)[-6:]:
            options.append((lambda v=v: v.expr, 3))
        for kind, e, at in self.atoms:
            if kind == "i" and at >= level:
                options.append((lambda e=e: e, 1.2))
        if self.chance(0.55):
            load = self.load("i", level)
            if load:
                options.append((lambda: load, 8))
        makers, weights = zip(*options)
        return self.rng.choices(makers, weights)[0]()

    def int_expr(self, depth=2, level=THREAD):
        if depth <= 0 or self.chance(0.15):
            return self.int_atom(level)
        kinds = {"arith": 10, "div": 5, "bits": 4, "unary": 2, "minmax": 2, "cond": 3, "from_float": 2, "from_bool": 2,
                 "count_bits": 3, "call": 4, "collective": 4, "hash": 0.6}
        kinds |= self.m.int_kinds
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        return getattr(self, f"int_{kind}")(depth, level) or self.int_arith(depth, level)

    def int_arith(self, depth, level):
        a, b = self.small(self.int_expr(depth - 1, level)), self.small(self.int_expr(depth - 1, level))
        op = self.pick("+", "+", "-", "*")
        if op == "*":
            a, b = self.small(a, 1024), self.small(b, 1024)
            ends = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
            return self.small(Expr(f"({a.text} * {b.text})", min(ends), max(ends)), 1 << 24)
        if op == "+":
            return Expr(f"({a.text} + {b.text})", a.lo + b.lo, a.hi + b.hi)
        return Expr(f"({a.text} - {b.text})", a.lo - b.hi, a.hi - b.lo)

    def int_div(self, depth, level):
        a = self.int_expr(depth - 1, level)
        if self.chance(0.7):
            d = self.pick(2, 3, 4, 5, 7, 16, 33, -3)
            divisor = Expr(str(d) if d > 0 else f"({d})", d, d)
        else:
            b = self.fit(self.int_expr(depth - 2, level), 0, 7)
            divisor = Expr(f"({b.text} + 1)", 1, 8)
        if self.chance(0.5):
            return Expr(f"({a.text} // {divisor.text})", -a.size - 1, a.size + 1)
        m = divisor.size - 1
        return Expr(f"({a.text} % {divisor.text})", -m if divisor.lo < 0 else 0, m if divisor.hi > 0 else 0)

    def int_bits(self, depth, level):
        a = self.int_expr(depth - 1, level)
        op = self.pick("&", "|", "^", "<<", ">>", "~")
        if op == "~":
            return Expr(f"(~{a.text})", -a.hi - 1, -a.lo - 1)
        if op in ("<<", ">>"):
            k = self.rng.randint(1, 4)
            a = self.small(a)
            if op == "<<":
                return Expr(f"({a.text} << {k})", -(a.size << k), a.size << k)
            return Expr(f"({a.text} >> {k})", -(a.size >> k) - 1, (a.size >> k) + 1)
        mask = self.pick(1, 3, 15, 63, 255)
        if op == "&":
            return Expr(f"({a.text} & {mask})", 0, mask)
        a = self.fit(a, 0, mask)
        b = self.fit(self.int_expr(depth - 1, level), 0, mask)
        return Expr(f"({a.text} {op} {b.text})", 0, mask)

    def int_unary(self, depth, level):
        a = self.int_expr(depth - 1, level)
        if self.chance(0.5):
            return Expr(f"(-{a.text})", -a.hi, -a.lo)
        return Expr(f"abs({a.text})", 0, a.size)

    def int_minmax(self, depth, level):
        a, b = self.int_expr(depth - 1, level), self.int_expr(depth - 1, level)
        if self.chance(0.5):
            return Expr(f"min({a.text}, {b.text})", min(a.lo, b.lo), min(a.hi, b.hi))
        return Expr(f"max({a.text}, {b.text})", max(a.lo, b.lo), max(a.hi, b.hi))

    def int_cond(self, depth, level):
        c = self.bool_expr(1, level)
        with self.without_collectives():
            a, b = self.int_expr(depth - 1, level), self.int_expr(depth - 1, level)
        return Expr(f"({a.text} if {c} else {b.text})", min(a.lo, b.lo), max(a.hi, b.hi))

    def int_from_float(self, depth, level):
        e = self.float_expr(depth - 1, level)
        text = self.pick(f"int({e.text})", f"int({e.text} * 2)", f"int(math.floor({e.text}))")
        size = int(2 * e.size) + 1
        return Expr(text, -size, size)

    def int_from_bool(self, depth, level):
        c = self.bool_expr(depth - 1, level)
        return self.pick(Expr(f"int({c})", 0, 1), Expr(f"(({c}) * 3)", 0, 3), Expr(f"(1 if {c} else 0)", 0, 1))

    def int_count_bits(self, depth, level):
        a = self.small(self.int_expr(depth - 1, level))
        which = self.pick("popc", "clz", "ffs", "brev", "selp")
        if which == "selp":
            b = self.small(self.int_expr(depth - 1, level))
            with self.without_collectives():
                c = self.compare(0, level)
            # selp wants two values of one type; an addition makes both int64
            return Expr(f"cuda.selp({c}, ({a.text} + 0), ({b.text} + 1))", min(a.lo, b.lo), max(a.hi, b.hi) + 1)
        if which == "brev":
            return Expr(f"((cuda.brev(np.uint32({self.fit(a, 0, 255).text})) >> 20) & 4095)", 0, 4095)
        kind = self.pick("np.int64", "np.int32")
        if which == "ffs":
            return Expr(f"(cuda.ffs({kind}({a.text})) & 63)", 0, 63)
        return Expr(f"(cuda.{which}({kind}({a.text})) + 0)", 0, 64)

    def int_hash(self, depth, level):
        """Overflow on purpose: int64 wraps, uint32 times uint32 is a uint64."""
        a = self.int_expr(depth - 1, level)
        if self.chance(0.5):
            text = f"((np.int64({a.text}) * 6364136223846793005 + 1442695040888963407) >> 40)"
            return Expr(text, -(1 << 23), 1 << 23)
        factor = f"np.uint32({self.fit(a, 0, 1023).text})"
        return Expr(f"((({factor} * np.uint32(2654435761)) >> 7) & 1023)", 0, 1023)

    def int_call(self, depth, level):
        return self.call("i", depth, level)

    def int_typed(self, depth, level):
        return self.typed_call("i", depth, level)

    def int_cast(self, depth, level):
        return self.cast_expression(depth, level)

    def int_member(self, depth, level):
        return member_expression(self, level)

    def int_collective(self, depth, level):
        if not self.collectives(level):
            return None
        options = ["ballot", "ballot", "popc"]
        if self.level == BLOCK:
            options.append("count")
        if self.on("match"):
            options.append("match")
        if level == THREAD and self.exited != "lane":
            options += ["shfl"] * 6 + (["warp_call"] * 3 if self.m.warp_functions else [])
        which = self.rng.choice(options)
        if which == "shfl":
            return self.shuffle(self.int_expr(depth - 1), level)
        if which == "warp_call":
            return self.call_warp("i", depth)
        if which == "count":
            with self.simple():
                c = self.bool_expr(1)
            return Expr(f"cuda.syncthreads_count(int({c}))", 0, self.m.threads)
        if which == "match":
            if level > THREAD:
                return None
            v = self.fit(self.int_expr(depth - 1), 0, 3)
            return Expr(f"(cuda.match_any_sync({self.mask()}, {v.text}) & 65535)", 0, 65535)
        ballot = f"cuda.ballot_sync({self.mask()}, {self.bool_expr(1)})"
        if which == "popc":
            return Expr(f"(cuda.popc({ballot}) + 0)", 0, 32)
        return Expr(f"({ballot} & {self.pick('0xFF', '0xFFFF')})", 0, 65535)

    def shuffle(self, value, level):
        """A shuffle of `value` in which every lane reads a lane that exists."""
        ops = ["idx", "up"] + (["down", "xor"] * 2 if self.full else [])
        op, text = self.rng.choice(ops), value.text
        mask = self.mask()
        if op == "idx":
            if level >= WARP:
                return None
            if not self.full:
                lane = f"{enclosed(self.int_expr(1).text)} % {self.wn}" if self.chance(0.6) else "0"
            else:
                lane = self.pick("0", "31", str(self.rng.randrange(32)), f"{enclosed(self.int_expr(1).text)} % 32",
                                 self.pick("lane ^ 1", "31 - lane", "lane // 2"))
                if self.on("shfl_wrap") and self.chance(0.1):
                    lane = f"lane + {self.pick(1, 7, 31)}"      # the hardware takes the lane modulo 32
                lane = lane.replace("lane", self.lane_text())
            return value._replace(text=f"cuda.shfl_sync({mask}, {text}, {lane})")
        amount = self.pick("1", "2", "4", "8", "16", str(self.rng.randint(1, 31)))
        uniform = [v for v in self.visible("i", WARP) if 0 <= v.lo and v.hi <= 31]
        if uniform and self.chance(0.2):
            amount = self.rng.choice(uniform).name
        return value._replace(text=f"cuda.shfl_{op}_sync({mask}, {text}, {amount})")

    def lane_text(self):
        return "lane" if any(e.text == "lane" for _, e, _ in self.atoms) else "cuda.laneid"

    # -- float expressions --------------------------------------------------------------------------------------------
    def fit_float(self, e, size=32, frac=3):
        """`e` forced to a multiple of 2**-frac in [-size, size]."""
        if e.frac <= frac:
            if e.size <= size:
                return e
            if self.chance(0.4):
                return Expr(f"min(max({e.text}, {-float(size)}), {float(size)})", -size, size, e.frac)
        unit, span = 2.0 ** -frac, size * 2 << frac
        text = f"((int({e.text} * {float(1 << frac)}) % {span} - {span // 2}) * {unit})"
        return Expr(text, -size, size, frac)

    def exact(self, e):
        """`e`, cut down if a float32 might not hold it."""
        if e.size * 2 ** e.frac >= 1 << MAX_FLOAT_BITS:
            return self.fit_float(e)
        return e

    def float_literal(self):
        value = self.pick(0.0, 0.5, 1.0, 1.5, 2.0, 0.25, -0.5, -1.25, 3.0, 4.5)
        return Expr(str(value) if value >= 0 else f"({value})", value, value, 2)

    def float_atom(self, level):
        options = [(self.float_literal, 2)]
        for v in self.visible("fs", level)[-6:]:
            options.append((lambda v=v: v.expr, 4))
        for kind, e, at in self.atoms:
            if kind == "f" and at >= level:
                options.append((lambda e=e: e, 1.5))
        if self.chance(0.6):
            load = self.load("f", level)
            if load:
                options.append((lambda: load, 9))
        makers, weights = zip(*options)
        return self.rng.choices(makers, weights)[0]()

    def float_expr(self, depth=2, level=THREAD):
        return self.exact(self.float_node(depth, level))

    def float_node(self, depth, level):
        if depth <= 0 or self.chance(0.15):
            return self.float_atom(level)
        a = self.float_expr(depth - 1, level)
        kind = self.rng.choices(
            ["add", "mul", "half", "int", "from_int", "div", "math", "minmax", "cond", "single", "fma", "call", "coll"],
            [8, 4, 2, 2, 2, 2, 3, 2, 3, 2, 1, 3, 3])[0]
        if kind == "mul":
            b = self.float_expr(depth - 1, level)
            a, b = self.fit_float(a, 64, 4), self.fit_float(b, 64, 4)
            return Expr(f"({a.text} * {b.text})", -a.size * b.size, a.size * b.size, a.frac + b.frac)
        if kind == "half":
            return Expr(f"({a.text} {self.pick('* 0.5', '/ 2', '/ 2.0')})", a.lo / 2, a.hi / 2, a.frac + 1)
        if kind == "int":
            i = self.fit(self.int_expr(depth - 1, level), -64, 63)
            a = self.fit_float(a, 64, 4)
            return self.pick(Expr(f"({a.text} * {i.text})", -a.size * 64, a.size * 64, a.frac),
                             Expr(f"({i.text} - {a.text})", -a.size - 64, a.size + 64, a.frac))
        if kind == "from_int":
            i = self.fit(self.int_expr(depth - 1, level), -500, 499)
            return self.pick(Expr(f"float({i.text})", -500, 500, 0), Expr(f"({i.text} / 4)", -125, 125, 2),
                             Expr(f"({i.text} * 0.25)", -125, 125, 2), Expr(f"np.float32({i.text})", -500, 500, 0))
        if kind == "div":
            return self.pick(Expr(f"({a.text} // 0.5)", -2 * a.size - 1, 2 * a.size + 1, 0),
                             Expr(f"({a.text} % 3.0)", 0, 3, a.frac),
                             Expr(f"({a.text} % 1.5)", 0, 1.5, max(a.frac, 1)),
                             Expr(f"({a.text} // 2)", -a.size - 1, a.size + 1, 0))
        if kind == "math":
            return self.pick(Expr(f"math.floor({a.text})", -a.size - 1, a.size + 1, 0),
                             Expr(f"math.ceil({a.text})", -a.size - 1, a.size + 1, 0),
                             Expr(f"math.fabs({a.text})", 0, a.size, a.frac),
                             Expr(f"abs({a.text})", 0, a.size, a.frac), Expr(f"(-{a.text})", -a.size, a.size, a.frac),
                             self.square_root(a))
        if kind == "minmax":
            b = self.float_expr(depth - 1, level)
            return Expr(f"{self.pick('min', 'max')}({a.text}, {b.text})", min(a.lo, b.lo), max(a.hi, b.hi),
                        max(a.frac, b.frac))
        if kind == "cond":
            c = self.bool_expr(1, level)
            with self.without_collectives():
                a, b = self.float_expr(depth - 1, level), self.float_expr(depth - 1, level)
            if self.chance(0.2):
                b = Expr(*self.pick(("0", 0, 0), ("1", 1, 1)))  # an int on one side: Numba makes it a float
            return Expr(f"({a.text} if {c} else {b.text})", min(a.lo, b.lo), max(a.hi, b.hi), max(a.frac, b.frac))
        if kind == "single":
            return a._replace(text=f"np.float32({a.text})")
        if kind == "fma":
            b, c = self.float_expr(0, level), self.float_expr(0, level)
            a, b, c = (self.fit_float(x) for x in (a, b, c))
            size = a.size * b.size + c.size
            return Expr(f"cuda.fma({a.text}, {b.text}, {c.text})", -size, size, max(a.frac + b.frac, c.frac))
        if kind == "call":
            result = self.call("f", depth, level)
            if self.has("signatures") and (result is None or self.chance(0.4)):
                result = self.typed_call("f", depth, level) or result
            if result:
                return result
        if kind == "coll" and self.collectives(level) and level == THREAD and self.exited != "lane":
            if self.m.warp_functions and self.chance(0.3):
                result = self.call_warp("f", depth)
                if result:
                    return result
            result = self.shuffle(a, level)
            if result:
                return result
        b = self.float_expr(depth - 1, level)
        op = self.pick("+", "-")
        size = a.size + b.size
        return Expr(f"({a.text} {op} {b.text})", -size, size, max(a.frac, b.frac))

    def square_root(self, a):
        a = self.fit_float(a)
        if not a.text.isidentifier():
            return Expr(f"math.sqrt({float(self.pick(1, 4, 9, 6.25))})", 0, 3, 1)
        return Expr(f"math.sqrt({a.text} * {a.text})", 0, a.size, a.frac)

    # -- conditions (texts) -------------------------------------------------------------------------------------------
    def variable(self, e, kind, level):
        """`e` if it names anything, else some value that Numba does not know when it compiles: a branch on literals
        alone would be pruned, and Numba then loses the variables assigned in it."""
        if any(c.isalpha() for c in e.text):
            return e
        known = [v.expr for v in self.visible(kind, level)]
        known += [a for k, a, at in self.atoms if k in kind and at >= level and a.text.isidentifier()]
        return self.rng.choice(known) if known else Expr(self.wn, 1, 32)

    def compare(self, depth, level):
        if self.chance(0.3):
            a, b = self.variable(self.float_expr(depth, level), "ifs", level), self.float_expr(0, level)
            return f"{a.text} {self.pick('<', '<=', '>', '>=', '==', '!=')} {b.text}"
        a = self.variable(self.int_expr(depth, level), "i", level)
        if self.chance(0.2):
            b, c = self.int_atom(level), self.int_expr(0, level)
            return f"{b.text} {self.pick('<', '<=')} {a.text} {self.pick('<', '<=')} {c.text}"
        if self.chance(0.4):
            m = self.pick(2, 3, 4, 5)
            return f"{a.text} % {m} {self.pick('==', '!=', '<')} {self.rng.randrange(1, m)}"
        b = self.int_atom(level)
        if self.chance(0.6) and a.lo < a.hi:
            b = Expr(str(int(a.lo + (a.hi - a.lo) * self.rng.random())), 0, 0)
        return f"{a.text} {self.pick('<', '<=', '>', '>=', '==', '!=')} {b.text}"

    def bool_expr(self, depth=1, level=THREAD):
        options = [(lambda: self.compare(depth, level), 8)]
        for v in self.visible("b", level)[-4:]:
            options.append((lambda v=v: v.name, 2))
        for kind, e, at in self.atoms:
            if kind == "b" and at >= level:
                options.append((lambda e=e: e.text, 1))
        if depth > 0:
            options += [(lambda: self.bool_pair(depth, level), 4),
                        (lambda: f"not ({self.bool_expr(depth - 1, level)})", 1),
                        (lambda: f"(({self.compare(0, level)}) & ({self.compare(0, level)}))", 0.7)]
        if self.chance(0.25):
            load = self.load("b", level)
            if load:
                options.append((lambda: load.text, 3))
        if self.collectives(level) and depth > 0:
            vote = self.pick("all", "any", "eq")
            options.append((lambda: f"cuda.{vote}_sync({self.mask()}, {self.bool_expr(0)})", 2.5))
        makers, weights = zip(*options)
        return self.rng.choices(makers, weights)[0]()

    def bool_pair(self, depth, level):
        first = self.bool_expr(depth - 1, level)
        with self.without_collectives():
            second = self.bool_expr(depth - 1, level)
        return f"({first} {self.pick('and', 'or')} {second})"

    # -- loads --------------------------------------------------------------------------------------------------------
    def index(self, n, level, size_text=None):
        """An index expression in [0, n), or one that wraps."""
        if n == 1:
            return "0"
        e = self.int_expr(1, level)
        size = size_text if size_text and self.chance(0.3) else str(n)
        inside = 0 <= e.lo and e.hi < n
        if self.on("negative_index") and self.chance(0.12):
            if self.chance(0.3):
                return str(-self.rng.randint(1, n))
            return f"{e.text} - {n}" if inside else f"{enclosed(e.text)} % {n} - {n}"
        if inside and self.chance(0.7):
            return e.text
        if n & (n - 1) == 0 and self.chance(0.3):
            return f"{e.text} & {n - 1}"
        return f"{enclosed(e.text)} % {size}"

    def element(self, array, level):
        """The text of a read of any element."""
        if array.offset is not None:
            return f"{array.name}[{array.offset} + {enclosed(self.int_expr(1, level).text)} % {array.shape[0]}]"
        sizes = [f"{array.name}.shape[{k}]" for k in range(len(array.shape))]
        return f"{array.name}[{', '.join(self.index(n, level, s) for n, s in zip(array.shape, sizes))}]"

    def load(self, kind, level):
        """A read of an array element, or None."""
        if self.plain > 1:
            return None
        self.plain += 1         # an index is simple: no loads inside loads, no collectives
        try:
            return self.load_from(kind, level)
        finally:
            self.plain -= 1

    def load_from(self, kind, level):
        options = []
        if level == THREAD or self.on("uniform_load"):
            options += [(a, "any", 2) for a in self.inputs if a.kind == kind]
        for a in self.shared:
            if a.kind != kind or self.plain > 1:
                continue
            if a.mode == "W" and level == THREAD:
                options.append((a, "own", 4))
            elif a.mode == "V" and level <= WARP and self.wn:
                options.append((a, "warp", 6))
            elif a.mode == "R" and (level == THREAD or self.on("uniform_load")):
                options.append((a, "any", 5))
        if level == THREAD:
            options += [(a, "any", 3) for a in self.locals if a.kind == kind and a in self.live_locals()]
            options += [(a, "own", 1) for a in self.outputs if a.kind == kind and a.own]
        if not options:
            return None
        a, how, _ = self.rng.choices(options, [o[2] for o in options])[0]
        if how == "own":
            text = f"{a.name}[{self.rng.choice(a.own)}]"
        elif how == "warp":
            where = f"{enclosed(self.int_expr(1, level).text)} % {self.wn}"
            where = self.pick(where, where, f"{self.wn} - 1", f"({self.lane_text()} + 1) % {self.wn}"
                              if level == THREAD else "0")
            text = f"{a.name}[wbase + {where}]"
        else:
            text = self.element(a, level)
        return self.convert(a, text)

    def convert(self, a, text):
        if a.kind == "b":
            return Expr(text, 0, 1)
        if a.dtype == "any" and a.kind == "i":
            return Expr(f"np.int64({text})", a.lo, a.hi)
        if a.dtype in ("int8", "int16"):    # narrow integers cannot be shuffled
            return self.pick(Expr(f"({text} + 0)", a.lo, a.hi), Expr(f"np.int32({text})", a.lo, a.hi))
        if a.dtype in ("uint8", "uint16", "uint64"):
            return self.pick(Expr(f"({text} & 127)", 0, 127), Expr(f"({text} % 100)", 0, 99),
                             Expr(f"np.int64({text})", a.lo, a.hi))
        if a.dtype == "uint32":     # unsigned values would turn min and max into floats
            return self.pick(Expr(f"({text} & 1023)", 0, 1023), Expr(f"({text} % 257)", 0, 256),
                             Expr(f"np.int64({text})", a.lo, a.hi))
        if a.dtype == "float16":
            twin = self.pick(text, text, f"({text} + {text})")
            scale = 2 if twin != text else 1
            return Expr(f"{self.pick('np.float32', 'np.float64')}({twin})", a.lo * scale, a.hi * scale, a.frac)
        if a in self.outputs:
            if a.kind == "i":       # its other writers may be atomics and augmented stores
                return Expr(f"({text} & 255)", 0, 255)
            return Expr(text, -32, 32, 3)
        return Expr(text, a.lo, a.hi, a.frac)

    def live_locals(self):
        return [a for a in self.locals if a.mode == "live"]

    # -- calls --------------------------------------------------------------------------------------------------------
    def arguments(self, f, depth, level=THREAD):
        texts = []
        for kind in f.params:
            if kind == "i":
                texts.append(self.fit(self.int_expr(depth - 1, level), -64, 63).text)
            elif kind == "f":
                texts.append(self.fit_float(self.float_expr(depth - 1, level)).text)
            else:
                texts.append(exact_argument(self, kind, depth - 1, level))
        return ", ".join(texts)

    def call(self, kind, depth, level):
        options = [f for f in self.m.pure_functions if f.kind == kind and (f.uniform or level == THREAD)
                   and f.cost * self.mult <= MAX_COST]
        if not options:
            return None
        f = self.rng.choice(options)
        self.cost = max(self.cost, self.mult * f.cost)
        text = f"{f.name}({self.arguments(f, depth, level)})"
        if f.narrow:        # numba-cuda shuffles no narrow integers
            text = f"({text} + 0)"
        return Expr(text, f.lo, f.hi, f.frac)

    def call_warp(self, kind, depth):
        options = [f for f in self.m.warp_functions if f.kind == kind and f.cost * self.mult <= MAX_COST]
        if not options:
            return None
        f = self.rng.choice(options)
        return Expr(f"{f.name}({self.arguments(f, depth)}, {self.wn})", f.lo, f.hi, f.frac)
