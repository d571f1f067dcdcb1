"""The weight file: its layout, written down once, with a writer and a memory-mapping reader.

A file is a header of 16 little-endian int32 followed by every tensor of a GPT-2 as one fp16 stream, without
padding, in the order `tensor_table` gives. Two numbers of the architecture have no field because every GPT-2 shares
them: layer norm uses `LAYER_NORM_EPS`, and the MLP uses the tanh form of GELU. The output head is the token
embedding itself (tied), so it is not stored twice. `data/README.md` shows the same layout as a table for people.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; tensor names and the (in, out)
orientation of the matrices are those of the published checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

MAGIC = int.from_bytes(b"KbKW", "little")  # "Kernel by Kernel Weights": the file's first four bytes
VERSION = 1
DTYPE_FP16 = 1
HEADER_FIELDS = ("magic", "version", "n_layer", "n_head", "d_model", "d_ff", "n_ctx", "vocab_size", "dtype")
HEADER_INTS = 16
HEADER_BYTES = 4 * HEADER_INTS
LAYER_NORM_EPS = 1e-5
FP16_MAX = 65504.0

# Upper limits are generous (GPT-2 XL is 48, 25, 1600, 6400, 1024, 50257): they are there to catch garbage.
LIMITS = {
    "n_layer": (1, 1024),
    "n_head": (1, 1024),
    "d_model": (1, 65536),
    "d_ff": (1, 262144),
    "n_ctx": (1, 1048576),
    "vocab_size": (1, 4194304),
}

DATA_DIR = Path(__file__).resolve().parent.parent / "data"
_REMAKE = "make the file again with data/download_gpt2.py or data/train_tiny.py"
_EXPONENT = np.uint16(0x7C00)  # all exponent bits set: the fp16 is an infinity or a NaN


class WeightsError(ValueError):
    """A weight file or a model configuration that cannot be used; the message says which field and what to do."""


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2. Raises `WeightsError` for sizes no model can have.

    n_layer: transformer blocks; n_head: attention heads a block; d_model: width of the residual stream;
    d_ff: width of the MLP's hidden layer (4 * d_model in every published GPT-2); n_ctx: longest sequence in tokens;
    vocab_size: number of token ids.
    """

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    n_ctx: int
    vocab_size: int

    def __post_init__(self) -> None:
        for field, (low, high) in LIMITS.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise WeightsError(f"{field} is {value!r}; it must be an integer from {low} to {high}")
            if not low <= value <= high:
                raise WeightsError(f"{field} is {value}; it must be from {low} to {high}")
        if self.d_model % self.n_head:
            raise WeightsError(
                f"d_model is {self.d_model} and n_head is {self.n_head}; d_model must be a multiple of n_head, "
                "so that every head has the same width"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, d_model / n_head."""
        return self.d_model // self.n_head

    @property
    def n_parameters(self) -> int:
        """Number of stored values (the tied head counts once)."""
        return sum(math.prod(shape) for _, shape, _ in tensor_table(self))

    @property
    def file_bytes(self) -> int:
        """Length in bytes of a weight file of these sizes."""
        return HEADER_BYTES + 2 * self.n_parameters


def tensor_table(config: GPT2Config) -> list[tuple[str, tuple[int, ...], int]]:
    """The tensors of a weight file in file order, as (name, shape, offset in bytes from the start of the file).

    Matrices are stored row by row as (in, out), so that y = x @ weight + bias.
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

    table, offset = [], HEADER_BYTES
    for name, shape in shapes:
        table.append((name, shape, offset))
        offset += 2 * math.prod(shape)
    return table


def save_weights(
    path: str | os.PathLike,
    config: GPT2Config,
    tensors: Mapping[str, np.ndarray],
    on_tensor: Callable[[str], None] | None = None,
) -> str:
    """Write `tensors` (name -> floating-point array of the shape `tensor_table` gives) as fp16; return the SHA-256.

    The file appears under `path` only when it is complete: a temporary file beside it is written, flushed to the
    disk and renamed. `tensors` is read one tensor at a time, so it may be a lazy mapping; `on_tensor(name)` is
    called after each, for a progress bar. Raises `WeightsError` for a missing or surplus tensor, a wrong shape,
    NaN or infinity, and a value that does not fit fp16.
    """
    path = Path(path)
    table = tensor_table(config)
    expected = {name for name, _, _ in table}
    for what, names in (("missing", expected - set(tensors)), ("not part of the layout", set(tensors) - expected)):
        if names:
            some = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise WeightsError(f"{len(names)} tensors are {what}: {some}; see tensor_table(config) for the names")

    header = np.zeros(HEADER_INTS, dtype="<i4")
    values = {"magic": MAGIC, "version": VERSION, "dtype": DTYPE_FP16, **asdict(config)}
    header[: len(HEADER_FIELDS)] = [values[field] for field in HEADER_FIELDS]

    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:

            def put(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            put(header.tobytes())
            for name, shape, _ in table:
                put(_to_fp16(name, tensors[name], shape).reshape(-1).view(np.uint8).data)
                if on_tensor is not None:
                    on_tensor(name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def load_weights(path: str | os.PathLike) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """Memory-map a weight file: (config, name -> read-only fp16 `np.memmap` view of the shape in `tensor_table`).

    Nothing is copied; pages are read from the disk when they are touched. Raises `WeightsError`, naming the file and
    the field, for a file that is missing, truncated, of another format or version, of impossible sizes, or that
    holds NaN or infinity.
    """
    path = Path(path)
    config = _read_header(path)
    found = path.stat().st_size
    if found != config.file_bytes:
        raise WeightsError(
            f"{path}: the file length is {found} bytes, but a model of the sizes in its header ({_describe(config)}) "
            f"takes {config.file_bytes} bytes; the file is {'cut short' if found < config.file_bytes else 'too long'}: "
            f"{_REMAKE}"
        )
    stream = np.memmap(path, dtype="<f2", mode="r", offset=HEADER_BYTES)
    tensors = {}
    for name, shape, offset in tensor_table(config):
        start = (offset - HEADER_BYTES) // 2
        flat = stream[start : start + math.prod(shape)]
        bad = first_non_finite(flat)
        if bad is not None:
            index = tuple(int(i) for i in np.unravel_index(bad, shape))
            raise WeightsError(f"{path}: tensor {name} holds {flat[bad]} at index {index}; {_REMAKE}")
        tensors[name] = flat.reshape(shape)
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


def _read_header(path: Path) -> GPT2Config:
    """The configuration in a file's header, after checking every one of the 16 integers."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise WeightsError(
            f"{path}: there is no such weight file; get real GPT-2 with data/download_gpt2.py, or name no weights "
            "to use the model in data/"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give the path of a weight file") from None
    if len(raw) < HEADER_BYTES:
        raise WeightsError(
            f"{path}: the file length is {len(raw)} bytes; the header alone is {HEADER_BYTES}: {_REMAKE}"
        )
    header = [int(value) for value in np.frombuffer(raw, dtype="<i4")]
    fields = dict(zip(HEADER_FIELDS, header, strict=False))
    for field, wanted, meaning in (
        ("magic", MAGIC, "the file is not in this project's format: convert the model with data/download_gpt2.py"),
        ("version", VERSION, "this code reads only that version: " + _REMAKE),
        ("dtype", DTYPE_FP16, "that is fp16, the only type defined so far: " + _REMAKE),
    ):
        if fields[field] != wanted:
            shown = (hex(fields[field] & 0xFFFFFFFF), hex(wanted)) if field == "magic" else (fields[field], wanted)
            raise WeightsError(f"{path}: {field} is {shown[0]}; it must be {shown[1]}; {meaning}")
    for position in range(len(HEADER_FIELDS), HEADER_INTS):
        if header[position]:
            raise WeightsError(
                f"{path}: reserved header integer {position} is {header[position]}; it must be 0; {_REMAKE}"
            )
    try:
        return GPT2Config(**{field: fields[field] for field in LIMITS})
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}; the header is damaged: {_REMAKE}") from None


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
                f"tensor {name} holds {value:g} at index {index}; fp16 ends at {FP16_MAX:g}: scale it down"
            )
        raise WeightsError(f"tensor {name} holds {value} at index {index}; every weight must be finite")
    return half


def _describe(config: GPT2Config) -> str:
    return ", ".join(f"{field} {value}" for field, value in asdict(config).items())
