"""The laptop's benchmark on a model of a few thousand weights: its figures, its ratios, and what it says is missing."""

import json

import pytest

from benchmarks import laptop
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.weights import save_weights

TINY = GPT2Config(n_layer=1, n_head=2, d_model=32, d_ff=64, n_ctx=64, vocab_size=61)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("laptop") / "tiny.bin"
    save_weights(path, TINY, laptop.random_weights(TINY))
    return str(path)


def test_a_run(weights, tmp_path, capsys):
    options = ["--weights", weights, "--only=decode,batch", "--tokens=4", "--prompt=3", "--rounds=2", "--peers=none"]
    assert laptop.main([*options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu" / "laptop.json").read_text())
    assert not result["errors"] and result["config"]["d_model"] == 32 and result["machine"]["threads"] >= 1
    for name in ("decode float32", "decode float16", "decode float16, one thread", "batch of 1, float32"):
        median, low, high = result["figures"][name]
        assert 0 < low <= median <= high
    assert set(result["ratios"]) == {"8 sequences / one", "share of the floor, float16, one thread"}
    shown = capsys.readouterr().out
    assert "batch of 8, float32: " in shown and "8 sequences / one: " in shown


def test_few_bits(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(laptop, "SMOLLM2", laptop.ROOT / "no-such-file.bin")
    options = ["--weights", weights, "--only=few", "--tokens=4", "--prompt=3", "--rounds=1", "--peers=none"]
    assert laptop.main([*options, "--name=few", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu" / "few.json").read_text())
    assert list(result["figures"]) == ["decode float16", "decode int8", "decode int4"] and not result["errors"]
    assert set(result["ratios"]) == {"int8 / float16", "int4 / float16"}


def test_products_are_checked_and_compared(weights):
    rows = laptop.prefill_products(weights, "float16")
    assert [row[:2] for row in rows] == [[32, 96], [32, 32], [32, 64], [64, 32]]
    assert all(speed > 0 for row in rows for speed in row[2:])
    figures = {"prefill float16": [[32, 96, [3.0, 2, 4], [6.0, 5, 7]], [64, 32, [1.0, 1, 1], [4.0, 4, 4]]]}
    assert laptop.ratios(figures, 100) == {"prefill float16 / NumPy, least of four": 0.25}


def test_ratios():
    figures = {
        "decode float32": [20.0, 1, 1], "decode transformers float32": [10.0, 1, 1], "decode float16": [30.0, 1, 1],
        "decode llama.cpp F16": [60.0, 1, 1], "decode float16, one thread": [5.0, 1, 1],
        "read GB/s, one thread": [10.0, 1, 1], "batch of 1, float32": [1.0, 1, 1], "batch of 8, float32": [4.0, 1, 1],
    }  # fmt: skip
    assert laptop.ratios(figures, weight_bytes=1e9) == {
        "float32 / transformers": 2, "float16 / llama.cpp F16": 0.5, "8 sequences / one": 4,
        "share of the floor, float16, one thread": 0.5,
    }  # fmt: skip


def test_what_fails_is_said_and_the_rest_is_measured():
    def broken():
        raise RuntimeError("no such processor")

    figures, errors = laptop.measure([("one", lambda: 2.0), ("two", broken)], rounds=3)
    assert figures == {"one": [2.0, 2.0, 2.0]} and errors == {"two": "no such processor"}


@pytest.mark.parametrize(
    "options, named",
    [
        (["--only=decode,encode"], "--only is decode,encode; it takes decode, batch, prefill, start"),
        (["--peers=abacus"], "--peers is abacus"), (["--tokens=1"], "--tokens must be at least 2"),
        (["--weights=nowhere.bin"], "there is no such weight file"),
    ],
)  # fmt: skip
def test_bad_options(options, named, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        laptop.main([*options, "--out", str(tmp_path)])
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_a_gguf_file_has_the_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    tensors = laptop.random_weights(TINY)
    laptop.write_gguf(tmp_path / "tiny.gguf", TINY, tensors)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert len(found) == len(tensors)
    up = found["blk.0.ffn_up.weight"].data
    assert (up == tensors["h.0.mlp.c_fc.weight"].T).all() and found["token_embd.weight"].data.shape == (61, 32)


def test_the_start_of_a_program(weights):
    assert 0.1 < laptop.first_token(weights, "float32", cold=False) < 600
