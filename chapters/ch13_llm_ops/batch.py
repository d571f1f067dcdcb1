"""Chapter 13, batches: what the rows of several sequences need beside the kernels that take rows as they come.

Norms, products, activations do not care whose rows they are. Three things do: which token and which position a row has
(``embed_rows``), where its key and value go and what it attends to (chapter 12's ``ragged.py``).
"""

from numba import cuda


@cuda.jit
def embed_rows(tokens, positions, wte, wpe, out, n_rows, d_model):
    """out[r, c] = wte[tokens[r], c] + wpe[positions[r], c]: chapter 3's ``embed`` for rows of any sequence.

    tokens, positions: (n_rows,) int32, checked by the caller. wte: (vocab_size, d_model) float32. wpe: (n_ctx, d_model)
    float32. out: (n_rows, d_model) float32. n_rows, d_model: int32.
    Launch: ``embed_rows[blocks_2d(n_rows, d_model)](…)``.
    """
    col, r = cuda.grid(2)
    if r < n_rows and col < d_model:
        out[r, col] = wte[tokens[r], col] + wpe[positions[r], col]


def embed_rows_reference(tokens, positions, wte, wpe):
    """NumPy reference of :func:`embed_rows`."""
    return wte[tokens] + wpe[positions]
