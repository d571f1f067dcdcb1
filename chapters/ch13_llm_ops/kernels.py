"""Chapter 13, the operations of a language model: GELU here, sampling in ``sampling.py``.

===============  =====================================  =====================================
kernel           one thread                             bytes an element moved (float32)
===============  =====================================  =====================================
``gelu_kernel``  one element, about 10 flops, a tanh    8 (one read, one write)
===============  =====================================  =====================================
"""

import math

import numpy as np
from numba import cuda, float32

GELU_THREADS = 256


def gelu_launch(n):
    """Launch configuration of :func:`gelu_kernel` for ``n`` elements: ``(grid, block)``, one thread an element.

    Raises ValueError if ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; skip the launch for empty input")
    return (n + GELU_THREADS - 1) // GELU_THREADS, GELU_THREADS


@cuda.jit
def gelu_kernel(x, out, n):
    """out[i] = gelu(x[i]) in the tanh form: x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 x³))), GPT-2's ``gelu_new``.

    x, out: (n,) float32, C-contiguous; ``out`` may be ``x`` itself. n: int32. The exact GELU, x · Φ(x) with the normal
    distribution's Φ, differs from this by up to 5e-4: weights trained with one form want that form. -inf gives NaN.
    Launch: ``gelu_kernel[gelu_launch(n)](…)``. Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    i = cuda.grid(1)
    if i < n:
        value = x[i]
        inner = float32(0.7978845608028654) * (value + float32(0.044715) * value * value * value)
        out[i] = float32(0.5) * value * (float32(1) + math.tanh(inner))


def gelu_reference(x):
    """NumPy reference of :func:`gelu_kernel`: (n,) float32, in float64 inside, returns float32."""
    x = x.astype(np.float64)
    return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(np.float32)
