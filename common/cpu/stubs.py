"""The names a kernel may use (`cuda.threadIdx.x`, `cuda.syncthreads()`, ...), as marker objects.

The front end recognises the objects themselves, so `from numba import cuda as c` or
`from numba.cuda import syncthreads` work as well. Called outside a kernel they explain themselves.
"""


class Stub:
    """A kernel-side name. ``name`` is its path below ``cuda``; ``role`` tells the front end what to do with it."""

    def __init__(self, name, role):
        self.name, self.role = name, role

    def __repr__(self):
        return f"<cuda.{self.name}>"

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"cuda.{self.name} only has a meaning inside a @cuda.jit function")


class Namespace:
    """A group of stubs: `cuda.atomic`, `cuda.shared`, `cuda.threadIdx`, ..."""

    def __init__(self, name, **members):
        self.__dict__.update(members)
        self._name = name

    def __repr__(self):
        return f"<cuda.{self._name}>"

    def __getattr__(self, attr):
        raise AttributeError(f"cuda.{self._name} has no attribute {attr!r}")


def _dim3(name):
    return Namespace(name, **{axis: Stub(f"{name}.{axis}", "position") for axis in "xyz"})


def _group(name, role, members):
    return Namespace(name, **{m: Stub(f"{name}.{m}", role) for m in members})


BLOCK_COLLECTIVES = ("syncthreads", "syncthreads_count", "syncthreads_and", "syncthreads_or")
WARP_COLLECTIVES = (
    "syncwarp",
    "shfl_sync",
    "shfl_up_sync",
    "shfl_down_sync",
    "shfl_xor_sync",
    "all_sync",
    "any_sync",
    "eq_sync",
    "ballot_sync",
    "match_any_sync",
    "match_all_sync",
    "activemask",
)
ATOMICS = ("add", "sub", "max", "min", "nanmax", "nanmin", "exch", "cas", "and_", "or_", "xor", "inc", "dec")
FENCES = ("threadfence", "threadfence_block", "threadfence_system", "nanosleep")
SCALARS = ("popc", "clz", "ffs", "brev", "selp", "fma", "cbrt", "lanemask_lt")


def build_stubs(fp16_names, libdevice_names):
    """All kernel-side names of the ``cuda`` module, as a dict.

    ``fp16_names`` and ``libdevice_names`` are what the backend has an equivalent for.
    """
    names = {n: _dim3(n) for n in ("threadIdx", "blockIdx", "blockDim", "gridDim")}
    names["laneid"] = Stub("laneid", "position")
    names["warpsize"] = Stub("warpsize", "position")
    for role, group in (
        ("grid", ("grid", "gridsize")),
        ("block", BLOCK_COLLECTIVES),
        ("warp", WARP_COLLECTIVES),
        ("fence", FENCES),
        ("scalar", SCALARS),
    ):
        names.update({n: Stub(n, role) for n in group})
    names["shared"] = _group("shared", "array", ("array",))
    names["local"] = _group("local", "array", ("array",))
    names["const"] = _group("const", "array", ("array_like",))
    names["atomic"] = _group("atomic", "atomic", (*ATOMICS, "compare_and_swap"))
    names["fp16"] = _group("fp16", "fp16", fp16_names)
    names["libdevice"] = _group("libdevice", "libdevice", libdevice_names)
    return names
