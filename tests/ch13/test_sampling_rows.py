"""Chapter 13: a batch of rows, settings in arrays, against sampling a row at a time and transformers' processors."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import cuda

from chapters.ch07_warp_reduce.argmax import argmax_launch, argmax_row
from chapters.ch13_llm_ops import sampling as single
from chapters.ch13_llm_ops import sampling_rows as ch13

SIZES = [50257, 1, 33, 1025, 5001]  # the last is what the sanitizer, which is slow, looks at
NEUTRAL = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence": 0.0, "frequency": 0.0, "repetition": 1.0,
    "seed": 0, "step": 0, "active": 1, "count_slot": -1,
}  # fmt: skip
DTYPES = {"temperature": np.float64, "top_p": np.float64, "min_p": np.float64, "seed": np.uint64, "step": np.int64}
DTYPES |= dict.fromkeys(("presence", "frequency", "repetition"), np.float32)
INF = np.float32(np.inf)


class Rows:
    """A batch's logits and settings on the device. rows: for each row, what differs from NEUTRAL."""

    def __init__(self, logits, rows, counts=None, biases=None):
        self.n, self.vocab_size = logits.shape
        self.logits = cuda.to_device(logits)
        self.a = {
            name: cuda.to_device(np.array([row.get(name, value) for row in rows], DTYPES.get(name, np.int32)))
            for name, value in NEUTRAL.items()
        }
        self.counts = cuda.to_device(np.zeros((1, self.vocab_size), np.int32) if counts is None else counts)
        ids, values = np.full((self.n, 5), -1, np.int32), np.zeros((self.n, 5), np.float32)
        for r, bias in enumerate(biases or []):
            ids[r, : len(bias)], values[r, : len(bias)] = list(bias), list(bias.values())
        self.bias = cuda.to_device(ids), cuda.to_device(values)
        self.adjusted = cuda.to_device(np.full(logits.shape, 7.5, np.float32))
        self.weights = cuda.device_array(logits.shape, np.int64)
        self.chosen = cuda.to_device(np.full(self.n, -7, np.int32))

    def adjust(self):
        a, b = self.a, self.bias
        penalties = a["presence"], a["frequency"], a["repetition"], a["count_slot"], self.counts
        ch13.adjust_rows[ch13.adjust_launch(self.n, self.vocab_size)](
            self.logits, self.adjusted, a["active"], *penalties, *b, self.vocab_size
        )
        return self.adjusted.copy_to_host()

    def draw(self, logits=None):
        a, logits = self.a, self.logits if logits is None else logits
        how = (a[name] for name in ("active", "temperature", "top_k", "top_p", "min_p", "seed", "step"))
        argmax_row[argmax_launch(self.n, self.vocab_size)](logits, self.chosen, self.vocab_size)
        ch13.draw_rows[ch13.rows_launch(self.n)](logits, self.weights, self.chosen, *how, self.vocab_size)
        return self.chosen.copy_to_host().tolist()

    def count(self):
        a = self.a
        launch = ch13.count_launch(self.n)
        ch13.count_tokens[launch](self.chosen, a["active"], a["count_slot"], self.counts, self.n)
        return self.counts.copy_to_host()


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, step=0):
    """Chapter 13's ``sample``: a token of one row."""
    n, out = len(logits), cuda.device_array(1, np.int32)
    weights = cuda.device_array(n, np.int64)
    single.sample(cuda.to_device(logits), weights, out, n, temperature, top_k or None, top_p, seed, step)
    return int(out.copy_to_host()[0])


def logprobs(logits, tokens, n_top):
    n = len(logits)
    outs = [np.full(n, np.nan, np.float32), np.zeros(n, np.int32), np.full((n, ch13.MAX_TOP), -5, np.int32)]
    outs = [cuda.to_device(out) for out in [*outs, np.full((n, ch13.MAX_TOP), 3, np.float32)]]
    which = (cuda.to_device(np.array(values, np.int32)) for values in (tokens, n_top))
    ch13.logprobs_rows[ch13.rows_launch(n)](cuda.to_device(logits), *which, *outs, logits.shape[1])
    return [out.copy_to_host() for out in outs]


# --- the draw --------------------------------------------------------------------------------------------------------

MIXED = [
    {"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 40}, {"top_p": 0.9, "temperature": 1.5}, {"top_k": 1},
    {"top_k": 50, "top_p": 0.8, "temperature": 0.9}, {"top_k": 10**9}, {"top_p": 1e-9},
]  # fmt: skip


@pytest.mark.parametrize("vocab_size", SIZES)
def test_a_row_is_what_sampling_alone_draws(rng, vocab_size):
    rows = [how | {"seed": 2**64 - 1 - i, "step": i**7} for i, how in enumerate(MIXED)]
    logits = rng.standard_normal((len(rows), vocab_size), dtype=np.float32).round(2) * 3  # with ties
    batch = Rows(logits, rows)
    for turn in range(2):  # the second time, the device has counted the steps
        got = batch.draw()
        for row, token, how in zip(logits, got, rows):
            how = how | {"step": how["step"] + turn}
            known = {name: how[name] for name in ("temperature", "top_k", "top_p", "seed", "step") if name in how}
            assert token == ch13.draw_row_reference(row, known.pop("temperature", 1.0), **known)
            if how.get("temperature") != 0:
                assert token == sample(row, how.get("temperature", 1.0), **known)
    assert batch.a["step"].copy_to_host().tolist() == [how["step"] + 2 for how in rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries({
            "temperature": st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]), "top_k": st.integers(0, 120),
            "top_p": st.floats(0.01, 1.0), "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
            "seed": st.integers(0, 2**64 - 1), "step": st.integers(0, 2**40), "data": st.integers(0, 5),
        }),
        min_size=1, max_size=9,
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_row_does_not_depend_on_its_place_in_the_batch(rows, random):
    logits = np.random.default_rng(8).standard_normal((6, 101)).astype(np.float32).round(1)
    pick = [row["data"] for row in rows]
    got = Rows(logits[pick], rows).draw()
    for row, token in zip(rows, got):
        how = {name: row[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "step")}
        assert token == ch13.draw_row_reference(logits[row["data"]], **how)
    order = random.sample(range(len(rows)), len(rows))
    assert Rows(logits[[pick[i] for i in order]], [rows[i] for i in order]).draw() == [got[i] for i in order]


def test_rows_that_are_not_active_are_left_alone(rng):
    logits = rng.standard_normal((5, 1025), dtype=np.float32)
    rows = [{"active": r % 2, "count_slot": r, "frequency": 1.0, "step": 9, "seed": r} for r in range(5)]
    batch = Rows(logits, rows, counts=np.zeros((5, 1025), np.int32))
    adjusted = batch.adjust()
    assert (adjusted[::2] == 7.5).all() and (adjusted[1::2] == logits[1::2]).all()
    batch.draw()
    counts = batch.count()
    assert batch.a["step"].copy_to_host().tolist() == [9, 10, 9, 10, 9]
    assert counts.sum(axis=1).tolist() == [0, 1, 0, 1, 0]
    expected = batch.chosen.copy_to_host()
    assert counts[1, expected[1]] == counts[3, expected[3]] == 1


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_rows_without_a_number_are_minus_1_and_harm_no_neighbour(rng, how):
    logits = rng.standard_normal((4, 1025), dtype=np.float32)
    fine = Rows(logits, [how | {"seed": r} for r in range(4)]).draw()
    logits[1] = np.nan
    batch = Rows(logits, [how | {"seed": r, "count_slot": r} for r in range(4)], np.zeros((4, 1025), np.int32))
    batch.adjust()
    got = batch.draw(batch.adjusted)
    assert got == [fine[0], -1, *fine[2:]]
    assert batch.count().sum(axis=1).tolist() == [1, 0, 1, 1]


def test_min_p_drops_what_is_too_unlikely():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.06, 0.04]], np.float32))
    for min_p, kept in [(0.0, 5), (0.11, 4), (0.2, 3), (0.74, 2), (0.76, 1), (1.0, 1)]:
        drawn = set()
        for seed in range(60):
            batch = Rows(logits, [{"min_p": min_p, "seed": seed}])
            drawn |= set(batch.draw())
        weights = batch.weights.copy_to_host()[0]
        assert (weights != single.DROPPED).tolist() == [True] * kept + [False] * (5 - kept)
        assert drawn <= set(range(kept))


def test_the_same_launch_goes_on_by_itself(rng):
    """Nothing from the host between two steps: what a CUDA graph replays."""
    logits = rng.standard_normal((3, 1025), dtype=np.float32)
    rows = [{"seed": 5, "frequency": 0.7, "count_slot": 2 - r, "temperature": float(r)} for r in range(3)]
    batch = Rows(logits, rows, np.zeros((3, 1025), np.int32))
    counts, steps = np.zeros((3, 1025), np.int32), []
    for step in range(6):
        batch.adjust()
        got = batch.draw(batch.adjusted)
        batch.count()
        steps.append(got)
        for r, token in enumerate(got):
            adjusted = ch13.adjust_reference(logits[r], counts[r], frequency=0.7)
            assert token == ch13.draw_row_reference(adjusted, float(r), seed=5, step=step)
            counts[r, token] += 1
    np.testing.assert_array_equal(batch.counts.copy_to_host()[::-1], counts)
    assert len({got[0] for got in steps}) > 1  # the penalty moves even the greedy row


# --- penalties and biases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [size for size in SIZES if size > 1])
def test_penalties_and_biases(rng, vocab_size):
    logits = rng.standard_normal((4, vocab_size), dtype=np.float32) * 5
    counts = np.stack([ch13.counts_of(*rng.integers(0, vocab_size, (2, 200)), vocab_size) for _ in range(2)])
    rows = [
        {"presence": 0.5, "count_slot": 1}, {"frequency": -0.3, "repetition": 1.3, "count_slot": 0}, {},
        {"presence": -1.1, "frequency": 2.0, "repetition": 0.7, "count_slot": 1},
    ]  # fmt: skip
    biases = [{}, {vocab_size - 1: 2.5, 0: -100.0}, {7: 1e-3}, {i: float(i) for i in range(5)}]
    batch = Rows(logits, rows, counts, biases)
    adjusted = batch.adjust()
    for r, (row, bias) in enumerate(zip(rows, biases)):
        mine = counts[row["count_slot"]] if "count_slot" in row else None
        how = {name: row[name] for name in ("presence", "frequency", "repetition") if name in row}
        np.testing.assert_array_equal(adjusted[r], ch13.adjust_reference(logits[r], mine, bias=bias, **how))
    np.testing.assert_array_equal(batch.logits.copy_to_host(), logits)  # log-probabilities are read from them


def test_neutral_penalties_change_no_bit(rng):
    logits = rng.standard_normal((2, 1025), dtype=np.float32)
    logits[:, :6] = INF, -INF, np.nan, 0.0, -0.0, 1e-45
    counts = np.full((1, 1025), 3 | ch13.IN_PROMPT, np.int32)
    adjusted = Rows(logits, [{"count_slot": 0}, {}], counts).adjust()
    np.testing.assert_array_equal(adjusted.view(np.int32)[:, 3:], logits.view(np.int32)[:, 3:])
    np.testing.assert_array_equal(adjusted, logits)


def test_presence_and_frequency_count_new_tokens_and_repetition_the_prompt_too():
    logits = np.full((3, 33), 2.0, np.float32)
    counts = ch13.counts_of([1, 1, 2], [2, 3, 3, 3], 33)[None]
    rows = [{"presence": 0.5}, {"frequency": 0.5}, {"repetition": 2.0}]
    adjusted = Rows(logits, [row | {"count_slot": 0} for row in rows], counts).adjust()
    assert adjusted[:, :5].tolist() == [[2, 2, 1.5, 1.5, 2], [2, 2, 1.5, 0.5, 2], [2, 1, 1, 1, 2]]
    assert (adjusted[:, 5:] == 2).all()


# --- the same as transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{"top_k": 40}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 60, "top_p": 0.6, "temperature": 0.8},
            {"top_k": 80, "top_p": 0.95, "min_p": 0.05, "temperature": 1.4}], ids=str)  # fmt: skip
def test_kept_tokens_are_transformers(rng, torch, transformers, how):
    logits = rng.standard_normal((3, 1025), dtype=np.float32) * 2
    scores = transformers.TemperatureLogitsWarper(how.get("temperature", 1.0))(None, torch.tensor(logits))
    for name, warper in (("top_k", transformers.TopKLogitsWarper), ("top_p", transformers.TopPLogitsWarper),
                         ("min_p", transformers.MinPLogitsWarper)):  # fmt: skip
        if name in how:
            scores = warper(how[name])(None, scores)
    batch = Rows(logits, [how | {"seed": r} for r in range(3)])
    batch.draw()
    weights = np.maximum(batch.weights.copy_to_host(), 0)
    wanted = torch.softmax(scores, -1).numpy()
    np.testing.assert_array_equal(weights > 0, wanted > 0)
    np.testing.assert_allclose(weights / weights.sum(1, keepdims=True), wanted, rtol=1e-5)


@pytest.mark.parametrize("repetition", [1.3, 0.6])
def test_repetition_is_transformers(rng, torch, transformers, repetition):
    logits = rng.standard_normal((1, 1025), dtype=np.float32)
    prompt, generated = rng.integers(0, 1025, 50), rng.integers(0, 1025, 30)
    counts = ch13.counts_of(prompt, generated, 1025)[None]
    adjusted = Rows(logits, [{"repetition": repetition, "count_slot": 0}], counts).adjust()
    text = torch.tensor(np.concatenate([prompt, generated])[None])
    wanted = transformers.RepetitionPenaltyLogitsProcessor(repetition)(text, torch.tensor(logits))
    np.testing.assert_allclose(adjusted, wanted.numpy(), rtol=1e-6)


def test_log_probabilities_are_torchs(rng, torch):
    logits = rng.standard_normal((4, 50257), dtype=np.float32) * 4 + 30
    tokens = rng.integers(0, 50257, 4)
    wanted = torch.log_softmax(torch.tensor(logits).double(), -1)
    logprob, rank, ids, top = logprobs(logits, tokens, [20] * 4)
    values, indices = wanted.topk(20)
    np.testing.assert_allclose(logprob, wanted.numpy()[np.arange(4), tokens], rtol=2e-7)
    np.testing.assert_allclose(top, values.numpy(), rtol=2e-7, atol=1e-7)
    np.testing.assert_array_equal(ids, indices.numpy())
    ranks = (wanted > wanted[torch.arange(4), torch.tensor(tokens)][:, None]).sum(1) + 1
    assert rank.tolist() == ranks.tolist()


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", SIZES)
def test_log_probabilities(rng, vocab_size):
    logits = rng.standard_normal((5, vocab_size), dtype=np.float32).round(1)  # with ties
    tokens, tops = rng.integers(0, vocab_size, 5), [0, 1, 5, 20, -1]
    logprob, rank, ids, top = logprobs(logits, tokens, tops)
    for r, (token, n_top) in enumerate(zip(tokens, tops)):
        if n_top < 0:  # a row that asks for none
            assert np.isnan(logprob[r]) and rank[r] == 0 and (ids[r] == -5).all()
            continue
        known = min(n_top, vocab_size)
        share, place, likeliest, shares = ch13.logprobs_reference(logits[r], token, known)
        np.testing.assert_allclose(logprob[r], share, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(top[r, :known], shares, rtol=1e-6, atol=1e-7)
        assert rank[r] == place and ids[r, :known].tolist() == likeliest.tolist()
        assert (ids[r, known:n_top] == -1).all() and (ids[r, n_top:] == -5).all()


@pytest.mark.parametrize("threads", [32, 96])
def test_the_block_does_not_change_a_bit(rng, threads):
    logits = cuda.to_device(rng.standard_normal((2, 5001), dtype=np.float32).round(2))
    tokens, n_top = cuda.to_device(np.array([4, 5000], np.int32)), cuda.to_device(np.array([20, 3], np.int32))
    runs = []
    for block in (threads, ch13.SAMPLING_THREADS):
        outs = [np.zeros(2, np.float32), np.zeros(2, np.int32), np.zeros((2, 20), np.int32)]
        outs = [cuda.to_device(out) for out in [*outs, np.zeros((2, 20), np.float32)]]
        ch13.logprobs_rows[2, block](logits, tokens, n_top, *outs, 5001)
        runs.append([out.copy_to_host() for out in outs])
    for one, other in zip(*runs):
        np.testing.assert_array_equal(one, other)


def test_log_probabilities_of_special_values():
    logits = np.zeros((5, 33), np.float32)
    logits[0] = np.nan
    logits[1] = -INF
    logits[2, 3:] = -INF
    logits[3, [4, 9]] = INF
    logits[4, 1::2] = np.nan
    logits[4, 2] = 1
    logprob, rank, ids, top = logprobs(logits, [5, 5, 2, 9, -1], [4] * 5)
    assert np.isnan(logprob[[0, 1, 4]]).all() and rank.tolist() == [0, 0, 3, 2, 0]
    np.testing.assert_allclose(logprob[2:4], np.log([1 / 3, 1 / 2]), rtol=1e-6)
    assert (ids[:2, :4] == -1).all() and ids[2, :4].tolist() == [0, 1, 2, -1]
    assert ids[3, :2].tolist() == [4, 9] and ids[4, :4].tolist() == [2, 0, 4, 6]
    np.testing.assert_allclose(top[4, :2], np.array([1, 0]) - np.log(np.e + 16), rtol=1e-6)
    assert (top[2, 3], top[0, 0]) == (-np.inf, -np.inf)


# --- launches --------------------------------------------------------------------------------------------------------


def test_launches():
    assert ch13.adjust_launch(3, 2049) == ((2, 3), ch13.ADJUST_THREADS)
    assert ch13.rows_launch(5) == (5, ch13.SAMPLING_THREADS)
    for launch, arguments in ((ch13.adjust_launch, (0, 5)), (ch13.adjust_launch, (5, 0)), (ch13.rows_launch, (0,)),
                              (ch13.count_launch, (0,))):  # fmt: skip
        with pytest.raises(ValueError, match="= 0"):
            launch(*arguments)
