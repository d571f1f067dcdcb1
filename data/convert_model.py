"""A published model, GPT-2 or Llama, as a weight file of this project (see data/README.md).

    python data/convert_model.py path/to/folder --out data/mine.bin
    python data/convert_model.py owner/name --out data/mine.bin
    python data/convert_model.py model.gguf --out data/mine.bin

A folder is one that transformers' `save_pretrained` has written, of a model and of its tokenizer; owner/name is a model
on the Hugging Face hub; a GGUF file is a Llama's. Of a folder, matrices are rounded to fp16 and a Llama's vectors kept
in fp32; a GGUF file's tensors stay in their types. A Llama takes its tokenizer and its form of a conversation with it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ch14_mini_llm.cli import Parser, run_program
from ch14_mini_llm.files import FileError, check_output
from ch14_mini_llm.model.config import GPT2Config, LlamaConfig
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.llama import EMBEDDING, HEAD, llama_tensors
from ch14_mini_llm.model.llama_file import save_llama
from ch14_mini_llm.model.weights import to_fp16
from ch14_mini_llm.tokenizer.bpe import TokenizerError
from ch14_mini_llm.tokenizer.own import OwnTokenizer, packed
from data import download_gpt2, gguf_model
from data.download_gpt2 import (
    ConversionError,
    LazyTensors,
    fetch,
    local_folder,
    open_tensors,
    plain_names,
    read_json,
    read_settings,
    read_size,
    select_tensors,
    shown,
)

# What the kernels compute; a setting that is absent from config.json has transformers' default, the first value here.
SUPPORTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def convert(source: str | Path, out: str | Path, revision: str | None = None, on_tensor=None):
    """Write the model in `source` (a folder, a GGUF file, or "owner/name" on the hub) to the file `out`; returns its
    sizes, a `GPT2Config` or `LlamaConfig`. on_tensor(name): called after each tensor.

    Raises `ConversionError`, `WeightsError`, `TokenizerError`, and `FileError` before anything is fetched when `out`
    cannot be written.
    """
    check_output(out, "--out")
    if os.path.isfile(source):
        return gguf_model.convert(source, out, on_tensor)
    folder = local_folder(source) or fetch(str(source), revision, read_config, TOKENIZER_FILES)
    config = read_config(folder / "config.json")
    files = [path for path in folder.iterdir() if path.is_file()]
    check_output(out, "--out", files, 2 * config.n_parameters)
    stored = open_tensors(folder)
    if isinstance(config, GPT2Config):
        download_gpt2.save_weights(out, config, select_tensors(stored, config), on_tensor)
    else:
        save_llama(out, config, select_llama(stored, config), read_tokenizer(folder), on_tensor)
    return config


def read_config(path: Path) -> GPT2Config | LlamaConfig:
    """The sizes in a transformers config.json. Raises `ConversionError` for anything the kernels do not compute."""
    settings = read_json(path)
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type == "gpt2":
        return download_gpt2.read_config(path)
    if model_type != "llama":
        raise ConversionError(
            f"{path}: model_type is {shown(model_type)}; this project runs 'gpt2' and 'llama': choose one of these"
        )
    settings = read_settings(path, SUPPORTED, "llama", "a plain Llama")
    size = partial(read_size, path, settings)
    n_head, d_model = size("num_attention_heads"), size("hidden_size")
    given = lambda name, absent: absent if settings.get(name) is None else settings[name]
    tied = given("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise ConversionError(f"{path}: tie_word_embeddings is {shown(tied)}; it must be true or false")
    try:
        return LlamaConfig(
            n_layer=size("num_hidden_layers"),
            n_head=n_head,
            n_kv_head=size("num_key_value_heads", fallback="num_attention_heads"),
            head_dim=size("head_dim") if given("head_dim", None) else d_model // max(n_head, 1),
            d_model=d_model,
            d_ff=size("intermediate_size"),
            n_ctx=size("max_position_embeddings"),
            vocab_size=size("vocab_size"),
            epsilon=_number(path, "rms_norm_eps", given("rms_norm_eps", 1e-6)),
            rotary_base=_rotary_base(path, settings),
            tied_head=tied,
        )
    except WeightsError as error:
        raise ConversionError(f"{path}: {error}") from None


def _number(path: Path, name: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConversionError(f"{path}: {name} is {shown(value)}; it must be a number above 0")
    return float(value)


def _rotary_base(path: Path, settings: dict) -> float:
    """rope_theta, of `rope_parameters` or by itself; raises `ConversionError` for positions that are scaled."""
    base = settings.get("rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        rules = settings.get(field)
        if rules is None:
            continue
        if not isinstance(rules, dict):
            raise ConversionError(f"{path}: {field} is {shown(rules)}; it must be an object")
        kind = rules.get("rope_type", rules.get("type", "default"))
        if kind != "default":
            raise ConversionError(
                f"{path}: {field} is of type {shown(kind)}: this project does not scale rotary positions; choose a "
                "Llama without (SmolLM2, TinyLlama, Llama 2, Llama 3)"
            )
        if rules.get("partial_rotary_factor") not in (None, 1.0):
            raise ConversionError(f"{path}: {field} turns only a part of a head; this project turns all of it")
        base = rules.get("rope_theta", base)
    return _number(path, "rope_theta", 10000.0 if base is None else base)


def select_llama(stored: Mapping[str, np.ndarray], config: LlamaConfig) -> LazyTensors:
    """A Llama's tensors out of a checkpoint's, without "model." and buffers: matrices in fp16, vectors in fp32.

    Raises `ConversionError` for missing or unknown tensors, for one that is there under two names, and for a head that
    is to be the token embedding and is not; `WeightsError`, when a tensor is read, for values that are not finite or do
    not fit fp16.
    """
    names = plain_names((name for name in stored if not name.endswith(".rotary_emb.inv_freq")), "model.")
    wanted = dict(llama_tensors(config))
    head = names.pop(HEAD, None) if config.tied_head else None
    for what, found in (("is missing", wanted.keys() - names), ("is unknown", names.keys() - wanted)):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConversionError(
                f"tensor {shown(min(found))} {what}{more}; the file must hold exactly the tensors of a LlamaForCausalLM"
            )
    if head is not None and not np.array_equal(stored[head], stored[names[EMBEDDING]]):
        raise ConversionError(f"{HEAD} differs from {EMBEDDING}, though tie_word_embeddings says that they are one")

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = stored[names[name]]
        return tensor.astype(np.float32) if len(shape) == 1 else to_fp16(name, tensor, shape)

    return LazyTensors({name: partial(read, name, shape) for name, shape in wanted.items()})


def read_tokenizer(folder: Path) -> bytes:
    """What `tokenizer.own` reads, of a folder's tokenizer. Raises `ConversionError` and `TokenizerError`."""
    if not os.path.lexists(folder / "tokenizer.json"):
        raise ConversionError(
            f"{folder} has no tokenizer.json; save the tokenizer there as well: "
            "AutoTokenizer.from_pretrained(name).save_pretrained(folder)"
        )

    def settings(name: str) -> dict:
        found = read_json(folder / name) if os.path.lexists(folder / name) else {}
        if not isinstance(found, dict):
            raise ConversionError(f"{folder / name}: not a JSON object; fetch it again")
        return found

    own, tokenizer = settings("tokenizer_config.json"), settings("tokenizer.json")
    special = {}
    for name in SPECIAL:
        token = own.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    ends = settings("generation_config.json").get("eos_token_id", settings("config.json").get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ConversionError(f"{folder}: eos_token_id is {shown(ends)}; it must be token ids")
    template = _chat_template(folder, own.get("chat_template"))
    end = OwnTokenizer(packed(tokenizer, ends, special, template)).id_of(special.get("eos_token", ""))
    return packed(tokenizer, sorted({*ends, *([] if end is None else [end])}), special, template)


def _chat_template(folder: Path, listed: object) -> str | None:
    """The form of a conversation: a file of its own, or in tokenizer_config.json, there perhaps one of several."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        with download_gpt2.open_input(path) as file:
            return file.read(download_gpt2.LARGEST_JSON).decode("utf-8")
    if isinstance(listed, list):
        listed = {form.get("name"): form.get("template") for form in listed if isinstance(form, dict)}.get("default")
    return listed if isinstance(listed, str) else None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (0, or 2 after a one-line error)."""
    parser = Parser(prog="convert_model.py", description="A GPT-2 or a Llama as a weight file of this project.")
    parser.add_argument("source", help="a folder saved by save_pretrained, a GGUF file, or owner/name on the hub")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, e.g. data/mine.bin")
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: the newest)")

    def work() -> None:
        from tqdm import tqdm

        options = parser.parse_args(argv)
        with tqdm(unit=" tensors", desc=f"writing {Path(options.out).name}") as bar:
            config = convert(options.source, options.out, options.revision, lambda _: bar.update())
        size = Path(options.out).stat().st_size
        print(f"{options.out}: {config.architecture}, {config.n_parameters:,} parameters, {size:,} bytes")

    mistakes = (ConversionError, WeightsError, TokenizerError, FileError, UnicodeDecodeError, OSError)
    return run_program("convert_model", work, mistakes, "stopped; run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
