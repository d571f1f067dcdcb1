"""Explicit signatures, ``@cuda.jit("void(float32[:], int32)")``: what they mean at a launch, as in numba-cuda 0.30.

A string, a signature or a tuple of types makes a kernel of that one signature: whatever a launch gives is converted to
it, scalars as ctypes does, arrays by reading their memory as if it held the elements that the signature names. A list
makes a kernel of several: the one that fits the arguments best is taken, by Numba's own rules.
"""

import ctypes

import numba
import numpy as np
from numba.core import sigutils, types
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target
from numba.core.typing import signature as make_signature

from .errors import LaunchTypeError


class Signatures:
    """The explicit signatures of one kernel or device function. ``given``: what ``cuda.jit`` got in its first place.

    Raises TypeError for a kernel with a result, and what Numba raises for a text that is no signature.
    """

    def __init__(self, function, given, device):
        self.name, self.given, self.several = function.__name__, given, isinstance(given, list)
        self.all = []
        wanted = function.__code__.co_argcount
        for text in given if self.several else [given]:
            args, result = sigutils.normalize_signature(text)
            if not device and result not in (None, types.void):
                raise TypeError(f"a kernel returns nothing: the signature {text} of {self.name} must begin with void")
            if len(args) != wanted:
                raise TypeError(
                    f"Signature mismatch: {len(args)} argument types given, but {self.name} takes {wanted} arguments"
                )
            self.all.append(make_signature(result, *args) if device and result is not None else tuple(args))
            # a kernel's are tuples of types, and a device function's whose result is left to inference

    def convert(self, values):
        """``(values, signature)``: launch arguments (NumPy arrays, numbers, tuples) as the kernel gets them.

        Raises LaunchTypeError.
        """
        wanted = self._choose(values) if self.several else self.all[0]
        if len(values) != len(wanted):
            raise LaunchTypeError(
                f"{self.name} takes {len(wanted)} arguments, not {len(values)}",
                fix=f"its signature is ({', '.join(map(str, wanted))})",
            )
        pairs = enumerate(zip(values, wanted))
        return [self._one(value, kind, f"argument {i + 1}") for i, (value, kind) in pairs], wanted

    def _choose(self, values):
        try:
            kinds = tuple(map(numba.typeof, values))
        except (ValueError, TypeError, NumbaError):
            kinds = None
        shown = ", ".join(map(str, kinds)) if kinds else ", ".join(type(v).__name__ for v in values)
        known = "; ".join(f"({', '.join(map(str, s))})" for s in self.all)
        fitting = [make_signature(types.none, *s) for s in self.all if kinds and len(s) == len(kinds)]
        try:
            found = cpu_target.typing_context.resolve_overload(self.name, fitting, kinds, {}, allow_ambiguous=False)
        except TypeError:  # several fit equally well
            raise LaunchTypeError(
                f"{self.name} has several signatures that fit ({shown}) equally well: {known}",
                fix="give scalars the type that is meant: np.int32(…), np.float32(…)",
            ) from None
        if found is None:
            raise LaunchTypeError(f"none of the signatures of {self.name} fits ({shown}): {known}")
        return found.args

    def _one(self, value, kind, where):
        if isinstance(kind, types.Array) and isinstance(value, np.ndarray):
            return self._array(value, kind, where)
        if isinstance(kind, types.BaseTuple) and isinstance(value, tuple) and len(value) == len(kind):
            return tuple(self._one(v, k, where) for v, k in zip(value, kind))
        try:
            if kind == types.boolean and isinstance(value, (bool, int, np.bool_, np.integer)):
                return np.bool_(value)
            if isinstance(kind, types.Integer):
                return getattr(np, kind.name)(getattr(ctypes, f"c_{kind.name}")(value).value)
            if kind == types.float16:
                return np.float16(value)
            if isinstance(kind, types.Float):
                return getattr(np, kind.name)({32: ctypes.c_float, 64: ctypes.c_double}[kind.bitwidth](value).value)
            if isinstance(kind, types.Complex):
                return getattr(np, kind.name)(complex(value))
        except (TypeError, ValueError) as error:
            raise LaunchTypeError(f"{where} of {self.name} is {value!r}; its signature says {kind}: {error}") from None
        raise LaunchTypeError(
            f"{where} of {self.name} is {_shown(value)}; its signature says {kind}",
            fix="pass what the signature names, or leave the signature out: types then come from the arguments",
        )

    def _array(self, array, kind, where):
        named = getattr(np, "bool_" if kind.dtype == types.boolean else kind.dtype.name, None)
        if array.ndim != kind.ndim or named is None:
            raise LaunchTypeError(
                f"{where} of {self.name} is {_shown(array)}; its signature says {kind}",
                fix=f"pass an array with {kind.ndim} axes: on a GPU the sizes would be read from other arguments",
            )
        dtype = np.dtype(named)
        if array.dtype == dtype and (kind.layout == "A" or array.flags[f"{kind.layout}_CONTIGUOUS"]):
            return array
        # A GPU gets the address, the shape and the strides as they are, and goes by the types of the signature. A
        # contiguous layout in it means that strides are not looked at.
        contiguous = np.empty(array.shape, dtype, order=kind.layout).strides if kind.layout in "CF" else array.strides
        bound = sum((n - 1) * s for n, s in zip(array.shape, contiguous)) + dtype.itemsize if array.size else 0
        if bound > array.nbytes or not (array.flags.c_contiguous or array.flags.f_contiguous):
            raise LaunchTypeError(
                f"{where} of {self.name} is {_shown(array)}; its signature says {kind}: its last elements would lie "
                "outside the array's memory",
                fix=f"pass an array of {dtype}",
            )
        flat = array.reshape(-1, order="A").view(np.uint8)
        return np.ndarray(array.shape, dtype, flat.data if array.flags.writeable else flat.tobytes(), 0, contiguous)


def _shown(value):
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}, shape {value.shape}"
    return f"{value!r} ({type(value).__name__})"


def is_signature(value):
    """Is the first argument of ``cuda.jit`` one or several signatures? (A list may hold any of the others.)"""
    return isinstance(value, list) or sigutils.is_signature(value)


