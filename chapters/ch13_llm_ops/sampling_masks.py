"""Chapter 13, masks: which tokens may follow at all, a bit each.

Where a text must have a form, JSON say, a grammar knows after each token which ones can come next. The others get a
logit of -inf, and neither the likeliest token nor a draw can be one of them.

A mask changes with every token and is made by the host, so it is made small: 50 257 bits are 6.3 KB, where a float32
bias for each token would be 201 KB. The 32 lanes of a warp look at 32 tokens in a row, whose bits are one word: one
address, read once for all of them. What it costs: of an allowed token, nothing but that read; of another one, a store.

It works on the buffer that ``adjust_rows`` has filled, never on the model's own logits: log-probabilities are of those.
"""

import numpy as np
from numba import cuda

from chapters.ch13_llm_ops.sampling_rows import SLICE, adjust_launch

WORD_BITS = 32
mask_launch = adjust_launch  # a block a slice of a row, here too


def mask_words(vocab_size):
    """How many words of 32 bits a mask has."""
    return -(-vocab_size // WORD_BITS)


@cuda.jit
def mask_rows(logits, masks, slot, vocab_size):
    """logits[r, i] = -inf where bit i of the mask of row r is 0; rows without a mask are left alone.

    logits: (n_rows, vocab_size) float32. masks: (max_slots, mask_words(vocab_size)) uint32; token i's bit is bit i % 32
    of word i // 32. slot: (n_rows,) int32, the row of ``masks`` that is row r's, -1 for none. vocab_size: int32.
    Launch: ``mask_rows[mask_launch(n_rows, vocab_size)](…)``, any block. Source: Willard & Louf 2023, "Efficient Guided
    Generation for Large Language Models".
    """
    row = cuda.blockIdx.y
    begin = cuda.blockIdx.x * SLICE
    end = min(begin + SLICE, vocab_size)
    if slot[row] < 0:
        return
    mask = masks[slot[row]]
    for i in range(begin + cuda.threadIdx.x, end, cuda.blockDim.x):
        word = i // WORD_BITS
        bit = i % WORD_BITS
        if (mask[word] >> bit) & 1 == 0:
            logits[row, i] = -np.inf


def mask_reference(logits, mask):
    """NumPy reference of :func:`mask_rows` for a row: (n,) float32, (mask_words(n),) uint32; returns (n,) float32."""
    bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")[: len(logits)]
    return np.where(bits == 1, logits, np.float32(-np.inf))
