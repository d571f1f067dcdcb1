"""CPU equivalents of kernel-level intrinsics that this project writes for the GPU (inline PTX and the like)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Equivalent:
    """``function`` stands in for an intrinsic: called once a lane, or once a warp with 32-lane arrays."""

    function: object
    level: str
    returns: object
    elements: int = 0
    writes: bool = False

    @property
    def text(self):
        """Python text that yields the function in a generated module."""
        module, attr = self.function.__module__, self.function.__name__
        return f"__import__('importlib').import_module({module!r}).{attr}"


_equivalents = {}


def cpu_equivalent(intrinsic, level="lane", returns=None, elements=0, writes=False):
    """Decorator: the function below it does on the CPU what ``intrinsic`` does on a GPU.

    ``level="lane"``: a ``numba.njit`` function with the intrinsic's own arguments, called once for each lane.
    ``level="warp"``: a ``numba.njit`` function called once for each warp, with every argument as an array of
    32 values (one a lane) followed by the outputs, one array of 32 for each dtype in ``returns``
    (a NumPy dtype, or a tuple of them). All 32 lanes must take part.
    ``elements``: if not 0, the first two arguments are an array and an index, and that many elements are read or
    written (``writes``) from there on, along the last axis: ``MINI_CHECK=1`` and the sanitizer check them all.

    Raises ValueError for another level, or for a warp-level equivalent without ``returns``.
    """
    if level not in ("lane", "warp"):
        raise ValueError(f"level={level!r}: it must be 'lane' or 'warp'")
    if level == "warp" and returns is None:
        raise ValueError("a warp-level equivalent needs returns=dtype (or a tuple of dtypes)")

    def register(function):
        _equivalents[id(intrinsic)] = (intrinsic, Equivalent(function, level, returns, elements, writes))
        return function

    return register


def equivalent_of(value):
    """The registered :class:`Equivalent` of an intrinsic, or None."""
    entry = _equivalents.get(id(value))
    return entry[1] if entry and entry[0] is value else None
