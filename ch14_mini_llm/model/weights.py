"""A GPT-2's weight file: its tensors in order, a writer and a memory-mapping reader.

`layout.py` has the layout of the file, for any model, and its checksums; `config.py` has the sizes of a GPT-2. Here is
what a GPT-2 puts into the file. Files of version 1 are read as well: they have 16 int32 for a header, and then the
tensors as one stream without padding.

Every GPT-2 has the same `LAYER_NORM_EPS`, the tanh form of GELU in the MLP, and the token embedding for an output head
(tied), which is not stored twice. `data/README.md` shows the same as tables for people.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; tensor names and the (in, out)
orientation of the matrices are those of the published checkpoints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ch14_mini_llm.files import FileError, open_input
from ch14_mini_llm.model.config import LAYER_NORM_EPS, GPT2Config
from ch14_mini_llm.model.layout import (
    MODEL_FIELDS,
    REMAKE,
    VERSION,
    Layout,
    WeightsError,
    make_layout,
    read_layout,
    read_tensors,
    read_version,
    write_layout,
)

# The header of version 1: these int32, and 7 more that are 0.
V1_FIELDS = ("magic", "version", "n_layer", "n_head", "d_model", "d_ff", "n_ctx", "vocab_size", "dtype")
V1_INTS = 16
V1_HEADER_BYTES = 4 * V1_INTS
V1_FP16 = 1

FP16_MAX = 65504.0

DATA_DIR = Path(__file__).resolve().parents[2] / "data"
_EXPONENT = np.uint16(0x7C00)  # all exponent bits set: the fp16 is an infinity or a NaN


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


def gpt2_layout(config: GPT2Config) -> Layout:
    """The layout of a weight file of these sizes, of the version that is written."""
    return make_layout(_model_of(config), _fp16_tensors(config))


def save_weights(
    path: str | os.PathLike,
    config: GPT2Config,
    tensors: Mapping[str, np.ndarray],
    on_tensor: Callable[[str], None] | None = None,
) -> str:
    """Write `tensors` (name -> floating-point array of the shape `tensor_table` gives) as fp16; return the SHA-256.

    The file appears under `path` only when it is complete: a temporary file in the same folder is written, flushed to
    the disk and renamed. `tensors` is read one tensor at a time, so it may be a lazy mapping; `on_tensor(name)` is
    called after each, for a progress bar. Raises `WeightsError` for a missing or surplus tensor, a wrong shape,
    NaN or infinity, and a value that does not fit fp16; `FileError` if `path` is no place for a file.
    """
    shapes = {name: shape for name, shape, _ in tensor_table(config)}
    for what, names in (
        ("missing", set(shapes) - set(tensors)), ("not part of the layout", set(tensors) - set(shapes)),
    ):  # fmt: skip
        if names:
            some = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise WeightsError(f"{len(names)} tensors are {what}: {some}; see tensor_table(config) for the names")

    def read(name: str) -> memoryview:
        return _to_fp16(name, tensors[name], shapes[name]).reshape(-1).view(np.uint8).data

    return write_layout(path, gpt2_layout(config), read, on_tensor)


def load_weights(path: str | os.PathLike) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """Memory-map a weight file: (config, name -> read-only fp16 `np.memmap` view of the shape in `tensor_table`).

    Nothing is copied. Raises `WeightsError`, naming the file and the field, for a file that is missing, no regular
    file, truncated, damaged, of another format, version or architecture, of impossible sizes, or that holds NaN or
    infinity.
    """
    path = Path(path)
    try:
        with open_input(path) as file:
            version = read_version(file)
            if version not in _LOADERS:
                raise WeightsError(f"version is {version}; this code reads 1 and {VERSION}: {REMAKE}")
            config, tensors = _LOADERS[version](file)
    except FileNotFoundError:
        raise WeightsError(
            f"{path}: there is no such weight file; get real GPT-2 with data/download_gpt2.py, or name no weights "
            "to use the model in data/"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give the path of a weight file") from None
    except FileError as error:
        raise WeightsError(f"{path}: cannot be read ({error}); give the path of a weight file") from None
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        bad = first_non_finite(flat)
        if bad is not None:
            index = tuple(int(i) for i in np.unravel_index(bad, tensor.shape))
            raise WeightsError(f"{path}: tensor {name} holds {flat[bad]} at index {index}; {REMAKE}")
    return config, tensors


def default_weights(data_dir: str | os.PathLike | None = None) -> Path:
    """The weight file to use when none is named: real GPT-2 if it was downloaded, else the tiny model.

    Looks in `data_dir` (the repository's data/). Raises `WeightsError` when there is neither.
    """
    folder = DATA_DIR if data_dir is None else Path(data_dir)
    for name in ("gpt2-small.bin", "tiny-gpt2.bin"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"there are no weights in {folder}: neither gpt2-small.bin (get it with: python data/download_gpt2.py --out "
        "data/gpt2-small.bin) nor tiny-gpt2.bin (comes with the repository: git checkout data/tiny-gpt2.bin, or train "
        "one with data/train_tiny.py)"
    )


def first_non_finite(flat: np.ndarray, chunk: int = 1 << 18) -> int | None:
    """Index of the first NaN or infinity in a 1-D fp16 array, or None.

    NumPy's float16 arithmetic is slow (each value is converted), so this looks at the exponent bits instead, in
    pieces that stay in the cache: 124M values in well under a second.
    """
    bits = flat.view("<u2")
    exponents = np.empty(min(chunk, bits.size), dtype=np.uint16)
    for start in range(0, bits.size, chunk):
        piece = bits[start : start + chunk]
        found = np.bitwise_and(piece, _EXPONENT, out=exponents[: piece.size])
        if found.max() == _EXPONENT:
            return start + int(np.argmax(found == _EXPONENT))
    return None


def _model_of(config: GPT2Config) -> dict:
    """The header's model of a GPT-2."""
    model = {
        "architecture": "gpt2",
        **{field: int(size) for field, size in asdict(config).items()},
        "n_kv_head": int(config.n_head),
        "head_dim": int(config.head_dim),
        "epsilon": LAYER_NORM_EPS,
        "rotary_base": None,
        "tied_head": True,
        "tokenizer": "gpt2",
    }
    return {field: model[field] for field in MODEL_FIELDS}


def _fp16_tensors(config: GPT2Config) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "fp16", shape) for name, shape, _ in tensor_table(config)]


def _load_v2(file: BinaryIO) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """Sizes and tensors of a GPT-2, not yet looked at for NaN."""
    layout = read_layout(file)
    model = layout.model
    if model["architecture"] != "gpt2":
        raise WeightsError(f"architecture is {model['architecture']!r}; this code runs 'gpt2': choose another model")
    config = GPT2Config(**{field.name: model[field.name] for field in fields(GPT2Config)})
    expected = _model_of(config)
    for field, value in model.items():
        if value != expected.get(field):
            raise WeightsError(
                f"{field} is {value!r}; in a GPT-2 of these sizes it is {expected.get(field)!r}: choose another model"
            )
    stored = [(tensor.name, tensor.type, tensor.shape) for tensor in layout.tensors]
    for there, wanted in zip([*stored, None], [*_fp16_tensors(config), None]):
        if there != wanted:
            raise WeightsError(f"the header lists {there}, where a GPT-2 of these sizes has {wanted}: {REMAKE}")
    shapes = {name: shape for name, _, shape in stored}
    return config, {name: data.view("<f2").reshape(shapes[name]) for name, data in read_tensors(file, layout).items()}


def _load_v1(file: BinaryIO) -> tuple[GPT2Config, dict[str, np.ndarray]]:
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


_LOADERS = {1: _load_v1, 2: _load_v2}


def _to_fp16(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`tensor` as a C-contiguous little-endian fp16 array, after checking shape and values."""
    tensor = np.asarray(tensor)
    if tensor.shape != shape:
        raise WeightsError(f"tensor {name} has shape {tensor.shape}; the configuration asks for {shape}")
    if tensor.dtype.kind != "f":
        raise WeightsError(f"tensor {name} has dtype {tensor.dtype}; it must be floating point")
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(tensor, dtype="<f2")
    bad = first_non_finite(half.reshape(-1))
    if bad is not None:
        index = tuple(int(i) for i in np.unravel_index(bad, shape))
        value = tensor[index]
        if np.isfinite(value):
            raise WeightsError(
                f"tensor {name} holds {value:.9g} at index {index}; fp16 ends at {FP16_MAX:g}: scale it down"
            )
        raise WeightsError(f"tensor {name} holds {value} at index {index}; every weight must be finite")
    return half


def _describe(config: GPT2Config) -> str:
    return ", ".join(f"{field} {value}" for field, value in asdict(config).items())
