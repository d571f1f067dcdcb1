"""The memory behind the blocks: keys and values of every layer, in pages."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.model.roles import Model


class PagedCache:
    """Pages 0 … n_blocks on the device; page 0 belongs to no sequence.

    layers: (k, v) of each layer, (n_blocks + 1, n_kv_head, block_size, head_dim) of ``dtype``. flat: the same memory.
    """

    def __init__(self, model: Model, n_blocks: int, block_size: int, dtype=np.float32) -> None:
        self.block_size = block_size
        shape = (n_blocks + 1, model.n_kv_head, block_size, model.head_dim)
        self.layers = [tuple(cuda.device_array(shape, dtype) for _ in range(2)) for _ in model.layers]
        self.flat = [tuple(pages.reshape(pages.size) for pages in layer) for layer in self.layers]


def block_bytes(model: Model, block_size: int, dtype=np.float32) -> int:
    """Bytes of a block in all layers."""
    return 2 * len(model.layers) * model.n_kv_head * block_size * model.head_dim * np.dtype(dtype).itemsize
