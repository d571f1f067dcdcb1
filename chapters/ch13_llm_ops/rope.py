"""Chapter 13, rotary position embedding: a token's position turns pairs of its query and key by an angle.

The head_dim numbers of a head are taken as head_dim / 2 points in the plane. At position p, point i is turned by the
angle p · base^(-2i / head_dim): the first quickly, the last hardly at all. The product of a query at p and a key at q
then depends on p - q alone, because turning both by the same angle changes no product.

Which two numbers make a point? Two layouts are in use, and weights trained with one need that one:

==============================  ===================================  =======================================
kernels                         point i                              used by
==============================  ===================================  =======================================
``rope_interleaved_v1_sincos``  (x[2i], x[2i + 1])                   the paper, GPT-J, Llama as Meta stores it
``rope_interleaved_v2_table``
``rope_halves_v1_sincos``       (x[i], x[i + head_dim / 2])          GPT-NeoX, Llama in transformers
``rope_halves_v2_table``
==============================  ===================================  =======================================

The two versions differ in where sine and cosine come from:

================  ===========================================  =======================================================
version           bytes a point (float32)                      when it loses
================  ===========================================  =======================================================
``…_v1_sincos``   16: x read and written                       always in accuracy: at position p an angle is off by up
                                                               to some p · 1e-7 radians; and in time, where an exp, a
                                                               log, a sine and a cosine for each point of each head
                                                               take longer than its bytes
``…_v2_table``    16, and 8 of the table, which all heads      when the table, 4 · head_dim bytes a position, is more
                  share and caches hold                        than the cache can hold
================  ===========================================  =======================================================

The table is computed once, in float64, on the host (:func:`rope_tables`): each entry is right to half a unit in its
last place, at any position. Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
"""

import math

import numpy as np
from numba import cuda, float32

from chapters.ch03_indexing.kernels import blocks_3d


def require_even(head_dim):
    """Raises ValueError unless ``head_dim`` is a positive even number."""
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: numbers are rotated in pairs, so it must be even and at least 2")


def rope_launch(n_head, T, head_dim):
    """Launch configuration of all versions, one thread a point (x), token (y) and head (z): ``(grid, block)``.

    Raises ValueError if a size is not positive, if head_dim is odd, or if the grid would be too large.
    """
    require_even(head_dim)
    return blocks_3d(n_head, T, head_dim // 2)


def rope_tables(n_positions, head_dim, base=10000.0):
    """cos and sin of every angle: two (n_positions, head_dim // 2) float32 arrays, computed in float64 with NumPy.

    Row p holds position p, column i the angle p · base^(-2i / head_dim). base: 1e4 in the paper; larger in models for
    long texts. Raises ValueError if ``n_positions`` is not positive or ``head_dim`` not even.
    """
    if n_positions <= 0:
        raise ValueError(f"n_positions = {n_positions}: a table needs at least 1 position")
    angles = rope_angles(np.arange(n_positions), head_dim, base)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope_angles(positions, head_dim, base):
    """The angles in radians: (T,) integers; returns (T, head_dim // 2) float64. Raises ValueError for odd head_dim."""
    require_even(head_dim)
    frequencies = float(base) ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    return np.asarray(positions, np.float64)[:, None] * frequencies


@cuda.jit(device=True)
def angle_of(position, point, head_dim, base):
    """position · base^(-2 · point / head_dim), in float32; a power is the exponential of a multiple of a logarithm."""
    exponent = float32(2 * point) / float32(head_dim)
    return float32(position) * math.exp(-exponent * math.log(float32(base)))


# --- pairs of neighbours ---------------------------------------------------------------------------------------------


@cuda.jit
def rope_interleaved_v1_sincos(x, positions, out, T, head_dim, base):
    """out[head, t] = x[head, t] with each pair (2i, 2i + 1) turned by the angle of positions[t]; sin, cos on the spot.

    x, out: (n_head, T, head_dim) float32, C-contiguous; ``out`` may be ``x`` itself. positions: (T,) int32:
    0 … T - 1 for a whole text, and where a text goes on from a cache, whatever its next positions are (with one new
    token, the cache's own ``pos``). T, head_dim: int32. base: float.
    Queries and keys may have different numbers of heads: one launch each.
    Launch: ``rope_interleaved_v1_sincos[rope_launch(n_head, T, head_dim)](…)``.
    """
    point, t, head = cuda.grid(3)
    if point < head_dim // 2 and t < T:
        angle = angle_of(positions[t], point, head_dim, base)
        c = math.cos(angle)
        s = math.sin(angle)
        a = x[head, t, 2 * point]
        b = x[head, t, 2 * point + 1]
        out[head, t, 2 * point] = a * c - b * s
        out[head, t, 2 * point + 1] = a * s + b * c


@cuda.jit
def rope_interleaved_v2_table(x, positions, cos, sin, out, T, head_dim):
    """out[head, t] = x[head, t] with each pair (2i, 2i + 1) turned by the angle of positions[t], from tables.

    cos, sin: (n_positions, head_dim // 2) float32 as :func:`rope_tables` makes them. Every position must be in
    0 … n_positions - 1: the kernel does not look. All else as in version 1.
    Launch: ``rope_interleaved_v2_table[rope_launch(n_head, T, head_dim)](…)``.
    """
    point, t, head = cuda.grid(3)
    if point < head_dim // 2 and t < T:
        position = positions[t]
        c = cos[position, point]
        s = sin[position, point]
        a = x[head, t, 2 * point]
        b = x[head, t, 2 * point + 1]
        out[head, t, 2 * point] = a * c - b * s
        out[head, t, 2 * point + 1] = a * s + b * c


rope_interleaved = rope_interleaved_v2_table


# --- pairs from the two halves ---------------------------------------------------------------------------------------


@cuda.jit
def rope_halves_v1_sincos(x, positions, out, T, head_dim, base):
    """out[head, t] = x[head, t] with each pair (i, i + head_dim / 2) turned by the angle of positions[t].

    Neighbouring threads read neighbouring numbers of either half. Arguments and launch as in
    :func:`rope_interleaved_v1_sincos`.
    """
    point, t, head = cuda.grid(3)
    half = head_dim // 2
    if point < half and t < T:
        angle = angle_of(positions[t], point, head_dim, base)
        c = math.cos(angle)
        s = math.sin(angle)
        a = x[head, t, point]
        b = x[head, t, point + half]
        out[head, t, point] = a * c - b * s
        out[head, t, point + half] = a * s + b * c


@cuda.jit
def rope_halves_v2_table(x, positions, cos, sin, out, T, head_dim):
    """out[head, t] = x[head, t] with each pair (i, i + head_dim / 2) turned by the angle of positions[t], from tables.

    Arguments and launch as in :func:`rope_interleaved_v2_table`.
    """
    point, t, head = cuda.grid(3)
    half = head_dim // 2
    if point < half and t < T:
        position = positions[t]
        c = cos[position, point]
        s = sin[position, point]
        a = x[head, t, point]
        b = x[head, t, point + half]
        out[head, t, point] = a * c - b * s
        out[head, t, point + half] = a * s + b * c


rope_halves = rope_halves_v2_table


# --- references ------------------------------------------------------------------------------------------------------


def _turned(points, positions, base):
    """Points as complex numbers, (n_head, T, head_dim // 2), turned: a product with numbers of magnitude 1."""
    return points * np.exp(1j * rope_angles(positions, 2 * points.shape[-1], base))


def rope_interleaved_reference(x, positions, base=10000.0):
    """NumPy reference of the interleaved versions: (n_head, T, head_dim) float32, (T,) integers; returns float32."""
    x = x.astype(np.float64)
    turned = _turned(x[..., 0::2] + 1j * x[..., 1::2], positions, base)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(np.float32)


def rope_halves_reference(x, positions, base=10000.0):
    """NumPy reference of the versions by halves: (n_head, T, head_dim) float32, (T,) integers; returns float32."""
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    turned = _turned(first + 1j * second, positions, base)
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)
