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

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ch14_mini_llm.files import FileError, open_input
from ch14_mini_llm.model.config import LAYER_NORM_EPS, GPT2Config
from ch14_mini_llm.model.header import MODEL_FIELDS
from ch14_mini_llm.model.layout import (
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
from ch14_mini_llm.model.llama_file import load_llama
from ch14_mini_llm.model.version1 import load_v1, tensor_table

FP16_MAX = 65504.0

DATA_DIR = Path(__file__).resolve().parents[2] / "data"
_EXPONENT = np.uint16(0x7C00)  # all exponent bits set: the fp16 is an infinity or a NaN


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
        return to_fp16(name, tensors[name], shapes[name]).reshape(-1).view(np.uint8).data

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
    for name, tensor in tensors.items() if config.architecture == "gpt2" else ():
        flat = tensor.reshape(-1)
        bad = first_non_finite(flat)
        if bad is not None:
            index = tuple(int(i) for i in np.unravel_index(bad, tensor.shape))
            raise WeightsError(f"{path}: tensor {name} holds {flat[bad]} at index {index}; {REMAKE}")
    return config, tensors


def weights_digest(path: str | os.PathLike) -> str:
    """A digest of what is in a weight file: of its header, which has a checksum of each tensor; of the whole file in
    version 1. Raises `WeightsError` and OSError."""
    with open_input(path) as file:
        if read_version(file) == 1:
            file.seek(0)
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
        layout = read_layout(file)
    return hashlib.blake2b(repr((layout.model, layout.tensors)).encode(), digest_size=16).hexdigest()


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
    if model["architecture"] == "llama":
        return load_llama(file, layout)
    if model["architecture"] != "gpt2":
        raise WeightsError(
            f"architecture is {model['architecture']!r}; this code runs 'gpt2' and 'llama': choose another model"
        )
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


_LOADERS = {1: load_v1, 2: _load_v2}


def to_fp16(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
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
