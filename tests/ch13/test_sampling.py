"""Chapter 13: sampling against a reference that sorts, the textbook definition, and the statistics of many draws."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch07_warp_reduce.argmax import greedy_argmax_reference
from chapters.ch13_llm_ops import sampling as ch13

SIZES = [1, 31, 33, 127, 1025, 50257]
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"k": 1},
    {"k": 40},
    {"k": 1000, "temperature": 1.5},
    {"p": 0.5},
    {"p": 0.95, "temperature": 1.5},
    {"k": 40, "p": 0.9, "temperature": 0.8},
    {"k": 2000, "p": 0.3},
]
INF = np.float32(np.inf)


def sample(logits, draws=1, **settings):
    """Runs both kernels; returns (weights, tokens) on the host."""
    weights, out = cuda.device_array(len(logits), np.int64), cuda.device_array(draws, np.int32)
    ch13.sample(cuda.to_device(logits), weights, out, len(logits), **settings)
    return weights.copy_to_host(), out.copy_to_host()


def kept(logits, **settings):
    return sample(logits, **settings)[0] != ch13.DROPPED


def kept_by_definition(logits, temperature=1.0, k=None, p=1.0):
    """Top-k, then top-p, as a textbook has them, in float64. Right where no running sum falls within rounding of p."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")[:k]
    scaled = logits[order].astype(np.float64) / temperature
    share = np.exp(scaled - scaled[0])
    share /= share.sum()
    if p < 1:
        order = order[np.cumsum(share) - share < p]  # those in front of which p was not reached yet
    return np.isin(np.arange(len(logits)), order)


def log_of(probabilities):
    return np.log(np.array(probabilities)).astype(np.float32)


# --- floats as integers ----------------------------------------------------------------------------------------------


@cuda.jit
def keys_there_and_back(x, keys, back, n):
    i = cuda.grid(1)
    if i < n:
        keys[i] = ch13.float_key(x[i])
        back[i] = ch13.key_float(keys[i])


def test_float_key_sorts_like_the_float(rng):
    largest, smallest = np.finfo(np.float32).max, np.float32(1e-45)
    special = np.array([-INF, -largest, -1, -smallest, 0, smallest, 1, largest, INF], np.float32)
    some = rng.standard_normal(500) * 10.0 ** rng.integers(-40, 38, 500)
    x = np.sort(np.concatenate([special, some.astype(np.float32)]))
    keys, back = cuda.device_array(len(x), np.int64), cuda.device_array(len(x), np.float32)
    keys_there_and_back[4, 128](cuda.to_device(x), keys, back, len(x))
    np.testing.assert_array_equal(back.copy_to_host(), x)
    np.testing.assert_array_equal(np.diff(keys.copy_to_host()) > 0, np.diff(x.astype(np.float64)) > 0)
    assert ch13.LOWEST_KEY == keys.copy_to_host()[1]


def test_float_key_of_both_zeros_is_0():
    keys, back = cuda.device_array(2, np.int64), cuda.device_array(2, np.float32)
    keys_there_and_back[1, 32](cuda.to_device(np.array([0.0, -0.0], np.float32)), keys, back, 2)
    assert keys.copy_to_host().tolist() == [0, 0]


# --- random numbers --------------------------------------------------------------------------------------------------

# From Random123's file of known answers (kat_vectors, "philox4x32 10"): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@cuda.jit
def philox_kernel(words, out):
    a, b, c, d = ch13.philox4x32(words[0], words[1], words[2], words[3], words[4], words[5])
    out[0] = a
    out[1] = b
    out[2] = c
    out[3] = d


@cuda.jit
def uniform_kernel(seed, step, out):
    i = cuda.threadIdx.x
    out[i] = ch13.uniform(seed, step, np.uint64(i))


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert ch13.philox_reference(counter, key) == expected
    out = cuda.device_array(4, np.uint64)
    philox_kernel[1, 1](cuda.to_device(np.array(counter + key, np.uint64)), out)
    assert tuple(int(v) for v in out.copy_to_host()) == expected


@pytest.mark.parametrize("seed, step", [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**64 - 1), (3 << 32, 5 << 32)])
def test_uniform_is_the_same_on_device_and_host(seed, step):
    out = cuda.device_array(32, np.float64)
    uniform_kernel[1, 32](np.uint64(seed), np.uint64(step), out)
    expected = [ch13.uniform_reference(seed, step, draw) for draw in range(32)]
    assert out.copy_to_host().tolist() == expected
    assert len(set(expected)) == 32 and 0 <= min(expected) and max(expected) < 1


def test_uniform_is_the_first_word_of_philox():
    assert ch13.uniform_reference(0, 0) == 0x6627E8D5 / 2**32
    assert ch13.uniform_reference(2**64 - 1, 2**64 - 1, 2**64 - 1) == 0x408F276D / 2**32


# --- the filters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_weights_and_kept_tokens(rng, n, settings):
    logits = rng.standard_normal(n, dtype=np.float32) * 3 - 20
    weights, tokens = sample(logits, seed=n, **settings)
    expected = ch13.weights_reference(logits, **settings)
    np.testing.assert_array_equal(weights == ch13.DROPPED, expected == ch13.DROPPED)
    assert np.abs(weights - expected).max() <= 1  # exp may differ in its last bit
    np.testing.assert_array_equal(weights != ch13.DROPPED, kept_by_definition(logits, **settings))
    assert tokens[0] == ch13.draw_reference(weights, ch13.uniform_reference(n, 0))


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_kept_tokens_of_tied_logits(rng, n, settings):
    logits = rng.integers(-3, 3, n).astype(np.float32) / 2
    mask = kept(logits, **settings)
    np.testing.assert_array_equal(mask, ch13.kept_reference(logits, **settings))
    edge = logits[mask].min()
    assert mask[logits > edge].all()
    ties = mask[logits == edge]
    assert (ties[:-1] >= ties[1:]).all()  # of equal logits the first ones


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [1, 2, 30, 126, 1024, 50256])
def test_top_k_keeps_exactly_k(n, k):
    mask = kept(np.full(n, -1.5, np.float32), k=k)
    assert mask.sum() == min(k, n) and mask[:k].all()


@pytest.mark.parametrize("p, size", [(1e-12, 1), (0.1, 1), (0.11, 2), (0.3, 3), (0.7, 7), (0.9, 9), (0.95, 10)])
def test_top_p_of_ten_equal_tokens(p, size):
    mask = kept(np.zeros(10, np.float32), p=p)
    assert mask.sum() == size and mask[:size].all()


def test_top_p_takes_the_fewest_that_reach_p():
    logits = log_of([0.1, 0.5, 0.15, 0.25])
    for p, expected in [(0.4, [1]), (0.6, [1, 3]), (0.76, [1, 2, 3]), (0.91, [0, 1, 2, 3])]:
        assert np.flatnonzero(kept(logits, p=p)).tolist() == expected


def test_top_p_is_of_what_top_k_left():
    logits = log_of([0.4, 0.3, 0.2, 0.1])
    assert np.flatnonzero(kept(logits, p=0.5)).tolist() == [0, 1]
    assert np.flatnonzero(kept(logits, k=2, p=0.5)).tolist() == [0]  # 0.4 / 0.7 is more than half


def test_temperature_comes_before_top_p():
    logits = log_of([0.5, 0.3, 0.2])
    assert kept(logits, p=0.6).sum() == 2
    assert kept(logits, p=0.6, temperature=0.25).sum() == 1
    assert kept(logits, p=0.6, temperature=100).sum() == 2
    assert kept(logits, p=0.7, temperature=100).sum() == 3


def test_probabilities(rng):
    logits = rng.standard_normal(1025, dtype=np.float32) * 2
    expected = np.exp(logits.astype(np.float64) / 0.8)
    expected[np.argsort(-logits)[300:]] = 0
    expected /= expected.sum()
    probabilities = ch13.probabilities_reference(logits, temperature=0.8, k=300)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6, atol=1e-12)
    weights = np.maximum(sample(logits, temperature=0.8, k=300)[0], 0)
    np.testing.assert_allclose(weights / weights.sum(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("threads", [32, 96, 512])
def test_the_block_does_not_change_the_result(rng, threads):
    n = 5000
    logits = rng.standard_normal(n, dtype=np.float32).round(2)  # with ties
    device_logits, weights, out = cuda.to_device(logits), cuda.device_array(n, np.int64), cuda.device_array(8, np.int32)
    ch13.filter_logits[1, threads](device_logits, weights, n, 0.9, 3000, 0.9)
    ch13.draw_token[8, threads](weights, out, n, np.uint64(5), np.uint64(6))
    expected_weights, expected_tokens = sample(logits, draws=8, temperature=0.9, k=3000, p=0.9, seed=5, step=6)
    np.testing.assert_array_equal(weights.copy_to_host(), expected_weights)
    np.testing.assert_array_equal(out.copy_to_host(), expected_tokens)


# --- special values --------------------------------------------------------------------------------------------------


def specials():
    logits = np.linspace(-2, 2, 127, dtype=np.float32)
    yield "nan", np.where(np.arange(127) % 3 == 0, np.float32(np.nan), logits)
    yield "-nan", np.where(np.arange(127) % 3 == 0, -np.float32(np.nan), logits)
    yield "-inf", np.where(np.arange(127) > 60, -INF, logits)
    yield "+inf", np.where(np.arange(127) % 50 == 1, INF, logits)
    yield "zeros", np.where(np.arange(127) % 2 == 0, np.float32(0.0), np.float32(-0.0))
    yield "extremes", np.where(np.arange(127) % 2 == 0, np.finfo(np.float32).max, -np.finfo(np.float32).max)
    yield "tiny", np.float32(1e-45) * (np.arange(127, dtype=np.float32) - 60)
    yield "mixed", np.array([-INF, np.nan, -INF, -3, 0.0, -0.0, np.nan, 0.0, -1], np.float32)


@pytest.mark.parametrize("settings", [{}, {"k": 1}, {"k": 3}, {"p": 0.5}, {"k": 20, "p": 0.4}], ids=str)
@pytest.mark.parametrize("logits", [pytest.param(logits, id=name) for name, logits in specials()])
def test_special_values(logits, settings):
    weights, tokens = sample(logits, draws=20, **settings)
    np.testing.assert_array_equal(weights != ch13.DROPPED, ch13.kept_reference(logits, **settings))
    assert (weights[~(logits > -INF)] == ch13.DROPPED).all()
    assert (weights[tokens] > 0).all()
    if settings.get("k") == 1:
        assert (tokens == greedy_argmax_reference(logits)).all()


@pytest.mark.parametrize("value", [-INF, np.float32(np.nan)])
@pytest.mark.parametrize("settings", [{}, {"k": 3, "p": 0.5}], ids=str)
def test_nothing_to_draw_is_minus_one(value, settings):
    weights, tokens = sample(np.full(33, value), draws=2, **settings)
    assert (weights == ch13.DROPPED).all() and tokens.tolist() == [-1, -1]
    assert ch13.draw_reference(weights, 0.5) == -1


def test_infinity_takes_all(rng):
    logits = rng.standard_normal(127, dtype=np.float32)
    logits[[3, 99]] = INF
    assert set(sample(logits, draws=100)[1].tolist()) == {3, 99}


def test_tiny_and_huge_temperature(rng):
    logits = rng.standard_normal(127, dtype=np.float32)
    assert (sample(logits, draws=50, temperature=1e-300)[1] == logits.argmax()).all()
    np.testing.assert_array_equal(sample(logits, temperature=1e300)[0], np.full(127, ch13.UNIT))


# --- the draw --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_draws_follow_the_running_sum(rng, n):
    weights = rng.integers(-1, 5, n) * rng.integers(0, ch13.UNIT // 4, n)
    weights[weights < 0] = ch13.DROPPED
    weights[n // 2] = 12345
    out = cuda.device_array(60, np.int32)
    ch13.draw_token[ch13.sample_launch(60)](cuda.to_device(weights), out, n, np.uint64(7), np.uint64(n))
    expected = [ch13.draw_reference(weights, ch13.uniform_reference(7, n, draw)) for draw in range(60)]
    assert out.copy_to_host().tolist() == expected


@pytest.mark.parametrize("position", [0, 1, 31, 32, 1023, 1024, 2047, 2048])
def test_the_only_weight_is_drawn(position):
    weights = np.full(2049, ch13.DROPPED)
    weights[::3] = 0
    weights[position] = 1
    out = cuda.device_array(4, np.int32)
    ch13.draw_token[ch13.sample_launch(4)](cuda.to_device(weights), out, 2049, np.uint64(1), np.uint64(2))
    assert out.copy_to_host().tolist() == [position] * 4


@pytest.mark.parametrize("step", [0, 7, 2**32 + 5, 2**63 - 1])
def test_a_step_in_device_memory_draws_the_same(rng, step):
    weights = cuda.to_device(rng.integers(-1, 5, 1025) * rng.integers(0, ch13.UNIT // 4, 1025))
    passed, read = cuda.device_array(60, np.int32), cuda.to_device(np.full(65, 7, np.int32))
    launch, seed, place = ch13.sample_launch(60), np.uint64(2**64 - 3), cuda.to_device(np.array([step, -1]))
    ch13.draw_token[launch](weights, passed, 1025, seed, np.uint64(step))
    ch13.draw_token_at[launch](weights, read[:60], 1025, seed, place[:1])
    tokens = passed.copy_to_host()
    np.testing.assert_array_equal(read.copy_to_host(), [*tokens, *[7] * 5])
    assert len(set(tokens.tolist())) > 40 and place.copy_to_host().tolist() == [step, -1]


def chi_square(tokens, probabilities):
    expected = probabilities * len(tokens)
    assert expected.min() > 5
    return float(((np.bincount(tokens, minlength=len(expected)) - expected) ** 2 / expected).sum())


def test_twenty_thousand_draws_follow_the_distribution(rng):
    logits = rng.standard_normal(50, dtype=np.float32)
    share = np.exp(logits.astype(np.float64) / 1.2)
    by_draw = sample(logits, draws=20_000, temperature=1.2, seed=42)[1]
    # 49 degrees of freedom: 24.0 and 85.4 cut off a thousandth at either end (too even is as wrong as too rough)
    assert 24.0 < chi_square(by_draw, share / share.sum()) < 85.4

    weights = cuda.to_device(ch13.weights_reference(logits, temperature=1.2))
    out = cuda.device_array(1, np.int32)
    by_step = np.empty(3000, np.int32)
    for step in range(len(by_step)):
        ch13.draw_token[ch13.sample_launch()](weights, out, 50, np.uint64(42), np.uint64(step))
        by_step[step] = out.copy_to_host()[0]
    assert 24.0 < chi_square(by_step, share / share.sum()) < 85.4


def test_filtered_draws_follow_the_kept_tokens(rng):
    logits = rng.standard_normal(300, dtype=np.float32)
    settings = {"temperature": 0.9, "k": 60, "p": 0.8}
    tokens = sample(logits, draws=20_000, seed=9, **settings)[1]
    mask = kept_by_definition(logits, **settings)
    assert mask[tokens].all() and 20 < mask.sum() < 60
    share = np.exp(logits[mask].astype(np.float64) / 0.9)
    freedom = mask.sum() - 1  # chi-square has mean f and variance 2 f; 4.5 sigma either way
    position = np.cumsum(mask) - 1
    assert abs(chi_square(position[tokens], share / share.sum()) - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_seed_and_step_repeat(rng):
    logits = rng.standard_normal(1025, dtype=np.float32)
    first = sample(logits, draws=40, seed=3, step=8)[1]
    np.testing.assert_array_equal(sample(logits, draws=40, seed=3, step=8)[1], first)
    np.testing.assert_array_equal(sample(logits, draws=7, seed=3, step=8)[1], first[:7])
    for other in ({"seed": 4, "step": 8}, {"seed": 3, "step": 9}, {"seed": 2**63 + 3, "step": 8}):
        assert (sample(logits, draws=40, **other)[1] != first).mean() > 0.8


def test_sample_in_a_stream(rng):
    logits = rng.standard_normal(127, dtype=np.float32)
    stream = cuda.stream()
    weights, out = cuda.device_array(127, np.int64), cuda.device_array(5, np.int32)
    ch13.sample(cuda.to_device(logits), weights, out, 127, k=9, seed=1, stream=stream)
    stream.synchronize()
    np.testing.assert_array_equal(out.copy_to_host(), sample(logits, draws=5, k=9, seed=1)[1])


# --- wrong parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": 0}, "temperature = 0: must be more than 0.*greedy"),
        ({"temperature": -1.5}, "temperature = -1.5: must be more than 0"),
        ({"temperature": float("nan")}, "temperature = nan: must be"),
        ({"temperature": float("inf")}, "temperature = inf: must be more than 0 and finite"),
        ({"k": 0}, "k = 0: must be a whole number from 1 .*None"),
        ({"k": -4}, "k = -4: must be a whole number from 1"),
        ({"k": 2.5}, "k = 2.5: must be a whole number from 1"),
        ({"p": 0}, "p = 0: must be more than 0 and at most 1"),
        ({"p": 1.01}, "p = 1.01: must be more than 0 and at most 1"),
        ({"p": float("nan")}, "p = nan: must be"),
        ({"seed": -1}, "seed = -1: must be a whole number from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed = 18446744073709551616: must be"),
        ({"step": -1}, "step = -1: must be a whole number from 0"),
        ({"n": 0}, "n = 0: must be a whole number from 1 to 4194304"),
        ({"n": 2**22 + 1}, "n = 4194305: must be a whole number from 1 to 4194304"),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        ch13.check_sampling(**{"n": 100, **settings})


def test_sample_checks_before_it_launches():
    with pytest.raises(ValueError, match="k = 0"):
        ch13.sample(None, None, None, 10, k=0)


def test_parameters_as_the_kernels_take_them():
    assert ch13.check_sampling(100) == (100, 1.0, 100, 1.0, 0, 0)
    assert ch13.check_sampling(100, k=101, p=1)[2:4] == (100, 1.0)
    assert ch13.check_sampling(100, seed=2**64 - 1)[4].dtype == np.uint64


def test_launch_refuses_no_draws():
    assert ch13.sample_launch(3)[0] == 3
    with pytest.raises(ValueError, match="draws = 0"):
        ch13.sample_launch(0)
