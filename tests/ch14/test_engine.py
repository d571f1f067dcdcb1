"""Chapter 14: the engine against the listing and transformers, and against itself in other company, bit by bit."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_models import make_hf_model
from numba import cuda
from test_engines import random_model

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, RequestError, Sampling
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.upload import float16_model, panels_model
from ch14_mini_llm.naive.gpt2 import GPT2

SMALL = dict(n_layer=2, n_head=2, d_model=32, d_ff=72, n_ctx=96, vocab_size=61)
PROMPTS = [1, 2, 15, 16, 17, 33, 50]


@pytest.fixture(scope="module")
def weights():
    return random_model(3, **SMALL)


@pytest.fixture(scope="module")
def model(weights):
    return panels_model(*weights)


class Watched(Engine):
    """An engine on pages of NaN that keeps the logits of every new token: ``seen[id, number of the token]``."""

    def __init__(self, model, level="kv", **options):
        super().__init__(model, level, **options)
        for pages in self.runner.cache.layers:
            for one in pages:
                one.copy_to_device(np.full(one.shape, np.nan, one.dtype))
        self.seen = {}
        launch = self.runner.launch

        def note(plan):
            ticket = launch(plan)
            cuda.synchronize()
            parts = [part for part in plan.parts if part.samples]
            ops = self.runner.ops[self.runner.shapes.of(plan, self.runner.sampler.draws).ops]
            for part, row in zip(parts, ops.logits.copy_to_host()):
                if part.padding:
                    continue
                number = part.start + part.count - part.sequence.n_prompt
                before = self.seen.setdefault((part.sequence.id, number), row)
                np.testing.assert_array_equal(before, row)  # made again after a preemption, it is the same
            return ticket

        self.runner.launch = note

    def logits(self, result):
        """(new tokens, vocab_size) of a request that has ended."""
        return np.stack([self.seen[result.id, number] for number in range(len(result.tokens))])


def prompts(rng, lengths=PROMPTS):
    return [rng.integers(0, SMALL["vocab_size"], n).tolist() for n in lengths]


def alone(model, request, **options):
    """``(tokens, logits)`` of a request alone in a new engine: no prefix cache, its prompt in one piece."""
    options = dict(num_blocks=30, block_size=16, max_batch=1, max_rows=100, prefix_cache=False) | options
    engine = Watched(model, **options)
    (result,) = engine.run([request])
    assert result.error is None
    return result.tokens, engine.logits(result)


# --- the same as others ----------------------------------------------------------------------------------------------


def test_tokens_are_the_listings(rng, weights, model):
    requests = [Request(prompt, 20) for prompt in prompts(rng)]
    listing = GPT2(*weights)
    engine = Watched(model)
    for request, result in zip(requests, engine.run(requests)):
        assert result.tokens == list(generate(listing, request.tokens, 20)) and result.finish_reason == "length"
    engine.check()
    assert engine.idle and engine.stats()["blocks_owned"] == 0


def test_logits_are_the_listings(rng, weights, model):
    listing = GPT2(*weights)
    requests = [Request(prompt, 3) for prompt in prompts(rng)]
    engine = Watched(model)
    for request, result in zip(requests, engine.run(requests)):
        everything = listing.logits_all([*request.tokens, *result.tokens])
        wanted = everything[len(request.tokens) - 1 :][: len(result.tokens)]
        np.testing.assert_allclose(engine.logits(result), wanted, rtol=1e-5, atol=1e-5)


def test_weights_of_half_the_bytes_give_the_same_bits(rng, weights, model):
    """A file's weights are float16: widened on the device or in the product, they are the same numbers."""
    requests = [Request(prompt, 6) for prompt in prompts(rng)]
    engine, half = Watched(model), Watched(panels_model(*weights, dtype="float16"))
    for result, other in zip(engine.run(requests), half.run(requests)):
        assert result.tokens == other.tokens
        np.testing.assert_array_equal(engine.logits(result), half.logits(other))


def test_logits_are_transformers(rng, torch, transformers, tmp_path):
    path, theirs = make_hf_model(tmp_path, 2, 2, 32, 96, 61, seed=5)
    requests = [Request(prompt, 8) for prompt in prompts(rng)]
    engine = Watched.from_file(path)
    for request, result in zip(requests, engine.run(requests)):
        with torch.no_grad():
            logits = theirs(torch.tensor([[*request.tokens, *result.tokens]])).logits[0].numpy()
        wanted = logits[len(request.tokens) - 1 : -1]
        np.testing.assert_allclose(engine.logits(result), wanted, atol=1e-4)
        assert result.tokens == np.argmax(wanted, axis=1).tolist()


def test_draws_are_those_of_one_sequence_at_a_time(rng, weights, model):
    listing = GPT2(*weights)
    requests = [Request(prompt, 12, Sampling(0.9, top_k=20, seed=i) if i % 2 else None)
                for i, prompt in enumerate(prompts(rng))]  # fmt: skip
    for request, result in zip(requests, Engine(model).run(requests)):
        assert result.tokens == list(generate(listing, request.tokens, 12, request.sampling))


# --- the same in any company -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_batch": 3, "max_rows": 9}, {"block_size": 4}, {"block_size": 64},
        {"num_blocks": 9}, {"num_blocks": 5, "max_batch": 4, "max_rows": 40}, {"prefix_cache": False},
    ],
    ids=str,
)  # fmt: skip
def test_bits_do_not_depend_on_who_else_is_there(rng, model, options):
    requests = [Request(prompt, 14) for prompt in prompts(rng)]
    engine = Watched(model, **options)
    for _ in range(2):  # the second time, prompts are in the prefix cache
        for request, result in zip(requests, engine.run(requests)):
            tokens, logits = alone(model, request)
            assert result.tokens == tokens[: len(result.tokens)]
            assert len(result.tokens) == 14 or "pool" in result.error
            np.testing.assert_array_equal(engine.logits(result), logits[: len(result.tokens)])
        engine.check()
        engine.seen.clear()
    stats = engine.stats()
    assert ("num_blocks" not in options or stats["preemptions"] > 0) and stats["blocks_owned"] == 0


@pytest.mark.parametrize("n", [15, 16, 17, 31, 32, 33])
def test_a_prompt_that_is_known_gives_the_same(rng, model, n):
    (prompt,) = prompts(rng, [n])
    engine = Watched(model)
    wanted, logits = alone(model, Request(prompt, 4))
    for times in (1, 4, 4):
        for result in engine.run([Request(prompt, 4)] * times):
            assert result.tokens == wanted
            np.testing.assert_array_equal(engine.logits(result), logits)
    assert result.cached_tokens == (n - 1) // 16 * 16


FAST = dict(level="fast", deterministic=True)
LEVELS = [{}, FAST]


@pytest.fixture(scope="module")
def half_model(weights):
    return float16_model(*weights)


@pytest.mark.parametrize("options", LEVELS, ids=str)
def test_equal_prompts_in_one_step_on_an_empty_cache(rng, model, half_model, options):
    model = half_model if options else model
    (prompt,) = prompts(rng, [33])
    engine = Watched(model, max_rows=8 * 33, **options)
    wanted, logits = alone(model, Request(prompt, 6), **options)
    for result in engine.run([Request(prompt, 6)] * 8):
        assert result.tokens == wanted and result.cached_tokens == 0
        np.testing.assert_array_equal(engine.logits(result), logits)


@pytest.mark.parametrize("options", LEVELS, ids=str)
def test_a_prompt_may_take_up_where_another_request_decoded(rng, model, half_model, options):
    model = half_model if options else model
    (prompt,) = prompts(rng, [17])
    engine = Watched(model, block_size=4, **options)
    (first,) = engine.run([Request(prompt, 20)])
    for end in (10, 18, 20):
        longer = Request([*prompt, *first.tokens[:end], 5], 6)
        (result,) = engine.run([longer])
        wanted, logits = alone(model, longer, **options)
        assert result.cached_tokens == (17 + min(end, 19)) // 4 * 4 and result.tokens == wanted
        np.testing.assert_array_equal(engine.logits(result), logits)


@pytest.mark.parametrize("options", LEVELS, ids=str)
@pytest.mark.parametrize("n", range(1, 34))
def test_every_size_of_a_batch_leaves_others_alone(rng, model, half_model, options, n):
    """Buckets are padded: real rows have the same bits, and nothing but the sequences' blocks is written."""
    model = half_model if options else model
    engine = Watched(model, **options, max_batch=33, max_rows=264, num_blocks=120, prefix_cache=False)
    texts = [[(3 * i + j) % SMALL["vocab_size"] for j in range(1 + i % 7)] for i in range(11)]  # 8 rows apart: another
    requests = [Request(texts[i % 11], 5) for i in range(n)]
    for request, result in zip(requests, engine.run(requests)):
        tokens, logits = solo(model, request, **options)
        assert result.tokens == tokens
        np.testing.assert_array_equal(engine.logits(result), logits)
    for layer in engine.runner.cache.layers:
        for pages in layer:
            unwritten = np.isnan(pages.copy_to_host()).all(axis=(1, 2, 3))
            assert unwritten[0] and unwritten.sum() == 121 - n  # padding writes nowhere


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=24), st.integers(2, 12), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_random_schedules(model, actions, num_blocks, max_batch, more, look_ahead):
    """Submits, steps and aborts in any order, on pages of NaN: what comes out is what would come out alone."""
    sizes = dict(num_blocks=num_blocks, block_size=4, max_batch=max_batch, max_rows=max_batch + more)
    run_schedule(Watched(model, look_ahead=look_ahead, **sizes), actions, lambda request: solo(model, request))


def run_schedule(engine, actions, solo):
    """A schedule from bytes, and what must hold. solo(request): its tokens and logits alone."""
    requests, got, ends = {}, {}, {}
    num_blocks = engine.pool.n_blocks

    def step():
        for output in engine.step():
            got[output.id] += output.tokens
            if output.finish_reason:
                ends[output.id] = output
        engine.check()

    for action in actions:
        kind, value = action % 4, action // 4
        if kind == 0:
            request = Request([value % 3] * min(1 + value % 13, num_blocks * 4), value // 8)
            id = engine.submit(request)
            requests[id], got[id] = request, []
        elif kind == 1 and requests:
            engine.abort(value % len(requests))
        else:
            step()
    for _ in range(3000):
        if engine.idle:
            break
        step()
    assert engine.idle and ends.keys() == requests.keys()
    for id, request in requests.items():
        tokens, _ = solo(request)
        whole = ends[id].finish_reason == "length" and ends[id].error is None
        assert got[id] == (tokens if whole else tokens[: len(got[id])])


_solo = {}


def solo(model, request, **options):
    key = tuple(request.tokens), request.max_new, *options.items()
    if key not in _solo:
        _solo[key] = alone(model, request, **options) if request.max_new else ([], None)
    return _solo[key]


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_, named",
    [
        (Request([], 1), "no tokens"), (Request([61], 1), "token id 61"), (Request([1], -1), "max_new is -1"),
        (Request([1], 96), "max_new up to 95"), (Request([1] * 40, 1), "the prompt has 40 tokens"),
        (Request([1], 1, stop_tokens=[70]), "token id 70"), (Request([1], 1, Sampling(top_k=70)), "top_k is 70"),
        (Request([1], 1.5), "max_new is 1.5"),
    ],
)  # fmt: skip
def test_what_can_never_run_is_refused_and_the_next_one_runs(model, request_, named):
    engine = Engine(model, num_blocks=8, block_size=4)
    with pytest.raises(RequestError, match=named):
        engine.submit(request_)
    bad, good = engine.run([request_, Request([1, 2], 3)])
    assert named in bad.error and bad.finish_reason == "error" and good.error is None and len(good.tokens) == 3


@pytest.mark.parametrize("option", [{"block_size": 6}, {"block_size": 2}, {"max_rows": 4}, {"num_blocks": 0}])
def test_sizes_that_cannot_be_are_refused(model, option):
    with pytest.raises(RequestError, match=f"{next(iter(option))} is {next(iter(option.values()))}"):
        Engine(model, max_batch=4, **option)


def test_a_request_that_outgrows_the_pool_says_so(model):
    engine = Engine(model, num_blocks=3, block_size=4)
    grown, after = engine.run([Request([1] * 6, 50), Request([2], 3)])
    assert grown.finish_reason == "length" and "pool of 3 blocks of 4 tokens" in grown.error
    assert len(grown.tokens) == 7 and after.error is None


def test_logits_of_nan_end_one_request_and_no_other(rng, weights):
    config, tensors = weights
    broken = dict(tensors)
    broken["wpe.weight"] = tensors["wpe.weight"].copy()
    broken["wpe.weight"][20] = np.nan
    engine = Engine(panels_model(config, broken))
    short, long = prompts(rng, [5, 19])
    fine, ends = engine.run([Request(short, 10), Request(long, 10)])
    assert ends.finish_reason == "error" and "NaN" in ends.error and len(ends.tokens) == 2  # position 20 is the second
    assert fine.error is None and fine.tokens == alone(panels_model(config, tensors), Request(short, 10))[0]


def test_an_error_in_a_step_ends_its_requests_and_not_the_engine(model, monkeypatch):
    engine = Engine(model)
    launch = engine.runner.launch

    def fails(plan):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.runner, "launch", fails)
    (result,) = engine.run([Request([1, 2, 3], 5)])
    assert result.finish_reason == "error" and "the device is gone" in result.error
    monkeypatch.setattr(engine.runner, "launch", launch)
    assert engine.run([Request([1, 2, 3], 5)])[0].error is None
    engine.check()


def test_requests_come_and_go_from_other_threads(model):
    engine = Engine(model, num_blocks=40, block_size=4, max_batch=4)
    ids, ends, stop = [], {}, threading.Event()

    def client(seed):
        for k in range(10):
            ids.append(engine.submit(Request([seed] * (k + 1), 6)))
            if k % 3 == 0:
                engine.abort(ids[-1])

    def run():
        while not (stop.is_set() and engine.idle):
            for output in engine.step():
                if output.finish_reason:
                    assert output.id not in ends
                    ends[output.id] = output.finish_reason

    threads = [threading.Thread(target=client, args=[seed]) for seed in range(3)]
    loop = threading.Thread(target=run)
    for thread in (loop, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    loop.join(timeout=120)
    assert not loop.is_alive() and sorted(ends) == sorted(ids) == list(range(30))
    assert set(ends.values()) <= {"abort", "length"}
    engine.check()


@pytest.mark.parametrize("look_ahead, reason", [(False, "length"), (True, "abort")])
def test_an_abort_while_the_last_step_runs(model, monkeypatch, look_ahead, reason):
    """Too late if the step is read at once; else it comes first, and what the step made is left out."""
    engine = Engine(model, look_ahead=look_ahead)
    launch = engine.runner.launch

    def aborts(plan):
        engine.abort(0)
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", aborts)
    (result,) = engine.run([Request([1, 2], 1)])
    assert result.finish_reason == reason and engine.step() == []
    engine.check()


@pytest.mark.parametrize("look_ahead", [False, True])
def test_an_idle_engine_owns_nothing(rng, model, look_ahead):
    """Not even if its last step was planned before the one in front of it had ended all texts."""
    (prompt,) = prompts(rng, [20])
    engine = Engine(model, look_ahead=look_ahead)
    tokens = engine.run([Request(prompt, 9)])[0].tokens
    last = next(i for i in range(8, 0, -1) if tokens[i] not in tokens[:i])
    (result,) = engine.run([Request(prompt, 9, stop_tokens=(tokens[last],))])
    assert result.finish_reason == "stop" and engine.idle and engine.stats()["blocks_owned"] == 0
    engine.check()


def test_nothing_happens_to_an_unknown_or_ended_id(model):
    engine = Engine(model)
    (result,) = engine.run([Request([1], 2)])
    engine.abort(result.id)
    engine.abort(12345)
    assert engine.step() == [] and engine.idle


def test_a_stop_token_ends_the_text_and_is_left_out(rng, model):
    (prompt,) = prompts(rng, [7])
    tokens, _ = alone(model, Request(prompt, 12, Sampling(seed=4)))
    stop = tokens[6]
    (result,) = Engine(model).run([Request(prompt, 12, Sampling(seed=4), stop_tokens=[stop])])
    assert result.finish_reason == "stop" and result.tokens == tokens[: tokens.index(stop)]
