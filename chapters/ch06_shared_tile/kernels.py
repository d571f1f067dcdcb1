"""Chapter 6, shared tiles: C = A @ B, three rungs, each reading less from global memory or taking more shapes.

A block computes one 16 x 16 tile of C. The last column counts what a block reads from global memory for its tile, in
floats; every read that a tile in shared memory replaces is one that 16 threads would have made for the same element.

========================  ================================  ============  =====================================
kernel                    what it changes                   shapes        floats read for a tile of C
========================  ================================  ============  =====================================
``matmul_v1_naive``       one thread an element of C        any           512 * K (each thread a row, a column)
``matmul_v2_tiled``       A and B pass through 16 x 16      multiples     32 * K (16 times less)
                          tiles in shared memory            of 16
``matmul_v3_any_shape``   guards: what lies outside is 0    any           32 * K
========================  ================================  ============  =====================================

All three take the same arguments and the same launch, ``matmul_launch(M, N)``; ``matmul_kernel`` is the last one.
"""

import numpy as np
from numba import cuda, float32

TILE = 16


def matmul_launch(M, N):
    """Launch configuration for a product of shape (M, N), one thread an element, columns along x: ``(grid, block)``.

    Raises ValueError if a size is not positive.
    """
    if M <= 0 or N <= 0:
        raise ValueError(f"shape ({M}, {N}): a product needs at least 1 row and 1 column")
    return ((N + TILE - 1) // TILE, (M + TILE - 1) // TILE), (TILE, TILE)


def require_multiples_of_tile(M, N, K):
    """Raises ValueError unless M, N and K are positive multiples of 16, as :func:`matmul_v2_tiled` needs them."""
    for name, size in (("M", M), ("N", N), ("K", K)):
        if size <= 0 or size % TILE:
            raise ValueError(
                f"{name} = {size} is not a positive multiple of {TILE}: matmul_v2_tiled would read past the arrays; "
                "pad the arrays with zeros, or use matmul_v3_any_shape"
            )


@cuda.jit
def matmul_v1_naive(A, B, C, M, N, K):
    """C = A @ B with one thread an element, everything from global memory.

    A: (M, K), B: (K, N), C: (M, N), all float32, C-contiguous; C overlaps neither. M, N, K: int32, at least 1.
    Launch: ``matmul_v1_naive[matmul_launch(M, N)](…)``.
    """
    col, row = cuda.grid(2)
    if row < M and col < N:
        acc = float32(0)
        for k in range(K):
            acc += A[row, k] * B[k, col]  # the 16 threads of a row read the same A, neighbours in B
        C[row, col] = acc


@cuda.jit
def matmul_v2_tiled(A, B, C, M, N, K):
    """C = A @ B through 16 x 16 tiles in shared memory, for multiples of 16 (:func:`require_multiples_of_tile`).

    A: (M, K), B: (K, N), C: (M, N), all float32, C-contiguous; C overlaps neither. M, N, K: int32, multiples of 16: the
    kernel does not look, and other sizes make it read and write past the arrays.
    Launch: ``matmul_v2_tiled[matmul_launch(M, N)](…)``. Source: CUDA C++ Programming Guide, section "Shared Memory".
    """
    a_tile = cuda.shared.array((TILE, TILE), float32)
    b_tile = cuda.shared.array((TILE, TILE), float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    col, row = cuda.grid(2)
    acc = float32(0)
    for k0 in range(0, K, TILE):
        a_tile[ty, tx] = A[row, k0 + tx]  # each thread brings one element of each tile
        b_tile[ty, tx] = B[k0 + ty, col]
        cuda.syncthreads()  # both tiles are complete
        for k in range(TILE):
            acc += a_tile[ty, k] * b_tile[k, tx]
        cuda.syncthreads()  # all have read them: the next round may overwrite
    C[row, col] = acc


@cuda.jit
def matmul_v3_any_shape(A, B, C, M, N, K):
    """C = A @ B through 16 x 16 tiles in shared memory, any shape.

    A: (M, K), B: (K, N), C: (M, N), all float32, C-contiguous; C overlaps neither. M, N, K: int32, at least 1.
    Launch: ``matmul_v3_any_shape[matmul_launch(M, N)](…)``.
    """
    a_tile = cuda.shared.array((TILE, TILE), float32)
    b_tile = cuda.shared.array((TILE, TILE), float32)
    tx = cuda.threadIdx.x
    ty = cuda.threadIdx.y
    col, row = cuda.grid(2)
    acc = float32(0)
    for k0 in range(0, K, TILE):
        if row < M and k0 + tx < K:
            a_tile[ty, tx] = A[row, k0 + tx]
        else:
            a_tile[ty, tx] = float32(0)  # what lies outside counts as 0: it adds nothing to the sum
        if k0 + ty < K and col < N:
            b_tile[ty, tx] = B[k0 + ty, col]
        else:
            b_tile[ty, tx] = float32(0)
        cuda.syncthreads()  # threads outside C come here too: a barrier is for the whole block
        for k in range(TILE):
            acc += a_tile[ty, k] * b_tile[k, tx]
        cuda.syncthreads()
    if row < M and col < N:
        C[row, col] = acc


matmul_kernel = matmul_v3_any_shape


def matmul_reference(A, B):
    """NumPy reference of all versions: (M, K) and (K, N) float32, summed in float64; returns (M, N) float32."""
    return (A.astype(np.float64) @ B.astype(np.float64)).astype(np.float32)
