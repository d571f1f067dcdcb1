"""A Llama in a weight file: its tensors in the types that they came in, and its tokenizer beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import BinaryIO

import numpy as np

from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.header import MODEL_FIELDS, TYPES
from ch14_mini_llm.model.layout import REMAKE, Layout, WeightsError, make_layout, read_tensors, write_layout
from ch14_mini_llm.model.llama import llama_tensors
from ch14_mini_llm.model.quantize import Blocks

ARRAYS = {"fp16": "<f2", "fp32": "<f4"}
KINDS = {"float16": "fp16", "float32": "fp32"}
PACKED = tuple(kind for kind, (values, _) in TYPES.items() if values > 1)
TOKENIZER = "tokenizer.json"  # the name of the tensor of bytes, and what the header calls the tokenizer


def save_llama(
    path,
    config: LlamaConfig,
    tensors: Mapping[str, object],
    tokenizer: bytes,
    on_tensor: Callable[[str], None] | None = None,
) -> str:
    """Write a Llama and its tokenizer (`tokenizer.own`); returns the file's SHA-256.

    tensors: name -> float16 or float32 array, or `Blocks`, of the shapes of `llama_tensors`; each is kept in its type.
    Raises `WeightsError` for a tensor that is missing, of another shape or type, or not finite, and `FileError`.
    """
    listed = []
    for name, shape in llama_tensors(config):
        if name not in tensors:
            raise WeightsError(f"tensor {name} is missing; a Llama of these sizes has it")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"tensor {name} has shape {tuple(tensor.shape)}; the configuration asks for {shape}")
        kind = tensor.kind if isinstance(tensor, Blocks) else KINDS.get(str(tensor.dtype))
        if kind is None:
            raise WeightsError(f"tensor {name} has dtype {tensor.dtype}; it must be float16, float32 or blocks")
        check_finite(name, tensor)
        listed.append((name, kind, shape))
    listed.append((TOKENIZER, "bytes", (len(tokenizer),)))

    def read(name: str) -> memoryview:
        if name == TOKENIZER:
            return memoryview(tokenizer)
        tensor = tensors[name]
        array = tensor.data if isinstance(tensor, Blocks) else tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    return write_layout(path, make_layout(_model_of(config), listed), read, on_tensor)


def load_llama(file: BinaryIO, layout: Layout) -> tuple[LlamaConfig, dict[str, object]]:
    """Sizes and tensors of an open file: arrays and `Blocks` on the mapped file, and `TOKENIZER`'s bytes."""
    model = layout.model
    config = LlamaConfig(**{field.name: model[field.name] for field in fields(LlamaConfig)})
    if model["tokenizer"] != TOKENIZER:
        raise WeightsError(f"tokenizer is {model['tokenizer']!r}; a Llama's is {TOKENIZER!r}, in the file: {REMAKE}")
    wanted = {**dict(llama_tensors(config)), TOKENIZER: None}
    if [entry.name for entry in layout.tensors] != list(wanted):
        raise WeightsError(f"the header's tensors are not those of a Llama of these sizes, in their order: {REMAKE}")
    for entry in layout.tensors:
        types = ("bytes",) if entry.name == TOKENIZER else ARRAYS if len(entry.shape) == 1 else (*ARRAYS, *PACKED)
        if entry.type not in types or wanted[entry.name] not in (None, entry.shape):
            raise WeightsError(
                f"tensor {entry.name} is {entry.type} of shape {entry.shape}; in a Llama of these sizes it is "
                f"{' or '.join(types)} of shape {wanted[entry.name]}: {REMAKE}"
            )
    tensors: dict[str, object] = {}
    data = read_tensors(file, layout)
    for entry in layout.tensors:
        raw = data[entry.name]
        if entry.type in ARRAYS:
            tensors[entry.name] = raw.view(ARRAYS[entry.type]).reshape(entry.shape)
        elif entry.type == "bytes":
            tensors[entry.name] = raw
        else:
            tensors[entry.name] = Blocks(raw.reshape(entry.shape[0], -1), entry.type, entry.shape)
    for name, tensor in tensors.items():
        if name != TOKENIZER:
            check_finite(name, tensor)
    return config, tensors


def check_finite(name: str, tensor) -> None:
    """Raises `WeightsError` for a tensor that holds NaN or infinity."""
    numbers = tensor.scales() if isinstance(tensor, Blocks) else tensor
    if not np.isfinite(numbers).all():
        bad = np.unravel_index(int(np.argmin(np.isfinite(numbers))), numbers.shape)
        what = "a scale of" if isinstance(tensor, Blocks) else "a value of"
        raise WeightsError(f"{what} tensor {name}, number {tuple(map(int, bad))}, is {numbers[bad]}: it must be finite")


def _model_of(config: LlamaConfig) -> dict:
    """The header's model of a Llama."""
    sizes = {name: int(value) if type(value) is not bool and name not in ("epsilon", "rotary_base") else value
             for name, value in asdict(config).items()}  # fmt: skip
    model = {"architecture": "llama", **sizes, "tokenizer": TOKENIZER}
    return {field: model[field] for field in MODEL_FIELDS}
