"""Chapter 13, batches: what the rows of several sequences need beside the kernels that take rows as they come.

Norms, products, activations do not care whose rows they are. Three things do: which token and which position a row has
(``embed_rows``), where its key and value go (``place_rows``), and what it attends to (chapter 12's ``ragged.py``). And
of a prompt's rows only the last is of use in the end: ``take_rows``.
"""

import numpy as np
from numba import cuda, float32, int32

from chapters.ch03_indexing.kernels import blocks_1d


@cuda.jit
def embed_rows(tokens, source, chosen, positions, wte, wpe, out, n_rows, d_model):
    """out[r, c] = wte[token of r, c] + wpe[positions[r], c]: chapter 3's ``embed`` for rows of any sequence.

    The token is tokens[r], or where source[r] is not negative chosen[source[r]], which the step before has left there:
    the host need not have seen it. tokens, source, positions: (n_rows,), chosen: (any,) int32, tokens and positions
    checked by the caller; a chosen token below 0 (there was none) embeds as 0, and so does a position (padding). wte:
    (vocab_size, d_model), wpe: (n_ctx, d_model), float32 or float16. out: (n_rows, d_model) float32. n_rows, d_model:
    int32. Launch: ``embed_rows[blocks_2d(n_rows, d_model)](…)``.
    """
    col, r = cuda.grid(2)
    if r < n_rows and col < d_model:
        token = tokens[r] if source[r] < 0 else chosen[source[r]]
        out[r, col] = float32(wte[max(token, 0), col]) + float32(wpe[max(positions[r], 0), col])


@cuda.jit
def embed_tokens(tokens, source, chosen, wte, out, n_rows, d_model):
    """out[r, c] = wte[token of r, c]: :func:`embed_rows` of a model that has no table of positions.

    Arguments as there. Launch: ``embed_tokens[blocks_2d(n_rows, d_model)](…)``.
    """
    col, r = cuda.grid(2)
    if r < n_rows and col < d_model:
        token = tokens[r] if source[r] < 0 else chosen[source[r]]
        out[r, col] = float32(wte[max(token, 0), col])


@cuda.jit(device=True, forceinline=True)
def slot_of(block_table, seq, position, block_size):
    """Where a token lies in the pages, page * block_size + place; -1 behind the table's end. block_size: 2 ** n."""
    page_bits = 31 - cuda.clz(int32(block_size))
    if position >> page_bits >= block_table.shape[1]:
        return int32(-1)
    return int32((block_table[seq, position >> page_bits] << page_bits) + (position & (block_size - 1)))


PLACE_THREADS = 128


def place_rows_launch(n_rows):
    """Launch configuration of :func:`place_rows`: ``(grid, block)``. Raises ValueError without a row."""
    return blocks_1d(n_rows, PLACE_THREADS)


@cuda.jit
def place_rows(slot_mapping, block_table, positions, n_rows, block_size):
    """slot_mapping[i] = where position positions[i] of the sequence in line i of block_table lies; -1 stays -1.

    For steps whose rows have moved on by themselves (``append_rows``), when the table has new pages. slot_mapping,
    positions: (n_rows,) int32. block_table: (n_rows or more, max_blocks) int32. n_rows, block_size: int32, block_size a
    power of two. Launch: ``place_rows[place_rows_launch(n_rows)](…)``.
    """
    i = cuda.grid(1)
    if i < n_rows and positions[i] >= 0:
        slot_mapping[i] = slot_of(block_table, i, positions[i], block_size)


@cuda.jit
def take_rows(x, rows, out, n_rows, d_model):
    """out[i] = x[rows[i]] for i < n_rows: the rows that logits are asked for.

    x: (any, d_model), out: (n_rows or more, d_model) float32. rows: (n_rows,) int32. n_rows, d_model: int32. Launch:
    ``take_rows[blocks_2d(n_rows, d_model)](…)``.
    """
    col, i = cuda.grid(2)
    if i < n_rows and col < d_model:
        out[i, col] = x[rows[i], col]


def place_rows_reference(slot_mapping, block_table, positions, block_size):
    """NumPy reference of :func:`place_rows`: the new slots."""
    lines, places = np.arange(len(positions)), np.maximum(positions, 0)
    slots = block_table[lines, places // block_size] * block_size + places % block_size
    return np.where(positions >= 0, slots, slot_mapping).astype(np.int32)


def embed_rows_reference(tokens, source, chosen, positions, wte, wpe):
    """NumPy reference of :func:`embed_rows`."""
    tokens = np.where(source < 0, tokens, chosen[np.maximum(source, 0)])
    return wte[np.maximum(tokens, 0)].astype(np.float32) + wpe[np.maximum(positions, 0)].astype(np.float32)
