"""Chapter 13, batches: what the rows of several sequences need beside the kernels that take rows as they come.

Norms, products, activations do not care whose rows they are. Three things do: which token and which position a row has
(``embed_rows``), where its key and value go and what it attends to (chapter 12's ``ragged.py``).
"""

import numpy as np
from numba import cuda, float32


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


def embed_rows_reference(tokens, source, chosen, positions, wte, wpe):
    """NumPy reference of :func:`embed_rows`."""
    tokens = np.where(source < 0, tokens, chosen[np.maximum(source, 0)])
    return wte[np.maximum(tokens, 0)].astype(np.float32) + wpe[np.maximum(positions, 0)].astype(np.float32)
