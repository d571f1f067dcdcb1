"""The layout of a weight file, whatever the model: a prefix of 16 bytes, a header in JSON, and the tensors.

The header names the architecture and its sizes, and lists the tensors with type, shape, place and checksum. So another
architecture, another type of tensor or a tokenizer in the file needs other words in the header, and no other layout.
`header.py` checks the words, `weights.py` says what a GPT-2 has in it; `data/README.md` shows it for people.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

import numpy as np

from ch14_mini_llm.files import replacing
from ch14_mini_llm.model.header import (
    ALIGNMENT,
    Tensor,
    WeightsError,
    aligned,
    check_model,
    check_names,
    json_object,
    no_constant,
    read_entries,
    size_of,
)

MAGIC = int.from_bytes(b"KbKW", "little")  # "Kernel by Kernel Weights": the file's first four bytes
VERSION = 2
PREFIX = struct.Struct("<4I")  # magic, version, bytes of the header, CRC-32 of these three and the header
MAX_HEADER = 1 << 24  # bytes
REMAKE = "make the file again with data/download_gpt2.py or data/train_tiny.py"


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
        entries.append(Tensor(name, kind, tuple(shape), offset, size_of(name, kind, shape)))
        offset += aligned(entries[-1].size)
    check_model(model)
    check_names(entries)
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
            file.write(bytes(aligned(tensor.size) - tensor.size))
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
        header = json.loads(text, object_pairs_hook=json_object, parse_constant=no_constant)
        if not isinstance(header, dict) or set(header) != {"model", "tensors"}:
            raise WeightsError("the header must have the two fields model and tensors")
        check_model(header["model"])
        tensors, offset = read_entries(header["tensors"])
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
        padding = stream[start + tensor.size : start + aligned(tensor.size)]
        if _crc32(data) != tensor.crc32 or padding.any():
            raise WeightsError(f"tensor {tensor.name} does not have its checksum; the file is damaged: {REMAKE}")
        return data

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib lets the other threads run meanwhile
        return dict(zip((tensor.name for tensor in layout.tensors), pool.map(checked, layout.tensors)))


def _pack(model: dict, entries: Iterable[Tensor]) -> bytes:
    """Prefix and header, up to the first tensor."""
    fields = [{**asdict(entry), "shape": list(entry.shape)} for entry in entries]
    text = json.dumps({"model": model, "tensors": fields}, separators=(",", ":")).encode()
    text = text.ljust(aligned(PREFIX.size + len(text)) - PREFIX.size)
    if len(text) > MAX_HEADER:
        raise WeightsError(f"the header takes {len(text)} bytes; it can be {MAX_HEADER}")
    start = PREFIX.pack(MAGIC, VERSION, len(text), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(text, zlib.crc32(start))) + text


def _crc32(data: memoryview | np.ndarray) -> str:
    return f"{zlib.crc32(data):08x}"
