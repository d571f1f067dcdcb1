"""Matrices of 8 or 4 bits on the device, for the level ``kv``: quantized here, or as a file has them."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.model.quantize import Blocks, unpacked
from ch14_mini_llm.model.roles import FewBits
from chapters.ch09_gemm.quantized import (
    BLOCK_BYTES,
    GROUP,
    pack_blocks_launch,
    pack_q4,
    pack_q8,
    quantize_reference,
    quantized_shapes,
)

BITS = {"int8": 8, "int4": 4}
KINDS = {8: "q8_0", 4: "q4_1"}  # of `Blocks`
KIND_BITS = {kind: bits for bits, kind in KINDS.items()}


def as_blocks(rows, bits: int) -> Blocks:
    """A matrix's rows in blocks of so many bits. What has few bits in a file stays as it is, whether 4 or 8: quantized
    twice it would only lose. Raises `RequestError` for rows that are no whole groups."""
    if isinstance(rows, Blocks):
        return rows
    n_in = rows.shape[1]
    if n_in % GROUP:
        raise RequestError(f"dtype int{bits}: a matrix has {n_in} inputs, no multiple of {GROUP}; use float16", "dtype")
    blocks = quantize_reference(unpacked(rows), bits)
    return Blocks(blocks.reshape(len(blocks), -1), KINDS[bits], rows.shape)


def few_bits(tensors: list, bits: int) -> FewBits:
    """Some matrices (n_out, n_in) as one on the device, their rows one below the other. Raises `RequestError`."""
    blocks = [as_blocks(tensor, bits) for tensor in tensors]
    if len({one.kind for one in blocks}) > 1:  # as many bits as the largest has
        bits = max(KIND_BITS[one.kind] for one in blocks)
        blocks = [one if KIND_BITS[one.kind] == bits else as_blocks(one.unpack(), bits) for one in blocks]
    bits, n_in = KIND_BITS[blocks[0].kind], blocks[0].shape[1]
    data = np.concatenate([one.data for one in blocks]).reshape(-1, n_in // GROUP, BLOCK_BYTES[bits])
    source = cuda.to_device(data), cuda.to_device(data.view(np.float16))
    n_out, (panels, steps) = len(data), quantized_shapes(n_in, len(data), bits)
    if bits == 8:
        arrays = cuda.device_array(panels, np.int8), cuda.device_array(steps, np.float16)
        pack_q8[pack_blocks_launch(n_in, n_out)](*source, *arrays, n_in, n_out)
    else:
        few = [cuda.device_array(steps, np.float16) for _ in ("steps", "least numbers")]
        arrays = cuda.device_array(panels, np.int32), *few
        pack_q4[pack_blocks_launch(n_in, n_out)](*source, *arrays, n_in, n_out)
    return FewBits(bits, arrays)
