"""What the header of a weight file may say: fields of the model, types and places of tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

ALIGNMENT = 64  # of the data and of each tensor in it: a cache line, and more than a type of 8 bytes needs
# The types of tensors: (values, bytes) of a block; a row of the last axis is so many whole blocks. `quantize.py` knows
# those with several values a block.
TYPES = {"fp16": (1, 2), "fp32": (1, 4), "bytes": (1, 1), "q8_0": (32, 34), "q4_1": (32, 20)}

# Limits of sizes are generous (GPT-2 XL is 48, 25, 1600, 6400, 1024, 50257): they are there to catch garbage.
LIMITS = {
    "n_layer": (1, 1024),
    "n_head": (1, 1024),
    "n_kv_head": (1, 1024),
    "head_dim": (1, 65536),
    "d_model": (1, 65536),
    "d_ff": (1, 262144),
    "n_ctx": (1, 1048576),
    "vocab_size": (1, 4194304),
}
# What the header says of the model, and of which kind it is. All of it must be there, for every architecture.
MODEL_FIELDS = {
    "architecture": (str,),
    **dict.fromkeys(LIMITS, (int,)),  # n_kv_head: heads of keys and values, fewer than n_head where they are grouped
    "epsilon": (float,),  # of the norms
    "rotary_base": (float, None),  # None: positions are not rotary
    "tied_head": (bool,),  # whether the output head is the token embedding, and not stored
    "tokenizer": (str, None),  # its name; one of its own is a tensor of this name and of type bytes
}
# Fields that came later; a file without one means what it meant before. A field that is in neither is refused: what
# this code does not know may change what the numbers mean.
LATER_FIELDS: dict[str, tuple] = {}


class WeightsError(ValueError):
    """A weight file or a model configuration that cannot be used; the message says which field and what to do."""


@dataclass(frozen=True)
class Tensor:
    """An entry of the header. offset: in bytes from the first tensor; size: in bytes; crc32: of them, 8 hex digits."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int
    crc32: str = "00000000"


def check_model(model: object) -> None:
    """Raises `WeightsError` unless `model` has the fields of a model, and values that can be."""
    if not isinstance(model, dict):
        raise WeightsError("the header's model must be an object")
    known = MODEL_FIELDS | LATER_FIELDS
    for what, fields in (("is missing", MODEL_FIELDS.keys() - model), ("is unknown", model.keys() - known)):
        if fields:
            raise WeightsError(f"the header's field {min(fields)[:60]!r} {what}")
    for field, value in model.items():
        _check_field(field, value, known[field])
    if model["n_head"] % model["n_kv_head"]:
        raise WeightsError(
            f"n_head is {model['n_head']} and n_kv_head is {model['n_kv_head']}; n_head must be a multiple of n_kv_head"
        )


def _check_field(field: str, value: object, kinds: tuple) -> None:
    low, high = LIMITS.get(field, (0, 2**53))
    allowed = {
        str: (isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable(), "a name"),
        int: (type(value) is int and low <= value <= high, f"from {low} to {high}"),
        float: (type(value) in (int, float) and 0 < value < 1e300, "a number above 0"),
        bool: (type(value) is bool, "true or false"),
        None: (value is None, "null"),
    }
    if not any(allowed[kind][0] for kind in kinds):
        words = " or ".join(allowed[kind][1] for kind in kinds)
        raise WeightsError(f"{field} is {json.dumps(value)[:60]}; it must be {words}")


def read_entries(listed: object) -> tuple[tuple[Tensor, ...], int]:
    """(the header's tensors, the length of the data), after checking that they lie one behind the other."""
    if not isinstance(listed, list):
        raise WeightsError("the header's tensors must be a list")
    entries, offset = [], 0
    for number, entry in enumerate(listed):
        fields = Tensor.__dataclass_fields__
        if not isinstance(entry, dict) or entry.keys() != fields.keys():
            raise WeightsError(f"entry {number} of the header's tensors must have the fields {', '.join(fields)}")
        if not all(isinstance(entry[key], str) and entry[key].isprintable() for key in ("name", "type", "crc32")):
            raise WeightsError(f"entry {number} of the header's tensors must have text for name, type and crc32")
        shape = entry["shape"] if isinstance(entry["shape"], list) else [None]
        if not all(type(value) is int and 0 <= value < 1 << 62 for value in (entry["offset"], entry["size"], *shape)):
            raise WeightsError(f"tensor {entry['name'][:60]} must have whole numbers for offset, size and shape")
        entry = Tensor(**{**entry, "shape": tuple(shape)})
        size = size_of(entry.name, entry.type, entry.shape)
        if (entry.offset, entry.size) != (offset, size):
            raise WeightsError(
                f"tensor {entry.name[:60]} is to be {entry.size} bytes at {entry.offset}, but its shape takes {size}, "
                f"and those before it end at {offset}"
            )
        entries.append(entry)
        offset += aligned(size)
    check_names(entries)
    return tuple(entries), offset


def check_names(entries: list[Tensor]) -> None:
    names = set()
    for entry in entries:
        if entry.name in names:
            raise WeightsError(f"tensor {entry.name[:60]} is listed twice")
        names.add(entry.name)


def size_of(name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raises `WeightsError` for a type that is not known, and for rows that are no whole blocks."""
    if kind not in TYPES:
        raise WeightsError(f"tensor {name[:60]} is of type {kind[:60]!r}; this code knows {', '.join(TYPES)}")
    values, size = TYPES[kind]
    if (shape[-1] if shape else 1) % values:
        raise WeightsError(f"tensor {name[:60]} has shape {shape}; type {kind} needs rows of a multiple of {values}")
    return math.prod(shape) // values * size


def json_object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; raises `WeightsError` for a field that is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise WeightsError("a field of the header is there twice")
    return fields


def no_constant(name: str) -> None:
    raise WeightsError(f"the header holds {name}, which is not a number of JSON's")


def aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
