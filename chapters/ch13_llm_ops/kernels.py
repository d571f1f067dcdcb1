"""Chapter 13, the operations of a language model: activations here, the rest in files of their own.

========================  ===========================================  ===============================================
kernel                    one element, one thread                      bytes an element of the result (float32)
========================  ===========================================  ===============================================
``gelu_kernel``           about 10 flops and a tanh (GPT-2)            8 (one read, one write)
``gelu_erf``              4 flops and an erf (BERT, ViT)               8
``silu``                  2 flops, an exp, a division                  8
``multiply``              1 flop                                       12 (two reads, one write)
``swiglu``                silu of one array times another (Llama)      12 (two reads, one write)
``swiglu_fused``          the same, both in the rows of one matrix     12
========================  ===========================================  ===============================================

All are limited by memory: each reads every byte once and computes little with it. The faster form of an activation is
therefore no kernel at all, but the last line of the matrix product that makes its input.

``rope.py`` rotates queries and keys by their positions, ``kv_cache.py`` keeps keys and values of earlier tokens, and
``sampling.py`` chooses the next token.
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch03_indexing.kernels import blocks_1d, blocks_2d


def activation_launch(n):
    """Launch configuration of the activations for ``n`` elements: ``(grid, block)``, one thread an element.

    Raises ValueError if ``n`` is not positive.
    """
    return blocks_1d(n)


# --- GELU ------------------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def gelu_of(value):
    """gelu(value) in the tanh form, float32."""
    inner = float32(0.7978845608028654) * (value + float32(0.044715) * value * value * value)
    return float32(0.5) * value * (float32(1) + math.tanh(inner))


@cuda.jit
def gelu_kernel(x, out, n):
    """out[i] = gelu(x[i]) in the tanh form: x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 x³))), GPT-2's ``gelu_new``.

    x, out: (n,) float32, C-contiguous; ``out`` may be ``x`` itself. n: int32. The exact GELU (:func:`gelu_erf`) differs
    from this by up to 5e-4: weights trained with one form want that form. -inf gives NaN.
    Launch: ``gelu_kernel[activation_launch(n)](…)``. Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    i = cuda.grid(1)
    if i < n:
        out[i] = gelu_of(x[i])


def gelu_reference(x):
    """NumPy reference of :func:`gelu_kernel`: (n,) float32, in float64 inside, returns float32."""
    x = x.astype(np.float64)
    return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(np.float32)


@cuda.jit
def gelu_erf(x, out, n):
    """out[i] = x · Φ(x) = x/2 · (1 + erf(x / sqrt(2))): the exact GELU, Φ being the normal distribution function.

    x, out: (n,) float32, C-contiguous; ``out`` may be ``x`` itself. n: int32. Below -3, 1 + erf cancels: the result is
    right to some 1e-7 · |x|, not to so many digits. -inf gives NaN.
    Launch: ``gelu_erf[activation_launch(n)](…)``. Source: Hendrycks and Gimpel 2016.
    """
    i = cuda.grid(1)
    if i < n:
        value = x[i]
        out[i] = float32(0.5) * value * (float32(1) + math.erf(value * float32(0.7071067811865476)))


def gelu_erf_reference(x):
    """Reference of :func:`gelu_erf`: (n,) float32, in float64 inside, returns float32."""
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.tolist()], np.float32)


# --- SiLU and SwiGLU -------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def silu_of(value):
    """value · sigmoid(value), float32. Far below 0 the exponential is inf, and value / inf is 0, as it should be."""
    return value / (float32(1) + math.exp(-value))


@cuda.jit
def silu(x, out, n):
    """out[i] = x / (1 + exp(-x)), also called swish.

    x, out: (n,) float32, C-contiguous; ``out`` may be ``x`` itself. n: int32. -inf gives NaN.
    Launch: ``silu[activation_launch(n)](…)``. Source: Elfwing, Uchibe, Doya 2018, "Sigmoid-Weighted Linear Units".
    """
    i = cuda.grid(1)
    if i < n:
        out[i] = silu_of(x[i])


def silu_reference(x):
    """NumPy reference of :func:`silu`: float32 of any shape, in float64 inside, returns float32."""
    x = x.astype(np.float64)
    return (x * np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))).astype(np.float32)  # no exponent above 0


@cuda.jit
def multiply(x, y, out, n):
    """out[i] = x[i] · y[i]: behind :func:`silu`, the second launch of a SwiGLU that is not fused.

    x, y, out: (n,) float32, C-contiguous; ``out`` may be ``x`` or ``y``. n: int32.
    Launch: ``multiply[activation_launch(n)](…)``.
    """
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i] * y[i]


def multiply_reference(x, y):
    """NumPy reference of :func:`multiply`: two float32 arrays of one shape, returns float32."""
    return x * y


@cuda.jit
def swiglu(gate, up, out, n):
    """out[i] = silu(gate[i]) · up[i], gate and up from two matrix products.

    gate, up, out: (n,) float32, C-contiguous (matrices of one shape, flat); ``out`` may be ``gate`` or ``up``.
    n: int32. Launch: ``swiglu[activation_launch(n)](…)``. Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    i = cuda.grid(1)
    if i < n:
        out[i] = silu_of(gate[i]) * up[i]


def swiglu_reference(gate, up):
    """NumPy reference of :func:`swiglu`: two float32 arrays of one shape, in float64 inside, returns float32."""
    gate = gate.astype(np.float64)
    return (gate * np.exp(np.minimum(gate, 0)) / (1 + np.exp(-np.abs(gate))) * up).astype(np.float32)


def swiglu_fused_launch(rows, d_ff):
    """Launch configuration of :func:`swiglu_fused`, one thread an element of the result: ``(grid, block)``.

    Raises ValueError if a size is not positive.
    """
    return blocks_2d(rows, d_ff)


@cuda.jit
def swiglu_fused(gate_up, out, rows, d_ff):
    """out[r, c] = silu(gate_up[r, c]) · gate_up[r, d_ff + c], gate and up from one matrix product, side by side.

    One product of twice the width fills a GPU better than two. gate_up: (rows, 2 · d_ff) float32, C-contiguous: in each
    row d_ff gates, then d_ff ups (not in turn). out: (rows, d_ff) float32, C-contiguous, not overlapping ``gate_up``.
    rows, d_ff: int32. Launch: ``swiglu_fused[swiglu_fused_launch(rows, d_ff)](…)``. Source: Shazeer 2020.
    """
    col, row = cuda.grid(2)
    if row < rows and col < d_ff:
        out[row, col] = silu_of(gate_up[row, col]) * gate_up[row, d_ff + col]


def swiglu_fused_reference(gate_up):
    """NumPy reference of :func:`swiglu_fused`: (rows, 2 · d_ff) float32, returns (rows, d_ff) float32."""
    gate, up = np.split(gate_up, 2, axis=1)
    return swiglu_reference(gate, up)
