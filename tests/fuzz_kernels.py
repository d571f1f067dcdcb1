"""Random Numba-CUDA kernels for differential testing: ``generate(seed)`` writes one, valid and free of races.

A case is a complete module (device functions and one kernel), a launch geometry and deterministic arguments. Every
kernel can be run by the oracle (tests/oracle.py) and by the backend under test; the arrays must agree exactly, so the
arithmetic is kept exact: integers stay in known intervals, floats are small multiples of 1/8 that float32 holds without
rounding, so that neither FMA contraction nor the order of a sum can matter.

How races are avoided: a shared array is always in one mode, and only a barrier changes it.

    W   every thread reads and writes the elements it owns
    V   the threads of a warp read what the warp owns (entered and left by syncwarp as well)
    R   everybody reads everything
    A   everybody updates it with one atomic operation

Global inputs are only read, global outputs are written by the thread that owns the element, or only by atomics.

How divergence is kept valid: the generator knows at which level the control flow is uniform (BLOCK, WARP or THREAD) and
of which level each value is. Barriers appear at BLOCK level only, shuffles and votes at WARP level or above.

Command line: ``python -m tests.fuzz_kernels --seeds 0:2000 [--backend] [--shrink] [--out DIR] [--size N] [--jobs N]
[--seconds S]``.
Without --backend the cases run on the oracle alone, in checked mode (races, unwritten memory, order of threads).
"""
import random
import re
from contextlib import contextmanager
from typing import NamedTuple

from tests.fuzz_cases import ArraySpec, Case, ScalarSpec, main

THREAD, WARP, BLOCK = 0, 1, 2

BLOCKS = [((1,), 2), ((7,), 3), ((31,), 2), ((32,), 6), ((33,), 5), ((40,), 2), ((64,), 10), ((65,), 2), ((96,), 6),
          ((100,), 2), ((128,), 3), ((5, 3), 2), ((8, 4), 4), ((7, 9), 3), ((33, 2), 2), ((16, 4), 4), ((32, 2), 4),
          ((4, 2, 3), 2), ((4, 4, 4), 3), ((2, 3, 5), 2), ((8, 4, 2), 3)]
GRIDS = [((1,), 3), ((2,), 5), ((3,), 4), ((4,), 2), ((2, 2), 2), ((1, 3), 2), ((2, 1, 2), 1)]
MAX_THREADS = 260           # of the whole launch: the oracle runs some 10^5 operations a second
MAX_COST = 40               # how often one thread may execute the innermost statement, about
MAX_FLOAT_BITS = 22         # float32 holds 24

# How often each kind of statement is chosen. `without` of generate() takes these names and those of EXTRAS.
STATEMENTS = {
    "assign": 9, "reassign": 7, "augment": 5, "tuple": 4, "if": 8, "block_if": 8, "warp_if": 7, "for": 7, "while": 4,
    "accumulate": 5, "barrier": 8, "syncwarp": 4, "vote_barrier": 4, "shared_write": 9, "collective": 8, "match": 2,
    "activemask": 3, "local": 4, "output": 6, "stride_loop": 4, "atomic": 6, "own_atomic": 5, "reuse": 4, "maybe": 4,
    "loop_variable": 2, "early_return": 5, "call_block": 7, "tree_reduce": 3, "scan": 2, "butterfly": 2, "warp_scan": 2,
    "warp_down": 2, "compact": 2, "match_group": 2, "submask": 4, "vote_loop": 4, "double_buffer": 2, "break": 6,
    "continue": 4, "return": 6, "place_loop": 4,
}
EXTRAS = ("dynamic_shared", "dynamic_alias", "float16", "const_array", "device_pure", "device_warp", "device_block",
          "uniform_break", "uniform_load", "shfl_wrap", "device_return_barrier", "negative_index")

# What a set of cases must contain: a regular expression for a line, or a pair (or triple) of them for a line inside a
# suite whose head matches the first (inside ...).
FEATURES = {
    "block 1-D": r"^BLOCK = \(\d+,\)", "block 2-D": r"^BLOCK = \(\d+, \d+\)",
    "block 3-D": r"^BLOCK = \(\d+, \d+, \d+\)",
    "several blocks": r"^GRID = (?!\(1,\))", "ragged warp": r"^# .* ragged",
    "barrier": r"cuda\.syncthreads\(\)", "barrier in for": (r"for ", r"cuda\.syncthreads"),
    "barrier in while": (r"while ", r"cuda\.syncthreads"), "barrier in if": (r"if ", r"cuda\.syncthreads"),
    "barrier in else": (r"else", r"cuda\.syncthreads"),
    "barrier in loop in if": (r"if ", r"for |while ", r"cuda\.syncthreads"),
    "barrier in if in loop": (r"for |while ", r"if ", r"cuda\.syncthreads"),
    "syncthreads_count": r"syncthreads_count", "syncthreads_and": r"syncthreads_and",
    "syncthreads_or": r"syncthreads_or",
    "syncwarp": r"syncwarp\(\)", "syncwarp mask": r"syncwarp\([^)]", "shfl_sync": r"shfl_sync",
    "shfl_up_sync": r"shfl_up_sync", "shfl_down_sync": r"shfl_down_sync", "shfl_xor_sync": r"shfl_xor_sync",
    "all_sync": r"all_sync", "any_sync": r"any_sync", "eq_sync": r"eq_sync", "ballot_sync": r"ballot_sync",
    "match_any_sync": r"match_any_sync", "match_all_sync": r"match_all_sync", "activemask": r"activemask",
    "lanemask_lt": r"lanemask_lt", "collective in for": (r"for ", r"_sync\("),
    "collective in while": (r"while ", r"_sync\("), "collective in if": (r"if ", r"_sync\("),
    "collective in warp branch": (r"if .*(?:warp|// 32)", r"cuda\.\w+_sync\("),
    "collective in while test": r"while .*_(?:sync|or)\(.*:$", "collective in if test": r"if .*_sync\(.*:$",
    "nested collectives": r"_sync\(.*_sync\(", "sub-mask": r"_sync\(0x(?:FFFF|FF|F),",
    "laneid": r"cuda\.laneid", "warpsize": r"cuda\.warpsize", "gridDim": r"cuda\.gridDim",
    "grid(1)": r"cuda\.grid\(1\)", "grid(2)": r"cuda\.grid\(2\)", "gridsize": r"cuda\.gridsize",
    "shared 1-D": r"shared\.array\([1-9N]", "shared 2-D": r"shared\.array\(\(", "dynamic shared": r"shared\.array\(0",
    "two dynamic arrays": r"dz = cuda\.shared\.array\(0", "several shared arrays": r"[ts]1 = cuda\.shared\.array",
    "local array": r"local\.array", "const array": r"const\.array_like", "atomic global": r"atomic\.\w+\(g",
    "atomic shared": r"atomic\.\w+\(h", "atomic old value": r"= cuda\.atomic", "atomic add": r"atomic\.add",
    "atomic max or min": r"atomic\.m(?:ax|in)", "atomic bits": r"atomic\.(?:or_|and_|xor)",
    "atomic exch or cas": r"atomic\.(?:exch|cas)", "atomic tuple index": r"atomic\.\w+\(\w+, \(.*, .*\), ",
    "int32 array": r"int32 array", "int64 array": r"int64 array", "uint32 array": r"uint32 array",
    "float32 array": r"float32 array", "float64 array": r"float64 array", "bool array": r"bool array",
    "float16 array": r"float16 array", "global 2-D": r"o\d\[g(?:id|y), ",
    "device function": r"^@cuda\.jit\(device=True\)",
    "device barrier": (r"def d", r"cuda\.syncthreads"), "device shuffle": (r"def d", r"cuda\.shfl"),
    "device return in branch": (r"def d", r"if ", r"return"), "device calls device": (r"def d", r"d[pwb]\d\("),
    "call in expression": r"[+*] d[pwb]\d\(|d[pwb]\d\(.*\) [+*]", "early return": r"^        return$",
    "break": r"^ +break$", "continue": r"^ +continue$", "while": r"^ +while ", "while True": r"while True:",
    "negative step": r"range\(.*, -\d+\):", "loop over scalar argument": r"range\((?:\w+, )?na\d\)",
    "loop over tuple": r"for \w+ in \(", "divergent loop": r"for \w+ in range\(.*(?:tid|lane|%)",
    "grid stride": r"for \w+ in range\(gid, ", "block stride": r"for \w+ in range\(tid, ", "elif": r"^ +elif",
    "else": r"^ +else:", "conditional expression": r" if .* else ", "nested conditional": r" if .* else .* if .* else ",
    "and": r" and ", "or": r" or ", "not": r"not ", "chained comparison": r"[^<>=]<=? [^<>=]+ <=? ",
    "augmented": r"^ +\w+ [-+*/%&|^]+= ", "augmented element": r"^ +\w+\[.*\] [-+*/%&|^]+= ",
    "tuple assignment": r"^ +\w+, \w+ = ", "swap": r"^ +(\w+), (\w+) = \2, \1$", "floor division": r"//",
    "negative index": r"- \d+\]|\[-", "shape": r"\.shape\[", "popc": r"popc", "clz": r"clz", "ffs": r"ffs",
    "brev": r"brev", "selp": r"selp", "fma": r"cuda\.fma", "math": r"math\.", "min or max": r"\b(?:min|max)\(",
    "np.float32": r"np\.float32\(", "int()": r"\bint\(", "int wraparound": r"6364136223846793005|2654435761",
    "name reused": r"reused", "maybe assigned": r"only if assigned", "loop variable after loop": r"left by the loop",
    "place in loops in branch": (r"if ", r"for \w+ in range\(\d+\):$", r"= .* % \d+\) \+ "),
    "keeps old value": r"keeps its value", "scalar float": r"fa\d", "scalar bool": r"ba\d",
}


def features_of(source):
    """The names in FEATURES that occur in a case's source."""
    lines = [(len(text) - len(text.lstrip()), text) for text in source.splitlines() if text.strip()]

    def inside(patterns, start, stop):
        for k in range(start, stop):
            if re.search(patterns[0], lines[k][1]):
                if len(patterns) == 1:
                    return True
                end = k + 1
                while end < len(lines) and lines[end][0] > lines[k][0]:
                    end += 1
                if inside(patterns[1:], k + 1, end):
                    return True
        return False

    return {name for name, p in FEATURES.items() if inside((p,) if isinstance(p, str) else p, 0, len(lines))}


class Expr(NamedTuple):
    """Source text with the interval of its value; a float is a multiple of 2**-frac."""

    text: str
    lo: float
    hi: float
    frac: int = 0

    @property
    def size(self):
        return max(abs(self.lo), abs(self.hi))


class Var:
    """A local variable: kind i (int64), f (float64), s (float32) or b (bool), with its fixed interval and level."""

    def __init__(self, name, kind, lo=0, hi=1, frac=0, level=THREAD, fixed=False, reusable=True):
        self.name, self.kind, self.lo, self.hi, self.frac = name, kind, lo, hi, frac
        self.level, self.fixed, self.reusable = level, fixed, reusable

    @property
    def expr(self):
        return Expr(self.name, self.lo, self.hi, self.frac)


class Array:
    """An array with the interval of its elements. `own` holds index texts of elements that this thread owns."""

    def __init__(self, name, kind, dtype, shape, lo, hi, frac=0, own=(), mode="R", op=None, warp_tile=False,
                 offset=None):
        self.name, self.kind, self.dtype, self.shape = name, kind, dtype, shape
        self.lo, self.hi, self.frac, self.own, self.mode, self.op = lo, hi, frac, own, mode, op
        self.warp_tile = warp_tile      # element k belongs to thread k: mode V is possible
        self.offset = offset            # of a dynamic array: its elements are a part of the launch's shared bytes


class Function(NamedTuple):
    name: str
    kind: str           # of the result
    params: tuple       # of kinds, i and f
    lo: float
    hi: float
    frac: int
    uniform: bool = False   # equal arguments give equal results (it does not look at threadIdx)
    cost: int = 1           # how often its innermost statement runs


def enclosed(text):
    """`text` in parentheses, unless it is a name, a number or in parentheses already."""
    if text.replace(".", "").isalnum():
        return text
    depth = 0
    for k, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and k < len(text) - 1:
            return f"({text})"
    return text


class Body:
    """Writes the statements of one function."""

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

    # -- small helpers ------------------------------------------------------------------------------------------------
    def pick(self, *options):
        return self.rng.choice(options)

    def chance(self, p):
        return self.rng.random() < p

    def on(self, name):
        return name not in self.m.without

    def emit(self, text):
        self.lines.append("    " * self.indent + text)

    @contextmanager
    def nest(self, level=None, loop=None, mult=1):
        """A nested suite: its own scope, and the shared arrays are back in their modes at its end."""
        saved = self.level, self.break_ok, self.mult, len(self.vars), list(self.masks)
        modes = {a.name: a.mode for a in self.shared}
        self.level = min(self.level, self.level if level is None else level)
        self.mult *= mult
        self.cost = max(self.cost, self.mult)
        if loop is not None:
            self.break_ok = loop
        self.depth, self.indent = self.depth + 1, self.indent + 1
        start = len(self.lines)
        yield
        self.restore(modes)
        if len(self.lines) == start:
            self.emit("pass")
        self.depth, self.indent = self.depth - 1, self.indent - 1
        self.level, self.break_ok, self.mult, count, self.masks = saved
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
                texts.append(kind)
        return ", ".join(texts)

    def call(self, kind, depth, level):
        options = [f for f in self.m.pure_functions if f.kind == kind and (f.uniform or level == THREAD)
                   and f.cost * self.mult <= MAX_COST]
        if not options:
            return None
        f = self.rng.choice(options)
        self.cost = max(self.cost, self.mult * f.cost)
        return Expr(f"{f.name}({self.arguments(f, depth, level)})", f.lo, f.hi, f.frac)

    def call_warp(self, kind, depth):
        options = [f for f in self.m.warp_functions if f.kind == kind and f.cost * self.mult <= MAX_COST]
        if not options:
            return None
        f = self.rng.choice(options)
        return Expr(f"{f.name}({self.arguments(f, depth)}, {self.wn})", f.lo, f.hi, f.frac)

    # -- statements ---------------------------------------------------------------------------------------------------
    def statements(self, count):
        for _ in range(count):
            self.statement()

    def statement(self):
        names, weights = zip(*[(n, w) for n, w in STATEMENTS.items() if n not in self.m.without])
        for _ in range(20):
            if getattr(self, f"s_{self.rng.choices(names, weights)[0]}")():
                return

    def suite(self):
        if self.level == BLOCK and self.is_kernel and self.chance(0.25):
            self.s_barrier()
        self.statements(self.rng.randint(1, 2 if self.depth < 3 else 1))

    def random_var(self, kind=None, level=None):
        """A new variable and an expression that fits it."""
        kind = kind or self.rng.choices("ifsb", [6, 4, 2, 2])[0]
        if level is None:
            level = self.rng.choices([THREAD, WARP, BLOCK], [7, 1, 1])[0]
        level = min(level, self.level if self.level > THREAD else THREAD)
        if kind == "i":
            lo, hi = self.pick((0, 15), (0, 255), (0, 1023), (-512, 511))
            return self.new("i", lo, hi, level=level), self.fit(self.int_expr(2, level), lo, hi).text
        if kind == "b":
            return self.new("b", level=level), self.bool_expr(1, level)
        e = self.fit_float(self.float_expr(2, level)).text
        if kind == "s":
            e = f"np.float32({e})"
        return self.new(kind, -32, 32, 3, level), e

    def value_for(self, var):
        if var.kind == "i":
            return self.fit(self.int_expr(2, var.level), var.lo, var.hi).text
        if var.kind == "b":
            return self.bool_expr(1, var.level)
        e = self.fit_float(self.float_expr(2, var.level), int(var.hi), var.frac).text
        return f"np.float32({e})" if var.kind == "s" else e

    def s_assign(self):
        var, text = self.random_var()
        self.emit(f"{var.name} = {text}")
        self.show(var)
        return True

    def target(self):
        """A variable that may be assigned here."""
        options = [v for v in self.visible("ifsb", writable=True) if v.level <= self.level]
        return self.rng.choice(options) if options else None

    def s_reassign(self):
        var = self.target()
        if var is None:
            return False
        if self.chance(0.4):        # keeps its old value where the condition is false
            self.emit(f"if {self.bool_expr(1, var.level)}:  # else {var.name} keeps its value")
            with self.nest(var.level):
                self.emit(f"{var.name} = {self.value_for(var)}")
        else:
            self.emit(f"{var.name} = {self.value_for(var)}")
        return True

    def s_augment(self):
        var = self.target()
        if var is None or var.kind == "b":
            return False
        if var.kind == "i":
            e = self.small(self.int_expr(1, var.level), 1024)
            op = self.pick("+=", "-=", "*=", "//=", "^=")
            if op == "//=":
                self.emit(f"{var.name} //= {self.pick(2, 3, 5)}")
                if var.lo < 0 or self.chance(0.2):
                    self.emit(f"{var.name} = {self.fit(Expr(var.name, var.lo - 1, var.hi), var.lo, var.hi).text}")
                return True
            self.emit(f"{var.name} {op} {e.text}")
            wide = Expr(var.name, -(1 << 40), 1 << 40)
            self.emit(f"{var.name} = {self.fit(wide, var.lo, var.hi).text}")
            return True
        e = self.fit_float(self.float_expr(1, var.level), 16)
        self.emit(f"{var.name} {self.pick('+=', '-=')} {e.text}")
        after = self.fit_float(Expr(var.name, -var.hi - 16, var.hi + 16, 3), int(var.hi)).text
        self.emit(f"{var.name} = {f'np.float32({after})' if var.kind == 's' else after}")
        return True

    def s_tuple(self):
        same = [(a, b) for a in self.visible("i", writable=True) for b in self.visible("i", writable=True)
                if a is not b and a.level == b.level <= self.level and (a.lo, a.hi) == (b.lo, b.hi)]
        if same and self.chance(0.6) or self.chance(0.2):
            if not same:
                pair = [self.new("i", 0, 63), self.new("i", 0, 63)]
                for v in pair:
                    self.emit(f"{v.name} = {self.value_for(v)}")
                    self.show(v)
                same = [pair]
            a, b = self.rng.choice(same)
            self.emit(f"{a.name}, {b.name} = {b.name}, {a.name}")
            return True
        (a, x), (b, y) = self.random_var("i"), self.random_var("f")
        self.emit(f"{a.name}, {b.name} = {x}, {y}")
        self.show(a)
        self.show(b)
        return True

    def branch(self, level):
        self.emit(f"if {self.bool_expr(1, level)}:")
        with self.nest(level):
            self.suite()
        while self.chance(0.25):
            with self.without_collectives():
                c = self.bool_expr(1, level)
            self.emit(f"elif {c}:")
            with self.nest(level):
                self.suite()
        if self.chance(0.5):
            self.emit("else:")
            with self.nest(level):
                self.suite()
        return True

    def s_if(self):
        return self.depth < 3 and self.branch(THREAD)

    def s_block_if(self):
        return self.depth < 3 and self.level == BLOCK and self.branch(BLOCK)

    def s_warp_if(self):
        if self.depth >= 3 or self.level < WARP or self.m.threads <= 32 and self.chance(0.7):
            return False
        if self.is_kernel and self.chance(0.7):
            k = self.rng.randrange(max(1, (self.m.threads + 31) // 32))
            warp = self.pick("warp", "tid // 32", f"tid // {self.pick('32', 'cuda.warpsize')}")
            self.emit(f"if {warp} {self.pick('==', '==', '<=', '!=')} {k}:")
            with self.nest(WARP):
                self.warp_suite()
            if self.chance(0.3):
                self.emit("else:")
                with self.nest(WARP):
                    self.suite()
            return True
        return self.branch(WARP)

    def warp_suite(self):
        if self.chance(0.5):
            self.s_collective()
        self.suite()

    # -- loops
    def trip(self):
        return self.rng.randint(1, 4 if self.mult < 5 else 2)

    def loop_body(self, level, uniform_exit):
        """The suite of a loop; at WARP level and above only uniform conditions may leave it, at its start."""
        if uniform_exit and self.level >= WARP and self.on("uniform_break") and self.chance(0.25):
            with self.simple():
                c = self.bool_expr(0, level)
            self.emit(f"if {c}:")
            self.indent += 1
            self.emit(self.pick("break", "continue"))
            self.indent -= 1
        if self.level == BLOCK and self.chance(0.45) and self.shared:
            self.s_shared_write()
            self.s_barrier()
            if self.chance(0.3):
                self.s_block_if()
        self.suite()

    def s_for(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        counts = [e for k, e, _ in self.atoms if k == "i" and e.text.startswith("na")]
        trip = self.trip()
        divergent = self.level == THREAD or self.chance(0.3)
        level = THREAD if divergent else self.level
        var = self.new("i", 0, 0, level=level, fixed=True)
        if divergent and self.chance(0.6):
            e = self.fit(self.int_expr(1), 0, trip)
            head, var.hi = self.pick((f"range({e.text})", trip), (f"range({e.text}, {trip + 3}, 2)", trip + 2))
        else:
            forms = [(f"range({trip})", 0, trip - 1), (f"range(2, {trip + 2})", 2, trip + 1),
                     (f"range({2 * trip}, 0, -2)", 2, 2 * trip), (f"range({trip - 1}, -1, -1)", 0, trip - 1),
                     ("(4, 2, 1)", 1, 4), ("(1, 5, 3)", 1, 5)]
            forms += [(f"range({e.text})", 0, e.hi - 1) for e in counts] * 2
            forms += [(f"range(1, {e.text})", 1, max(1, e.hi - 1)) for e in counts]
            head, var.lo, var.hi = self.rng.choice(forms)
        self.emit(f"for {var.name} in {head}:")
        with self.nest(level, loop=level == THREAD, mult=5):
            self.show(var)
            self.loop_body(level, True)
        return True

    def s_while(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        divergent = self.level == THREAD or self.chance(0.35)
        level = THREAD if divergent else self.level
        var = self.new("i", -3, 9, level=level, fixed=True)
        start = self.fit(self.int_expr(1, level), 0, 6) if divergent else Expr(str(self.rng.randint(2, 5)), 0, 5)
        self.emit(f"{var.name} = {start.text}")
        self.show(var)
        step = self.pick(f"{var.name} -= {self.pick(1, 1, 2)}", f"{var.name} //= 2", f"{var.name} >>= 1")
        if self.chance(0.3):
            self.emit("while True:")
            with self.nest(level, loop=level == THREAD, mult=6):
                self.emit(step)
                with self.simple():
                    c = self.bool_expr(1, level) if self.chance(0.4) else None
                self.emit(f"if {var.name} <= 0{f' or {c}' if c else ''}:")
                self.indent += 1
                self.emit("break")
                self.indent -= 1
                self.loop_body(level, True)
            return True
        with self.without_collectives():
            extra = f" and {self.bool_expr(1, level)}" if self.chance(0.35) else ""
        self.emit(f"while {var.name} > 0{extra}:")
        with self.nest(level, loop=level == THREAD, mult=6):
            self.emit(step)     # first, so that `continue` cannot loop for ever
            self.loop_body(level, True)
        return True

    def s_accumulate(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        trip, kind = self.rng.randint(2, 8 if self.depth == 0 else 4), self.pick("i", "f", "s")
        level = self.level if self.chance(0.6) else THREAD
        if kind == "i":
            acc = self.new("i", -64 * trip, 64 * trip, fixed=True)
            start = "0"
        else:
            acc = self.new(kind, -16 * trip, 16 * trip, 3, fixed=True)
            start = {"f": self.pick("0.0", "0", "0.0"), "s": "np.float32(0)"}[kind]
        self.emit(f"{acc.name} = {start}")
        counter = self.new("i", 0, trip - 1, level=level, fixed=True)
        head = f"range({trip})" if level or self.chance(0.5) else f"range({self.fit(self.int_expr(1), 0, trip).text})"
        self.emit(f"for {counter.name} in {head}:")
        with self.nest(level, loop=level == THREAD, mult=trip):
            self.show(counter)
            if kind != "s":
                self.show(acc)
            if self.chance(0.5):
                self.loop_body(level, False)
            if self.chance(0.2):
                with self.without_collectives():
                    self.emit(f"if {self.bool_expr(1)}:")
                self.level, inner = THREAD, self.level
                self.indent += 1
                self.add_to(acc, kind)
                self.indent -= 1
                self.level = inner
            else:
                self.add_to(acc, kind)
            if acc in self.vars:
                self.vars.remove(acc)
        self.show(acc)
        return True

    def add_to(self, acc, kind):
        if kind == "i":
            self.emit(f"{acc.name} += {self.fit(self.int_expr(2), -64, 63).text}")
        else:
            e = self.fit_float(self.float_expr(2), 16).text
            self.emit(f"{acc.name} += {f'np.float32({e})' if kind == 's' else e}")

    def s_stride_loop(self):
        """A grid-stride loop over an output, or a block-stride loop over a shared array."""
        if not self.is_kernel or self.depth >= 3 or self.mult > 4:
            return False
        shared = [a for a in self.shared if a.mode == "W" and len(a.shape) == 1 and a.warp_tile]
        outs = [a for a in self.globals if a.mode == "stride"]
        if shared and self.chance(0.5):
            a = self.rng.choice(shared)
            size = str(a.shape[0]) if a.offset is not None else self.pick(str(a.shape[0]), f"{a.name}.shape[0]")
            head = f"range(tid, {size}, nt)"
        elif outs:
            a = self.rng.choice(outs)
            head = f"range(gid, {self.pick(f'{a.name}.shape[0]', f'{a.name}.size')}, gstride)"
        else:
            return False
        var = self.new("i", 0, a.shape[0] - 1, fixed=True)
        self.emit(f"for {var.name} in {head}:")
        with self.nest(THREAD, loop=True, mult=3):
            self.show(var)
            if self.chance(0.4):
                self.suite()
            self.write(a, var.name)
        return True

    def s_place_loop(self):
        """Uniform loops in a branch that some threads take; in them a place made of their variables and the thread."""
        if not self.is_kernel or self.depth >= 3 or self.mult > 4:
            return False
        thread = self.pick(*(e.text for k, e, _ in self.atoms if k == "i" and e.text in ("tid", "lane", "gid")), "tid")
        modulus, scale = self.pick(8, 16), self.pick(1, 2, 4)
        rows, cols = self.rng.randint(2, 3), self.rng.randint(1, 4)
        acc, counters = self.new("i", 0, 0, fixed=True), []
        self.emit(f"{acc.name} = 0")
        with self.without_collectives():
            self.emit(f"if {self.bool_expr(1)}:")
        with self.nest(THREAD):
            for trip in (rows, cols) if self.chance(0.7) else (rows,):
                counters.append((self.new("i", 0, trip - 1, fixed=True), trip))
                self.emit(f"for {counters[-1][0].name} in range({trip}):")
                self.indent += 1
            (outer, trip), inner = counters[0], f" + {counters[1][0].name}" if len(counters) == 2 else ""
            place = self.new("i", 0, 64 * trip + scale * modulus + cols, fixed=True)
            self.emit(f"{place.name} = {outer.name} * 64 + {scale} * ({thread} % {modulus}) + {self.pick(0, 3)}{inner}")
            self.emit(f"if {place.name} < {self.rng.randint(1, 64 * trip)}:")
            self.emit(f"    {acc.name} += {place.name}")
            self.indent -= len(counters)
        acc.hi = rows * cols * (place.hi + 3)
        self.show(acc)
        return True

    def s_loop_variable(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        trip = self.rng.randint(2, 4)
        level = self.pick(THREAD, self.level)  # where all threads go round it together, its body may hold collectives
        # a name of its own: for Numba the loop might not run at all and leave what the name held before
        var = self.new("i", 1, trip, fixed=True, reuse=False)
        self.emit(f"for {var.name} in range(1, {trip + 1}):  # {var.name} is left by the loop")
        with self.nest(level, loop=level == THREAD, mult=trip):
            self.show(var)
            self.loop_body(level, False)
            self.vars.remove(var)
            if level == THREAD and self.chance(0.6):
                self.emit(f"if {self.bool_expr(0)}:")
                self.indent += 1
                self.emit("break")
                self.indent -= 1
        if self.chance(0.4):
            var.lo, var.hi, var.fixed = -8, 31, False
            with self.without_collectives():
                self.emit(f"if {self.bool_expr(1)}:  # else {var.name} keeps its value")
            with self.nest(THREAD):
                self.emit(f"{var.name} = {self.value_for(var)}")
        self.show(var)
        return True

    def s_break(self):
        return self.leave("break")

    def s_continue(self):
        return self.leave("continue")

    def leave(self, word):
        if not self.break_ok or self.level != THREAD:
            return False
        self.emit(f"if {self.bool_expr(1)}:")
        self.indent += 1
        self.emit(word)
        self.indent -= 1
        return True

    def s_return(self):
        if self.returns is None or self.level != THREAD or self.depth == 0 and self.chance(0.5):
            return False
        self.emit(f"if {self.bool_expr(1)}:")
        self.indent += 1
        self.emit(f"return {self.returns(THREAD)}")
        self.indent -= 1
        return True

    def s_early_return(self):
        if not self.is_kernel or self.depth or self.exited == "lane" or self.chance(0.5):
            return False
        level = self.rng.choices([THREAD, WARP, BLOCK], [5, 3, 1])[0]
        if level == THREAD and any(a.mode == "V" for a in self.shared):
            self.barrier()
            for a in self.shared:
                a.mode = "R" if a.mode == "V" else a.mode
        with self.without_collectives(), self.simple():
            c = self.bool_expr(1, level)
        if level == THREAD:
            c = self.pick(c, f"gid >= {self.m.total - self.rng.randint(1, max(1, self.m.total // 2))}", "gid >= nn")
        elif level == WARP:
            c = f"warp {self.pick('==', '>=')} {self.rng.randint(0, max(0, self.m.threads // 32 - 1))}"
        self.emit(f"if {c}:")
        self.indent += 1
        self.emit("return")
        self.indent -= 1
        if level == THREAD:
            self.exited = "lane"
        elif level == WARP:
            self.exited = "warp"
        return True

    # -- synchronisation
    def barrier(self, text="cuda.syncthreads()"):
        self.emit(text)
        for a in self.shared:
            if a.op:
                a.mode = self.pick("A", "R")
            else:
                a.mode = self.rng.choices("WRV", [4, 5, 1 if a.warp_tile and self.exited != "lane" else 0])[0]

    def force(self, array, mode):
        """A barrier after which `array` is in `mode`."""
        self.barrier()
        array.mode = mode

    def s_barrier(self):
        if self.level < BLOCK:
            return False
        self.barrier()
        return True

    def s_vote_barrier(self):
        if self.level < BLOCK:
            return False
        with self.simple():
            c = self.bool_expr(1)
        which = self.pick("count", "and", "or")
        predicate = self.pick(f"int({c})", f"1 if {c} else 0", f"({c}) * 1")
        name = self.new("i", 0, self.m.threads if which == "count" else 1, level=BLOCK)
        self.barrier(f"{name.name} = cuda.syncthreads_{which}({predicate})")
        name.fixed = True
        self.show(name)
        return True

    def s_syncwarp(self):
        if self.level < WARP:
            return False
        self.emit(f"cuda.syncwarp({self.pick('', '', '', self.mask())})")
        if self.exited != "lane":
            for a in self.shared:
                if a.warp_tile and a.mode in ("W", "V"):
                    a.mode = self.pick("W", "V")
        return True

    def s_activemask(self):
        if self.level < BLOCK or self.depth:
            return False
        var = self.new("i", 0, 1, level=WARP, fixed=True, reuse=False)
        self.emit("cuda.syncwarp()")
        self.emit(f"{var.name} = cuda.activemask()")
        self.masks.append(var.name)
        count, text = self.new("i", 0, 32), f"cuda.popc({var.name})"
        self.emit(f"{count.name} = {text} + 0")
        self.show(count)
        return True

    def s_collective(self):
        """Variables made by shuffles and votes, alone and inside expressions."""
        if self.level < WARP:
            return False
        if self.exited == "lane" or self.chance(0.35):
            vote = f"cuda.{self.pick('all', 'any', 'eq')}_sync({self.mask()}, {self.bool_expr(0)})"
            if self.chance(0.3) and self.depth < 3:
                self.emit(f"if {self.pick('', 'not ')}{vote}:")
                with self.nest(WARP):
                    self.warp_suite()
                return True
            if self.chance(0.4):
                var = self.new("b", level=WARP)
                self.emit(f"{var.name} = {vote}")
            else:
                e = self.int_collective(2, WARP)
                if e is None:
                    return False
                hi = max(e.hi, 1)
                var = self.new("i", 0, hi, level=WARP)
                self.emit(f"{var.name} = {e.text}")
            self.show(var)
            return True
        if self.chance(0.5):
            e = self.fit_float(self.shuffle(self.fit_float(self.float_expr(1)), THREAD))
            extra = self.fit_float(self.float_expr(1), 16)
            var = self.new("f", -64, 64, 3)
            self.emit(f"{var.name} = {e.text} {self.pick('+', '-')} {extra.text}")
        else:
            e = self.shuffle(self.fit(self.int_expr(1), 0, 255), THREAD)
            extra = self.fit(self.int_expr(1), 0, 63)
            var = self.new("i", -63, 318)
            self.emit(f"{var.name} = {e.text} {self.pick('+', '-')} {extra.text}")
        self.show(var)
        return True

    def s_match(self):
        if self.level < WARP:
            return False
        mask, same = self.new("i", 0, 1), self.new("b", level=WARP)
        e = self.fit(self.int_expr(1), 0, self.pick(1, 7))
        self.emit(f"{mask.name}, {same.name} = cuda.match_all_sync({self.mask()}, {e.text})")
        self.emit(f"{mask.name} = {mask.name} & 1")
        self.show(mask)
        self.show(same)
        return True

    # -- memory
    def write(self, a, index):
        """One store (or augmented store) to an element that this thread owns."""
        ref = f"{a.name}[{index}]"
        if a.kind == "b":
            self.emit(f"{ref} = {self.bool_expr(1)}")
        elif a.kind == "i":
            if self.chance(0.15):
                self.emit(f"{ref} = {self.fit_float(self.float_expr(1), 32).text if a.dtype != 'uint32' else 7}")
            elif a not in self.shared and self.chance(0.3) and a.dtype != "uint32":
                self.emit(f"{ref} {self.pick('+=', '-=', '^=')} {self.fit(self.int_expr(2), -512, 511).text}")
            else:
                lo, hi = self.pick((0, 1023), (0, 255), (0, 63)) if a.dtype == "uint32" else (-512, 511)
                self.emit(f"{ref} = {self.fit(self.int_expr(2), max(lo, a.lo), min(hi, a.hi)).text}")
        else:
            e = self.fit_float(self.float_expr(2), 32).text
            if self.chance(0.15) and a.dtype != "float16":
                self.emit(f"{ref} = {self.fit(self.int_expr(1), -32, 31).text}")
            else:
                self.emit(f"{ref} = {e}")

    def s_shared_write(self):
        writable = [a for a in self.shared if a.mode == "W"]
        if not writable:
            return False
        a = self.rng.choice(writable)
        if self.chance(0.2) and a.kind == "i":
            own = self.rng.choice(a.own)
            e = Expr(f"({a.name}[{own}] + {self.fit(self.int_expr(1), 0, 63).text})", -1 << 30, 1 << 30)
            self.emit(f"{a.name}[{own}] = {self.fit(e, max(a.lo, -512), 511).text}")
        else:
            self.write(a, self.rng.choice(a.own))
        return True

    def s_output(self):
        plain = [a for a in self.globals if a.mode == "own"]
        if not plain:
            return False
        a = self.rng.choice(plain)
        if a.op:                    # smaller than the grid: guarded
            self.emit(f"if {a.op}:")
            self.indent += 1
            level, self.level = self.level, THREAD
            self.write(a, self.rng.choice(a.own))
            self.level = level
            self.indent -= 1
        else:
            self.write(a, self.rng.choice(a.own))
        return True

    def s_local(self):
        if len(self.locals) > 3 or self.depth > 2 or self.mult > 8:
            return False
        n, kind = self.pick(2, 3, 4, 8), self.pick("i", "f")
        name = self.name(reuse=False).replace("v", "l")
        dtype = self.pick("int32", "int64") if kind == "i" else self.pick("float32", "float64")
        lo, hi, frac = (-512, 511, 0) if kind == "i" else (-32, 32, 3)
        a = Array(name, kind, dtype, (n,), lo, hi, frac, mode="live")
        self.emit(f"{name} = cuda.local.array({n}, {self.m.dtype(dtype)})")
        counter = self.new("i", 0, n - 1, level=self.level, fixed=True)
        self.emit(f"for {counter.name} in range({n}):")
        with self.nest(THREAD, loop=False, mult=n):
            self.show(counter)
            with self.simple():
                self.emit(f"{name}[{counter.name}] = " + (
                    self.fit(self.int_expr(1), lo, hi) if kind == "i" else self.fit_float(self.float_expr(1))).text)
        self.locals.append(a)
        self.statements(1)
        e = self.fit(self.int_expr(1), lo, hi) if kind == "i" else self.fit_float(self.float_expr(1))
        self.emit(f"{name}[{self.index(n, THREAD)}] = {e.text}")
        self.statements(1)
        var = self.new(kind, lo, hi, frac)
        self.emit(f"{var.name} = {name}[{self.index(n, THREAD)}]")
        self.show(var)
        self.locals.remove(a)
        return True

    def s_atomic(self):
        options = [a for a in self.globals if a.mode == "A"] + [a for a in self.shared if a.mode == "A"] * 3
        if not options or self.mult > 40:
            return False
        a = self.rng.choice(options)
        with self.simple():
            index = ", ".join(self.index(n, THREAD) for n in a.shape)
            if len(a.shape) > 1:
                index = f"({index})"
            if a.kind == "i":
                value = self.fit(self.int_expr(1), 0, 15).text
            else:
                value = self.fit_float(self.float_expr(1), 4, 2).text
        self.emit(f"cuda.atomic.{a.op}({a.name}, {index}, {value})")
        return True

    def s_own_atomic(self):
        """An atomic on an element that only this thread touches: its old value is known."""
        options = [a for a in self.globals if a.mode == "own" and not a.op and a.dtype in ("int32", "int64")
                   and len(a.shape) == 1]
        if not options:
            return False
        a, var = self.rng.choice(options), self.new("i", 0, 255)
        value = self.fit(self.int_expr(1), 0, 255).text
        call = self.pick(f"exch({a.name}, gid, {value})", f"add({a.name}, gid, {value})",
                         f"max({a.name}, gid, {value})", f"cas({a.name}, gid, {self.pick(0, 1, 2)}, {value})")
        self.emit(f"{var.name} = cuda.atomic.{call} & 255")
        self.show(var)
        return True

    # -- names
    def s_reuse(self):
        """One name: an int used as an index, then a float (or the other way round)."""
        if not self.inputs:
            return False
        first, second = self.pick("if", "fi")
        (a, x) = self.random_var(first)
        self.emit(f"{a.name} = {x}  # reused below as {'a float' if second == 'f' else 'an int'}")
        self.show(a)
        self.use(a)
        self.retire(a)
        self.dead.remove(a.name)
        b, y = self.random_var(second)
        if b.name not in self.dead and b.reusable:
            self.dead.append(b.name)
        b.name = a.name
        if self.chance(0.25) and second == "i" and self.depth < 3 and self.mult < 8:
            b.lo, b.hi, b.fixed, b.level = 0, 2, True, THREAD
            self.emit(f"for {b.name} in range(3):")
            with self.nest(THREAD, loop=True, mult=3):
                self.show(b)
                self.suite()
            return True
        self.emit(f"{b.name} = {y}")
        self.show(b)
        self.use(b)
        return True

    def use(self, var):
        """A statement in which the value matters."""
        target, arrays = self.new(self.pick("i", "f"), -2048, 2048, 3), [a for a in self.inputs if len(a.shape) == 1]
        arrays = [a for a in arrays if a.kind == target.kind and a.dtype not in ("uint32", "float16")]
        if var.kind == "i" and arrays:
            a = self.rng.choice(arrays)
            text = f"{a.name}[{var.name} % {a.shape[0]}]"
        elif target.kind == "i":
            text = f"{var.name} * 3 + 1" if var.kind == "i" else f"int({var.name} * 4.0)"
        else:
            text = f"{var.name} * 0.5" if var.kind in "fs" else f"{var.name} * 0.125"
        if target.kind == "i":
            target.frac = 0
        self.emit(f"{target.name} = {text}")
        self.show(target)

    def s_maybe(self):
        """A variable that is assigned on one path only, and read on that path only."""
        if self.depth >= 3:
            return False
        level = self.level if self.chance(0.3) else THREAD
        flag = self.new("b", level=level, fixed=True, reuse=False)
        self.emit(f"{flag.name} = {self.bool_expr(1, level)}")
        self.show(flag)
        value = self.new("i", -64, 63, fixed=True, reuse=False)
        self.emit(f"if {flag.name}:")
        with self.nest(level):
            self.emit(f"{value.name} = {self.fit(self.int_expr(2), -64, 63).text}  # read only if assigned")
            if self.chance(0.3):
                self.suite()
        self.statements(self.rng.randint(0, 2))
        if self.chance(0.5):
            result = self.new("i", -64, 63)
            self.emit(f"{result.name} = {value.name} if {flag.name} else {self.rng.randint(-9, 9)}")
            self.show(result)
            return True
        self.emit(f"if {flag.name}:")
        with self.nest(level):
            self.show(value)
            self.suite()
            target = [v for v in self.visible("i", writable=True) if v.level == THREAD]
            if target:
                v = self.rng.choice(target)
                self.emit(f"{v.name} = {self.fit(Expr(f'({v.name} + {value.name})', -4096, 4096), v.lo, v.hi).text}")
            self.vars.remove(value)
        return True

    # -- idioms -------------------------------------------------------------------------------------------------------
    def scratch(self, kinds="if"):
        """A one-dimensional shared array with one element a thread, for an idiom at BLOCK level."""
        if self.level < BLOCK or self.mult > 4 or self.depth >= 3:
            return None
        options = [a for a in self.shared if a.warp_tile and a.kind in kinds and a.dtype != "uint32" and not a.op]
        return self.rng.choice(options) if options else None

    def own_value(self, a, limit):
        if a.kind == "i":
            return self.fit(self.int_expr(1), 0, limit).text
        return self.fit_float(self.float_expr(1), limit, 2).text

    def s_tree_reduce(self):
        a = self.scratch()
        if a is None or self.exited == "lane":
            return False
        if a.mode != "W":
            self.force(a, "W")
        self.emit(f"{a.name}[tid] = {self.own_value(a, 8)}")
        self.emit("cuda.syncthreads()")
        half = 1
        while half < self.m.threads:
            half *= 2
        step, n = self.new("i", 0, 128, level=BLOCK, fixed=True), self.m.threads
        how = self.pick("+", "+", "max", "min")
        old, other = f"{a.name}[tid]", f"{a.name}[tid + {step.name}]"
        update = f"{old} += {other}" if how == "+" else f"{old} = {how}({old}, {other})"
        self.emit(f"{step.name} = {max(half // 2, 1)}")
        self.emit(f"while {step.name} > 0:")
        self.indent += 1
        self.emit(f"if tid < {step.name} and tid + {step.name} < {self.pick(str(n), 'nt')}:")
        self.emit(f"    {update}")
        self.emit("cuda.syncthreads()")
        self.emit(self.pick(f"{step.name} //= 2", f"{step.name} >>= 1"))
        self.indent -= 1
        self.dead.append(step.name)
        var = self.new(a.kind, -8 * n, 8 * n, 2 if a.kind == "f" else 0, level=BLOCK, fixed=True)
        self.emit(f"{var.name} = {a.name}[0]")
        self.show(var)
        self.barrier()
        return True

    def s_scan(self):
        a = self.scratch()
        if a is None or self.exited == "lane":
            return False
        if a.mode != "W":
            self.force(a, "W")
        n = self.m.threads
        self.emit(f"{a.name}[tid] = {self.own_value(a, 4)}")
        self.emit("cuda.syncthreads()")
        off, t, doubling = self.new("i", fixed=True), self.new(a.kind, fixed=True), self.chance(0.5)
        zero = "0" if a.kind == "i" else self.pick("0.0", "0")
        if doubling:
            self.emit(f"{off.name} = 1")
            self.emit(f"while {off.name} < {self.pick('nt', str(n))}:")
        else:
            k = self.new("i", fixed=True)
            self.emit(f"for {k.name} in range({max(1, (n - 1).bit_length())}):")
            self.emit(f"    {off.name} = 1 << {k.name}")
            self.dead.append(k.name)
        self.indent += 1
        if self.chance(0.5):
            self.emit(f"{t.name} = {a.name}[tid - {off.name}] if tid >= {off.name} else {zero}")
        else:
            self.emit(f"{t.name} = {zero if a.kind == 'i' else '0.0'}")
            self.emit(f"if tid >= {off.name}:")
            self.emit(f"    {t.name} = {a.name}[tid - {off.name}]")
        self.emit("cuda.syncthreads()")
        self.emit(f"{a.name}[tid] += {t.name}")
        self.emit("cuda.syncthreads()")
        if doubling:
            self.emit(f"{off.name} *= 2")
        self.indent -= 1
        self.dead += [off.name, t.name]
        var = self.new(a.kind, -4 * n, 4 * n, 2 if a.kind == "f" else 0, fixed=True)
        self.emit(f"{var.name} = {a.name}[{self.pick('tid', 'nt - 1 - tid')}]")
        self.show(var)
        self.barrier()
        return True

    def warp_ready(self):
        return self.level >= WARP and self.exited != "lane" and self.mult <= 12 and self.depth < 3

    def s_butterfly(self):
        if not self.warp_ready() or not self.full:
            return False
        kind = self.pick("i", "f")
        var = self.new(kind, -512, 512, 2 if kind == "f" else 0, fixed=True)
        value = self.fit(self.int_expr(1), -15, 15) if kind == "i" else self.fit_float(self.float_expr(1), 8, 2)
        self.emit(f"{var.name} = {value.text} + {'0' if kind == 'i' else '0.0'}")
        how = self.pick("+", "max")
        k = self.new("i", fixed=True)
        form = self.rng.randrange(3)
        self.emit([f"for {k.name} in (16, 8, 4, 2, 1):", f"for {k.name} in range(5):", f"{k.name} = 16"][form])
        if form == 2:
            self.emit(f"while {k.name} > 0:")
        amount = f"1 << {k.name}" if form == 1 else k.name
        other = f"cuda.shfl_xor_sync({self.mask()}, {var.name}, {amount})"
        self.emit(f"    {var.name} += {other}" if how == "+" else f"    {var.name} = max({var.name}, {other})")
        if form == 2:
            self.emit(f"    {k.name} //= 2")
        self.dead.append(k.name)
        self.show(var)
        return True

    def s_warp_scan(self):
        if not self.warp_ready():
            return False
        var, t, d = self.new("i", -512, 512, fixed=True), self.new("i", fixed=True), self.new("i", fixed=True)
        self.emit(f"{var.name} = {self.fit(self.int_expr(1), -15, 15).text} + 0")
        self.emit(f"{d.name} = 1")
        self.emit(f"while {d.name} < {self.pick('32', 'cuda.warpsize')}:")
        self.emit(f"    {t.name} = cuda.shfl_up_sync({self.mask()}, {var.name}, {d.name})")
        self.emit(f"    if {self.lane_text()} >= {d.name}:")
        self.emit(f"        {var.name} += {t.name}")
        self.emit(f"    {d.name} *= 2")
        self.dead += [t.name, d.name]
        self.show(var)
        return True

    def s_warp_down(self):
        """A reduction that also works in a ragged warp: lanes without a partner drop what they receive."""
        if not self.warp_ready():
            return False
        var, t, d = self.new("i", -512, 512, fixed=True), self.new("i", fixed=True), self.new("i", fixed=True)
        self.emit(f"{var.name} = {self.fit(self.int_expr(1), -15, 15).text} + 0")
        self.emit(f"{d.name} = 16")
        self.emit(f"while {d.name} > 0:")
        self.emit(f"    {t.name} = cuda.shfl_down_sync({self.mask()}, {var.name}, {d.name})")
        self.emit(f"    if {self.lane_text()} + {d.name} < {self.wn}:")
        self.emit(f"        {var.name} += {t.name}")
        self.emit(f"    {d.name} >>= 1")
        self.dead += [t.name, d.name]
        self.show(var)
        return True

    def s_compact(self):
        if self.level < WARP:
            return False
        m, keep = self.new("i", level=WARP, fixed=True), self.new("b", fixed=True)
        self.emit(f"{keep.name} = {self.bool_expr(1)}")
        self.emit(f"{m.name} = cuda.ballot_sync({self.mask()}, {keep.name})")
        position = self.new("i", 0, 32)
        self.emit(f"{position.name} = cuda.popc({m.name} & cuda.lanemask_lt()) if {keep.name} else 32")
        self.dead.append(m.name)
        self.show(keep)
        self.show(position)
        return True

    def s_match_group(self):
        """Lanes with the same key form a group with its own mask."""
        if self.level < WARP:
            return False
        m, leader = self.new("i", fixed=True), self.new("i", 0, 31, fixed=True)
        key = self.fit(self.int_expr(1), 0, 3)
        self.emit(f"{m.name} = cuda.match_any_sync({self.mask()}, {key.text})")
        self.emit(f"{leader.name} = cuda.ffs({m.name}) - 1")
        var = self.new("i", 0, 255)
        value = self.fit(self.int_expr(1), 0, 255).text
        self.emit(f"{var.name} = cuda.shfl_sync({m.name}, {value}, {leader.name})")
        test = self.new("b")
        with self.without_collectives():
            c = self.bool_expr(0)
        self.emit(f"{test.name} = cuda.{self.pick('all', 'any', 'eq')}_sync({m.name}, {c})")
        self.dead.append(m.name)
        for v in (leader, var, test):
            self.show(v)
        return True

    def s_submask(self):
        """A branch taken by half a warp, whose mask names exactly these lanes."""
        if not self.warp_ready() or not self.full:
            return False
        n, mask = self.pick((16, "0xFFFF"), (8, "0xFF"), (4, "0xF"))
        target = [v for v in self.visible("i", writable=True) if v.level == THREAD]
        if not target:
            return False
        v = self.rng.choice(target)
        self.emit(f"if {self.lane_text()} < {n}:")
        op = self.pick(f"cuda.shfl_xor_sync({mask}, {v.name}, {n // 2})",
                       f"cuda.shfl_sync({mask}, {v.name}, {self.rng.randrange(n)})",
                       f"cuda.shfl_up_sync({mask}, {v.name}, 1)",
                       f"cuda.popc(cuda.ballot_sync({mask}, {v.name} % 2 == 0))")
        self.emit(f"    {v.name} = {self.fit(Expr(f'({op} + 1)', -4096, 4096), v.lo, v.hi).text}")
        if self.chance(0.5):
            self.emit(f"    cuda.syncwarp({mask})")
        return True

    def s_vote_loop(self):
        """A loop that goes on while any thread of the block (or of the warp) has work."""
        if self.level < WARP or self.depth >= 2 or self.mult > 4:
            return False
        block = self.level == BLOCK and self.chance(0.6)
        work = self.new("i", 0, 5, fixed=True)
        count = self.new("i", 0, 5, level=BLOCK if block else WARP, fixed=True)
        self.emit(f"{work.name} = {self.fit(self.int_expr(1), 0, 5).text}")
        self.emit(f"{count.name} = 0")
        test = f"cuda.any_sync({self.mask()}, {work.name} > 0)"
        if block:
            test = f"cuda.syncthreads_or(int({work.name} > 0))"
        inverse = self.chance(0.4)
        self.emit("while True:" if inverse else f"while {test}:")
        level = BLOCK if block else WARP
        self.show(work)
        self.show(count)
        with self.nest(level, loop=False, mult=5):
            if inverse:
                self.emit(f"if {f'{test} == 0' if block else f'not {test}'}:")
                self.emit("    break")
            self.emit(f"if {work.name} > 0:")
            with self.nest(THREAD):
                self.emit(f"{work.name} -= 1")
                self.suite()
            self.emit(f"{count.name} += 1")
            if self.chance(0.5):
                self.suite()
        return True

    def s_double_buffer(self):
        """Two halves in turn, one barrier a round."""
        if not self.is_kernel or self.level < BLOCK or self.depth > 1 or self.mult > 4 or not self.m.double_buffers:
            return False
        if self.exited:
            return False
        a = self.m.double_buffers[0]
        rounds = self.rng.randint(2, 4)
        k, var = self.new("i", 0, rounds - 1, level=BLOCK, fixed=True), self.new("i", 0, 64 * rounds, fixed=True)
        self.emit("cuda.syncthreads()")
        self.emit(f"{var.name} = 0")
        self.emit(f"for {k.name} in range({rounds}):")
        with self.nest(BLOCK, loop=False, mult=rounds):
            self.show(k)
            with self.simple():
                value = self.fit(self.int_expr(2), 0, 63).text
                self.emit(f"{a.name}[{k.name} % 2, tid] = {value}")
                self.emit("cuda.syncthreads()")
                self.emit(f"{var.name} += {a.name}[{k.name} & 1, {self.index(self.m.threads, THREAD)}]")
        self.emit("cuda.syncthreads()")
        self.show(var)
        return True

    def s_call_block(self):
        """A call of a device function that holds barriers."""
        if not self.m.block_functions or self.level < BLOCK or self.mult > 4 or self.exited:
            return False
        f, needs = self.rng.choice(self.m.block_functions)
        if f.cost * self.mult > MAX_COST:
            return False
        array = None
        texts = []
        with self.simple():
            for kind in f.params:
                if kind == "s":
                    options = [a for a in self.shared if a.warp_tile and a.dtype == needs]
                    if not options:
                        return False
                    array = self.rng.choice(options)
                    texts.append(array.name)
                elif kind == "u":
                    texts.append(self.fit(self.int_expr(1, BLOCK), 0, 7).text)
                elif kind == "i":
                    texts.append(self.fit(self.int_expr(1), -64, 63).text)
                else:
                    texts.append(self.fit_float(self.float_expr(1)).text)
            texts += ["tid", "nt"]
            extra = self.fit(self.int_expr(1), 0, 63).text if f.kind == "i" else self.float_literal().text
        call = f"{f.name}({', '.join(texts)})"
        if self.chance(0.4):
            call = self.pick(f"{call} + {extra}", f"{extra} + {call}")
        var = self.new(f.kind, f.lo - 64, f.hi + 64, max(f.frac, 2) if f.kind == "f" else 0)
        self.emit(f"{var.name} = {call}")
        self.show(var)
        if array is not None:
            array.mode = "W"
        return True


class Module:
    """Writes a case: constants, device functions, the kernel."""

    def __init__(self, seed, size, without):
        self.rng = random.Random(f"kernel {seed}")
        self.seed, self.size, self.without = seed, size, frozenset(without)
        unknown = self.without - set(STATEMENTS) - set(EXTRAS)
        if unknown:
            raise ValueError(f"unknown features {sorted(unknown)}; known: {sorted({*STATEMENTS, *EXTRAS})}")
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
        self.double_buffers = []
        self.shared_bytes = 0
        self.constants = set()
        self.specs = []
        self.sections = []
        self.numba_types = self.rng.random() < 0.3

    def on(self, name):
        return name not in self.without

    def chance(self, p):
        return self.rng.random() < p

    def dtype(self, name):
        return name if self.numba_types and name != "float16" else f"np.{name}"

    # -- device functions ---------------------------------------------------------------------------------------------
    def device_functions(self):
        if self.on("device_pure"):
            for _ in range(self.rng.choices([0, 1, 2], [2, 3, 5])[0]):
                self.pure_function()
        if self.on("device_warp") and self.chance(0.4):
            self.warp_function()
        if self.on("device_block"):
            for _ in range(self.rng.choices([0, 1, 2], [5, 4, 1])[0]):
                self.block_function()

    def finish(self, body, name, params, function, functions):
        self.sections.append("\n".join(["@cuda.jit(device=True)", f"def {name}({', '.join(params)}):", *body.lines]))
        functions.append(function)

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
        body = Body(self, THREAD)
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
        function = Function(name, kind, tuple(kinds), *self.interval(kind), uniform, body.cost)
        self.finish(body, name, names, function, self.pure_functions)

    def warp_function(self):
        body = Body(self, WARP)
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
        self.finish(body, "dw0", names, function, self.warp_functions)

    def block_function(self):
        """A function that begins and ends with a barrier and works on a shared array of its caller or its own."""
        body = Body(self, BLOCK)
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
        self.finish(body, name, names, (function, dtype), self.block_functions)

    # -- the kernel ---------------------------------------------------------------------------------------------------
    def padded(self):
        return (self.threads + 31) // 32 * 32

    def shared_interval(self, kind):
        return {"i": (-(1 << 15), 1 << 15, 0), "f": (-2048, 2048, 3), "b": (0, 1, 0)}[kind]

    def kernel(self):
        body = Body(self, BLOCK)
        body.is_kernel = True
        params = []
        self.inputs(body, params)
        self.scalars(body, params)
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
        for _ in range(2):
            body.s_assign()
        body.statements(self.size)
        self.flush(body, params)
        self.rng.shuffle(params)
        self.specs = [spec for _, spec in params]
        names = ", ".join(name for name, _ in params)
        self.sections.append("\n".join(["@cuda.jit", f"def kernel({names}):", *body.lines]))

    def array(self, params, name, dtype, shape, fill, *limits):
        params.append((name, ArraySpec(dtype, tuple(shape), fill, limits)))

    def inputs(self, body, params):
        choices = [("int32", "i"), ("int64", "i"), ("uint32", "i"), ("float32", "f"), ("float64", "f"), ("bool", "b"),
                   ("float16", "f")]
        weights = [4, 3, 2, 4, 3, 2, 2 if self.on("float16") else 0]
        picked = self.rng.choices(choices, weights, k=self.rng.randint(2, 4))
        picked.append(self.rng.choice(choices[:2]))
        for k, (dtype, kind) in enumerate(picked):
            name, n = f"x{k}", self.rng.choice([5, 16, 33, 64, 100])
            shape = (n,) if self.chance(0.65) else (self.rng.choice([2, 3, 7]), self.rng.choice([4, 5, 9]))
            if kind == "i":
                lo, hi = (0, 1000) if dtype == "uint32" else self.rng.choice([(-100, 100), (0, 31), (-5, 5)])
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

    def nn(self):
        """The size of guarded outputs: a few threads have nothing to do."""
        if not hasattr(self, "_nn"):
            self._nn = max(1, self.total - self.rng.choice([0, 1, 5, self.threads // 2, self.threads]))
        return self._nn

    def outputs(self, body, params):
        types = [("int32", "i"), ("int64", "i"), ("uint32", "i"), ("float32", "f"), ("float64", "f"), ("bool", "b"),
                 ("float16", "f")]
        weights = [4, 3, 2, 4, 3, 1.5, 2 if self.on("float16") else 0]
        total = self.total
        for k in range(self.rng.randint(3, 5)):
            dtype, kind = self.rng.choices(types, weights)[0]
            name, form = f"o{k}", self.rng.choices(["plain", "row", "guard", "stride", "grid2"], [4, 2, 3, 3, 2])[0]
            lo, hi, frac = {"i": (-512, 511, 0), "f": (-32, 32, 3), "b": (0, 1, 0)}[kind]
            if dtype == "uint32":
                lo, hi = 0, 1023
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
                text = f"({shape[0]}, {shape[1]})" if len(shape) == 2 else str(shape[0])
                if len(shape) == 1 and self.chance(0.3):
                    text = f"NT_{shape[0]}"
                    self.constants.add(shape[0])
                body.emit(f"{name} = cuda.shared.array({text}, {self.dtype(dtype)})")
            value = body.pick("k % 11", "(k * 7) % 13") if kind == "i" else body.pick("k * 0.25 % 4.0", "(k % 9) / 8")
            index = fill or ("k" if len(shape) == 1 else f"k // {shape[1]}, k % {shape[1]}")
            fills.append((name, shape[0] * (shape[1] if len(shape) == 2 else 1), index, value))
            body.shared.append(a)

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
        for name, kept, dtype in (("fi", ints, "int64"), ("ff", floats, "float64")):
            if not kept:
                continue
            for j, v in enumerate(kept):
                body.emit(f"{name}[{j}, gid] = {v.name}")
            self.array(params, name, dtype, (len(kept), self.total), "ints" if name == "fi" else "dyadic",
                       0, 0)
        if body.shared:
            body.emit("cuda.syncthreads()")
            for a in body.shared:
                count = a.shape[0] * (a.shape[1] if len(a.shape) == 2 else 1)
                index = "k" if len(a.shape) == 1 else f"k // {a.shape[1]}, k % {a.shape[1]}"
                if a.offset:
                    index = f"{a.offset} + k"
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
        self.device_functions()
        self.kernel()
        ragged = "ragged" if self.threads % 32 else "full"
        dtypes = sorted({f"{s.dtype} array" for s in self.specs if isinstance(s, ArraySpec)})
        head = [f"# seed {self.seed}, size {self.size}: {self.threads} threads a block, the last warp is {ragged}",
                f"# {', '.join(dtypes)}", "import math", "", "import numpy as np", "from numba import cuda"]
        if self.numba_types:
            head[-1:] = ["from numba import cuda, float32, float64, int32, int64, uint32"]
        head += ["", f"GRID = {self.grid}", f"BLOCK = {self.block}", "FULL = 0xFFFFFFFF"]
        text = "\n\n\n".join(self.used_sections())
        head += [f"NT_{n} = {n}" for n in sorted(self.constants)]
        return Case(self.seed, "\n".join(head) + "\n\n\n" + text + "\n", self.grid, self.block, self.shared_bytes,
                    tuple(self.specs))


def generate(seed, size=5, without=()):
    """The random kernel number `seed`.

    size      how many statements at the top level of the kernel (about; nested ones come on top)
    without   names of STATEMENTS and EXTRAS that must not appear, for a backend that refuses them

    Returns a Case; the same arguments give the same case. Raises ValueError for an unknown name in `without`.
    """
    return Module(seed, size, without).case()


if __name__ == "__main__":
    main(generate)
