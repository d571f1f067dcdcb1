"""Chapter 14: the engine in float16: against float32, and against itself in other company, with graphs and without."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine import FAST, SMALL, Watched, alone, prompts, run_schedule, solo
from test_engines import RELATIVE, random_model

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, RequestError, Sampling
from ch14_mini_llm.forward.shapes import rounded
from ch14_mini_llm.model.upload import float16_model, panels_model


@pytest.fixture(scope="module")
def weights():
    return random_model(3, **SMALL)


@pytest.fixture(scope="module")
def model(weights):
    return float16_model(*weights)


@pytest.fixture(scope="module")
def plain(weights):
    return panels_model(*weights)


@pytest.mark.parametrize("options", [{"max_rows": 90}, {"max_rows": 100, "max_batch": 8}, FAST], ids=str)
def test_logits_are_those_of_float32(rng, model, plain, options):
    """Of prompts together in tiles or as rows, and of the steps behind them, as long as the tokens are the same."""
    requests = [Request(prompt, 6) for prompt in prompts(rng)]
    engine = Watched(model, **{"level": "fast", **options})
    for request, result in zip(requests, engine.run(requests)):
        tokens, wanted = alone(plain, request)
        same = next((i for i, pair in enumerate(zip(result.tokens, tokens)) if pair[0] != pair[1]), len(tokens) - 1) + 1
        found = engine.logits(result)[:same]
        assert np.abs(found - wanted[:same]).max() <= RELATIVE * np.abs(wanted).max()
        assert same == len(tokens) or np.ptp(np.sort(wanted[same - 1])[-2:]) <= 2 * RELATIVE * np.abs(wanted).max()


def test_a_prompt_in_pieces_is_what_it_is_in_one(rng, model, plain):
    """A piece that no token follows has no logits, so nothing of its last layer may be left for the next step."""
    prompt, *others = prompts(rng, [90, 21, 40])
    request = Request(prompt, 3)
    tokens, wanted = alone(plain, request)
    for max_rows in (20, 34, 100):
        engine = Watched(model, level="fast", max_rows=max_rows, max_batch=4, prefix_cache=False)
        for _ in range(3):  # step by step, then as graphs
            found = engine.logits(engine.run([request, *(Request(other, 2) for other in others)])[0])
            assert np.abs(found[0] - wanted[0]).max() <= RELATIVE * np.abs(wanted[0]).max()
            engine.seen.clear()


def test_long_prompts_are_divided_among_segments_of_keys(rng):
    """Beside a sequence that decodes, in pieces that begin and end anywhere, and with pages of NaN behind the text."""
    config, tensors = random_model(5, **SMALL | {"n_ctx": 1000})
    plain, model = (upload(config, tensors) for upload in (panels_model, float16_model))
    requests = [Request(prompt, 4) for prompt in prompts(rng, [900, 3, 500, 384, 385])]
    engine = Watched(model, level="fast", max_rows=300, max_batch=6, num_blocks=170, prefix_cache=False)
    for cache in engine.runner.cache.flat:
        for array in cache:
            array.copy_to_device(np.full(array.shape, np.nan, array.dtype))
    shapes = []
    run = engine.runner.run
    engine.runner.run = lambda shape, *rest: shapes.append(shape) or run(shape, *rest)
    for request, result in zip(requests, engine.run(requests)):
        assert result.error is None
        found, (_, wanted) = engine.logits(result), alone(plain, request, num_blocks=64)
        assert np.abs(found[0] - wanted[0]).max() <= RELATIVE * np.abs(wanted[0]).max()
    assert {shape.split for shape in shapes if shape.n_tiles} == {False, True}
    assert any(shape.split and shape.n_steps for shape in shapes)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_batch": 3, "max_rows": 9}, {"block_size": 64}, {"num_blocks": 9}, {"look_ahead": True},
        {"num_blocks": 5, "max_batch": 4, "max_rows": 40, "look_ahead": True},
    ],
    ids=str,
)  # fmt: skip
def test_bits_do_not_depend_on_who_else_is_there(rng, model, options):
    requests = [Request(prompt, 14) for prompt in prompts(rng)]
    engine = Watched(model, **FAST, **options)
    for _ in range(2):  # the second time, prompts are in the prefix cache, and steps are graphs
        for request, result in zip(requests, engine.run(requests)):
            tokens, logits = alone(model, request, **FAST)
            assert result.tokens == tokens[: len(result.tokens)]
            assert len(result.tokens) == 14 or "pool" in result.error
            np.testing.assert_array_equal(engine.logits(result), logits[: len(result.tokens)])
        engine.check()
        engine.seen.clear()
    assert any(engine.runner._graphs.values())


def test_a_few_graphs_serve_all_steps(rng, model):
    """Whatever the lengths: shapes are buckets, and padding up to them changes no token."""
    requests = [Request(prompt, 1 + n % 7) for n, prompt in enumerate(prompts(rng, rng.integers(1, 60, 24)))]
    engine = Watched(model, level="fast", max_batch=8, max_rows=72, prefix_cache=False)
    for _ in range(2):
        steps = engine.stats()["steps"]
        results = engine.run(requests)
        steps = engine.stats()["steps"] - steps
    shapes = set(engine.runner._graphs)
    assert steps >= 15 and len(shapes) <= 10
    assert {shape.rows for shape in shapes if shape.ops == "many"} <= {64, 72}
    for request, result in zip(requests, results):
        assert len(result.tokens) == request.max_new


def with_and_without_graphs(model, requests, **options):
    """The engine with graphs after two runs of ``requests`` and one that launches each kernel: tokens, bits of logits
    are the same. Returns the shapes of steps that were replayed."""
    engine, eager = (Watched(model, level="fast", prefix_cache=False, **options) for _ in range(2))
    run, replayed = engine.runner.run, []
    engine.runner.run = lambda shape: run(shape) and not replayed.append(shape)
    once = eager.runner.run
    eager.runner.run = lambda shape: once(shape, record=False)
    wanted = eager.run(requests)
    for _ in range(3):
        replayed.clear()
        engine.seen.clear()
        for result, other in zip(engine.run(requests), wanted):
            assert result.error is None and result.tokens == other.tokens
            np.testing.assert_array_equal(engine.logits(result), eager.logits(other))
    assert not any(eager.runner._graphs.values())
    return replayed


@pytest.mark.parametrize("n", range(1, 34))
def test_a_replay_is_its_launches_with_any_number_of_sequences(model, n):
    requests = [Request([i % 61, n, 5], 4) for i in range(n)]
    replayed = with_and_without_graphs(model, requests, max_batch=40, max_rows=240, num_blocks=40)
    steps = [shape for shape in replayed if shape.single]
    assert len(steps) >= 3 and {shape.ops for shape in steps} == {"few" if n <= 8 else "many"}


@pytest.mark.parametrize("rows", [64, 128, 192, 256, 384])
def test_a_replay_is_its_launches_with_parts_of_prompts(rng, model, rows):
    """Beside sequences that decode, and drawn from."""
    lengths = [2, 3, *[60] * (rows // 60), rows % 60 or 1]
    draws = [Sampling(1.1, top_k=9, seed=i) for i in range(len(lengths))]
    requests = [Request(prompt, 6, draw) for prompt, draw in zip(prompts(rng, lengths), draws)]
    replayed = with_and_without_graphs(model, requests, max_batch=10, max_rows=rows + 2, num_blocks=60)
    assert any(shape.ops == "many" and not shape.single and shape.rows >= rows for shape in replayed)


@pytest.mark.parametrize("n, rows", [(1, 1), (5, 6), (6, 6), (7, 8), (13, 16), (17, 24), (24, 24), (25, 32)])
def test_rounded(n, rows):
    assert rounded(n) == rows


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=16), st.integers(2, 12), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_random_schedules(model, actions, num_blocks, max_batch, more, look_ahead):
    sizes = dict(num_blocks=num_blocks, block_size=4, max_batch=max_batch, max_rows=max_batch + more)
    engine = Watched(model, **FAST, look_ahead=look_ahead, **sizes)
    run_schedule(engine, actions, lambda request: solo(model, request, **FAST))


@pytest.mark.parametrize("look_ahead", [False, True])
def test_draws_and_scores_are_the_same_in_a_batch(rng, model, look_ahead):
    sampling = Sampling(0.9, top_k=20, seed=5, frequency_penalty=0.5)
    prompt, *others = prompts(rng, [9, 1, 30, 17])
    request = Request(prompt, 10, sampling, logprobs=2)
    requests = [Request(other, 12, Sampling(1.1) if i else None) for i, other in enumerate(others)]
    (wanted,) = Engine(model, **FAST, look_ahead=False).run([request])
    for _ in range(2):
        result = Engine(model, **FAST, look_ahead=look_ahead, max_rows=40).run([*requests, request])[-1]
        assert result.tokens == wanted.tokens and result.logprobs == wanted.logprobs


def test_a_prompts_scores_are_those_of_float32(rng, model, plain):
    (prompt,) = prompts(rng, [33])
    request = Request(prompt, 3, prompt_logprobs=0)
    (wanted,) = Engine(plain).run([request])
    for options in ({"max_rows": 90}, {"max_rows": 40, "max_batch": 4}, FAST):
        (result,) = Engine(model, **{"level": "fast", **options}).run([request])
        assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 33
        pairs = zip(result.prompt_logprobs[1:], wanted.prompt_logprobs[1:])
        assert max(abs(ours.logprob - theirs.logprob) for ours, theirs in pairs) < 0.1


@pytest.mark.parametrize("options, named", [
    ({"level": "quick"}, "level is 'quick'"), ({"level": "fast", "block_size": 12}, "block_size is 12"),
])  # fmt: skip
def test_what_the_level_does_not_take_is_refused(weights, options, named):
    with pytest.raises(RequestError, match=named):
        Engine.of(*weights, **options)
