"""Fetch GPT-2's weights from the Hugging Face hub and write them in this project's layout (see data/README.md).

    python data/download_gpt2.py --out data/gpt2-small.bin
    python data/download_gpt2.py --out data/gpt2-medium.bin --model gpt2-medium
    python data/download_gpt2.py --out data/mine.bin --model path/to/folder

Only config.json and the weights are fetched; an interrupted download goes on where it stopped. A folder written by
transformers' `GPT2LMHeadModel.save_pretrained` is read in place. PyTorch is needed only for models that come
as pytorch_model.bin. Weights are rounded to fp16.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ch14_mini_llm.cli import Parser, cut, run_program
from ch14_mini_llm.files import FileError, check_output, open_input
from ch14_mini_llm.model.config import LAYER_NORM_EPS, GPT2Config
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.weights import save_weights, tensor_table

HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
LARGEST_JSON = 1 << 26  # bytes
PREFIX = "transformer."  # of most names in a GPT-2's checkpoint
SAVE_AS_FLOAT = "save the model as float32 or float16 first"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

# What the kernels compute; a setting that is absent from config.json has transformers' default, the first value here.
# The two names of the activation are one function, the tanh form of GELU.
SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


class ConversionError(ValueError):
    """A model that cannot be fetched or written in the layout; the message says why and what to do."""


def convert(
    source: str | Path, out: str | Path, revision: str | None = None, progress: bool = False
) -> tuple[GPT2Config, str]:
    """Write the GPT-2 in `source` (a folder, a name in `HUB_NAMES`, or a hub id "owner/name") to the file `out`.

    Returns (GPT2Config, SHA-256 of the file). Raises `ConversionError`, `FileError` before anything is fetched when
    `out` cannot be written, or `WeightsError` naming the tensor when a value is not finite or does not fit fp16.
    """
    check_output(out, "--out")
    out = Path(out)
    folder = local_folder(source) or fetch(str(source), revision)
    config = read_config(folder / "config.json")
    check_output(out, "--out", [path for path in folder.iterdir() if path.is_file()], config.file_bytes)
    tensors = select_tensors(open_tensors(folder), config)
    if not progress:
        return config, save_weights(out, config, tensors)

    from tqdm import tqdm

    with tqdm(total=len(tensors), unit="tensor", desc=f"writing {out.name}") as bar:
        return config, save_weights(out, config, tensors, on_tensor=lambda _: bar.update())


def local_folder(source: str | Path) -> Path | None:
    """The folder `source` names, or None when it names a model on the hub."""
    path = Path(source)
    if not str(source):
        raise ConversionError(f"--model is empty; give one of {', '.join(HUB_NAMES)}, a hub id or a folder")
    is_folder = os.path.isdir(path)
    if is_folder and os.path.lexists(path / "config.json"):
        return path
    if str(source) in HUB_NAMES:
        return None
    if is_folder:
        raise ConversionError(f"--model: the folder {path} has no config.json; give a folder saved by save_pretrained")
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ConversionError(
            f"--model: {cut(str(source))} is neither a folder here, nor one of {', '.join(HUB_NAMES)}, nor owner/name"
        )
    return None


def fetch(name: str, revision: str | None = None, read=None, more: Sequence[str] = ()) -> Path:
    """Download config.json and the weights of a hub model into the hub's cache; returns the folder they lie in.

    read(path): what config.json must pass before the weights are fetched, by default `read_config`. more: files to
    fetch as well, where the model has them. Files already in the cache are not fetched again. Raises `ConversionError`
    offline and for unknown names.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ConversionError("downloading needs a package: pip install huggingface_hub") from None
    repo = HUB_NAMES.get(name, name)
    offline = not _hub_answers()

    def get(filename: str) -> Path:
        return Path(hf_hub_download(repo, filename, revision=revision, local_files_only=offline))

    def get_if_there(filename: str) -> Path | None:
        try:
            return get(filename)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not offline:
                raise  # the connection broke; the file may well exist
            return None

    try:
        config = get("config.json")
        (read or read_config)(config)  # refuse an unsuitable model before its weights are fetched
        folder = config.parent
        revision = folder.name  # the commit: all files from the same one, should the branch move meanwhile
        for filename in more:
            get_if_there(filename)
        for filename in WEIGHT_FILES:
            path = get_if_there(filename)
            if path is None:
                continue
            if filename.endswith(".index.json"):
                for shard in sorted(_shards(path)):
                    get(shard)
            return folder
    except ConversionError:
        raise
    except Exception as error:  # the hub library raises many kinds, its HTTP library's among them
        raise ConversionError(_hub_message(error, repo, revision)) from error
    if offline:
        raise ConversionError(_offline_message(repo))
    raise ConversionError(f"{repo} has none of {', '.join(WEIGHT_FILES)}; choose another model")


def _hub_answers() -> bool:
    """Whether the hub can be reached; asked first because the hub library retries a dead network for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
        return not constants.HF_HUB_OFFLINE
    except Exception:  # whatever the HTTP library in use raises
        return False


def _hub_message(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError):
        return _offline_message(repo)
    if isinstance(error, RevisionNotFoundError):
        return f"--revision: {repo} has no revision {revision!r}; leave it out to take the newest"
    if isinstance(error, GatedRepoError):
        return f"--model: {repo} asks for an accepted licence; accept it on its page and log in with: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"--model: the hub has no public model {repo}; choose one of {', '.join(HUB_NAMES)}"
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"cannot download {repo} ({type(error).__name__}: {reason[:160]}); "
        "run the same command again: it goes on where it stopped"
    )


def _offline_message(repo: str) -> str:
    return (
        f"the hub cannot be reached and {repo} is not in its cache; check the network and run the same command again "
        "(it goes on where it stopped), or give a folder saved by save_pretrained as --model. Without real GPT-2 the "
        "programs use data/tiny-gpt2.bin"
    )


def _shards(index: Path) -> dict[str, set[str]]:
    """{file: names of its tensors} of a model.safetensors.index.json; raises `ConversionError`."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: there is no weight_map of tensors in it; fetch it again")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ConversionError(
                f"{index}: {_name(name)} is said to be in {cut(str(shard))}, which is no .safetensors file next to it"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def read_config(path: Path) -> GPT2Config:
    """The sizes in a transformers config.json. Raises `ConversionError` for anything the kernels do not compute."""
    settings = read_settings(path, SUPPORTED, "gpt2", "a plain GPT-2")
    size = partial(read_size, path, settings)
    d_model = size("n_embd", "hidden_size")
    try:
        return GPT2Config(
            n_layer=size("n_layer", "num_hidden_layers"),
            n_head=size("n_head", "num_attention_heads"),
            d_model=d_model,
            d_ff=size("n_inner") if settings.get("n_inner") is not None else 4 * d_model,
            n_ctx=size("n_positions", "max_position_embeddings", fallback="n_ctx"),
            vocab_size=size("vocab_size"),
        )
    except WeightsError as error:
        raise ConversionError(f"{path}: {error}") from None


def read_size(path: Path, settings: dict, *names: str, fallback: str | None = None) -> int:
    """The value of the names that transformers takes for one another, or else of `fallback`."""
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    if not given and fallback is not None and settings.get(fallback) is not None:
        given = {fallback: settings[fallback]}
    if not given:
        raise ConversionError(f"{path}: {names[0]} is missing; give the config.json that belongs to the model")
    (name, value), *others = given.items()
    for other, different in others:
        if different != value:
            raise ConversionError(
                f"{path}: {name} is {shown(value)} and {other} is {shown(different)}, two names of one size; "
                "remove the wrong one"
            )
    if type(value) is not int:
        raise ConversionError(f"{path}: {name} is {shown(value)}; it must be an integer")
    return value


def read_settings(path: Path, supported: Mapping[str, tuple], model_type: str, what: str) -> dict:
    """A config.json of this model_type. Raises `ConversionError` for a value that is not among the `supported` ones.

    supported: field -> what it may be, what it is when it is absent first. what: the model is to be, in words.
    """
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ConversionError(f"{path}: not a JSON object; give the config.json of {what}")
    problems = []
    if settings.get("model_type") != model_type:
        problems.append(f"model_type is {shown(settings.get('model_type'))}, not {model_type!r}")
    for field, allowed in supported.items():
        value = settings.get(field, allowed[0])
        if value not in allowed:
            problems.append(f"{field} is {shown(value)}, not {' or '.join(repr(choice) for choice in allowed)}")
    if problems:
        raise ConversionError(f"{path}: this model cannot be run here: {'; '.join(problems)}; choose {what}")
    return settings


def shown(value: object) -> str:
    """A value of a JSON file, not longer than a line."""
    return cut(value) if isinstance(value, str) else f"{value!r}"[:60]


def read_json(path: Path):
    """What a JSON file of a model says. Raises `ConversionError`."""
    try:
        with open_input(path) as file:
            text = file.read(LARGEST_JSON + 1)
        if len(text) > LARGEST_JSON:
            raise ConversionError(f"{path}: longer than {LARGEST_JSON} bytes; give the folder of a GPT-2")
        return json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _object(path, pairs))
    except FileError as error:
        raise ConversionError(f"{error}; give a folder saved by save_pretrained") from None
    except ConversionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)[:100]
        raise ConversionError(f"{path}: cannot be read as JSON ({reason}); delete it and fetch it again") from None


def _object(path: Path, pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; raises `ConversionError` for a field that is there twice: which one counts?"""
    fields: dict = {}
    for field, value in pairs:
        if field in fields:
            raise ConversionError(f"{path}: {cut(field)} is there twice; remove the wrong one")
        fields[field] = value
    return fields


class LazyTensors(Mapping):
    """name -> array, read from the disk when asked for, so that only one tensor is in memory at a time."""

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        reader = self._readers[name]
        try:
            return reader()
        except (ConversionError, WeightsError):
            raise
        except Exception as error:  # whatever the library finds wrong with the file only now
            reason = _reason(error)
            raise ConversionError(f"tensor {_name(name)} cannot be read ({reason}); fetch the model again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def open_tensors(folder: Path) -> LazyTensors:
    """The tensors stored in a model folder, under the names the file gives them. Raises `ConversionError`."""
    single, index, pickled = (folder / name for name in WEIGHT_FILES)
    if os.path.lexists(single):
        return LazyTensors(_safetensors_readers(single))
    if os.path.lexists(index):
        readers = {}
        for shard, names in _shards(index).items():
            stored = _safetensors_readers(folder / shard)
            for what, odd in (("is not in it", names - set(stored)), ("is not listed", set(stored) - names)):
                if odd:
                    raise ConversionError(f"{index}: {_name(min(odd))} {what}: {shard}; fetch the model again")
            readers.update(stored)
        return LazyTensors(readers)
    if os.path.lexists(pickled):
        return LazyTensors(_pytorch_readers(pickled))
    raise ConversionError(f"{folder} has none of {', '.join(WEIGHT_FILES)}; give a folder saved by save_pretrained")


def _require_file(path: Path) -> None:
    """Raises `ConversionError` unless `path` is a regular file that can be opened: the libraries wait for a pipe."""
    try:
        open_input(path).close()
    except FileError as error:
        raise ConversionError(f"{error}; give a folder saved by save_pretrained") from None
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror}); delete it and fetch it again") from None


def _reason(error: BaseException) -> str:
    """What a library says is wrong, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _safetensors_readers(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ConversionError("reading model.safetensors needs a package: pip install safetensors") from None
    _require_file(path)
    try:
        file = safe_open(path, framework="np")
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    except Exception as error:  # of many types, the library's own among them
        raise ConversionError(f"{path}: cannot be read ({_reason(error)}); delete it and fetch it again") from None
    for name, dtype in types.items():
        if dtype not in ("F16", "F32", "F64", "BF16") and not _is_ignored(_plain_name(name)):
            raise ConversionError(f"{path}: {_name(name)} is stored as {dtype}; {SAVE_AS_FLOAT}")
    return {
        name: lambda name=name: _bfloat16(path, name) if types[name] == "BF16" else file.get_tensor(name)
        for name in types
    }


def _bfloat16(path: Path, name: str) -> np.ndarray:
    """A bfloat16 tensor of a safetensors file that the library has opened, as float32: NumPy has no such type.

    The file is the header's length, 8 bytes; the header in JSON; the tensors.
    """
    with open_input(path) as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        upper = np.frombuffer(file.read(end - start), "<u2").astype(np.uint32)  # the first half of a float32
    return (upper << 16).view(np.float32).reshape(entry["shape"])


def _pytorch_readers(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"{path.name} can only be read with PyTorch: pip install torch, or choose a model with model.safetensors"
        ) from None
    _require_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: never runs code from the file
    except Exception as error:  # unpickling damaged files fails in many ways
        raise ConversionError(f"{path}: cannot be read ({type(error).__name__}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ConversionError(f"{path}: no dictionary of tensors by name; save the model's state_dict")
    floats = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
    for name, tensor in state.items():
        if _is_ignored(_plain_name(name)):
            continue
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise ConversionError(f"{path}: {_name(name)} is no tensor but a {kind}; save the model's state_dict")
        if tensor.dtype not in floats or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}".replace("torch.", "")
            raise ConversionError(f"{path}: {_name(name)} is stored as {kind}; {SAVE_AS_FLOAT}")
    return {name: lambda tensor=tensor: _as_numpy(tensor) for name, tensor in state.items()}


def _as_numpy(tensor) -> np.ndarray:
    """A torch tensor of floats as an array; bfloat16, which NumPy has not, as float32."""
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _name(name: str) -> str:
    """A tensor's name, as it is if that is one for people."""
    return name if name.isprintable() and 0 < len(name) <= 80 else cut(name)


def _plain_name(name: str) -> str:
    return name.removeprefix(PREFIX)


def _is_ignored(name: str) -> bool:
    # the causal mask, which some checkpoints carry as a tensor
    return name.startswith("h.") and name.endswith((".attn.bias", ".attn.masked_bias"))


def plain_names(stored: Iterable[str], prefix: str) -> dict[str, str]:
    """{name without the prefix: name as it is stored}. Raises `ConversionError` for one that is there both ways."""
    names: dict[str, str] = {}
    for name in stored:
        plain = name.removeprefix(prefix)
        if plain in names:
            both = f"{_name(names[plain])} and {_name(name)}"
            raise ConversionError(f"tensor {_name(plain)} is there twice, as {both}; remove the wrong one")
        names[plain] = name
    return names


def select_tensors(stored: Mapping[str, np.ndarray], config: GPT2Config) -> LazyTensors:
    """The layout's tensors out of a checkpoint's, without "transformer.", masks and the tied head.

    Raises `ConversionError` for missing or unknown tensors, for one that is there under two names, and for a head that
    differs from the token embedding.
    """
    names = plain_names(stored, PREFIX)
    layers = range(config.n_layer)
    masks = {f"h.{layer}.attn.{mask}" for layer in layers for mask in ("bias", "masked_bias")}
    names = {plain: name for plain, name in names.items() if plain not in masks}
    head = names.pop("lm_head.weight", None)
    wanted = {name for name, _, _ in tensor_table(config)}
    for what, found in (("is missing", sorted(wanted - set(names))), ("is unknown", sorted(set(names) - wanted))):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            first = _name(found[0])
            raise ConversionError(f"tensor {first} {what}{more}; the file must hold exactly a GPT-2's tensors")
    if head is not None and not np.array_equal(stored[head], stored[names["wte.weight"]]):
        raise ConversionError(
            "lm_head.weight differs from wte.weight; only a head tied to the embedding can be run here"
        )
    return LazyTensors({name: lambda name=name: stored[names[name]] for name in wanted})


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (0, or 2 after a one-line error)."""
    parser = Parser(
        prog="download_gpt2.py",
        description="Fetch GPT-2's weights and write them in this project's layout (fp16; 124M makes about 250 MB).",
        epilog="Then: python ch14_mini_llm/run.py --prompt 'Hello, there is' takes data/gpt2-small.bin by itself.",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, e.g. data/gpt2-small.bin")
    parser.add_argument(
        "--model",
        default="gpt2",
        help=f"{', '.join(HUB_NAMES)}, a hub id owner/name, or a folder saved by save_pretrained (default: gpt2)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: the newest)")

    def work() -> None:
        options = parser.parse_args(argv)
        config, digest = convert(options.model, options.out, options.revision, progress=True)
        print(
            f"{options.out}: n_layer {config.n_layer}, n_head {config.n_head}, d_model {config.d_model}, "
            f"d_ff {config.d_ff}, n_ctx {config.n_ctx}, vocab_size {config.vocab_size}"
        )
        print(f"{config.n_parameters:,} parameters, {config.file_bytes:,} bytes, SHA-256 {digest}")

    mistakes = (ConversionError, WeightsError, FileError, OSError)
    return run_program("download_gpt2", work, mistakes, "stopped; run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
