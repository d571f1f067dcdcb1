"""Exercise ch04/transpose: turn each head's matrix, with coalesced reads and coalesced writes.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch04/transpose
"""

import numpy as np
from numba import cuda, float32

from common import memory_report

TILE = 32
ROWS = 8  # a block is TILE x ROWS threads

# --- your code begins (optional) ---
# --- your code ends ---


@cuda.jit
def transpose_heads(x, out, n_head, n_tokens, head_dim):
    """out[h, i, t] = x[h, t, i]: each head's matrix is transposed.

    x: (n_head, n_tokens, head_dim) float32. out: (n_head, head_dim, n_tokens) float32. All sizes: int, of any value.
    Launched with one block of (TILE, ROWS) threads for each tile of TILE x TILE elements: blockIdx.x counts the tiles
    along the last axis of x, blockIdx.y those along its tokens, blockIdx.z the heads.
    """
    # --- your code begins ---
    raise NotImplementedError("your code")
    # --- your code ends ---


# What follows is given: it launches your kernel, and counts what it asks of memory.


def transpose(x):
    """x (n_head, n_tokens, head_dim) float32 with its last two axes swapped."""
    n_head, n_tokens, head_dim = x.shape
    out = cuda.to_device(np.full((n_head, head_dim, n_tokens), -7, np.float32))
    grid = (head_dim + TILE - 1) // TILE, (n_tokens + TILE - 1) // TILE, n_head
    transpose_heads[grid, (TILE, ROWS)](cuda.to_device(x), out, n_head, n_tokens, head_dim)
    return out.copy_to_host()


def count(x):
    """What transpose(x) asks of memory: a list of dicts, one for each line, array and kind of access. CPU backend only.

    array: its name. space: "global", "shared" or "local". access: "read", "write" or "atomic". requests: of warps.
    sectors: of 32 bytes, moved in global memory. turns: of shared memory, best_turns: without bank conflicts.
    """
    with memory_report() as report:
        transpose(x)
    return [
        {
            "line": one.line, "array": one.array, "space": one.space, "access": one.access, "requests": one.requests,
            "sectors": one.sectors, "turns": one.wavefronts, "best_turns": one.ideal_wavefronts,
        }
        for one in report.lines
    ]  # fmt: skip
