"""Explicit signatures: what a parameter's type does to its values, and arithmetic that starts from narrow types.

A typed expression carries Numba's type as well as its interval: integers are computed in 64 bits (unsigned where both
operands are), ``-x`` and ``~x`` in the operand's width, and a cast cuts to the width.
"""

from typing import NamedTuple

from tests.fuzz.parts import MAX_COST, THREAD, Expr, enclosed

INTS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
SIGNED = ("int8", "int16", "int32", "int64")
FLOATS = ("float32", "float64")


def limits(dtype):
    """The lowest and the highest value of an integer type."""
    bits = int(dtype.lstrip("uint"))
    return (0, (1 << bits) - 1) if dtype[0] == "u" else (-(1 << bits - 1), (1 << bits - 1) - 1)


class Typed(NamedTuple):
    """An expression of a known integer type."""

    text: str
    dtype: str
    lo: int
    hi: int

    def become(self, dtype, text=None):
        """The same as another type: its interval where that fits, else everything that the type holds."""
        low, high = limits(dtype)
        inside = low <= self.lo and self.hi <= high
        return Typed(text or self.text, dtype, *((self.lo, self.hi) if inside else (low, high)))


class TypedFunction(NamedTuple):
    name: str
    params: tuple       # of dtypes
    result: str
    lo: int
    hi: int
    frac: int = 0
    exact: bool = False     # one of several signatures: the arguments must have the types of this one


class Typing:
    """Typed expressions, and calls of functions with signatures; a part of Body."""

    # -- expressions
    def typed(self, depth=2):
        if depth <= 0 or self.chance(0.15):
            return self.typed_atom()
        kinds = {"arith": 8, "bits": 4, "shift": 2, "divide": 2, "negative": 3, "invert": 3, "absolute": 1,
                 "extreme": 2, "choice": 1, "cast": 5, "power": 1}
        return getattr(self, f"typed_{self.rng.choices(list(kinds), list(kinds.values()))[0]}")(depth)

    def typed_atom(self):
        value = self.pick(1, 2, 3, 5, 7, 13, 100, 255, 1000, 65535, -1, -2, -100)
        options = [(Typed(str(value) if value >= 0 else f"({value})", "int64", value, value), 1)]
        options += [(e, 5) for e in self.typed_atoms]
        if self.is_kernel or not self.typed_atoms:
            e = self.int_atom(THREAD)
            options.append((Typed(f"({e.text} + 0)", "int64", e.lo, e.hi), 3))
        narrow = [a for a in self.inputs if a.dtype in ("int8", "uint8", "int16", "uint16", "uint32", "uint64")]
        if narrow and not self.plain:
            a = self.rng.choice(narrow)
            with self.simple():
                options.append((Typed(self.element(a, THREAD), a.dtype, a.lo, a.hi), 4))
        return self.rng.choices(*zip(*options))[0]

    @staticmethod
    def wide(*operands):
        return "uint64" if all(e.dtype[0] == "u" for e in operands) else "int64"

    def typed_arith(self, depth):
        op = self.pick("+", "-", "*", "*")
        a, b = self.typed(depth - 1), self.typed(depth - 1)
        wide = self.wide(a, b)
        a, b = a.become(wide), b.become(wide)
        ends = {"+": (a.lo + b.lo, a.hi + b.hi), "-": (a.lo - b.hi, a.hi - b.lo)}.get(op)
        if ends is None:
            products = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
            ends = min(products), max(products)
        return Typed(f"({a.text} {op} {b.text})", wide, *ends).become(wide)

    def typed_bits(self, depth):
        op = self.pick("&", "|", "^")
        a, b = self.typed(depth - 1), self.typed(depth - 1)
        wide = self.wide(a, b)
        a, b = a.become(wide), b.become(wide)
        text = f"({a.text} {op} {b.text})"
        if op == "&" and (a.lo >= 0 or b.lo >= 0):
            return Typed(text, wide, 0, min(e.hi for e in (a, b) if e.lo >= 0))
        if min(a.lo, b.lo) >= 0:
            return Typed(text, wide, 0, (1 << max(a.hi, b.hi).bit_length()) - 1)
        return Typed(text, wide, *limits(wide))

    def typed_shift(self, depth):
        a, k = self.typed(depth - 1), self.rng.choice([1, 3, 8, 31, 32, 63])
        if not any(c.isalpha() for c in a.text):    # Python computes with literals, and knows no width
            k = 3
        a = a.become(self.wide(a))
        if self.chance(0.5):
            return Typed(f"({a.text} >> {k})", a.dtype, a.lo >> k, a.hi >> k)
        return Typed(f"({a.text} << {k})", a.dtype, a.lo << k, a.hi << k).become(a.dtype)

    def typed_divide(self, depth):
        a, d = self.typed(depth - 1), self.rng.choice([2, 3, 7, 10, 255])
        divisor = Typed(*self.pick((str(d), "int64"), (f"np.uint8({d})", "uint8"), (f"np.int16({d})", "int16")), d, d)
        a = a.become(self.wide(a, divisor))
        if self.chance(0.5):
            return Typed(f"({a.text} // {divisor.text})", a.dtype, a.lo // d, a.hi // d)
        return Typed(f"({a.text} % {divisor.text})", a.dtype, 0, d - 1)

    def typed_negative(self, depth):
        a = self.typed(depth - 1)
        e = Typed(f"(-{a.text})", a.dtype, -a.hi, -a.lo).become(a.dtype)
        return e._replace(dtype=self.wide(a))

    def typed_invert(self, depth):
        a = self.typed(depth - 1)
        top = limits(a.dtype)[1] if a.dtype[0] == "u" else -1
        return Typed(f"(~{a.text})", self.wide(a), top - a.hi, top - a.lo)

    def typed_absolute(self, depth):
        a = self.typed(depth - 1)
        if a.dtype[0] == "i" and a.lo == limits(a.dtype)[0]:
            return Typed(f"abs({a.text})", a.dtype, *limits(a.dtype))
        low = 0 if a.lo <= 0 <= a.hi else min(abs(a.lo), abs(a.hi))
        return Typed(f"abs({a.text})", a.dtype, low, max(abs(a.lo), abs(a.hi)))

    def same(self, depth):
        """Two expressions of one type, by casts."""
        a, dtype = self.typed(depth - 1), self.rng.choice(INTS)
        b = self.typed(depth - 1)
        return [e.become(dtype, f"np.{dtype}({e.text})") for e in (a, b)]

    def typed_extreme(self, depth):
        a, b = self.same(depth)
        which = self.pick(min, max)
        return Typed(f"{which.__name__}({a.text}, {b.text})", a.dtype, which(a.lo, b.lo), which(a.hi, b.hi))

    def typed_choice(self, depth):
        test = self.typed_test(depth - 1)
        with self.without_collectives():
            a, b = self.same(depth)
        return Typed(f"({a.text} if {test} else {b.text})", a.dtype, min(a.lo, b.lo), max(a.hi, b.hi))

    def typed_cast(self, depth):
        a, dtype = self.typed(depth - 1), self.rng.choice(INTS)
        return a.become(dtype, f"np.{dtype}({a.text})")

    def typed_power(self, depth):
        a = self.typed(depth - 1)
        if max(abs(a.lo), abs(a.hi)) >= 1 << 25:
            return self.typed_arith(depth)
        size = max(abs(a.lo), abs(a.hi))
        return Typed(f"({a.text} ** 2)", "int64", 0, size * size)

    def typed_test(self, depth):
        a, b = self.typed(depth), self.typed(0)
        if not any(c.isalpha() for c in a.text + b.text):
            a = Typed(self.wn or "p0", "int64", 0, 0)
        return f"{a.text} {self.pick('<', '<=', '>', '>=', '==', '!=')} {b.text}"

    def plain_int(self, e, limit=1 << 16):
        """A typed expression as one that may stand anywhere: an int64 in a small interval."""
        e = e.become("int64", f"np.int64({e.text})" if e.dtype[0] == "u" else f"({e.text} + 0)")
        return self.small(Expr(e.text, e.lo, e.hi), limit)

    # -- statements
    def look_at(self, name):
        """All bits of a variable that is never assigned again go to memory at the kernel's end, if it gets there."""
        if self.is_kernel and not self.depth and not self.exited:
            self.raw.append(("i", name))

    def s_typed(self):
        """A variable computed from narrow types."""
        e = self.typed(3)
        if self.chance(0.3):
            var = self.new("b")
            self.emit(f"{var.name} = {self.typed_test(2)}")
        elif self.chance(0.3):      # all 64 bits are looked at, at the end
            name = self.name(reuse=False)
            self.emit(f"{name} = {e.text}")
            if not self.depth:
                self.typed_atoms.append(e._replace(text=name))
            self.look_at(name)
            return True
        else:
            e = self.plain_int(e)
            var = self.new("i", min(e.lo, -1), e.hi)
            self.emit(f"{var.name} = {e.text}")
        self.show(var)
        return True

    # -- calls
    def typed_argument(self, dtype, exact, depth, level):
        """An argument for a parameter of a type: of that type if it must, else one that is converted."""
        if dtype in FLOATS:
            if exact or self.chance(0.7):
                text = self.fit_float(self.float_expr(depth, level)).text
                return f"np.{dtype}({text})" if exact else text
            return self.fit(self.int_expr(depth, level), -32, 32).text
        if dtype == "boolean":
            return f"({self.bool_expr(0, level)})" if exact or self.chance(0.6) else self.int_expr(depth, level).text
        if exact:
            return f"np.{dtype}({self.int_expr(depth, level).text})"
        if self.chance(0.2):        # a float, its whole part in range
            text = self.fit_float(self.float_expr(depth, level)).text
            return f"math.fabs({text})" if dtype[0] == "u" else text
        e = self.int_expr(depth, level)
        return f"({enclosed(e.text)} * {self.pick(3, 100, 1000003, 123456789012)})" if self.chance(0.3) else e.text

    def typed_call(self, kind, depth, level):
        """A call of a function with narrow types as an expression that may stand anywhere, or None."""
        options = [f for f in self.m.typed_functions if (f.result in FLOATS) == (kind == "f")]
        if not options or self.mult > MAX_COST:
            return None
        f = self.rng.choice(options)
        with self.simple():
            arguments = [self.typed_argument(t, f.exact, min(depth - 1, 1), level) for t in f.params]
        text = f"{f.name}({', '.join(arguments)})"
        if kind == "f":
            return Expr(text, f.lo, f.hi, f.frac)
        if f.result == "boolean":
            return Expr(f"int({text})", 0, 1)
        return self.plain_int(Typed(text, f.result, f.lo, f.hi))


class SignatureModule:
    """Signatures of device functions and of the kernel; a part of Module."""

    def decoration(self, result, params, decoy=None):
        """The arguments of ``cuda.jit`` for a device function: a string, types, or a list of strings."""
        text = f"{result}({', '.join(params)})"
        if decoy:
            signatures = [text, decoy]
            self.rng.shuffle(signatures)
            return "[" + ", ".join(f'"{s}"' for s in signatures) + "], device=True"
        if self.chance(0.3):
            for name in (result, *(p.partition("[")[0] for p in params)):
                self.numba_names.add(name)
            return f"{text}, device=True"
        return self.rng.choice([f'"{text}", device=True', f'"{text}", device=True', f'["{text}"], device=True'])

    def narrow(self, kind):
        """A type for a parameter or a result whose values are small."""
        return self.rng.choice(SIGNED if kind == "i" else FLOATS)

    def typed_function(self):
        """A function whose signature says what becomes of its arguments and of its result."""
        body = self.new_body(THREAD)
        weights = [3, 3, 3, 3, 4, 4, 2, 2, 2, 2, 1]
        params = self.rng.choices([*INTS, *FLOATS, "boolean"], weights, k=self.rng.randint(1, 3))
        if not set(params) & set(INTS):
            params[0] = self.rng.choice(INTS)
        for k, dtype in enumerate(params):
            if dtype in FLOATS:
                body.vars.append(self.parameter(f"p{k}", -32, 32, 3, "f"))
                body.typed_atoms.append(Typed(f"int(p{k} * 2)", "int64", -64, 64))
            elif dtype == "boolean":
                body.vars.append(self.parameter(f"p{k}", 0, 1, kind="b"))
            else:
                body.typed_atoms.append(Typed(f"p{k}", dtype, *limits(dtype)))
        body.wn = next(f"p{k}" for k, t in enumerate(params) if t in INTS)
        for k in range(self.rng.randint(0, 2)):
            e = body.typed(2)
            if self.chance(0.3) and any(a.text == body.wn for a in body.typed_atoms):
                name, gone = body.wn, next(a for a in body.typed_atoms if a.text == body.wn)
                body.typed_atoms.remove(gone)
            else:
                name = f"t{k}"
            body.emit(f"{name} = {e.text}")
            body.typed_atoms.append(e._replace(text=name))
        result = self.rng.choices([*INTS, *FLOATS, "boolean"], weights)[0]
        several = self.chance(0.35)
        ends = [self.typed_return(body, result, several) for _ in range(1 + several)]
        if several:
            body.emit(f"if {body.typed_test(1)}:")
            body.emit(f"    return {ends[1].text}")
        body.emit(f"return {ends[0].text}")
        lo, hi = min(e.lo for e in ends), max(e.hi for e in ends)
        if result in INTS:
            low, high = limits(result)
            lo, hi = (lo, hi) if low <= lo and hi <= high else (low, high)
        name = f"ds{len(self.typed_functions)}"
        decoy = None
        if len(params) == 1 and params[0] in INTS and self.chance(0.3):
            decoy = "float64(float64)" if not set("&|^~<>") & set("".join(body.lines)) else None
        self.section(body, name, [f"p{k}" for k in range(len(params))], self.decoration(result, params, decoy))
        self.typed_functions.append(TypedFunction(name, tuple(params), result, lo, hi, 3, bool(decoy)))

    def typed_return(self, body, result, several):
        """The expression of a return, before the cast to `result`; floats are in the range of an integer result."""
        e = body.typed(3)
        if result in FLOATS or self.chance(0.2) and result != "boolean":
            high = 60 if result not in ("int8", "uint8") else 30
            small = body.fit(body.plain_int(e), 0 if result[0] == "u" else -high, high)
            quotient = self.rng.choice([2, 4, 8])
            end = Expr(f"{enclosed(small.text)} / {quotient}", small.lo / quotient, small.hi / quotient, 3)
            if result in INTS:
                return Expr(end.text, -high, high) if result[0] != "u" else Expr(end.text, 0, high)
            return end
        if several:     # returns of several types would be made one, perhaps a float
            e = e.become("int64", f"np.int64({e.text})")
        return Expr(e.text, e.lo, e.hi)

    def kernel_signature(self, params, declared, form):
        """The argument of the kernel's decorator: a string, a tuple of types, types called with types, or a list."""
        types = []
        for name, spec in params:
            dtype = declared.get(name, spec.dtype)
            dtype = {"bool": "boolean", "int": "int64", "float": "float64"}.get(dtype, dtype)
            rank = len(getattr(spec, "shape", ()))
            last = self.rng.choice([":", "::1"])
            types.append(f"{dtype}[{', '.join([':'] * (rank - 1) + [last])}]" if rank else dtype)
        text = ", ".join(types)
        if "float16" in text and form in ("tuple", "call"):     # Numba has no name for it
            form = "string"
        if form in ("tuple", "call"):
            self.numba_names |= {t.partition("[")[0] for t in types}
            if form == "call":
                self.numba_names.add("void")
            return f"void({text})" if form == "call" else f"({text},)"
        signature = f"({text})" if form == "bare" else f"void({text})"
        if form != "list":
            return f'"{signature}"'
        # a second one, that no launch takes: the size is a float in it
        other = ", ".join("float64" if name == "nn" else t for t, (name, _) in zip(types, params))
        return self.rng.choice([f'["{signature}", "void({other})"]', f'["void({other})", "{signature}"]'])


def wide_scalars(rng):
    """Scalars of a launch that do not fit the parameter's type: (declared dtype, dtype given, value, value after)."""
    for _ in range(rng.randint(1, 2)):
        dtype = rng.choice(INTS)
        value = rng.choice([70000, 300, -1, -129, 200, 2**31, 2**32 + 5, -2**40, 12345678901, 255, 2**63 - 1])
        low, high = limits(dtype)
        after = (value - low) % (high - low + 1) + low
        given = rng.choice(["int", "int64", *(["int32"] if -2**31 <= value < 2**31 else [])])
        yield dtype, given, value, after


