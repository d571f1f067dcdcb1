"""Chapter 14, static batches: the same tokens as alone, whoever waits for whom, and what waiting and padding cost."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine import SMALL, Watched, alone, model, prompts, weights  # noqa: F401  (model and weights: fixtures)
from test_engines import random_model
from test_scheduler import Run
from test_scheduler import alone as alone_on_dict

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, Sampling
from ch14_mini_llm.engine.static import StaticScheduler
from ch14_mini_llm.model.upload import float16_model


def static(n_blocks=100, block_size=4, max_batch=4, max_rows=40, ahead=1):
    return Run(n_blocks, block_size, max_batch, max_rows, ahead=ahead, kind=StaticScheduler)


def plans_of(run, lines=None):
    """All plans until everything has ended.

    lines: gets the first batch as text, a place a line: p for rows of a prompt, d of new tokens, a dot of padding.
    """
    plans = []
    while not run.scheduler.idle:
        plan = run.step()
        if plan is None:
            continue
        plans.append(plan)
        for i, place in enumerate(run.scheduler.places if lines is not None else ()):
            for part in plan.parts:
                if part.sequence in (place.sequence, place.padding):
                    glyph = "." if part.padding else "p" if part.start < part.sequence.n_prompt else "d"
                    lines[i] += glyph * part.count
    return plans


def test_the_batch_is_a_padded_matrix_that_waits_for_the_slowest():
    run, lines = static(), [""] * 3
    for length, new in (6, 2), (3, 3), (2, 5):
        run.submit([length] * length, new)
    plans = plans_of(run, lines)
    run.finish()
    assert lines == ["ppppppd...", "ppp...dd..", "pp....dddd"]
    assert [plan.rows for plan in plans] == [18, 3, 3, 3, 3] and sum(plan.padding_rows for plan in plans) == 12
    assert not any(plan.same_as_last for plan in plans[2:])


def test_no_request_joins_before_the_whole_batch_has_ended():
    run = static(max_batch=2)
    for number, new in enumerate((1, 12, 1, 1)):
        run.submit([number] * 3, new)
    together = [{part.sequence.id for part in plan.parts if not part.padding} for plan in plans_of(run)]
    run.finish()
    assert together == [{0, 1}, *[{1}] * 11, {2, 3}]


def test_a_prompt_longer_than_the_budget_takes_several_steps_of_columns():
    run, lines = static(max_batch=2, max_rows=9), ["", ""]
    for number, length in enumerate((11, 2)):
        run.submit([number] * length, 3)
    plans = plans_of(run, lines)
    run.finish()
    assert [plan.rows for plan in plans] == [8, 8, 6, 2, 2] and lines == ["p" * 11 + "dd", "pp" + "." * 9 + "dd"]
    assert plans[-1].same_as_last


def test_a_place_that_has_ended_costs_its_logits_too():
    run = static()
    run.submit([1] * 5, 1)
    run.submit([2] * 5, 4)
    assert [sum(part.samples for part in plan.parts) for plan in plans_of(run)] == [2] * 4
    assert not any(run.pool.uses)


def test_the_blocks_of_a_place_come_back_when_the_batch_has_ended():
    run = static()
    run.submit([1] * 4, 1)
    run.submit([2] * 4, 9)
    while not run.ends:
        run.step()
    assert list(run.ends) == [0] and run.pool.free == 100 - 1 - 3
    run.scheduler.check()
    run.finish()


def test_a_batch_takes_the_room_of_its_longest_texts_at_once():
    run = static(n_blocks=10, max_batch=4)
    for number in range(4):
        run.submit([number] * 5, 9)  # 13 tokens are run over: 4 blocks of 4
    run.step()
    assert [sequence.id for sequence in run.scheduler.running] == [0, 1] and run.pool.free == 2
    run.finish()
    assert not any(sequence.preemptions for sequence in run.sequences)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_a_request_that_outgrows_the_pool_ends_and_says_so(ahead):
    run = static(n_blocks=2, ahead=ahead)
    run.submit(range(6), 20)
    run.submit([5], 3)
    run.finish()
    end = run.ends[0]
    assert end.finish_reason == "length" and "the pool of 2 blocks of 4 tokens is full" in end.error
    assert len(run.sequences[0].new_tokens) == 3 and run.sequences[1].error is None


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("when", range(0, 30, 2))
def test_an_abort_in_any_state(when, ahead):
    run = static(n_blocks=9, max_batch=2, max_rows=5, ahead=ahead)
    for number in range(4):
        run.submit([number] * (3 + 4 * number), 6)
    for _ in range(when):
        run.step()
    for sequence in run.sequences[1:3]:
        run.scheduler.abort(sequence)
        run.scheduler.abort(sequence)
    run.fetch()
    run.scheduler.check()
    run.finish()


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=40), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9))
def test_random_schedules(actions, n_blocks, block_size, max_batch, more_rows):
    """Submits, steps and aborts in any order: all requests end as they would alone, and no block is lost."""
    run = Run(n_blocks, block_size, max_batch, max_batch + more_rows, ahead=1 + n_blocks % 3, kind=StaticScheduler)
    run.act(actions).finish()


# --- on the device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_batch": 3, "max_rows": 9}, {"block_size": 4, "max_batch": 2}, {"num_blocks": 6, "max_batch": 4},
        {"look_ahead": True, "max_batch": 3, "max_rows": 9}, {"look_ahead": True, "block_size": 4},
    ],
    ids=str,
)  # fmt: skip
def test_bits_are_those_of_a_request_alone(rng, model, options):  # noqa: F811
    requests = [Request(prompt, 14 - 2 * i) for i, prompt in enumerate(prompts(rng))]
    engine = Watched(model, static=True, **options)
    for request, result in zip(requests, engine.run(requests)):
        tokens, logits = alone(model, request)
        assert result.tokens == tokens and result.error is None
        np.testing.assert_array_equal(engine.logits(result), logits)
    engine.check()
    stats = engine.stats()
    assert engine.idle and stats["blocks_owned"] == 0 and stats["preemptions"] == 0
    assert 0 < stats["padding_rows"] < stats["rows"]
    assert stats["rows"] - stats["padding_rows"] == sum(len(r.tokens) + r.max_new - 1 for r in requests)


def test_stops_and_aborts_give_the_tokens_of_a_continuous_batch(rng, model):  # noqa: F811
    (first, second, third) = prompts(rng, [5, 20, 9])
    tokens, _ = alone(model, Request(second, 12))
    requests = [Request(first, 12), Request(second, 12, stop_tokens=[tokens[4]]), Request(third, 12)]
    ends = {}
    for static in (False, True):
        engine = Watched(model, max_batch=2, static=static)
        aborted = []

        def stop_the_first(output, engine=engine, aborted=aborted):
            aborted.append(output.id)
            if aborted.count(0) == 5:
                engine.abort(0)

        ends[static] = [(r.tokens, r.finish_reason) for r in engine.run(requests, stop_the_first)]
        engine.check()
    assert ends[True] == ends[False]
    assert [reason for _, reason in ends[True]] == ["abort", "stop", "length"]


_solo = {}


def solo(model, request):  # noqa: F811
    key = tuple(request.tokens), request.max_new, request.sampling
    if key not in _solo:
        _solo[key] = alone(model, request)[0]
    return _solo[key]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=12), st.integers(2, 12), st.integers(1, 4), st.integers(1, 9))
def test_random_lengths_on_pages_of_nan(model, sizes, num_blocks, max_batch, more):  # noqa: F811
    engine = Watched(
        model, num_blocks=num_blocks, block_size=4, max_batch=max_batch, max_rows=max_batch + more, static=True
    )
    requests = [
        Request([size % 3] * min(1 + size % 13, num_blocks * 4), 1 + size // 8, Sampling(seed=7) if size % 4 else None)
        for size in sizes
    ]
    for request, result in zip(requests, engine.run(requests)):
        tokens = solo(model, request)
        assert result.tokens == (tokens[: len(result.tokens)] if result.error else tokens)
        assert not result.error or "pool" in result.error
    engine.check()


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(look_ahead=st.booleans())
def test_the_level_fast_too(look_ahead):
    half = float16_model(*random_model(3, **SMALL | {"d_model": 64}))
    requests = [Request([7 * length % 61] * length, 12 - length % 9) for length in (3, 20, 9, 40, 1)]
    options = {"level": "fast", "deterministic": True, "max_batch": 3, "look_ahead": look_ahead}
    static, continuous = (Engine(half, static=static, **options).run(requests) for static in (True, False))
    assert [result.tokens for result in static] == [result.tokens for result in continuous]


def test_the_dict_device_is_the_one_of_the_continuous_scheduler():
    run, other = static(max_batch=3), Run(100, 4, 3, 40, ahead=1)
    for each in (run, other):
        for number, (length, new) in enumerate([(3, 9), (17, 2), (8, 30), (1, 1), (12, 5)]):
            each.submit([number] * length, new)
        each.finish()
    for a, b in zip(run.sequences, other.sequences):
        assert a.new_tokens == b.new_tokens == alone_on_dict(a.tokens[: a.n_prompt], a.max_new)
