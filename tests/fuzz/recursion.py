"""Device functions that call themselves, with a bound that ends.

numba-cuda takes a recursive call only if its arguments have the types of the function's own: every argument is an int64
or a float64, made so by np.int64 and np.float64 where no signature does it.
"""

from tests.fuzz.parts import THREAD, Expr, Function

MAX_DEPTH = 4       # a GPU's stack is small


class Recursion:
    """Calls of recursive functions; a part of Body."""

    def s_recursive_call(self):
        functions = [f for f in self.m.pure_functions if f.name.startswith("dx")]
        if not functions or self.mult > 4:
            return False
        f = self.rng.choice(functions)
        with self.simple():
            text = f"{f.name}({self.arguments(f, 2)})"
        var = self.new(f.kind, f.lo, f.hi, f.frac)
        self.emit(f"{var.name} = {text}" if f.kind == "f" else f"{var.name} = {text} + 0")
        self.show(var)
        return True


class RecursionModule:
    """Recursive device functions; a part of Module."""

    def recursive_function(self):
        body = self.new_body(THREAD)
        name = f"dx{len(self.pure_functions)}"
        kind = self.rng.choice("iif")
        form = self.rng.choice(["line", "line", "tail", "tree", "loop", "choice", "late", "gcd"])
        signed = self.has("signatures") and self.chance(0.5)
        lo, hi, frac = self.interval(kind)
        whole, real = "int64" if kind == "i" else "float64", "np.int64" if kind == "i" else "np.float64"

        def value():
            e = body.int_expr(2) if kind == "i" else body.float_expr(2)
            return (body.fit(e, lo, hi) if kind == "i" else body.fit_float(e)).text

        def fitted(text, span):
            e = Expr(text, -span, span, frac)
            return (body.fit(e, lo, hi) if kind == "i" else body.fit_float(e)).text

        if form == "gcd":
            kind, lo, hi, frac, whole = "i", 0, 63, 0, "int64"
            params, kinds = ["n", "a"], ("D", "D")
            lines = [f"if a {self.rng.choice(['== 0', '< 1'])}:", "    return n", f"return {name}(a, n % a)"]
            for line in lines:
                body.emit(line)
        else:
            params, kinds = ["n", "a"], ("N", "I" if kind == "i" else "F")
            body.vars += [self.parameter("n", 0, MAX_DEPTH), self.parameter("a", lo, hi, frac, kind)]
            self.recursive_lines(body, name, form, kind, f"{real}({value()})", value, fitted)
        types = ["int64", whole]
        if signed:
            kinds = tuple({"N": "n", "D": "d", "I": "i", "F": "f"}[k] for k in kinds)
        self.section(body, name, params, self.decoration(whole, types) if signed else "device=True")
        uniform = "threadIdx" not in "".join(body.lines)
        cost = 2 ** MAX_DEPTH if form in ("tree", "loop") else MAX_DEPTH + 1
        self.pure_functions.append(Function(name, kind, kinds, lo, hi, frac, uniform, cost))

    def recursive_lines(self, body, name, form, kind, base, value, fitted):
        down = self.rng.choice(["n - 1", "n - 1", "n // 2"]) if form != "tree" else "n - 1"
        exact = "np.int64" if kind == "i" else "np.float64"
        with body.simple():
            again = f"{name}({down}, {exact}({value()}))"
            step = value()
        if form == "choice":
            body.emit(f"return {base} if n <= 0 else {fitted(f'({again} + {step})', 256)}")
            return
        if form == "late":
            body.emit(f"if n > {self.rng.choice([0, 1])}:")
            body.emit(f"    step = {step}")
            body.emit(f"    return {fitted(f'({again} - step)', 256)}")
            body.emit(f"return {base}")
            return
        body.emit(f"if n <= {0 if down != 'n // 2' else self.rng.choice([0, 1])}:")
        body.emit(f"    return {base}")
        if form == "line":
            if self.chance(0.4):
                body.emit(f"if {body.compare(0, THREAD)}:")
                body.emit(f"    return {fitted(f'({again} + {step})', 256)}")
            body.emit(f"below = {again}")
            body.emit(f"return {fitted(f'(below - {step})', 256)}")
        elif form == "tail":
            body.emit(f"return {again}")
        elif form == "tree":
            body.emit(f"return {fitted(f'({again} - {name}(n - 2, a))', 256)}")
        else:
            body.emit(f"total = {'0' if kind == 'i' else '0.0'}")
            body.emit("for k in range(2):")
            body.emit(f"    total += {again}")
            body.emit(f"return {fitted('total', 256)}")


def exact_argument(body, kind, depth, level):
    """An argument of a recursive function: N, D, I, F have the exact type that the recursion needs."""
    if kind in "Ff":
        text = body.fit_float(body.float_expr(depth, level)).text
    else:
        bounds = {"n": (0, MAX_DEPTH), "d": (0, 63), "i": (-64, 63)}[kind.lower()]
        text = body.fit(body.int_expr(depth, level), *bounds).text
    return text if kind.islower() else f"np.{'float64' if kind == 'F' else 'int64'}({text})"
