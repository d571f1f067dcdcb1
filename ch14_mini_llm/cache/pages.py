"""The memory behind the blocks: keys and values of every layer, in pages."""

from __future__ import annotations

from collections.abc import Sequence

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.model.roles import Model
from chapters.ch13_llm_ops.kv_blocks import blocks_in, blocks_launch, blocks_out

WORD = np.int64  # what blocks are copied in; a page of at least 4 tokens is a whole number of them


class PagedCache:
    """Pages 0 … n_blocks on the device; page 0 belongs to no sequence.

    layers: (k, v) of each layer, (n_blocks + 1, n_kv_head, block_size, head_dim) of ``dtype``. flat: the same memory.
    words: all of it, (2 * n_layer, n_blocks + 1, words of a page).
    """

    def __init__(self, model: Model, n_blocks: int, block_size: int, dtype=np.float32) -> None:
        self.block_size, self.dtype = block_size, np.dtype(dtype)
        page = model.n_kv_head, block_size, model.head_dim
        pieces = cuda.device_array((2 * len(model.layers), n_blocks + 1, *page), dtype)
        self.layers = [(pieces[2 * layer], pieces[2 * layer + 1]) for layer in range(len(model.layers))]
        self.flat = [tuple(pages.reshape(pages.size) for pages in layer) for layer in self.layers]
        self.words = pieces.reshape(len(pieces), n_blocks + 1, int(np.prod(page))).view(WORD)
        self.block_shape = (len(self.layers), 2, *page)

    def host(self, n: int) -> np.ndarray:
        """Room for ``n`` blocks in the host's memory, (n, 2 * n_layer, words of a page), which the device reaches.
        Raises MemoryError if there is not so much."""
        try:
            return cuda.mapped_array((n, self.words.shape[0], self.words.shape[2]), WORD)
        except Exception as error:  # the driver's, of several classes
            size = n * self.words.shape[0] * self.words.shape[2] * self.words.dtype.itemsize
            raise MemoryError(f"no {size / 1e9:.2g} GB of the host's memory for {n} blocks ({error})") from None

    def touch(self, blocks: Sequence[int]) -> None:
        """Have the memory of these blocks at hand, without content. A host's system gives memory when it is first
        written, and takes longer for that than the writing does; a GPU's is there."""
        if common.BACKEND == "cpu":
            for block in blocks:
                self.words[:, block] = 0

    def read(self, blocks: Sequence[int], memory: np.ndarray, slots: Sequence[int]) -> None:
        """Bring blocks to slots of what `host` has given. They are there when this returns."""
        n_pieces, _, size = self.words.shape
        arguments = self.words, _numbers(blocks), _numbers(slots), memory, size
        blocks_out[blocks_launch(len(blocks), n_pieces, size)](*arguments)
        cuda.synchronize()

    def write(self, memory: np.ndarray, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Bring them back. The slots are free again when this returns."""
        n_pieces, _, size = self.words.shape
        arguments = memory, _numbers(slots), _numbers(blocks), self.words, size
        blocks_in[blocks_launch(len(blocks), n_pieces, size)](*arguments)
        cuda.synchronize()


def _numbers(numbers: Sequence[int]):
    return cuda.to_device(np.array(numbers, np.int32))


def block_bytes(model: Model, block_size: int, dtype=np.float32) -> int:
    """Bytes of a block in all layers."""
    return 2 * len(model.layers) * model.n_kv_head * block_size * model.head_dim * np.dtype(dtype).itemsize
