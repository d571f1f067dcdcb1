"""The capstone against transformers: logits, greedy tokens, sampling, and which kernels it launches."""

import ast
import inspect
import textwrap

import numpy as np
import pytest
from make_models import make_hf_model

from ch14_mini_llm.engine.request import RequestError, Sampling
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.weights import load_weights, save_weights, tensor_table
from ch14_mini_llm.naive import gpt2 as model_module
from ch14_mini_llm.naive.gpt2 import GPT2
from ch14_mini_llm.naive.sampler import Sampler
from chapters.ch03_indexing.kernels import bias_add, embed, residual_add
from chapters.ch04_memory.kernels import split_qkv
from chapters.ch06_shared_tile.kernels import matmul_kernel
from chapters.ch07_warp_reduce.argmax import greedy_argmax
from chapters.ch07_warp_reduce.norms import layernorm_row
from chapters.ch09_gemm.gemv import gemv_logits
from chapters.ch10_softmax.kernels import softmax_row
from chapters.ch11_attention.kernels import attention_scores, attention_values
from chapters.ch13_llm_ops.kernels import gelu_kernel
from chapters.ch13_llm_ops.sampling import (
    draw_reference,
    draw_token,
    filter_logits,
    uniform_reference,
    weights_reference,
)
from common.trace import trace

RELATIVE = 1e-4  # of the largest logit of a position
NEAR_TIE = 1e-3  # logits this close may be ranked either way

# Head widths of 7, 16, 17 and 8; vocabularies that fill no block; d_ff that is not 4 * d_model.
CONFIGS = {
    "1-layer-1-head": dict(n_layer=1, n_head=1, d_model=7, n_ctx=65, vocab_size=131),
    "2-layers-2-heads": dict(n_layer=2, n_head=2, d_model=32, n_ctx=80, vocab_size=257),
    "3-layers-3-heads": dict(n_layer=3, n_head=3, d_model=51, n_ctx=72, vocab_size=1025, d_ff=77),
    "2-layers-3-heads": dict(n_layer=2, n_head=3, d_model=24, n_ctx=67, vocab_size=1031, d_ff=33),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request, tmp_path_factory, transformers):
    """(our model, transformers' model) of the same random weights, ours read through data/download_gpt2.py."""
    seed = list(CONFIGS).index(request.param)
    path, theirs = make_hf_model(tmp_path_factory.mktemp("hf"), seed=seed, **CONFIGS[request.param])
    return GPT2.from_file(path), theirs


def their_logits(theirs, tokens):
    """Logits of transformers at every position, (n_tokens, vocab_size) float32."""
    import torch

    with torch.no_grad():
        return theirs(torch.tensor([tokens])).logits[0].numpy()


def random_prompt(config, length, seed=0):
    return np.random.default_rng([length, seed]).integers(0, config.vocab_size, length).tolist()


def small_model(tmp_path, **sizes):
    """The weight file of a random model, made without torch."""
    config = GPT2Config(**{**dict(n_layer=2, n_head=3, d_model=33, d_ff=70, n_ctx=40, vocab_size=257), **sizes})
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape, _ in tensor_table(config):
        fan_in = config.d_model if name in ("wte.weight", "wpe.weight") else shape[0]
        scale, centre = (0.2, 1) if "ln_" in name and name.endswith("weight") else (fan_in**-0.5, 0)
        tensors[name] = centre + scale * rng.standard_normal(shape)
    save_weights(tmp_path / "model.bin", config, tensors)
    return tmp_path / "model.bin"


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, "n_ctx"])
def test_logits_agree_with_transformers_at_every_position(pair, length):
    ours, theirs = pair
    tokens = random_prompt(ours.config, ours.config.n_ctx if length == "n_ctx" else length)
    found, expected = ours.logits_all(tokens), their_logits(theirs, tokens)
    assert found.shape == expected.shape == (len(tokens), ours.config.vocab_size)
    error = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert error.max() < RELATIVE, f"position {error.argmax()}: {error.max():.2e}"


@pytest.mark.parametrize("length", [1, 16, 33])
def test_32_greedy_tokens_agree_with_transformers(pair, length):
    ours, theirs = pair
    prompt = random_prompt(ours.config, length, seed=1)
    tokens = prompt + list(generate(ours, prompt, max_new=32))
    assert len(tokens) == length + 32
    # transformers' logits at every position of our sequence: each of our tokens must be its choice there
    logits = their_logits(theirs, tokens)[length - 1 : -1]
    for position, (row, token) in enumerate(zip(logits, tokens[length:], strict=True)):
        second, first = np.sort(row)[-2:]
        assert token == row.argmax() or (first - second < NEAR_TIE and first - row[token] < NEAR_TIE), position


def test_generation_up_to_n_ctx(pair):
    ours, theirs = pair
    n_ctx = ours.config.n_ctx
    prompt = random_prompt(ours.config, n_ctx - 2)
    made = list(generate(ours, prompt, max_new=2))
    logits = their_logits(theirs, prompt + made)
    assert made == logits[-3:-1].argmax(axis=1).tolist()


def test_logits_of_the_last_position_are_left_on_the_device(pair):
    ours, _ = pair
    tokens = random_prompt(ours.config, 9)
    every = ours.logits_all(tokens)
    token = ours.forward(tokens)
    np.testing.assert_array_equal(ours.logits.copy_to_host(), every[-1])
    assert token == every[-1].argmax()


def test_every_tensor_counts(tmp_path):
    """A forward pass that ignored a weight would also pass the other tests if that weight did little."""
    path = small_model(tmp_path)
    config, tensors = load_weights(path)
    tokens = random_prompt(config, 11)
    expected = GPT2(config, tensors).logits_all(tokens)
    for name in tensors:
        altered = {**tensors, name: tensors[name] + np.where(np.arange(tensors[name].size) % 2, 0.1, -0.1).reshape(
            tensors[name].shape)}  # fmt: skip
        difference = np.abs(GPT2(config, altered).logits_all(tokens) - expected).max() / np.abs(expected).max()
        assert difference > 10 * RELATIVE, name


def test_a_token_sees_no_later_one(tmp_path):
    model = GPT2.from_file(small_model(tmp_path))
    tokens = random_prompt(model.config, 20)
    every = model.logits_all(tokens)
    other = tokens[:13] + [(token + 1) % model.config.vocab_size for token in tokens[13:]]
    np.testing.assert_array_equal(model.logits_all(other)[:13], every[:13])
    assert not np.array_equal(model.logits_all(other)[13:], every[13:])


# --- buffers ---------------------------------------------------------------------------------------------------------


def test_a_long_sequence_leaves_no_trace_in_a_short_one(tmp_path):
    path = small_model(tmp_path)
    used, fresh = GPT2.from_file(path), GPT2.from_file(path)
    short, long = random_prompt(used.config, 5), random_prompt(used.config, 40)
    used.forward(long)
    np.testing.assert_array_equal(used.logits_all(short), fresh.logits_all(short))


def test_a_forward_allocates_nothing_on_the_device(tmp_path, monkeypatch):
    model = GPT2.from_file(small_model(tmp_path))
    tokens = random_prompt(model.config, 7)
    expected = model.forward(tokens)

    def refuse(*args, **kwargs):
        raise AssertionError("device memory allocated in a forward pass")

    for name in ("device_array", "to_device", "device_array_like", "pinned_array", "mapped_array"):
        monkeypatch.setattr(model_module.cuda, name, refuse)
    assert model.forward(tokens) == expected


def test_max_length_bounds_the_buffers(tmp_path):
    path = small_model(tmp_path)
    whole, cut = GPT2.from_file(path), GPT2.from_file(path, max_length=9)
    tokens = random_prompt(whole.config, 9)
    np.testing.assert_array_equal(cut.logits_all(tokens), whole.logits_all(tokens))
    with pytest.raises(
        RequestError, match=r"10 tokens, but this model's buffers are for 9: .*max_length up to 40"
    ):
        cut.forward([*tokens, 1])
    with pytest.raises(RequestError, match="buffers"):
        generate(cut, tokens, max_new=2)
    assert len(list(generate(cut, tokens, max_new=1))) == 1


@pytest.mark.parametrize("length", [0, 41, -1])
def test_max_length_out_of_range(tmp_path, length):
    with pytest.raises(RequestError, match=f"max_length is {length}; .*1 to 40"):
        GPT2.from_file(small_model(tmp_path), max_length=length)


# --- which kernels ---------------------------------------------------------------------------------------------------

BLOCK = [
    layernorm_row, matmul_kernel, bias_add, split_qkv, attention_scores, softmax_row, attention_values,
    matmul_kernel, bias_add, residual_add,
    layernorm_row, matmul_kernel, bias_add, gelu_kernel, matmul_kernel, bias_add, residual_add,
]  # fmt: skip


@pytest.mark.parametrize("n_layer", [1, 3])
def test_a_forward_launches_exactly_the_chapters_kernels(tmp_path, n_layer):
    model = GPT2.from_file(small_model(tmp_path, n_layer=n_layer))
    with trace() as launches:
        model.forward([1, 2, 3])
    expected = [embed] + n_layer * BLOCK + [layernorm_row, gemv_logits, greedy_argmax]
    assert len(launches) == len(expected)
    for launch, kernel in zip(launches, expected, strict=True):
        assert launch.kernel is kernel
        assert launch.defined_at.startswith("chapters/ch")


def test_a_sampled_step_ends_in_chapter_13(tmp_path):
    model = GPT2.from_file(small_model(tmp_path))
    launches = model.trace_step([1, 2, 3], Sampling(top_k=5))
    assert [launch.kernel for launch in launches[-3:]] == [gemv_logits, filter_logits, draw_token]


def test_forward_is_short_enough_to_read():
    source = textwrap.dedent(inspect.getsource(GPT2.forward))
    assert len(source.splitlines()) <= 60
    launches = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    assert launches and all(launch.lineno == launch.end_lineno for launch in launches), "one line a kernel"


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_repeats_with_the_seed_only(tmp_path):
    model = GPT2.from_file(small_model(tmp_path))
    runs = [list(generate(model, [1, 2], 20, Sampling(temperature=1.5, seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_top_k_of_one_is_greedy(tmp_path):
    model = GPT2.from_file(small_model(tmp_path))
    assert list(generate(model, [1, 2], 10, Sampling(top_k=1, seed=3))) == list(generate(model, [1, 2], 10))


def test_every_step_draws_with_its_own_number_from_its_own_logits(tmp_path):
    model = GPT2.from_file(small_model(tmp_path))
    sampling = Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=11)
    tokens = [1, 2]
    for step, token in enumerate(generate(model, tokens, 12, sampling)):
        weights = weights_reference(model.logits.copy_to_host(), 1.3, 50, 0.9)
        assert token == draw_reference(weights, uniform_reference(11, step))


def test_a_sampler_allocates_once(tmp_path, monkeypatch):
    model = GPT2.from_file(small_model(tmp_path))
    sampler = Sampler(Sampling(seed=5), model.config.vocab_size)
    first = model.forward([1, 2], sampler)
    monkeypatch.setattr(model_module.cuda, "device_array", None)
    sampler.step = 0
    assert model.forward([1, 2], sampler) == first


# --- the end, and requests that are refused --------------------------------------------------------------------------


def test_generation_stops_at_the_stop_token(tmp_path):
    model = GPT2.from_file(small_model(tmp_path))
    made = list(generate(model, [5], 15))
    stop = made[-1]
    assert list(generate(model, [5], 15, stop=stop)) == made[: made.index(stop)]


@pytest.mark.parametrize("sampling", [None, Sampling()], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_are_reported(tmp_path, sampling):
    config, tensors = load_weights(small_model(tmp_path))
    tensors["ln_f.bias"] = np.full(config.d_model, np.nan, np.float32)  # no file holds NaN, but an overflow makes them
    with pytest.raises(WeightsError, match="after 2 tokens all logits are NaN"):
        list(generate(GPT2(config, tensors), [1, 2], 3, sampling))


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "no tokens"),
        ([1, 257], r"token id 257 \(position 1\) .* ids from 0 to 256"),
        ([-1], "token id -1"),
        ([1.5], "token 0 is 1.5"),
        ([True], "token 0 is True"),
        (list(range(41)), "41 tokens"),
    ],
)
def test_bad_tokens_are_refused_before_any_launch(tmp_path, tokens, message):
    model = GPT2.from_file(small_model(tmp_path))
    with trace() as launches, pytest.raises(RequestError, match=message):
        model.forward(tokens)
    assert not launches


@pytest.mark.parametrize(
    "tokens, max_new, message",
    [
        ([1], 0, "max_new is 0"),
        ([1] * 30, 11, r"make 41, .* \(n_ctx\) is 40: use max_new up to 10"),
        ([1] * 40, 1, "at most 39"),
    ],
)
def test_bad_requests_are_refused_at_once(tmp_path, tokens, max_new, message):
    model = GPT2.from_file(small_model(tmp_path))
    with pytest.raises(RequestError, match=message):
        generate(model, tokens, max_new)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-1), "temperature is -1"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_k=-2), "top_k is -2"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_p=1.01), "top_p is 1.01"),
        (dict(top_p=float("nan")), "top_p is nan"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**64), "seed is 18446744073709551616"),
    ],
)
def test_bad_sampling_settings_are_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        Sampling(**settings)


def test_top_k_beyond_the_vocabulary_is_refused(tmp_path):
    model = GPT2.from_file(small_model(tmp_path))
    with pytest.raises(RequestError, match="top_k is 258; .* 257 tokens"):
        generate(model, [1], 1, Sampling(top_k=258))
    assert len(list(generate(model, [1], 1, Sampling(top_k=257)))) == 1
