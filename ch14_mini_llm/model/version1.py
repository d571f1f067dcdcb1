"""Weight files of version 1: 16 int32 for a header, and then the tensors as one stream without padding or checksums."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, fields
from typing import BinaryIO

import numpy as np

from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.layout import REMAKE, WeightsError

# The header of version 1: these int32, and 7 more that are 0.
V1_FIELDS = ("magic", "version", "n_layer", "n_head", "d_model", "d_ff", "n_ctx", "vocab_size", "dtype")
V1_INTS = 16
V1_HEADER_BYTES = 4 * V1_INTS
V1_FP16 = 1


def tensor_table(config: GPT2Config) -> list[tuple[str, tuple[int, ...], int]]:
    """The tensors of a weight file in file order, as (name, shape, offset in bytes in a file of version 1).

    In a file of version 2 they are at the offsets that its header gives. Matrices are stored row by row as (in, out),
    so that y = x @ weight + bias.
    """
    d, d_ff = config.d_model, config.d_ff
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("wte.weight", (config.vocab_size, d)),
        ("wpe.weight", (config.n_ctx, d)),
    ]
    for layer in range(config.n_layer):
        block = (
            ("ln_1.weight", (d,)),
            ("ln_1.bias", (d,)),
            ("attn.c_attn.weight", (d, 3 * d)),
            ("attn.c_attn.bias", (3 * d,)),
            ("attn.c_proj.weight", (d, d)),
            ("attn.c_proj.bias", (d,)),
            ("ln_2.weight", (d,)),
            ("ln_2.bias", (d,)),
            ("mlp.c_fc.weight", (d, d_ff)),
            ("mlp.c_fc.bias", (d_ff,)),
            ("mlp.c_proj.weight", (d_ff, d)),
            ("mlp.c_proj.bias", (d,)),
        )
        shapes += [(f"h.{layer}.{name}", shape) for name, shape in block]
    shapes += [("ln_f.weight", (d,)), ("ln_f.bias", (d,))]

    table, offset = [], V1_HEADER_BYTES
    for name, shape in shapes:
        table.append((name, shape, offset))
        offset += 2 * math.prod(shape)
    return table


def load_v1(file: BinaryIO) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """Sizes and tensors of a file of version 1, which has no checksum, not yet looked at for NaN."""
    file.seek(0)
    raw = file.read(V1_HEADER_BYTES)
    if len(raw) < V1_HEADER_BYTES:
        raise WeightsError(f"the file length is {len(raw)} bytes; the header alone is {V1_HEADER_BYTES}: {REMAKE}")
    header = [int(value) for value in np.frombuffer(raw, dtype="<i4")]
    values = dict(zip(V1_FIELDS, header, strict=False))
    if values["dtype"] != V1_FP16:
        raise WeightsError(f"dtype is {values['dtype']}; it must be {V1_FP16}, which is fp16: {REMAKE}")
    for position in range(len(V1_FIELDS), V1_INTS):
        if header[position]:
            raise WeightsError(f"reserved header integer {position} is {header[position]}; it must be 0; {REMAKE}")
    try:
        config = GPT2Config(**{field.name: values[field.name] for field in fields(GPT2Config)})
    except WeightsError as error:
        raise WeightsError(f"{error}; the header is damaged: {REMAKE}") from None
    length, expected = os.fstat(file.fileno()).st_size, V1_HEADER_BYTES + 2 * config.n_parameters
    if length != expected:
        raise WeightsError(
            f"the file length is {length} bytes, but a model of the sizes in its header ({_describe(config)}) takes "
            f"{expected} bytes; the file is {'cut short' if length < expected else 'too long'}: {REMAKE}"
        )
    stream = np.memmap(file, dtype="<f2", mode="r", offset=V1_HEADER_BYTES)
    tensors = {}
    for name, shape, offset in tensor_table(config):
        start = (offset - V1_HEADER_BYTES) // 2
        tensors[name] = stream[start : start + math.prod(shape)].reshape(shape)
    return config, tensors


def _describe(config: GPT2Config) -> str:
    return ", ".join(f"{field} {value}" for field, value in asdict(config).items())
