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

What the language has beyond that (rows of arrays, signatures, recursion, ...) are features with names, listed in
tests/fuzz/kinds.py: a kernel contains some of those asked for.

Command line: ``python -m tests.fuzz_kernels --seeds 0:2000 [--backend | --ptx sm_80] [--features rows,signatures | gpu]
[--wild] [--shrink] [--out DIR] [--size N] [--jobs N] [--seconds S]``.
Without --backend the cases run on the oracle alone, in checked mode (races, unwritten memory, order of threads). With
--ptx they do not run: numba-cuda compiles them, which shows that a GPU would take them.
"""
from tests.fuzz.features import FEATURES, features_of
from tests.fuzz.kinds import DEFAULT_KINDS, EXTRAS, GPU_KINDS, KINDS, STATEMENTS
from tests.fuzz.module import Module
from tests.fuzz_cases import main

__all__ = ["DEFAULT_KINDS", "EXTRAS", "FEATURES", "GPU_KINDS", "KINDS", "STATEMENTS", "features_of", "generate"]


def generate(seed, size=5, without=(), features=None):
    """The random kernel number `seed`.

    size      how many statements at the top level of the kernel (about; nested ones come on top)
    without   names of STATEMENTS and EXTRAS that must not appear, for a backend that refuses them
    features  names of KINDS, of which the kernel contains some; by default those of DEFAULT_KINDS in every second
              kernel, and none in the others

    Returns a Case; the same arguments give the same case. Raises ValueError for a name that is not known.
    """
    if features is None:
        features = DEFAULT_KINDS if seed % 4 in (1, 2) else ()     # odd and even numbers: some tests take each tenth
    return Module(seed, size, without, features).case()


if __name__ == "__main__":
    main(generate)
