"""Chapter 14: tokens that must keep to something, on the engine, with constraints that a test can see through."""

import numpy as np
import pytest
from test_engine import SMALL
from test_engines import random_model

from ch14_mini_llm.engine.constraint import Guard
from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, RequestError, Sampling
from ch14_mini_llm.model.upload import float16_model, panels_model
from ch14_mini_llm.naive.gpt2 import GPT2
from chapters.ch13_llm_ops.sampling_masks import mask_reference
from chapters.ch13_llm_ops.sampling_rows import adjust_reference, counts_of, draw_row_reference, logprobs_reference

V = SMALL["vocab_size"]


@pytest.fixture(scope="module")
def weights():
    return random_model(3, **SMALL)


@pytest.fixture(scope="module")
def model(weights):
    return panels_model(*weights)


@pytest.fixture(scope="module")
def listing(weights):
    return GPT2(*weights)


class Walk:
    """Token t may be followed by those from 5 t + 1 to 5 t + 4, modulo the vocabulary. fails: {number of the token: an
    exception to raise}. length: after so many it is done."""

    def __init__(self, length=10**9, fails=()):
        self.length, self.fails, self.tokens = length, dict(fails), []

    @property
    def done(self):
        return len(self.tokens) >= self.length

    def allowed(self, n=None):
        last = ([0] + self.tokens)[-1 if n is None else n]
        return [(5 * last + k) % V for k in range(1, 5)]

    def mask(self, n_words):
        assert n_words == -(-V // 32)
        if -len(self.tokens) in self.fails:
            raise self.fails[-len(self.tokens)]
        words = np.zeros(n_words, np.uint32)
        for token in self.allowed():
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def advance(self, token):
        assert token in self.allowed(), f"{token} behind {self.tokens}"
        self.tokens.append(token)
        if len(self.tokens) in self.fails:
            raise self.fails[len(self.tokens)]


class Anything:
    done = False

    def mask(self, n_words):
        return None

    def advance(self, token):
        pass


def prompt_of(n, seed=0):
    return np.random.default_rng([n, seed]).integers(0, V, n).tolist()


def run(model, *requests, **options):
    engine = Engine(model, **{"num_blocks": 60, **options})
    results = engine.run(requests)
    engine.check()
    return results, engine


KINDS = [
    None, Sampling(0), Sampling(1.3, seed=4), Sampling(0.9, seed=7, top_k=2, top_p=0.9, min_p=0.01),
    Sampling(0.8, seed=3, frequency_penalty=1.5, repetition_penalty=1.4, logit_bias={3: 5.0, 60: -100.0}),
]  # fmt: skip


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("sampling", KINDS, ids=range(len(KINDS)))
def test_each_token_is_the_references_among_the_allowed(model, listing, sampling, look_ahead):
    walk, prompt = Walk(), prompt_of(11)
    request = Request(prompt, 12, sampling, logprobs=3, constraint=walk)
    (result,), _ = run(model, request, look_ahead=look_ahead)
    assert result.tokens == walk.tokens and result.finish_reason == "length" and len(result.tokens) == 12
    logits = listing.logits_all(prompt + result.tokens)[len(prompt) - 1 :]
    s = sampling or Sampling(0)
    for step, token in enumerate(result.tokens):
        how = s.presence_penalty, s.frequency_penalty, s.repetition_penalty, s.logit_bias
        row = adjust_reference(logits[step], counts_of(prompt, result.tokens[:step], V), *how)
        words, before = np.zeros(-(-V // 32), np.uint32), Walk()
        before.tokens = result.tokens[:step]
        words = before.mask(len(words))
        masked = mask_reference(row, words)
        assert token == draw_row_reference(
            masked, 0 if s.greedy else s.temperature, s.top_k or 0, s.top_p, s.min_p, s.seed or 0, step
        )
        score = logprobs_reference(logits[step], token, 3)  # of the model's own logits, whatever may follow
        assert result.logprobs[step].rank == score[1] and list(result.logprobs[step].top) == score[2].tolist()


@pytest.mark.parametrize("level", ["kv", "fast"])
@pytest.mark.parametrize(
    "options",
    [{}, {"look_ahead": True}, {"look_ahead": True, "max_batch": 4}, {"max_batch": 5, "max_rows": 9}],
    ids=["at once", "ahead", "queue", "chunks"],
)
def test_neighbours_write_what_they_write_without(weights, level, options):
    """Constrained and other requests among each other, in steps planned ahead: all write what they write alone, and
    a row without a mask is not touched by its neighbour's."""
    model = {"kv": panels_model, "fast": float16_model}[level](*weights)
    options = {"deterministic": True, **options}
    samplings = [None, Sampling(1.1, seed=5), Sampling(0.9, seed=2, frequency_penalty=1.0), Sampling(seed=8, top_p=0.8)]

    def requests(which=lambda i: True):
        return [
            Request(prompt_of(4 + i, i), 9 + i % 4, samplings[i % 4], constraint=Walk() if i % 2 else None)
            for i in range(8)
            if which(i)
        ]

    results, engine = run(model, *requests(), level=level, **options)
    assert all(result.error is None for result in results)
    plain, _ = run(model, *requests(lambda i: i % 2 == 0), level=level, **options)
    assert [result.tokens for result in results[::2]] == [result.tokens for result in plain]
    alone = [run(model, requests()[i], level=level, **options)[0][0].tokens for i in (1, 3, 5, 7)]
    assert [result.tokens for result in results[1::2]] == alone


def test_others_go_on_while_a_token_is_waited_for(model):
    engine = Engine(model, num_blocks=60, look_ahead=True)
    plans = []
    engine.on_step = lambda plan, outputs: plans.append(plan and [part.sequence.id for part in plan.parts])
    free, kept = engine.run([Request(prompt_of(5), 12), Request(prompt_of(6), 12, constraint=Walk())])
    assert plans.count([free.id]) > 3 and plans.count([free.id, kept.id]) > 3
    assert len(free.tokens) == len(kept.tokens) == 12


@pytest.mark.parametrize("look_ahead", [False, True])
def test_nothing_is_lost_when_a_request_gives_way(model, look_ahead):
    """A pool for two of the four: what was read stays, and a token under way that was dropped is not counted twice."""
    walks = [Walk() for _ in range(4)]
    requests = lambda walks: [
        Request(prompt_of(8, i), 30, KINDS[i], constraint=walk, priority=-i) for i, walk in enumerate(walks)
    ]
    wanted, _ = run(model, *requests([Walk() for _ in range(4)]))
    results, engine = run(model, *requests(walks), num_blocks=7, max_batch=4, look_ahead=look_ahead)
    assert engine.stats()["preemptions"] > 0 and [result.error for result in results] == [None] * 4
    assert [result.tokens for result in results] == [result.tokens for result in wanted]
    assert [walk.tokens for walk in walks] == [result.tokens for result in results]


def test_the_end_of_a_constraint_is_a_stop(model):
    """Behind its last token, also if that is the last there may be; before that, the limit counts."""
    lengths = [1, 3, 8, 9]
    results, _ = run(model, *(Request(prompt_of(5), 8, constraint=Walk(n)) for n in lengths), look_ahead=True)
    assert [len(result.tokens) for result in results] == [1, 3, 8, 8]
    assert [result.finish_reason for result in results] == ["stop", "stop", "stop", "length"]


def test_a_stop_token_that_is_allowed_ends_it_and_is_left_out(model):
    (whole,), _ = run(model, Request(prompt_of(5), 8, constraint=Walk()))
    walk, stop = Walk(), whole.tokens[2]
    (result,), _ = run(model, Request(prompt_of(5), 8, None, (stop,), constraint=walk))
    assert result.finish_reason == "stop" and result.tokens == walk.tokens == whole.tokens[: whole.tokens.index(stop)]


def test_no_mask_leaves_everything_as_it_is(model):
    for sampling in KINDS:
        free, kept = run(model, *(Request(prompt_of(9), 10, sampling, constraint=c) for c in (None, Anything())))[0]
        assert free.tokens == kept.tokens


@pytest.mark.parametrize("number, where", [(-3, "mask"), (3, "advance")])
@pytest.mark.parametrize("look_ahead", [False, True])
def test_what_a_constraint_raises_ends_its_request_alone(model, number, where, look_ahead):
    broken = Walk(fails={number: RuntimeError(f"in {where}")})
    ask = lambda constraint: Request(prompt_of(7), 12, constraint=constraint)
    results, engine = run(model, ask(None), ask(broken), ask(Walk()), look_ahead=look_ahead)
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert f"RuntimeError: in {where}" in results[1].error and engine.failure is None
    assert [result.tokens for result in run(model, ask(None), ask(Walk()))[0]] == [results[0].tokens, results[2].tokens]


def test_one_that_fails_at_once_is_refused(model):
    class Nothing(Anything):
        def mask(self, n_words):
            return np.zeros(n_words, np.uint32)

    for constraint, words in [
        (Walk(fails={0: KeyError("x")}), "first token"), (Nothing(), "allows no token"), (Walk(0), "whole before")
    ]:  # fmt: skip
        with pytest.raises(RequestError, match=words) as caught:
            Engine(model, num_blocks=9).submit(Request([1], 3, constraint=constraint))
        assert caught.value.field == "constraint"
    bad, good = run(model, Request([1], 3, constraint=Nothing()), Request([1], 3))[0]
    assert bad.finish_reason == "error" and good.error is None
    reason, error = Guard(Walk(fails={1: ValueError("no")}), V).advance(1)
    assert reason == "error" and "behind token 1" in error


def test_a_dead_end_is_an_error(model):
    class Dead(Walk):
        def mask(self, n_words):
            return super().mask(n_words) * np.uint32(len(self.tokens) < 4)

    bad, good = run(model, Request(prompt_of(5), 9, constraint=Dead()), Request(prompt_of(5), 9))[0]
    assert "allows no token" in bad.error and len(bad.tokens) == 4 and good.error is None


@pytest.mark.parametrize("look_ahead", [False, True])
def test_abort_in_the_middle(model, look_ahead):
    engine = Engine(model, num_blocks=20, look_ahead=look_ahead)
    walk = Walk()
    ids = [engine.submit(Request(prompt_of(6), 40, constraint=c)) for c in (walk, Walk(), None)]
    ends = {}
    while not engine.idle:
        if len(walk.tokens) == 5:
            engine.abort(ids[0])
        ends |= {output.id: output.finish_reason for output in engine.step() if output.finish_reason}
    assert ends == {ids[0]: "abort", ids[1]: "length", ids[2]: "length"} and len(walk.tokens) < 8
    engine.check()


def test_a_static_batch_takes_none(model):
    with pytest.raises(RequestError, match="static") as caught:
        Engine(model, num_blocks=20, static=True).submit(Request([1], 3, constraint=Walk()))
    assert caught.value.field == "constraint"
