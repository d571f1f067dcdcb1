"""One function being written: names, scopes, levels, and the modes of its shared arrays."""

from contextlib import contextmanager

from tests.fuzz.parts import THREAD, WARP, Var


class Writer:
    """The lines of one function, and what is known at the place where the next one goes."""

    def __init__(self, module, level):
        self.m, self.rng, self.level = module, module.rng, level
        self.lines, self.depth, self.indent = [], 0, 1
        self.vars, self.dead, self.names = [], [], 0
        self.inputs, self.outputs, self.shared, self.locals, self.globals = [], [], [], [], []
        self.lazy = 0               # inside `and`, `or` and conditional expressions: no collectives
        self.plain = 0              # no loads of shared arrays, no collectives
        self.break_ok = False       # the innermost loop is one that single threads may leave
        self.mult = 1               # how often this place is executed by one thread, at most
        self.cost = 1               # the largest mult so far, with those of the functions called
        self.exited = None          # None, "warp" (whole warps have returned) or "lane"
        self.returns = None         # in a device function: makes the expression of a return
        self.atoms = []             # (kind, Expr, level): ids and scalar arguments
        self.masks = []             # variables that hold the mask of the warp
        self.is_kernel = False
        self.full = module.threads % 32 == 0
        self.wn = None              # text: lanes in this warp
        self.typed_atoms = []       # names of known integer types
        self.raw = []               # (kind, name): variables whose every bit goes to memory at the end
        self.again = None           # the first line of the outermost loop that whole warps are in
        self.promised = []          # the modes of shared arrays that the suites around this place will restore

    # -- small helpers ------------------------------------------------------------------------------------------------
    def pick(self, *options):
        return self.rng.choice(options)

    def chance(self, p):
        return self.rng.random() < p

    def on(self, name):
        return name not in self.m.without

    def has(self, kind):
        return kind in self.m.kinds

    def emit(self, text):
        self.lines.append("    " * self.indent + text)

    @contextmanager
    def nest(self, level=None, loop=None, mult=1):
        """A nested suite: its own scope, and the shared arrays are back in their modes at its end."""
        saved = self.level, self.break_ok, self.mult, self.again, len(self.vars), list(self.masks)
        modes = {a.name: a.mode for a in self.shared}
        self.level = min(self.level, self.level if level is None else level)
        self.mult *= mult
        self.cost = max(self.cost, self.mult)
        if loop is not None:
            self.break_ok = loop
        self.depth, self.indent = self.depth + 1, self.indent + 1
        start = len(self.lines)
        if mult > 1 and self.level >= WARP and self.again is None:
            self.again = start
        self.promised.append(modes)
        yield
        self.promised.pop()
        self.restore(modes)
        if len(self.lines) == start:
            self.emit("pass")
        self.depth, self.indent = self.depth - 1, self.indent - 1
        self.level, self.break_ok, self.mult, self.again, count, self.masks = saved
        for v in self.vars[count:]:
            if v.reusable:
                self.dead.append(v.name)
        del self.vars[count:]

    def restore(self, modes):
        changed = [a for a in self.shared if a.mode != modes[a.name]]
        if not changed:
            return
        if all({a.mode, modes[a.name]} <= {"W", "V"} for a in changed):
            self.emit("cuda.syncwarp()")
        else:
            self.emit("cuda.syncthreads()")
        for a in changed:
            a.mode = modes[a.name]

    @contextmanager
    def without_collectives(self):
        self.lazy += 1
        yield
        self.lazy -= 1

    @contextmanager
    def simple(self):
        self.plain += 1
        yield
        self.plain -= 1

    def name(self, reuse=True):
        if reuse and self.dead and self.chance(0.35):
            return self.dead.pop(self.rng.randrange(len(self.dead)))
        self.names += 1
        return f"v{self.names}"

    def new(self, kind, lo=0, hi=1, frac=0, level=THREAD, fixed=False, reuse=True):
        """A variable under a name that nobody uses; it is visible after show()."""
        return Var(self.name(reuse), kind, lo, hi, frac, level, fixed, reusable=reuse)

    def show(self, var):
        self.vars.append(var)
        return var

    def retire(self, var):
        self.vars.remove(var)
        self.dead.append(var.name)

    def visible(self, kinds, level=THREAD, writable=False):
        return [v for v in self.vars if v.kind in kinds and v.level >= level and not (writable and v.fixed)]

    def collectives(self, level):
        """May a collective whose result is of `level` stand in the expression being written?"""
        return self.level >= WARP and level <= WARP and not self.lazy and not self.plain

    def mask(self):
        names = ["0xFFFFFFFF", "0xFFFFFFFF", "FULL", "-1"] + self.masks
        return self.rng.choice(names)
