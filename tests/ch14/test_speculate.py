"""Chapter 14: guesses of next tokens change how many steps there are, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import SMALL, alone
from test_engines import random_model

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, RequestError, Sampling
from ch14_mini_llm.engine.speculate import LONGEST_PAUSE, MOST, Ngrams, n_right
from ch14_mini_llm.levels import make_engine
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.upload import float16_model, panels_model

N_CTX = SMALL["n_ctx"]


@pytest.fixture(scope="module")
def weights():
    return random_model(3, **SMALL)


@pytest.fixture(scope="module")
def model(weights):
    return panels_model(*weights)


def repeating(rng, count, most=20):
    """Prompts that say a thing several times, as a model of random weights then does as well."""
    words = [rng.integers(0, SMALL["vocab_size"], rng.integers(1, 6)).tolist() for _ in range(count)]
    return [(word * most)[: rng.integers(1, most)] for word in words]


def run(model, requests, speculate, level="kv", **options):
    engine = Engine(model, level, speculate=speculate, **dict(num_blocks=200, max_batch=16, max_rows=100) | options)
    results = engine.run(requests)
    engine.check()
    return results, engine.stats()


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.tokens, one.finish_reason, one.error) == (other.tokens, other.finish_reason, other.error)
        assert one.logprobs == other.logprobs


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [2, 16, 60])
def test_fifty_prompts_have_the_tokens_that_they_have_without(rng, model, places):
    requests = [
        Request(tokens, int(rng.integers(1, N_CTX - len(tokens))), logprobs=2 if i % 3 == 0 else None)
        for i, tokens in enumerate(repeating(rng, 50))
    ]
    wanted, before = run(model, requests, None)
    got, stats = run(model, requests, "ngram", max_batch=places)
    same(got, wanted)
    drafts, accepted = stats["spec_decode_num_draft_tokens"], stats["spec_decode_num_accepted_tokens"]
    assert before["spec_decode_num_draft_tokens"] == 0 < accepted <= drafts
    assert stats["generation_tokens"] == before["generation_tokens"]


@pytest.mark.parametrize("n_prompt", [1, 7, 40])
def test_exactly_to_the_end_of_the_context(model, n_prompt):
    request = Request(([5, 9, 11] * N_CTX)[:n_prompt], N_CTX - n_prompt)
    wanted, _ = alone(model, request)
    for places in range(1, MOST + 3):
        ((got,), stats) = run(model, [request], "ngram", max_batch=places)
        assert got.tokens == wanted and got.finish_reason == "length"
        assert stats["steps"] == N_CTX - n_prompt - stats["spec_decode_num_accepted_tokens"]


def test_draws_are_those_of_the_same_seed(rng, model):
    settings = {"temperature": 0.4}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.5}, {"logit_bias": {7: 30.0}}
    requests = [
        Request(tokens, 40, Sampling(seed=i, **settings[i % len(settings)]), logprobs=1)
        for i, tokens in enumerate(repeating(rng, 16))
    ]
    wanted, _ = run(model, requests, None)
    got, stats = run(model, requests, "ngram", max_batch=32)
    same(got, wanted)
    assert 0 < stats["spec_decode_num_accepted_tokens"] < stats["spec_decode_num_draft_tokens"]


def test_a_draw_is_a_guess_with_the_probability_that_the_model_gives_it(model):
    """What makes it exact: over many seeds, guessed tokens are as frequent as drawn ones."""
    prompt, n = [3, 4, 5, 3, 4, 5, 3, 4], 400
    requests = [Request(prompt, 3, Sampling(temperature=2.0, top_k=3, seed=seed)) for seed in range(n)]
    texts = [[result.tokens for result in run(model, requests, how, max_batch=32)[0]] for how in (None, "ngram")]
    assert texts[0] == texts[1] and len({tuple(text) for text in texts[0]}) > 5


def test_in_a_small_pool_with_a_prefix_cache(rng, model):
    requests = [Request(tokens, 40) for tokens in repeating(rng, 12)]
    wanted, _ = run(model, requests, None)
    got, stats = run(model, requests, "ngram", num_blocks=12, block_size=8, max_batch=6)
    same(got, wanted)
    assert stats["preemptions"] > 0


def test_on_the_level_fast(rng):
    config, tensors = random_model(3, n_layer=2, n_head=2, d_model=64, d_ff=128, n_ctx=96, vocab_size=61)
    model = float16_model(config, tensors)
    requests = [Request(tokens, 50) for tokens in repeating(rng, 6)]
    options = dict(level="fast", max_batch=16, max_rows=80)
    wanted, _ = run(model, requests, None, deterministic=True, **options)
    got, stats = run(model, requests, "ngram", deterministic=True, **options)
    same(got, wanted)
    assert stats["spec_decode_num_accepted_tokens"] > 0
    for request in requests[:3]:  # alone, eight rows go through the kernels of one
        wanted, got = (run(model, [request], how, **options | {"max_batch": 1 + MOST})[0] for how in (None, "ngram"))
        same(got, wanted)


def test_a_model_whose_logits_are_no_numbers(weights):
    config, tensors = weights
    name = next(name for name in tensors if name.endswith("ln_f.weight"))
    model = panels_model(config, {**tensors, name: np.full_like(tensors[name], np.nan)})
    requests = [Request([1, 2, 3] * 5, 20)]
    wanted, _ = run(model, requests, None)
    same(run(model, requests, "ngram")[0], wanted)
    assert wanted[0].finish_reason == "error"


@pytest.mark.parametrize("level", ["kv", "fast"])
def test_one_sequence_at_a_time(weights, level):
    prompt = [5, 9, 11] * 6
    texts = [list(generate(make_engine(level, *weights, speculate=how), prompt, 60, None)) for how in (None, "ngram")]
    assert texts[0] == texts[1]


# --- who guesses -----------------------------------------------------------------------------------------------------


def test_nobody_guesses_whose_logits_depend_on_the_tokens_before(model):
    class Any:
        done = False

        def mask(self, n_words):
            return None

        def advance(self, token):
            pass

    for more in {"sampling": Sampling(0.0, frequency_penalty=0.1)}, {"constraint": Any()}:
        (result,), stats = run(model, [Request([5, 9, 11] * 6, 40, **more)], "ngram")
        assert result.finish_reason == "length" and stats["spec_decode_num_draft_tokens"] == 0


@pytest.mark.parametrize("options", [{"speculate": "luck"}, {"speculate": 1}, {"speculate": "ngram", "static": True}])
def test_mistakes(model, options):
    with pytest.raises(RequestError, match=r"speculate is .*(it can be|leave one out)"):
        Engine(model, **options)
    with pytest.raises(RequestError, match="naive has no guesses"):
        make_engine("naive", None, None, speculate="ngram")


# --- the guesses -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 4))
@settings(deadline=None)
def test_ngrams_are_what_stood_behind_the_same_tokens(tokens, size):
    guesser = Ngrams(size)
    for end in range(len(tokens) + 1):
        text = tokens[:end]
        places = [i for i in range(size, end) if text[i - size : i] == text[-size:]] if end > size else []
        guess = guesser._find(text, 5)
        if not places:
            assert guess == []
        else:
            longer = text[places[-1] :]
            assert guess == (longer * 5)[:5]


def test_how_many_are_guessed_depends_on_how_many_were_right():
    guesser, text = Ngrams(1), [1] * 10
    assert len(guesser.guess(text, 9)) == 3 and guesser.hot
    guesser.learn(text, 3, 3)
    assert len(guesser.guess(text, 9)) == 6
    guesser.learn(text, 6, 6)
    assert len(guesser.guess(text, 9)) == MOST and len(guesser.guess(text, 2)) == 2 and guesser.guess(text, 0) == []
    guesser.learn(text, MOST, 1)
    assert len(guesser.guess(text, 9)) == 2
    pauses = []
    for _ in range(9):
        guesser.learn(text, 1, 0)
        assert not guesser.hot
        start = len(text)
        while not guesser.guess(text, 9):
            guesser.look(text)
            assert not guesser.hot
            text.append(1)
        pauses.append(len(text) - start)
    assert pauses == [2, 4, 8, 16, 32] + [LONGEST_PAUSE] * 4


def test_n_right():
    assert [n_right((1, 2, 3), tokens) for tokens in ([1, 2, 3, 4], [1, 2, 4, 3], [0, 2, 3, 4])] == [3, 2, 0]
