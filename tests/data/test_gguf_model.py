"""A GGUF file of a Llama becomes a weight file with the same numbers, or is refused with the reason."""

import json

import gguf
import numpy as np
import pytest
from test_llama import random_llama

from ch14_mini_llm.levels import make_engine
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.llama_file import TOKENIZER
from ch14_mini_llm.model.quantize import Blocks, unpacked
from ch14_mini_llm.model.weights import load_weights
from ch14_mini_llm.tokenizer.own import tokenizer_of
from data import gguf_model

Q8, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
CHARACTERS = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *CHARACTERS, "he", "ll", "hell"]
CONFIG = LlamaConfig(2, 4, 2, 16, 64, 96, 128, len(TOKENS), 1e-5, 1e5, True)


def turned(matrix, n_head):
    """The rows as llama.cpp's converter orders them: pairs of a head next to each other."""
    return matrix.reshape(n_head, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def write(path, tensors, types, **changes):
    """A GGUF file of `CONFIG`. types: part of a name -> type; others are F16, and vectors F32. changes: of fields."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    c = CONFIG
    fields = {
        "block_count": c.n_layer, "context_length": c.n_ctx, "embedding_length": c.d_model,
        "feed_forward_length": c.d_ff, "attention.head_count": c.n_head, "attention.head_count_kv": c.n_kv_head,
        "rope.dimension_count": c.head_dim, **changes,
    }  # fmt: skip
    for name, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(c.epsilon)
    writer.add_rope_freq_base(c.rotary_base)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    for name, tensor in tensors.items():
        kind = next((kind for part, kind in types.items() if part in name), F16)
        if "q_proj" in name or "k_proj" in name:
            tensor = turned(tensor, c.n_head if "q_proj" in name else c.n_kv_head)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_model.gguf_name(name), tensor)
        elif kind == F16:
            writer.add_tensor(gguf_model.gguf_name(name), tensor.astype(np.float16))
        else:
            data = gguf.quants.quantize(tensor.astype(np.float32), kind)
            writer.add_tensor(gguf_model.gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_same_numbers_in_their_types(tmp_path):
    tensors = random_llama(CONFIG)
    types = {"q_proj": Q8, "k_proj": Q8, "embed": Q8}
    config = gguf_model.convert(write(tmp_path / "m.gguf", tensors, types), tmp_path / "m.bin")
    found_config, found = load_weights(tmp_path / "m.bin")
    assert found_config == config == CONFIG
    for name, tensor in tensors.items():
        packed = any(part in name for part in types)
        assert isinstance(found[name], Blocks) == packed
        if packed:
            tensor = gguf.quants.dequantize(gguf.quants.quantize(tensor.astype(np.float32), Q8), Q8)
        np.testing.assert_array_equal(unpacked(found[name]), tensor)
    plain = {name: unpacked(tensor) for name, tensor in found.items() if name != TOKENIZER}
    wanted = list(generate(make_engine("naive", CONFIG, plain, 32), [5, 6, 7], 8))
    assert list(generate(make_engine("kv", found_config, found, 32), [5, 6, 7], 8)) == wanted
    tokenizer = tokenizer_of(found_config, found)
    assert tokenizer.decode(tokenizer.encode("hello 12")) == "hello 12"
    assert TOKENS.index("hell") in tokenizer.encode("hello")
    assert tokenizer.chat([{"role": "user", "content": "hell"}]) == [1, TOKENS.index("hell")]


@pytest.mark.parametrize(
    "changes, types, left_out, named",
    [
        ({"architecture": "qwen2"}, {}, None, "architecture is 'qwen2'"),
        ({"rope.scaling.type": "yarn"}, {}, None, "llama.rope.scaling.type is 'yarn'"),
        ({"expert_count": 8}, {}, None, "llama.expert_count is 8"),
        ({"rope.dimension_count": 8}, {}, None, "dimension_count is 8; it must be 16"),
        ({"block_count": 3}, {}, None, "tensor blk.2.attn_norm.weight is missing"),
        ({"feed_forward_length": 64}, {}, None, "has shape (96, 64)"),
        ({}, {"up_proj": gguf.GGMLQuantizationType.Q4_0}, None, "is of type Q4_0"),
        ({}, {}, "norm.weight", "tensor output_norm.weight is missing"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_in_one_line(tmp_path, capsys, changes, types, left_out, named):
    tensors = {name: tensor for name, tensor in random_llama(CONFIG).items() if name != left_out}
    path = write(tmp_path / "m.gguf", tensors, types, **changes)
    assert gguf_model.main([str(path), "--out", str(tmp_path / "m.bin")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and not (tmp_path / "m.bin").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such format at all, whatever it is"])
def test_what_is_no_gguf_file(tmp_path, capsys, content):
    (tmp_path / "m.gguf").write_bytes(content)
    assert gguf_model.main([str(tmp_path / "m.gguf"), "--out", str(tmp_path / "m.bin")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert gguf_model.main([str(tmp_path / "none.gguf"), "--out", str(tmp_path / "m.bin")]) == 2


def test_the_command_line(tmp_path, capsys, monkeypatch):
    assert gguf_model.main(["--out", str(tmp_path / "m.bin")]) == 2
    assert "give a GGUF file, or --smollm2" in capsys.readouterr().err
    path = write(tmp_path / "m.gguf", random_llama(CONFIG), {})
    monkeypatch.setattr(gguf_model, "fetch_smollm2", lambda folder: path)
    assert gguf_model.main(["--smollm2", "--out", str(tmp_path / "m.bin")]) == 0
    assert "parameters in" in capsys.readouterr().out
    assert json.loads(bytes(load_weights(tmp_path / "m.bin")[1][TOKENIZER]))["stop_tokens"] == [2]
