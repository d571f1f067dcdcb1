"""data/convert_model.py: a Llama that transformers saved arrives, with its tokenizer; what cannot be run is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_hub import Hub
from make_models import make_hf_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request
from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.llama_file import TOKENIZER
from ch14_mini_llm.model.weights import load_weights
from ch14_mini_llm.tokenizer.own import OwnTokenizer, StreamDecoder, tokenizer_of
from data import convert_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXTS = ["Hello, world! 12", " two  blanks", "naïve 😀 你好", "", "<s>", "a\n\tb", "x" * 99]
CORPUS = ["hello world, the cat sat on the mat and the hat"] * 20
SIZES = {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip


def of_bytes():
    """As GPT-2 and Llama 3 have it, with a token in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return bpe


def of_sentencepiece():
    """As Llama 2 has it: a blank in front, characters, and bytes for those that are not there."""
    letters = sorted({*"".join(CORPUS).replace(" ", "▁"), *"Hw!12"})
    special = ["<unk>", "<s>", "</s>"]
    words = ["▁t", "he", "▁the", "at", "▁h", "ll", "llo", "▁he", "▁hello"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("▁", "h"), ("l", "l"), ("ll", "o"), ("▁", "he"),
              ("▁he", "llo")]  # fmt: skip
    vocabulary = {name: number for number, name in enumerate(names)}
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return bpe


def save(folder, transformers, torch, bpe, dtype="float32", shards="5GB", **sizes):
    """A random Llama and its tokenizer as `save_pretrained` writes them; returns (model, tokenizer)."""
    torch.manual_seed(len(sizes))
    config = transformers.LlamaConfig(
        **SIZES | {"vocab_size": bpe.get_vocab_size(), "tie_word_embeddings": True, "eos_token_id": 2} | sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape) + (parameter.ndim == 1)
            parameter.copy_(noise.to(torch.bfloat16))  # what every type here holds exactly
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shards)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return model.float(), tokenizer


@pytest.fixture(scope="module", params=[of_bytes, of_sentencepiece])
def made(request, transformers, torch, tmp_path_factory):
    """(folder, transformers' model, its tokenizer, our config and tensors)."""
    folder = tmp_path_factory.mktemp("llama")
    shape = {} if request.param is of_bytes else {"num_key_value_heads": 4, "tie_word_embeddings": False}
    dtype = "bfloat16" if request.param is of_bytes else "float32"
    model, tokenizer = save(folder / "hf", transformers, torch, request.param(), dtype, **shape)
    assert convert_model.main([str(folder / "hf"), "--out", str(folder / "m.bin")]) == 0
    return folder / "hf", model, tokenizer, *load_weights(folder / "m.bin")


def test_every_tensor_arrives(made):
    _, model, _, config, tensors = made
    state = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    if config.tied_head:
        del state["lm_head.weight"]
    assert state.keys() == tensors.keys() - {TOKENIZER}
    for name, tensor in state.items():
        assert tensors[name].dtype == (np.float32 if tensor.ndim == 1 else np.float16)
        np.testing.assert_array_equal(tensors[name], tensor.astype(tensors[name].dtype))


def test_the_engine_says_what_transformers_says(made, torch):
    _, model, tokenizer, config, tensors = made
    prompts = [tokenizer.encode(text) for text in ("hello", "the cat sat on the", "x", "the mat, the hat")]
    engine = Engine.of(config, tensors, "kv", num_blocks=40)
    for prompt, result in zip(prompts, engine.run([Request(prompt, 12) for prompt in prompts])):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *result.tokens]])).logits[0, len(prompt) - 1 : -1].numpy()
        assert result.error is None and result.tokens == logits.argmax(1).tolist()


def test_the_tokenizer_is_transformers(made):
    folder, _, theirs, config, tensors = made
    ours = tokenizer_of(config, tensors)
    assert ours.stop_tokens == (2,)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids[1:]) == text or text == "<s>"
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, ids[1:])) + stream.finish() == ours.decode(ids[1:])
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "hat"}]
        for conversation in (messages[:1], messages, [*messages, {"role": "user", "content": "and?"}]):
            wanted = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
            assert ours.chat(conversation) == wanted
            assert ours.chat(conversation)[0] == 1 != ours.chat(conversation)[1]


def test_shards_other_types_and_older_settings_make_the_same_numbers(transformers, torch, tmp_path):
    bpe = of_bytes()
    save(tmp_path / "a", transformers, torch, bpe)
    save(tmp_path / "b", transformers, torch, bpe, "bfloat16", shards="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    path = tmp_path / "b" / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("rope_parameters", None)
    path.write_text(json.dumps({**settings, "rope_theta": 5e5, "rope_scaling": None}))
    found = []
    for name in "ab":
        convert_model.convert(tmp_path / name, tmp_path / f"{name}.bin")
        found.append(load_weights(tmp_path / f"{name}.bin"))
    (config, tensors), (other, others) = found
    assert config == LlamaConfig(2, 4, 2, 16, 48, 100, 128, bpe.get_vocab_size(), 1e-5, 1e4, True)
    assert vars(other) == {**vars(config), "rotary_base": 5e5}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, others[name])


def test_gpt2_and_gguf_go_the_same_way(transformers, tmp_path, monkeypatch):
    path, _ = make_hf_model(tmp_path, 1, 1, 32, 16, 33, seed=1)
    assert convert_model.main([str(tmp_path / "hf"), "--out", str(tmp_path / "again.bin")]) == 0
    assert (tmp_path / "again.bin").read_bytes() == Path(path).read_bytes()
    seen = []
    monkeypatch.setattr(convert_model.gguf_model, "convert", lambda *given: seen.append(given[0]))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    convert_model.convert(tmp_path / "m.gguf", tmp_path / "no.bin")
    assert seen == [tmp_path / "m.gguf"]


def test_from_a_hub(made, tmp_path, monkeypatch):
    """Its tokenizer's files come along; nothing else does."""
    hub = Hub(made[0], "owner/llama")
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        import huggingface_hub.constants as constants

        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        config = convert_model.convert("owner/llama", tmp_path / "m.bin")
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
    assert config == made[3]
    for name, tensor in load_weights(tmp_path / "m.bin")[1].items():
        np.testing.assert_array_equal(tensor, made[4][name])
    asked = {line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= asked


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
RULES = [
    ({"model_type": "qwen2"}, "model_type is 'qwen2'; this project runs 'gpt2' and 'llama'"),
    ({"model_type": ...}, "model_type is None"),
    ({"rope_parameters": LLAMA_3}, "rope_parameters is of type 'llama3': this project does not scale"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is of type 'linear'"),
    ({"rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
    ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'; it must be a number above 0"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu' or 'swish'"),
    ({"attention_bias": True}, "attention_bias is True, not False"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"num_key_value_heads": 3}, "n_head is 4 and n_kv_head is 3"),
    ({"num_attention_heads": "4"}, "num_attention_heads is '4'; it must be an integer"),
    ({"hidden_size": ...}, "hidden_size is missing"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"tie_word_embeddings": False}, "tensor 'lm_head.weight' is missing"),
    ({"num_hidden_layers": 3}, "is missing (and 8 more)"),
    ({"num_hidden_layers": 1}, "is unknown (and 8 more)"),
    ({"intermediate_size": 99}, "has shape (100, 48); the configuration asks for (99, 48)"),
    ({"eos_token_id": "end"}, "eos_token_id is"),
]


@pytest.fixture(scope="module")
def saved(transformers, torch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, transformers, torch, of_bytes())
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "hf"))


def refused(folder, capsys):
    """The one line that is said of a folder."""
    out = folder.parent / "m.bin"
    assert convert_model.main([str(folder), "--out", str(out)]) == 2 and not out.exists()
    said = capsys.readouterr()
    line = [line for line in said.err.replace("\r", "\n").splitlines() if "writing m.bin:" not in line and line]
    assert len(line) == 1 and not said.out, said.err
    return line[0]


@pytest.mark.parametrize("changes, said", RULES, ids=lambda given: given[:30] if isinstance(given, str) else "")
def test_what_cannot_be_run_is_refused_in_one_line(folder, capsys, changes, said):
    settings = json.loads((folder / "config.json").read_text())
    settings = {field: value for field, value in {**settings, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    assert said in refused(folder, capsys)


def test_tokenizers_that_cannot_be_read_are_refused_in_one_line(folder, capsys):
    whole = json.loads((folder / "tokenizer.json").read_text())
    for tokenizer, said in (
        ({**whole, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "its decoder is a WordPiece"),
        ({**whole, "decoder": None}, "its decoder is None"),
        ({"model": 1}, "the weight file's tokenizer cannot be read"),
        ([], "not a JSON object"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert said in refused(folder, capsys)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json; save the tokenizer there as well" in refused(folder, capsys)


def test_a_tensor_under_two_names_is_refused_in_one_line(folder, torch, capsys):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "tensor norm.weight is there twice" in refused(folder, capsys)


def test_numbers_that_do_not_fit_are_refused_in_one_line(folder, torch, capsys):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for value, said in (7e4, "fp16 ends at 65504"), (float("nan"), "every weight must be finite"):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert said in refused(folder, capsys)


def test_stop_tokens_come_from_all_places(saved, folder):
    for listed, wanted in (None, [2]), (7, [2, 7]), ([5, 2, 9], [2, 5, 9]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed} if listed else {}))
        found = json.loads(convert_model.read_tokenizer(folder))["stop_tokens"]
        assert found == wanted and OwnTokenizer(convert_model.read_tokenizer(folder)).stop_tokens == tuple(wanted)
