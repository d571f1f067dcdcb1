"""Chapter 14: weights of 8 and 4 bits, which are those of float32 that they unpack to, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from test_engine import Watched
from test_engines import random_model
from test_llama import random_llama

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, RequestError
from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.few_bits import BITS, KINDS, as_blocks
from ch14_mini_llm.model.quantize import Blocks, unpacked
from ch14_mini_llm.model.upload import panels_model
from chapters.ch09_gemm.quantized import quantize_reference, unpack_reference

GPT2 = dict(n_layer=2, n_head=2, d_model=32, d_ff=96, n_ctx=96, vocab_size=61)
LLAMA = LlamaConfig(2, 4, 2, 16, 64, 96, 96, 101, 1e-5, 10000.0, True)
every_dtype = pytest.mark.parametrize("dtype", BITS)


def same_bits(rng, few, whole):
    """Tokens and logits of engines on two models."""
    requests = [Request(rng.integers(0, few.vocab_size, n).tolist(), 12) for n in (1, 5, 17, 40)]
    engines = [Watched(model, num_blocks=60, max_rows=33) for model in (few, whole)]
    for ours, theirs in zip(*(engine.run(requests) for engine in engines), strict=True):
        assert ours.tokens == theirs.tokens and ours.error is None
        np.testing.assert_array_equal(*(engine.logits(result) for engine, result in zip(engines, (ours, theirs))))


@every_dtype
def test_a_gpt2(rng, dtype):
    config, tensors = random_model(3, **GPT2)
    there_and_back = lambda rows: unpacked(as_blocks(np.ascontiguousarray(rows), BITS[dtype]))
    whole = {name: there_and_back(array.T).T if array.ndim == 2 and name.startswith("h.") else array
             for name, array in tensors.items()}  # fmt: skip
    head = panels_model(config, {**whole, "wte.weight": there_and_back(tensors["wte.weight"])}).head
    few = panels_model(config, tensors, dtype=dtype)
    assert few.head.weight.dtype == dtype and few.layers[0].down.weight.bits == BITS[dtype]
    same_bits(rng, few, replace(panels_model(config, whole), head=head))  # the embedding stays as it is


@every_dtype
def test_a_llama_of_a_file_with_few_bits(rng, dtype):
    """As the file has them, whichever is asked for; also where a product's matrices have different ones."""
    kinds = {"self_attn.q_proj": 4, "self_attn.k_proj": 8, "self_attn.v_proj": 4, "mlp.down_proj": 8, "embed_tokens": 8}
    few, whole = {}, {}
    for name, array in random_llama(LLAMA).items():
        role = name.removesuffix(".weight").split(".", 2)[-1]
        few[name] = array
        if array.ndim == 2:
            bits = kinds.get(role if role in kinds else name.removesuffix(".weight"), 4)
            few[name] = as_blocks(array, bits)
            assert few[name].kind == KINDS[bits] and as_blocks(few[name], 8) is few[name]
        whole[name] = unpacked(few[name])
    mixed = [name for name in few if "q_proj" in name or "v_proj" in name]
    whole |= {name: unpacked(as_blocks(whole[name], 8)) for name in mixed}  # beside 8 bits they have 8 as well
    same_bits(rng, panels_model(LLAMA, few, dtype=dtype), panels_model(LLAMA, whole))


@every_dtype
def test_a_llama_that_is_quantized_here(rng, dtype):
    few = random_llama(LLAMA)
    whole = {
        name: unpacked(as_blocks(array, BITS[dtype])) if array.ndim == 2 and name != "embed_tokens.weight" else array
        for name, array in few.items()
    }
    config = replace(LLAMA, tied_head=False)
    few["lm_head.weight"] = few["embed_tokens.weight"]
    whole["lm_head.weight"] = unpacked(as_blocks(few["embed_tokens.weight"], BITS[dtype]))
    same_bits(rng, panels_model(config, few, dtype=dtype), panels_model(config, whole))


def test_what_cannot_be_is_refused():
    config, tensors = random_model(3, **GPT2 | {"d_model": 40})
    with pytest.raises(RequestError, match="40 inputs, no multiple of 32; use float16"):
        Engine.of(config, tensors, "kv", dtype="int4")
    config, tensors = random_model(3, **GPT2)
    with pytest.raises(RequestError, match="dtype is 'int4'; engine fast keeps weights as float16"):
        Engine.of(config, tensors, "fast", dtype="int4")
    with pytest.raises(RequestError, match="dtype is 'int2'"):
        Engine.of(config, tensors, "kv", dtype="int2")


@pytest.mark.parametrize("bits", KINDS)
def test_chapter_9_and_the_weight_file_mean_the_same_blocks(rng, bits):
    rows = rng.standard_normal((7, 96), dtype=np.float32)
    blocks = quantize_reference(rows, bits)
    known = Blocks(blocks.reshape(7, -1), KINDS[bits], rows.shape)
    np.testing.assert_array_equal(known.unpack(), unpack_reference(blocks, bits))
