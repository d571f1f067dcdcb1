"""Weights of few bits: blocks of 32 numbers of a row with a scale, as ggml's files have them, and back to numbers.

===========  ==============================================================  ===========================
type         a block of 32 numbers                                           w[i]
===========  ==============================================================  ===========================
``q8_0``     float16 d; 32 int8 q                                 34 bytes   d * q[i]
``q4_1``     float16 d, m; 16 bytes: q[i] low, q[i + 16] high     20 bytes   d * q[i] + m
===========  ==============================================================  ===========================

Source: ggml, ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ch14_mini_llm.model.header import TYPES

BLOCK = 32


@dataclass(frozen=True)
class Blocks:
    """A matrix of few bits. data: (rows, bytes of a row) uint8. kind: of `TYPES`. shape: of the numbers."""

    data: np.ndarray
    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    def unpack(self, dtype=np.float32) -> np.ndarray:
        """The numbers, computed in float32, as ``dtype``."""
        _, n_bytes = TYPES[self.kind]
        blocks = self.data.reshape(-1, n_bytes)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        if self.kind == "q8_0":
            values = blocks[:, 2:].view(np.int8) * scale
        else:
            least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
            quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
            values = quants * scale + least
        return values.reshape(self.shape).astype(dtype, copy=False)

    def scales(self) -> np.ndarray:
        """Its scales and least values, float16: what is not finite in them is not in the numbers either."""
        _, n_bytes = TYPES[self.kind]
        blocks = self.data.reshape(-1, n_bytes)
        return np.ascontiguousarray(blocks[:, : 4 if self.kind == "q4_1" else 2]).view("<f2")


def unpacked(tensor, dtype=np.float32) -> np.ndarray:
    """A tensor of a file as an array of ``dtype``: `Blocks` are unpacked, arrays converted."""
    return tensor.unpack(dtype) if isinstance(tensor, Blocks) else np.ascontiguousarray(tensor, dtype=dtype)
