"""The engine, small enough for the slow tools: a sanitizer on the CPU or on a GPU."""

import numpy as np
import pytest
from test_engines import RELATIVE, last_logits, prompt_of, random_model

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, Sampling
from ch14_mini_llm.levels import make_engine
from ch14_mini_llm.levels.generate import generate

SIZES = dict(n_layer=2, n_head=1, d_model=64, d_ff=136, n_ctx=160, vocab_size=257)


def test_a_prompt_and_three_steps():
    config, tensors = random_model(**SIZES)
    fast, naive = make_engine("fast", config, tensors), make_engine("naive", config, tensors)
    tokens = prompt_of(130)  # two blocks of queries; and the steps' keys are a chunk and some more
    made = list(generate(fast, tokens, 4))
    found = fast.logits.copy_to_host()
    expected = last_logits(naive, tokens + made[:-1])
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()
    drawn = list(generate(fast, tokens, 4, Sampling(temperature=0.9, top_k=30, top_p=0.9, seed=2)))
    assert len(drawn) == 4 and all(0 <= token < 257 for token in drawn)


@pytest.mark.parametrize("level", ["kv", "fast"])
def test_a_mixed_batch(level):
    """Steps beside prompts, in rows and in tiles, draws beside the likeliest, a preemption, and padding."""
    engine = Engine.of(*random_model(**SIZES), level, num_blocks=14, max_batch=5, max_rows=80)
    adjusted = Sampling(0.8, seed=3, repetition_penalty=1.2, logit_bias={5: 2.0})
    requests = [
        Request(prompt_of(5), 9), Request(prompt_of(90), 6, Sampling(seed=1), logprobs=1),
        Request(prompt_of(33), 4, adjusted), Request(prompt_of(17), 30), Request(prompt_of(2), 3, prompt_logprobs=1),
    ]  # fmt: skip
    for result, request in zip(engine.run(requests), requests):
        assert result.error is None and len(result.tokens) == request.max_new
        assert all(0 <= token < 257 for token in result.tokens)
    engine.check()
