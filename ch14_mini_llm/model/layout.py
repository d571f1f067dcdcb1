"""The layout of a weight file, whatever the model: a prefix of 16 bytes, a header in JSON, and the tensors.

The header names the architecture and its sizes, and lists the tensors with type, shape, place and checksum. So another
architecture, another type of tensor or a tokenizer in the file needs other words in the header, and no other layout.
`weights.py` says what a GPT-2 has in it; `data/README.md` shows it for people.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

import numpy as np

from ch14_mini_llm.files import replacing

MAGIC = int.from_bytes(b"KbKW", "little")  # "Kernel by Kernel Weights": the file's first four bytes
VERSION = 2
PREFIX = struct.Struct("<4I")  # magic, version, bytes of the header, CRC-32 of these three and the header
ALIGNMENT = 64  # of the data and of each tensor in it: a cache line, and more than a type of 8 bytes needs
MAX_HEADER = 1 << 24  # bytes
# The types of tensors: (values, bytes) of a block; a row of the last axis is so many whole blocks. A type with several
# values a block, such as 32 of 4 bits with a scale of 16 bits in 18 bytes, is one more entry.
TYPES = {"fp16": (1, 2), "fp32": (1, 4), "bytes": (1, 1)}

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

REMAKE = "make the file again with data/download_gpt2.py or data/train_tiny.py"


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


@dataclass(frozen=True)
class Layout:
    """What a header says. model: field -> value; data: where the first tensor starts; end: the length of the file."""

    model: dict
    tensors: tuple[Tensor, ...]
    data: int
    end: int


def make_layout(model: dict, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """The layout of a file that is yet to be written. tensors: (name, type, shape), in file order.

    Raises `WeightsError` for a field or a type that cannot be.
    """
    entries, offset = [], 0
    for name, kind, shape in tensors:
        entries.append(Tensor(name, kind, tuple(shape), offset, _size(name, kind, shape)))
        offset += _aligned(entries[-1].size)
    _check_model(model)
    _check_names(entries)
    data = len(_pack(model, entries))
    return Layout(model, tuple(entries), data, data + offset)


def write_layout(
    path: str | os.PathLike,
    layout: Layout,
    read: Callable[[str], bytes | memoryview],
    on_tensor: Callable[[str], None] | None = None,
) -> str:
    """Write a weight file; returns its SHA-256.

    layout: from `make_layout`. read(name): the bytes of a tensor, asked for one tensor after the other;
    on_tensor(name): called after each. The file appears under `path` only when it is complete. Raises `WeightsError`
    for a tensor of another size, `FileError` if `path` is no place for a file, and OSError.
    """
    with replacing(path) as file:
        file.write(bytes(layout.data))  # the header comes last, with the checksums: its length does not depend on them
        entries = []
        for tensor in layout.tensors:
            data = memoryview(read(tensor.name)).cast("B")
            if len(data) != tensor.size:
                raise WeightsError(f"tensor {tensor.name} has {len(data)} bytes, where its shape takes {tensor.size}")
            file.write(data)
            file.write(bytes(_aligned(tensor.size) - tensor.size))
            entries.append(replace(tensor, crc32=_crc32(data)))
            if on_tensor is not None:
                on_tensor(tensor.name)
        file.seek(0)
        file.write(_pack(layout.model, entries))
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_version(file: BinaryIO) -> int:
    """The version of an open weight file, not looked at any further.

    Raises `WeightsError` for a file that is shorter than any header, or of another format.
    """
    file.seek(0)
    raw = file.read(PREFIX.size)
    if len(raw) < PREFIX.size:
        raise WeightsError(f"the file length is {len(raw)} bytes; the shortest header is {PREFIX.size}: {REMAKE}")
    magic, version = PREFIX.unpack(raw)[:2]
    if magic != MAGIC:
        raise WeightsError(
            f"magic is {magic:#x}; it must be {MAGIC:#x}; the file is not in this project's format: convert the model "
            "with data/download_gpt2.py"
        )
    return version


def read_layout(file: BinaryIO) -> Layout:
    """The layout of an open weight file of version 2. Raises `WeightsError`; reads no tensor."""
    file.seek(0)
    prefix = file.read(PREFIX.size)
    length, crc = PREFIX.unpack(prefix)[2:]
    data = PREFIX.size + length
    if not 0 < length <= MAX_HEADER or data % ALIGNMENT:
        raise WeightsError(
            f"the header's length is {length} bytes; it must be from 1 to {MAX_HEADER}, and with the {PREFIX.size} "
            f"before it a multiple of {ALIGNMENT}: {REMAKE}"
        )
    text = file.read(length)
    if len(text) < length:
        raise WeightsError(f"the file length is {PREFIX.size + len(text)} bytes; the header alone is {data}: {REMAKE}")
    if zlib.crc32(text, zlib.crc32(prefix[:-4])) != crc:
        raise WeightsError(f"the header does not have the checksum that stands before it; it is damaged: {REMAKE}")
    try:
        header = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        if not isinstance(header, dict) or set(header) != {"model", "tensors"}:
            raise WeightsError("the header must have the two fields model and tensors")
        _check_model(header["model"])
        tensors, offset = _entries(header["tensors"])
    except WeightsError as error:
        raise WeightsError(f"{error}; {REMAKE}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the header cannot be read as JSON ({str(error)[:100]}); {REMAKE}") from None
    return Layout(header["model"], tensors, data, data + offset)


def read_tensors(file: BinaryIO, layout: Layout) -> dict[str, np.ndarray]:
    """Memory-map an open weight file: name -> its bytes, a read-only 1-D uint8 `np.memmap`, all of them checked.

    Raises `WeightsError` for a file of another length than the header says, and for bytes that were changed.
    """
    length = os.fstat(file.fileno()).st_size
    if length != layout.end:
        raise WeightsError(
            f"the file length is {length} bytes, but what its header lists takes {layout.end} bytes; the file is "
            f"{'cut short' if length < layout.end else 'too long'}: {REMAKE}"
        )
    stream = np.memmap(file, dtype=np.uint8, mode="r")

    def checked(tensor: Tensor) -> np.ndarray:
        start = layout.data + tensor.offset
        data = stream[start : start + tensor.size]
        padding = stream[start + tensor.size : start + _aligned(tensor.size)]
        if _crc32(data) != tensor.crc32 or padding.any():
            raise WeightsError(f"tensor {tensor.name} does not have its checksum; the file is damaged: {REMAKE}")
        return data

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib lets the other threads run meanwhile
        return dict(zip((tensor.name for tensor in layout.tensors), pool.map(checked, layout.tensors)))


def _pack(model: dict, entries: Iterable[Tensor]) -> bytes:
    """Prefix and header, up to the first tensor."""
    fields = [{**asdict(entry), "shape": list(entry.shape)} for entry in entries]
    text = json.dumps({"model": model, "tensors": fields}, separators=(",", ":")).encode()
    text = text.ljust(_aligned(PREFIX.size + len(text)) - PREFIX.size)
    if len(text) > MAX_HEADER:
        raise WeightsError(f"the header takes {len(text)} bytes; it can be {MAX_HEADER}")
    start = PREFIX.pack(MAGIC, VERSION, len(text), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(text, zlib.crc32(start))) + text


def _check_model(model: object) -> None:
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


def _entries(listed: object) -> tuple[tuple[Tensor, ...], int]:
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
        size = _size(entry.name, entry.type, entry.shape)
        if (entry.offset, entry.size) != (offset, size):
            raise WeightsError(
                f"tensor {entry.name[:60]} is to be {entry.size} bytes at {entry.offset}, but its shape takes {size}, "
                f"and those before it end at {offset}"
            )
        entries.append(entry)
        offset += _aligned(size)
    _check_names(entries)
    return tuple(entries), offset


def _check_names(entries: list[Tensor]) -> None:
    names = set()
    for entry in entries:
        if entry.name in names:
            raise WeightsError(f"tensor {entry.name[:60]} is listed twice")
        names.add(entry.name)


def _size(name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raises `WeightsError` for a type that is not known, and for rows that are no whole blocks."""
    if kind not in TYPES:
        raise WeightsError(f"tensor {name[:60]} is of type {kind[:60]!r}; this code knows {', '.join(TYPES)}")
    values, size = TYPES[kind]
    if (shape[-1] if shape else 1) % values:
        raise WeightsError(f"tensor {name[:60]} has shape {shape}; type {kind} needs rows of a multiple of {values}")
    return math.prod(shape) // values * size


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; raises `WeightsError` for a field that is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise WeightsError("a field of the header is there twice")
    return fields


def _no_constant(name: str) -> None:
    raise WeightsError(f"the header holds {name}, which is not a number of JSON's")


def _crc32(data: memoryview | np.ndarray) -> str:
    return f"{zlib.crc32(data):08x}"


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
