"""The memory behind the blocks: keys and values of every layer, in pages."""

from __future__ import annotations

import itertools

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
        self.dtype, self.block_shape = np.dtype(dtype), (len(self.layers), 2, *shape[1:])

    def read(self, block: int) -> np.ndarray:
        """A block's keys and values, (n_layer, 2, n_kv_head, block_size, head_dim), in the host's memory."""
        values = np.empty(self.block_shape, self.dtype)
        for to, pages in zip(values.reshape(-1, *self.block_shape[2:]), itertools.chain(*self.layers)):
            to[...] = pages[block].copy_to_host()
        return values

    def write(self, block: int, values: np.ndarray) -> None:
        """Bring back what `read` has given."""
        for given, pages in zip(values.reshape(-1, *self.block_shape[2:]), itertools.chain(*self.layers)):
            pages[block].copy_to_device(given)


def block_bytes(model: Model, block_size: int, dtype=np.float32) -> int:
    """Bytes of a block in all layers."""
    return 2 * len(model.layers) * model.n_kv_head * block_size * model.head_dim * np.dtype(dtype).itemsize
