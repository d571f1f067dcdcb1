"""Constants of many origins: members of enums, fields of named tuples, tuples, names in modules of packages."""

from tests.fuzz.parts import BLOCK, Expr

MODULE = """pkg = types.ModuleType("pkg")
pkg.sub = types.ModuleType("pkg.sub")
pkg.sub.deep = types.ModuleType("pkg.sub.deep")"""




class ConstantModule:
    """Constants, as atoms of every function; a part of Module."""

    def constant_section(self):
        """Lines that define the constants; their names are in self.constant_atoms and self.members afterwards."""
        rng, atoms = self.rng, []
        number = lambda: rng.choice([0, 1, 2, 3, 5, 7, 12, 31, -1, -4])
        imports, lines = [], []

        def add(text, value, kind="i"):
            atoms.append((kind, Expr(text, value, value, 2 if kind == "f" else 0), BLOCK))

        if self.has("constants"):
            imports += ["import types", "from enum import Enum, IntEnum", "from typing import NamedTuple"]
            values = {"LOW": number(), "MID": 8, "HIGH": rng.choice([16, 100])}
            lines += ["class Mode(IntEnum):", *(f"    {k} = {v}" for k, v in values.items()), "", ""]
            self.members = [(f"Mode.{k}", v) for k, v in values.items()]
            colour = number()
            lines += ["class Colour(Enum):", f"    RED = {colour}", f"    BLUE = {colour + 1}", "", ""]
            for name, value in self.members:
                add(f"{name}.value", value)
            add("Colour.RED.value", colour)
            a, b, c = number(), rng.choice([0.5, 2.0, -1.25]), number()
            lines += ["class Inner(NamedTuple):", "    depth: int", "    scale: float", "", "",
                      "class Config(NamedTuple):", "    size: int", "    inner: Inner", "", "",
                      f"CONFIG = Config({a}, Inner({c}, {b}))"]
            add("CONFIG.size", a)
            add("CONFIG.inner.depth", c)
            add("CONFIG.inner.scale", b, "f")
            triple = [number() for _ in range(3)]
            lines += [f"TRIPLE = {tuple(triple)}", MODULE]
            for k, value in enumerate(triple):
                add(f"TRIPLE[{k}]", value)
            add("len(TRIPLE)", 3)
            n, deep, real = number(), number(), rng.choice([0.25, 1.5, -0.5])
            dtype = rng.choice(["int32", "int64", "int8"])
            lines += [f"pkg.sub.N, pkg.sub.deep.N, pkg.sub.F = np.{dtype}({n}), {deep}, {real}",
                      "pkg.sub.Mode, pkg.sub.CONFIG, pkg.sub.PAIR = Mode, CONFIG, (4, 2.5)"]
            add("(pkg.sub.N + 0)", n)
            add("pkg.sub.deep.N", deep)
            add("pkg.sub.F", real, "f")
            add("pkg.sub.CONFIG.size", a)
            add("pkg.sub.PAIR[1]", 2.5, "f")
            self.members.append(("pkg.sub.Mode.MID", 8))
        if self.has("class_constants"):
            imports += ["import types", "from dataclasses import dataclass"]
            n, m, k, f = number(), number(), number(), rng.choice([0.5, -2.0])
            lines += ["class Sizes:", f"    N = {n}", "", "    class Inner:", f"        M = {m}", "", "",
                      "@dataclass(frozen=True)", "class Settings:", f"    rows: int = {k}", f"    scale: float = {f}",
                      "", "", "SETTINGS = Settings()",
                      f"SPACE = types.SimpleNamespace(n={n}, inner=types.SimpleNamespace(m={m}))"]
            for text, value in (("Sizes.N", n), ("Sizes.Inner.M", m), ("SETTINGS.rows", k), ("SPACE.n", n),
                                ("SPACE.inner.m", m)):
                add(text, value)
            add("SETTINGS.scale", f, "f")
        self.constant_atoms = rng.sample(atoms, min(len(atoms), 7))
        self.imports |= set(imports)
        if lines:
            self.sections.append("\n".join(lines))


def member_expression(body, level):
    """An integer made of an enum's member, in a place where numba-cuda takes one; None without enums."""
    if not body.m.members:
        return None
    (a, x), (b, y) = body.rng.choice(body.m.members), body.rng.choice(body.m.members)
    e = body.small(body.int_expr(0, level))
    return body.pick(Expr(f"({a} + {e.text})", x + e.lo, x + e.hi), Expr(f"({e.text} - {b})", e.lo - y, e.hi - y),
                     Expr(f"({a} * {b})", x * y, x * y), Expr(f"(-{a})", -x, -x),
                     Expr(f"(({e.text} & 127) ^ Mode.HIGH)", 0, 127), Expr(f"({a} << 2)", x << 2, x << 2),
                     Expr(f"(({a} if {body.bool_expr(0, level)} else {b}) + 0)", min(x, y), max(x, y)))
