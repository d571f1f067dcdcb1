"""Fetch GPT-2's weights from the Hugging Face hub and write them in this project's layout (see data/README.md).

    python data/download_gpt2.py --out data/gpt2-small.bin
    python data/download_gpt2.py --out data/gpt2-medium.bin --model gpt2-medium
    python data/download_gpt2.py --out data/mine.bin --model path/to/folder

Only config.json and the weights are fetched; an interrupted download goes on where it stopped. A folder written by
transformers' `GPT2LMHeadModel.save_pretrained` is read in place. PyTorch is needed only for models that come
as pytorch_model.bin. Weights are rounded to fp16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ch14_mini_llm.weights import LAYER_NORM_EPS, GPT2Config, WeightsError, save_weights, tensor_table

HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
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

    Returns (GPT2Config, SHA-256 of the file). Raises `ConversionError`, or `WeightsError` naming the tensor when a
    value is not finite or does not fit fp16.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise ConversionError(f"--out: there is no folder {out.parent}; make it, or choose another place")
    if out.is_dir():
        raise ConversionError(f"--out: {out} is a folder; give the name of the file to write")
    folder = local_folder(source) or fetch(str(source), revision)
    config = read_config(folder / "config.json")
    tensors = select_tensors(open_tensors(folder), config)
    if not progress:
        return config, save_weights(out, config, tensors)

    from tqdm import tqdm

    with tqdm(total=len(tensors), unit="tensor", desc=f"writing {out.name}") as bar:
        return config, save_weights(out, config, tensors, on_tensor=lambda _: bar.update())


def local_folder(source: str | Path) -> Path | None:
    """The folder `source` names, or None when it names a model on the hub."""
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if str(source) in HUB_NAMES:
        return None
    if path.is_dir():
        raise ConversionError(f"--model: the folder {path} has no config.json; give a folder saved by save_pretrained")
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ConversionError(
            f"--model: {str(source)!r} is neither a folder here, nor one of {', '.join(HUB_NAMES)}, nor owner/name"
        )
    return None


def fetch(name: str, revision: str | None = None) -> Path:
    """Download config.json and the weights of a hub model into the hub's cache; returns the folder they lie in.

    Files already in the cache are not fetched again. Raises `ConversionError` offline and for unknown names.
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

    try:
        config = get("config.json")
        read_config(config)  # refuse an unsuitable model before its weights are fetched
        folder = config.parent
        revision = folder.name  # the commit: both files from the same one, should the branch move meanwhile
        for filename in WEIGHT_FILES:
            try:
                path = get(filename)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not offline:
                    raise  # the connection broke; the file may well exist
                continue
            if filename.endswith(".index.json"):
                for shard in _shards(path):
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


def _shards(index: Path) -> list[str]:
    """Names of the files a model.safetensors.index.json spreads the tensors over."""
    return sorted(set(_read_json(index)["weight_map"].values()))


def read_config(path: Path) -> GPT2Config:
    """The sizes in a transformers config.json. Raises `ConversionError` for anything the kernels do not compute."""
    settings = _read_json(path)
    if not isinstance(settings, dict):
        raise ConversionError(f"{path}: not a JSON object; give the config.json of a GPT-2")
    problems = []
    if settings.get("model_type") != "gpt2":
        problems.append(f"model_type is {settings.get('model_type')!r}, not 'gpt2'")
    for field, allowed in SUPPORTED.items():
        value = settings.get(field, allowed[0])
        if value not in allowed:
            problems.append(f"{field} is {value!r}, not {' or '.join(repr(choice) for choice in allowed)}")
    if problems:
        raise ConversionError(f"{path}: this model cannot be run here: {'; '.join(problems)}; choose a plain GPT-2")

    def size(*names: str) -> int:
        for name in names:
            if settings.get(name) is not None:
                return settings[name]
        raise ConversionError(f"{path}: {names[0]} is missing; give the config.json that belongs to the model")

    d_model = size("n_embd", "hidden_size")
    d_ff = settings.get("n_inner")
    try:
        return GPT2Config(
            n_layer=size("n_layer", "num_hidden_layers"),
            n_head=size("n_head", "num_attention_heads"),
            d_model=d_model,
            d_ff=d_ff if d_ff is not None else 4 * d_model,
            n_ctx=size("n_positions", "max_position_embeddings", "n_ctx"),
            vocab_size=size("vocab_size"),
        )
    except WeightsError as error:
        raise ConversionError(f"{path}: {error}") from None


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON ({error}); delete it and fetch it again") from None


class LazyTensors(Mapping):
    """name -> array, read from the disk when asked for, so that only one tensor is in memory at a time."""

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def open_tensors(folder: Path) -> LazyTensors:
    """The tensors stored in a model folder, under the names the file gives them."""
    single, index, pickled = (folder / name for name in WEIGHT_FILES)
    if single.is_file():
        return LazyTensors(_safetensors_readers(single))
    if index.is_file():
        readers = {}
        for shard in _shards(index):
            readers.update(_safetensors_readers(folder / shard))
        return LazyTensors(readers)
    if pickled.is_file():
        return LazyTensors(_pytorch_readers(pickled))
    raise ConversionError(f"{folder} has none of {', '.join(WEIGHT_FILES)}; give a folder saved by save_pretrained")


def _safetensors_readers(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ConversionError("reading model.safetensors needs a package: pip install safetensors") from None
    try:
        file = safe_open(path, framework="np")
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}); delete it and fetch it again") from None
    for name, dtype in types.items():
        if dtype not in ("F16", "F32", "F64") and not _is_ignored(_plain_name(name)):
            raise ConversionError(f"{path}: {name} is stored as {dtype}; save the model as float32 or float16 first")
    return {name: lambda name=name: file.get_tensor(name) for name in types}


def _pytorch_readers(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"{path.name} can only be read with PyTorch: pip install torch, or choose a model with model.safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: never runs code from the file
        return {name: lambda tensor=tensor: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # unpickling damaged files fails in many ways
        raise ConversionError(f"{path}: cannot be read ({type(error).__name__}); fetch it again") from error


def _plain_name(name: str) -> str:
    return name.removeprefix("transformer.")


def _is_ignored(name: str) -> bool:
    # the causal mask, which some checkpoints carry as a tensor
    return name.startswith("h.") and name.endswith((".attn.bias", ".attn.masked_bias"))


def select_tensors(stored: Mapping[str, np.ndarray], config: GPT2Config) -> LazyTensors:
    """The layout's tensors out of a checkpoint's, without "transformer.", masks and the tied head.

    Raises `ConversionError` for missing or unknown tensors and for a head that differs from the token embedding.
    """
    names = {_plain_name(name): name for name in stored if not _is_ignored(_plain_name(name))}
    head = names.pop("lm_head.weight", None)
    wanted = {name for name, _, _ in tensor_table(config)}
    for what, found in (("is missing", sorted(wanted - set(names))), ("is unknown", sorted(set(names) - wanted))):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConversionError(f"tensor {found[0]} {what}{more}; the file must hold exactly a GPT-2's tensors")
    if head is not None and not np.array_equal(stored[head], stored[names["wte.weight"]]):
        raise ConversionError(
            "lm_head.weight differs from wte.weight; only a head tied to the embedding can be run here"
        )
    return LazyTensors({name: lambda name=name: stored[names[name]] for name in wanted})


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (0, or 2 after a one-line error)."""
    parser = argparse.ArgumentParser(
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
    options = parser.parse_args(argv)
    try:
        config, digest = convert(options.model, options.out, options.revision, progress=True)
    except (ConversionError, WeightsError, OSError) as error:
        print(f"download_gpt2: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("download_gpt2: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(
        f"{options.out}: n_layer {config.n_layer}, n_head {config.n_head}, d_model {config.d_model}, "
        f"d_ff {config.d_ff}, n_ctx {config.n_ctx}, vocab_size {config.vocab_size}"
    )
    print(f"{config.n_parameters:,} parameters, {config.file_bytes:,} bytes, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
