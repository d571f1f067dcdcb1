"""Masks of a step's rows on their way to the device: one copy a step, and only if a row has a mask."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
from collections.abc import Sequence as Listed

import numpy as np
from numba import cuda

from ch14_mini_llm.engine.constraint import Guard
from chapters.ch13_llm_ops.sampling_masks import mask_words

ALL = np.uint32(0xFFFFFFFF)


class Masks:
    """Room for the masks of ``max_batch`` rows. device: (max_batch, n_words) uint32, at one address for good."""

    def __init__(self, max_batch: int, vocab_size: int) -> None:
        self._host = np.zeros((max_batch, mask_words(vocab_size)), np.uint32)
        self.device = cuda.to_device(self._host)
        self._cuts: dict[int, object] = {}  # the first n rows on the device: to cut an array takes numba-cuda 50 µs

    def upload(self, guards: Listed[Guard]) -> None:
        """Row i is the mask of guards[i] from now on."""
        for row, guard in zip(self._host, guards):
            row[:] = ALL if guard.words is None else guard.words
        n = min(1 << (len(guards) - 1).bit_length(), len(self._host))
        if n not in self._cuts:
            self._cuts[n] = self.device[:n]
        self._cuts[n].copy_to_device(self._host[:n])
