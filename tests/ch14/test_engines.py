"""The levels of the engine: kv and fast say what naive says, to the precision of their arithmetic."""

import numpy as np
import pytest
from numba import cuda

from ch14_mini_llm.engine.request import RequestError, Sampling
from ch14_mini_llm.levels import ENGINES, make_engine
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.weights import tensor_table
from chapters.ch12_flash.paged_half import paged_v4_parts
from chapters.ch13_llm_ops.fused import append_rows, gemv_ln_logits, gemv_ln_qkv, pick_best

SIZES = dict(n_layer=2, n_head=2, d_model=128, d_ff=264, n_ctx=1024, vocab_size=257)
LENGTHS = [511, 1023, 1, 2, 15, 16, 17, 130]
RELATIVE = 2e-2  # of the largest logit: float16 has 11 bits, and a layer rounds some ten times


def random_model(seed=0, **sizes):
    """(config, tensors in float16): unit-variance outputs, as for the tests of the naive level."""
    config = GPT2Config(**{**SIZES, **sizes})
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape, _ in tensor_table(config):
        fan_in = config.d_model if name in ("wte.weight", "wpe.weight") else shape[0]
        scale, centre = (0.2, 1) if "ln_" in name and name.endswith("weight") else (fan_in**-0.5, 0)
        tensors[name] = (centre + scale * rng.standard_normal(shape)).astype(np.float16)
    return config, tensors


@pytest.fixture(scope="module")
def levels():
    """A model of each level, of the same weights."""
    config, tensors = random_model()
    return {level: make_engine(level, config, tensors) for level in ENGINES}


def prompt_of(length, seed=0, vocab_size=257):
    return np.random.default_rng([length, seed]).integers(0, vocab_size, length).tolist()


def last_logits(model, tokens):
    model.prefill(tokens)
    return model.logits.copy_to_host()


# --- logits and tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_after_a_prompt(levels, length):
    tokens = prompt_of(length)
    naive, kv, fast = (last_logits(levels[level], tokens) for level in ENGINES)
    assert np.abs(kv - naive).max() <= 1e-5 * np.abs(naive).max()  # another attention, whose sums have another order
    assert np.abs(fast - naive).max() <= RELATIVE * np.abs(naive).max()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 127, 511])
def test_logits_of_steps(levels, length):
    """A step's logits are those of a forward pass over the whole sequence."""
    tokens = prompt_of(length, seed=1)
    for level in ("kv", "fast"):
        made = list(generate(levels[level], tokens, 5))
        naive = last_logits(levels["naive"], tokens + made[:-1])
        found = levels[level].logits.copy_to_host()
        allowed = {"kv": 1e-5, "fast": RELATIVE}[level]
        assert np.abs(found - naive).max() <= allowed * np.abs(naive).max(), level


@pytest.mark.parametrize("level, tie", [("kv", 1e-4), ("fast", 2 * RELATIVE)])
@pytest.mark.parametrize("length", [900, 1, 16, 127])
def test_greedy_tokens(levels, level, tie, length):
    """Equal to those of the naive level, or the first difference is a near tie there: two logits ``tie`` apart."""
    tokens = prompt_of(length, seed=2)
    made = list(generate(levels[level], tokens, 24))
    expected = list(generate(levels["naive"], tokens, 24 if length < 500 else 4))
    for i, (token, other) in enumerate(zip(made, expected)):
        if token != other:
            logits = last_logits(levels["naive"], tokens + expected[:i])
            assert logits[other] - logits[token] <= tie * np.abs(logits).max(), i
            break


@pytest.mark.parametrize("level", ["kv", "fast"])
def test_up_to_the_last_position(levels, level):
    model = levels[level]
    tokens = prompt_of(1020, seed=3)
    made = list(generate(model, tokens, 4))
    assert len(made) == 4
    naive = last_logits(levels["naive"], tokens + made[:3])
    assert np.abs(model.logits.copy_to_host() - naive).max() <= RELATIVE * np.abs(naive).max()
    with pytest.raises(RequestError, match=r"1020 prompt tokens and max_new 5 make 1025, .*n_ctx\) is 1024"):
        generate(model, tokens, 5)
    assert 0 <= model.prefill(prompt_of(1024)) < 257  # the 1024th position has logits too


# --- the fast level --------------------------------------------------------------------------------------------------


def run_of(model, tokens, max_new, sampling=None, graphs=True):
    """Tokens and the last logits of a generation."""
    runner = model.engine.runner
    run, runner.run = runner.run, lambda shape: run(shape, record=graphs)
    try:
        tokens = list(generate(model, tokens, max_new, sampling))
    finally:
        runner.run = run
    cuda.synchronize()
    return [tokens, model.logits.copy_to_host()]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=3)])
def test_a_replay_is_bit_equal_to_its_launches(levels, sampling):
    fast, tokens = levels["fast"], prompt_of(17)
    eager = run_of(fast, tokens, 130, sampling, graphs=False)
    replayed = run_of(fast, tokens, 130, sampling)
    for found, expected in zip(replayed, eager, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(set(eager[0])) > 3


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_a_prompts_graph_is_bit_equal_to_its_launches(length):
    """The first prompt of a length is launched, the others are replayed, with padding behind them."""
    config, tensors = random_model(n_layer=1)
    fast, tokens = make_engine("fast", config, tensors), prompt_of(length)
    runs = [run_of(fast, tokens, 1) for _ in range(3)]
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(found, expected)
    assert [graph is not None for graph in fast.engine.runner._graphs.values()] == [True]
    shorter = prompt_of(max(length - 1, 1), seed=5)
    again = run_of(fast, shorter, 1)
    for found, expected in zip(again, run_of(make_engine("fast", config, tensors), shorter, 1), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_k=20, seed=7)])
def test_two_runs_are_equal(levels, sampling):
    fast, tokens = levels["fast"], prompt_of(33)
    first = list(generate(fast, tokens, 40, sampling))
    list(generate(fast, prompt_of(200), 3))  # something else in between
    assert list(generate(fast, tokens, 40, sampling)) == first


def test_the_seed_decides(levels):
    runs = [list(generate(levels["fast"], [1, 2], 20, Sampling(seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_sampling_draws_what_the_other_levels_draw(levels):
    """Same seed, same step: with logits this close the draw falls on the same token, but for the odd edge."""
    sampling = Sampling(temperature=1.0, seed=11)
    drawn = {level: list(generate(levels[level], [5, 6, 7], 10, sampling)) for level in ENGINES}
    assert drawn["kv"] == drawn["naive"]
    assert drawn["fast"][0] == drawn["naive"][0]


def test_top_k_1_is_greedy(levels):
    fast = levels["fast"]
    assert list(generate(fast, [1, 2], 10, Sampling(top_k=1, seed=3))) == list(generate(fast, [1, 2], 10))


def test_an_abandoned_generation_disturbs_nothing(levels):
    fast, tokens = levels["fast"], prompt_of(9)
    expected = list(generate(fast, tokens, 12))
    for _token in generate(fast, prompt_of(50), 30):
        break  # two more steps are under way
    assert list(generate(fast, tokens, 12)) == expected


def test_stop(levels):
    made = list(generate(levels["fast"], [5], 15))
    stop = made[4]
    assert list(generate(levels["fast"], [5], 15, stop=stop)) == made[: made.index(stop)]


def test_a_short_model():
    """Fewer tokens than the context, and a single token to make: no graph is needed."""
    config, tensors = random_model()
    model = make_engine("fast", config, tensors, max_length=7)
    assert len(list(generate(model, [1, 2, 3, 4, 5, 6, 7], 1))) == 1
    assert len(list(generate(model, [1, 2, 3], 5))) == 5
    with pytest.raises(RequestError, match="8 tokens, but this model's buffers are for 7"):
        generate(model, [1, 2, 3, 4], 5)


@pytest.mark.parametrize("n_head, d_model", [(4, 128), (1, 128)])  # head_dim 32, 128
def test_other_heads(n_head, d_model):
    config, tensors = random_model(n_head=n_head, d_model=d_model, n_ctx=96)
    tokens = prompt_of(40)
    fast, naive = (make_engine(level, config, tensors) for level in ("fast", "naive"))
    found, expected = last_logits(fast, tokens), last_logits(naive, tokens)
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()
    made = list(generate(fast, tokens, 6))
    expected = last_logits(naive, tokens + made[:-1])
    assert np.abs(fast.logits.copy_to_host() - expected).max() <= RELATIVE * np.abs(expected).max()


def test_weights_that_overflow_are_told():
    config, tensors = random_model(n_ctx=32)
    tensors["ln_f.weight"] = np.full_like(tensors["ln_f.weight"], np.nan)
    with pytest.raises(WeightsError, match="after 2 tokens all logits are NaN"):
        list(generate(make_engine("fast", config, tensors), [1, 2], 3))


# --- the trace -------------------------------------------------------------------------------------------------------


def test_the_trace_of_a_step(levels):
    launches = levels["fast"].trace_step([1, 2, 3])
    assert len(launches) == 5 * SIZES["n_layer"] + 2
    assert launches[0].kernel is gemv_ln_qkv and launches[1].kernel is paged_v4_parts
    assert [launch.kernel for launch in launches[-2:]] == [gemv_ln_logits, pick_best]
    assert all(launch.defined_at.startswith("chapters/ch") for launch in launches)
    assert levels["fast"].trace_step([1], Sampling(seed=1))[-1].kernel is append_rows


@pytest.mark.parametrize("level", ENGINES)
def test_a_traced_step_leaves_the_logits_of_its_sequence(levels, level):
    model, tokens = levels[level], prompt_of(20)
    model.trace_step(tokens)
    expected = last_logits(levels["naive"], tokens)
    assert np.abs(model.logits.copy_to_host() - expected).max() <= RELATIVE * np.abs(expected).max()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, problem",
    [
        (dict(n_head=2, d_model=96), "head_dim is 48; engine fast has attention for .*64.*use engine kv"),
        (dict(d_ff=260), "d_ff is 260; engine fast needs a multiple of 8"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(sizes, problem):
    config, tensors = random_model(**sizes)
    with pytest.raises(RequestError, match=problem):
        make_engine("fast", config, tensors)


def test_an_unknown_level_is_refused():
    with pytest.raises(RequestError, match="engine is 'quick'; it must be one of naive, kv, fast"):
        make_engine("quick", *random_model())


@pytest.mark.parametrize("level", ENGINES)
def test_bad_tokens_and_lengths_are_refused(levels, level):
    for tokens, problem in (([], "no tokens"), ([257], "not in this model's vocabulary"), ([1] * 1025, "1025 tokens")):
        with pytest.raises(RequestError, match=problem):
            levels[level].prefill(tokens)
    with pytest.raises(RequestError, match="max_length is 2000"):
        make_engine(level, *random_model(n_layer=1), max_length=2000)
