"""Casts: integers that wrap to narrow types, floats in their range, and (wild) what lies beyond."""

from tests.fuzz.parts import THREAD, Expr
from tests.fuzz.signatures import INTS, limits


class Casts:
    """A part of Body."""

    def cast_expression(self, depth, level):
        """An integer that went through a narrow type."""
        dtype = self.rng.choice(INTS[:6])
        if self.chance(0.35):
            size = {"int8": 60, "uint8": 120}.get(dtype, 500)
            e = self.fit_float(self.float_expr(depth - 1, level), size // 4)
            text = f"np.{dtype}({f'math.fabs({e.text})' if dtype[0] == 'u' else e.text} * {self.pick(1, 2, 4)}.0)"
            lo, hi = (0 if dtype[0] == "u" else -int(4 * e.size) - 1), int(4 * e.size) + 1
        else:
            e = self.int_expr(depth - 1, level)
            factor = self.pick("", "", " * 37", " * 100003")
            text, (lo, hi) = f"np.{dtype}({e.text}{factor})", limits(dtype)
            if self.chance(0.3):
                dtype = self.rng.choice(INTS[:6])
                text, (lo, hi) = f"np.{dtype}({text})", limits(dtype)
        return self.widened(text, dtype, lo, hi)

    def widened(self, text, dtype, lo, hi):
        """The value of a narrow type as an int64 in a small interval."""
        forms = [self.small(Expr(f"np.int64({text})", lo, hi))]
        if dtype[0] == "u":
            forms += [Expr(f"({text} & 255)", 0, min(hi, 255)), Expr(f"({text} % 100)", 0, min(hi, 99))]
            low, high = limits(dtype)
            forms.append(self.small(Expr(f"np.int64(~{text})", high - hi, high - lo)))
        else:
            forms += [self.small(Expr(f"({text} + 0)", lo, hi)), self.small(Expr(f"int(float({text}))", lo, hi))]
            inside = lo > limits(dtype)[0]
            low, high = (-hi, -lo) if inside else limits(dtype)
            forms.append(self.small(Expr(f"(-{text})", low, high)))
        return self.rng.choice(forms)

    def s_cast(self):
        e = self.cast_expression(2, THREAD)
        var = self.new("i", min(e.lo, 0), max(e.hi, 1))
        self.emit(f"{var.name} = {e.text}")
        self.show(var)
        return True

    # -- out of range
    def s_wild(self):
        """A cast of a float or a shift whose operands come from memory: the compiler must not know them."""
        reals = [a for a in self.inputs if a.kind == "f" and a.dtype in ("float32", "float64") and a.name != "table"]
        whole = [a for a in self.inputs if a.kind == "i" and a.dtype in ("int32", "int64")]
        name = self.name(reuse=False)
        if reals and self.chance(0.6):
            a = self.rng.choice(reals)
            with self.simple():
                text = self.element(a, THREAD)
            factor = self.pick(1, 16, 100, 5000, 1e5, 3e8, 1e12, 1e18, 1e30)
            value = f"np.float64({text}) * {float(factor)!r}"
            if self.chance(0.5):
                value = f"np.float32({value})"
            self.emit(f"{name} = np.{self.rng.choice(INTS)}({value})")
        elif whole:
            a, b = self.rng.choice(whole), self.rng.choice(whole)
            with self.simple():
                text, amount = self.element(a, THREAD), self.element(b, THREAD)
            value = self.pick(f"np.int64({text})", f"np.uint32({text})", f"np.uint64({text})", f"np.int8({text})")
            self.emit(f"{name} = {value} {self.pick('<<', '>>')} {amount}")
        else:
            return False
        self.look_at(name)
        var = self.new("i", 0, 255)
        self.emit(f"{var.name} = np.int64({name}) & 255")
        self.show(var)
        return True
