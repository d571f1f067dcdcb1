"""Chapter 4, memory: a layout is index arithmetic, and the arithmetic decides what neighbouring threads touch.

The 32 threads of a warp make one request together. Memory answers in *sectors* of 32 bytes, 8 floats: a warp whose
threads read 32 neighbours needs 4 sectors, one whose threads read every 8th float needs 32, of which 7/8 is thrown
away. The first kind of access is called *coalesced*.

=======================  =====================================================  ==================================
kernel                   what a warp touches                                    sectors a warp (32 floats), at best 4
=======================  =====================================================  ==================================
``copy_v1_element``      32 neighbours, read and written                        4 + 4
``copy_v2_float4``       128 neighbours: 16 bytes a thread in one instruction   16 + 16 for 4 times the floats
``copy_offset``          32 neighbours that start anywhere                      4 or 5, + 4
``copy_strided``         every ``stride``-th float                              4 * stride, at most 32, + 4
``kinetic_energy_aos``   4 fields of 32 records of 8 floats                     32 a field, or 32 in all if cached
``kinetic_energy_soa``   4 fields, each an array of its own                     4 a field
``split_qkv``            runs of ``head_dim`` floats                            4 + 4, if head_dim is a multiple of 32
=======================  =====================================================  ==================================

The transpose, which is coalesced on one side only unless shared memory helps, is in ``transpose.py``.

GPT-2 computes query, key and value with one matrix product, so each token's row of the result holds all three, and in
each of them the heads lie side by side. Attention works head by head and wants one ``(n_tokens, head_dim)`` matrix a
head. With ``d_model = n_head * head_dim``, element ``i`` of ``head`` of token ``t`` lies at these flat addresses:

=============  ================================  ===========================================================
array          shape                             flat address
=============  ================================  ===========================================================
``qkv`` (q)    (n_tokens, 3 * d_model)           t * 3 * d_model + 0 * d_model + head * head_dim + i
``qkv`` (k)    the same array                    t * 3 * d_model + 1 * d_model + head * head_dim + i
``qkv`` (v)    the same array                    t * 3 * d_model + 2 * d_model + head * head_dim + i
``q, k, v``    (n_head, n_tokens, head_dim)      head * n_tokens * head_dim + t * head_dim + i
=============  ================================  ===========================================================
"""

import numpy as np
from numba import cuda, float32

from chapters.ch03_indexing.kernels import blocks_1d, blocks_2d
from common.ptx import load_float4, store_float4

PARTICLE = ("x", "y", "z", "vx", "vy", "vz", "mass", "charge")  # the fields of a record, in their order
VX, VY, VZ, MASS = 3, 4, 5, 6


# --- copies ----------------------------------------------------------------------------------------------------------


@cuda.jit
def copy_v1_element(x, out, n):
    """out[i] = x[i], one float a thread.

    x, out: (n,) float32. n: int32. Launch: ``copy_v1_element[blocks_1d(n)](…)``.
    """
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i]


def copy_float4_launch(n):
    """Launch configuration of :func:`copy_v2_float4` for ``n`` floats, four a thread: ``(grid, block)``.

    Raises ValueError if ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; skip the launch for empty input")
    return blocks_1d((n + 3) // 4)


@cuda.jit
def copy_v2_float4(x, out, n):
    """out[i] = x[i], 16 bytes a thread: a quarter of the instructions, and more bytes under way at a time.

    x, out: (n,) float32, both starting at a multiple of 16 bytes (every array of its own does; a slice may not).
    n: int32, any: the last thread copies the 1 to 3 floats left over one by one.
    Launch: ``copy_v2_float4[copy_float4_launch(n)](…)``.
    """
    i = 4 * cuda.grid(1)
    if i + 3 < n:
        a, b, c, d = load_float4(x, i)
        store_float4(out, i, a, b, c, d)
    else:
        for j in range(i, n):
            out[j] = x[j]


copy_kernel = copy_v2_float4


@cuda.jit
def copy_offset(x, out, n, offset):
    """out[i] = x[i + offset]: coalesced, but a warp begins in the middle of a sector unless 8 divides offset.

    x: (n + offset,) float32 or longer. out: (n,) float32. n, offset: int32, offset at least 0.
    Launch: ``copy_offset[blocks_1d(n)](…)``.
    """
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i + offset]


@cuda.jit
def copy_strided(x, out, n, stride):
    """out[i] = x[i * stride]: neighbouring threads read ``stride`` floats apart; from 8 on, each needs its own sector.

    x: ((n - 1) * stride + 1,) float32 or longer. out: (n,) float32. n, stride: int32, stride at least 1.
    Launch: ``copy_strided[blocks_1d(n)](…)``.
    """
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i * stride]


# --- array of structures, structure of arrays ------------------------------------------------------------------------


@cuda.jit
def kinetic_energy_aos(particles, out, n):
    """out[i] = mass * speed² / 2 of particle i, from an array of structures: all fields of a particle side by side.

    particles: (n, 8) float32, fields as in ``PARTICLE``. out: (n,) float32. n: int32. Each field is read with a stride
    of 8 floats, so all sectors of the array are fetched, though only half of the fields are used.
    Launch: ``kinetic_energy_aos[blocks_1d(n)](…)``.
    """
    i = cuda.grid(1)
    if i < n:
        vx, vy, vz = particles[i, VX], particles[i, VY], particles[i, VZ]
        out[i] = float32(0.5) * particles[i, MASS] * (vx * vx + vy * vy + vz * vz)


@cuda.jit
def kinetic_energy_soa(fields, out, n):
    """out[i] = mass * speed² / 2 of particle i, from a structure of arrays: each field of all particles side by side.

    fields: (8, n) float32, rows as in ``PARTICLE``. out: (n,) float32. n: int32. Every read is coalesced, and fields
    that are not used are not fetched.
    Launch: ``kinetic_energy_soa[blocks_1d(n)](…)``.
    """
    i = cuda.grid(1)
    if i < n:
        vx, vy, vz = fields[VX, i], fields[VY, i], fields[VZ, i]
        out[i] = float32(0.5) * fields[MASS, i] * (vx * vx + vy * vy + vz * vz)


def kinetic_energy_reference(particles):
    """NumPy reference of both versions: (n, 8) float32 records; returns (n,) float32."""
    particles = particles.astype(np.float64)
    return (0.5 * particles[:, MASS] * (particles[:, VX : VZ + 1] ** 2).sum(axis=1)).astype(np.float32)


# --- query, key and value --------------------------------------------------------------------------------------------


def split_qkv_launch(n_tokens, d_model):
    """Launch configuration of :func:`split_qkv`, one thread for each (token, column): ``(grid, block)``.

    Raises ValueError if a size is not positive.
    """
    return blocks_2d(n_tokens, d_model)


@cuda.jit
def split_qkv(qkv, q, k, v, n_tokens, n_head, head_dim):
    """q[head, t, i], k[head, t, i], v[head, t, i] = the three thirds of row t of qkv, cut into heads.

    qkv: (n_tokens, 3 * n_head * head_dim) float32, C-contiguous, each row query, key, value of one token.
    q, k, v: (n_head, n_tokens, head_dim) float32, C-contiguous, none of them overlapping ``qkv``.
    n_tokens, n_head, head_dim: int32.
    Launch: ``split_qkv[split_qkv_launch(n_tokens, n_head * head_dim)](…)``. Source: Radford et al. 2019 (GPT-2).
    """
    col, t = cuda.grid(2)  # neighbouring threads, neighbouring columns: coalesced
    d_model = n_head * head_dim
    if t < n_tokens and col < d_model:
        head = col // head_dim  # which head this column of the third belongs to
        i = col % head_dim  # and which of its elements it is
        q_col = col
        k_col = d_model + col
        v_col = 2 * d_model + col
        q[head, t, i] = qkv[t, q_col]
        k[head, t, i] = qkv[t, k_col]
        v[head, t, i] = qkv[t, v_col]


def split_qkv_reference(qkv, n_head):
    """NumPy reference of :func:`split_qkv`: (n_tokens, 3 * d_model) float32 and the number of heads.

    Returns float32 (3, n_head, n_tokens, head_dim): query, key and value.
    """
    n_tokens, width = qkv.shape
    head_dim = width // (3 * n_head)
    return np.ascontiguousarray(qkv.reshape(n_tokens, 3, n_head, head_dim).transpose(1, 2, 0, 3), dtype=np.float32)
