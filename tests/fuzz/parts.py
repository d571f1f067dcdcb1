"""What random kernels are made of: levels, launch geometries, expressions with intervals, variables, arrays."""

from typing import NamedTuple

THREAD, WARP, BLOCK = 0, 1, 2

BLOCKS = [((1,), 2), ((7,), 3), ((31,), 2), ((32,), 6), ((33,), 5), ((40,), 2), ((64,), 10), ((65,), 2), ((96,), 6),
          ((100,), 2), ((128,), 3), ((5, 3), 2), ((8, 4), 4), ((7, 9), 3), ((33, 2), 2), ((16, 4), 4), ((32, 2), 4),
          ((4, 2, 3), 2), ((4, 4, 4), 3), ((2, 3, 5), 2), ((8, 4, 2), 3)]
GRIDS = [((1,), 3), ((2,), 5), ((3,), 4), ((4,), 2), ((2, 2), 2), ((1, 3), 2), ((2, 1, 2), 1)]
MAX_THREADS = 260           # of the whole launch: the oracle runs some 10^5 operations a second
MAX_COST = 40               # how often one thread may execute the innermost statement, about
MAX_FLOAT_BITS = 22         # float32 holds 24


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
        self.row_owned = False          # a thread owns all elements whose first index is its own
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
    narrow: bool = False    # its signature gives it a narrow integer as a result


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
