"""One prompt and three steps of the fast level, small enough for the slow tools: a sanitizer on the CPU or on a GPU."""

import numpy as np
from test_engines import RELATIVE, last_logits, prompt_of, random_model

from ch14_mini_llm.engine.request import Sampling
from ch14_mini_llm.levels import make_engine
from ch14_mini_llm.levels.generate import generate


def test_a_prompt_and_three_steps():
    config, tensors = random_model(n_layer=2, n_head=1, d_model=64, d_ff=136, n_ctx=160, vocab_size=257)
    fast, naive = make_engine("fast", config, tensors), make_engine("naive", config, tensors)
    tokens = prompt_of(130)  # two blocks of queries; and the steps' keys are a chunk and some more
    made = list(generate(fast, tokens, 4))
    found = fast.logits.copy_to_host()
    expected = last_logits(naive, tokens + made[:-1])
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()
    drawn = list(generate(fast, tokens, 4, Sampling(temperature=0.9, top_k=30, top_p=0.9, seed=2)))
    assert len(drawn) == 4 and all(0 <= token < 257 for token in drawn)
