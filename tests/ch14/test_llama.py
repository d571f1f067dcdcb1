"""Chapter 14: a Llama as a listing and on the engine, against transformers."""

import numpy as np
import pytest

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, RequestError, Sampling
from ch14_mini_llm.levels import make_engine
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.llama import llama_tensors
from ch14_mini_llm.model.llama_file import TOKENIZER, save_llama
from ch14_mini_llm.model.quantize import Blocks, unpacked
from ch14_mini_llm.model.weights import load_weights

# grouped heads; one key head, untied, odd d_ff and d_model; as many key heads, wider than their share of d_model
CONFIGS = [
    LlamaConfig(2, 4, 2, 16, 48, 100, 128, 101, 1e-5, 10000.0, True),
    LlamaConfig(1, 3, 1, 8, 33, 71, 128, 101, 1e-6, 1e5, False),
    LlamaConfig(2, 2, 2, 32, 40, 129, 128, 101, 1e-5, 5e5, True),
]
LENGTHS = 1, 5, 17, 40


def random_llama(config, seed=0):
    """{name: float16 array}, and vectors in float32."""
    rng = np.random.default_rng(seed)
    number = lambda shape: 0.2 * rng.standard_normal(shape, dtype=np.float32) + (len(shape) == 1)
    return {name: number(shape).astype(np.float16 if len(shape) == 2 else np.float32)
            for name, shape in llama_tensors(config)}  # fmt: skip


def prompts(config):
    return [np.random.default_rng(n).integers(0, config.vocab_size, n).tolist() for n in LENGTHS]


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.n_head}-{config.n_kv_head}", scope="module")
def config(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(config):
    return random_llama(config)


def test_the_listing_is_transformers(torch, transformers, config, tensors):
    from benchmarks.peers import TransformersLlama

    logits = TransformersLlama(config, tensors, device="cpu", dtype=torch.float32).logits
    listing = make_engine("naive", config, tensors, 48)
    for prompt in prompts(config):
        made = list(generate(listing, prompt, 4))
        wanted = logits([*prompt, *made])[len(prompt) - 1 : -1]
        assert made == wanted.argmax(1).tolist()
        np.testing.assert_allclose(listing.logits.copy_to_host(), wanted[-1], atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_engine_is_the_listing(config, tensors, dtype):
    """Alone and together, prompts cut into pieces: the same tokens, and bit by bit the same logits."""
    listing = make_engine("naive", config, tensors, 64)
    requests = [Request(prompt, 12) for prompt in prompts(config)]
    engine = Engine.of(config, tensors, "kv", dtype=dtype, num_blocks=40, max_rows=33)
    for request, result in zip(requests, engine.run(requests)):
        assert result.tokens == list(generate(listing, request.tokens, 12)) and result.error is None
    single = make_engine("kv", config, tensors, 64, dtype=dtype)
    for prompt in prompts(config):
        assert single.prefill(prompt) == listing.prefill(prompt)
        expected = listing.logits.copy_to_host()
        np.testing.assert_allclose(single.logits.copy_to_host(), expected, atol=2e-5 * np.abs(expected).max())
    engine.check()


# grouped heads; wide enough that no kernel holds a row's weights in registers, and wide heads; one key head, untied
FAST_CONFIGS = [
    LlamaConfig(2, 4, 2, 16, 48, 104, 128, 101, 1e-5, 10000.0, True),
    LlamaConfig(1, 9, 3, 128, 1032, 3112, 128, 101, 1e-5, 5e5, True),
    LlamaConfig(1, 4, 4, 32, 1544, 1552, 128, 101, 1e-5, 5e5, False),
    LlamaConfig(2, 3, 1, 8, 40, 72, 128, 101, 1e-6, 1e5, False),
]


@pytest.mark.parametrize("config", FAST_CONFIGS, ids=lambda config: f"{config.n_head}-{config.n_kv_head}")
def test_fast_is_the_engine_in_float16(config):
    """Few rows and many, prompts in pieces, steps and prompts in one; pools of NaN."""
    tensors = random_llama(config)
    if config.d_model > 1000:
        tensors = {name: tensor / np.float16(5) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    plain, fast = (make_engine(level, config, tensors, 64) for level in ("kv", "fast"))
    for prompt in prompts(config):
        plain.prefill(prompt)
        fast.prefill(prompt)
        expected = plain.logits.copy_to_host()
        np.testing.assert_allclose(fast.logits.copy_to_host(), expected, atol=2e-2 * np.abs(expected).max())
    engine = Engine.of(config, tensors, "fast", num_blocks=60, max_rows=48)
    for cache in engine.runner.cache.flat:
        for array in cache:
            array.copy_to_device(np.full(array.shape, np.nan, array.dtype))
    requests = [Request(prompt, 12) for prompt in prompts(config)]
    for request, result in zip(requests, engine.run(requests)):
        assert result.error is None and len(result.tokens) == 12
        text = [*request.tokens, *result.tokens]
        for n in range(len(request.tokens), len(text)):
            plain.prefill(text[:n])
            logits = plain.logits.copy_to_host()
            assert logits.max() - logits[text[n]] <= 2e-2 * np.abs(logits).max()
    engine.check()


def test_deterministic_rows_do_not_depend_on_company():
    config = FAST_CONFIGS[0]
    tensors = random_llama(config)
    requests = [Request(prompt, 9, logprobs=0) for prompt in prompts(config)]
    engine = Engine.of(config, tensors, "fast", num_blocks=60, deterministic=True)
    together = engine.run(requests)
    for request, result in zip(requests, together):
        (alone,) = Engine.of(config, tensors, "fast", num_blocks=60, deterministic=True, max_rows=40).run([request])
        assert alone.tokens == result.tokens and alone.logprobs == result.logprobs


def test_fast_refuses_sizes_that_it_has_no_kernels_for():
    config = LlamaConfig(1, 3, 1, 8, 33, 71, 128, 101, 1e-6, 1e5, False)
    with pytest.raises(RequestError, match="d_model is 33; engine fast needs a multiple of 8"):
        make_engine("fast", config, random_llama(config))


def packed(rng, kind, shape):
    """Random blocks of a type, with scales that are numbers."""
    n_bytes = {"q8_0": 34, "q4_1": 20}[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 32, n_bytes)).astype(np.uint8)
    for at in range(0, 4 if kind == "q4_1" else 2, 2):
        scales = (0.01 * rng.standard_normal(blocks.shape[:2])).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return Blocks(blocks.reshape(shape[0], -1), kind, shape)


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_blocks_are_ggmls(rng, kind):
    gguf = pytest.importorskip("gguf")
    blocks = packed(rng, kind, (7, 96))
    expected = gguf.quants.dequantize(blocks.data, gguf.GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(blocks.unpack(), expected)
    np.testing.assert_array_equal(blocks.unpack(np.float16), expected.astype(np.float16))


def test_a_file_keeps_types_and_numbers(rng, tmp_path):
    config = LlamaConfig(1, 2, 1, 16, 32, 64, 64, 61, 1e-5, 1e4, False)
    kinds = {"self_attn.q_proj": "q4_1", "mlp.down_proj": "q8_0", "embed_tokens": "q8_0"}
    tensors = random_llama(config)
    for name, tensor in tensors.items():
        for part, kind in kinds.items():
            if part in name:
                tensors[name] = packed(rng, kind, tensor.shape)
    save_llama(tmp_path / "llama.bin", config, tensors, b"{}")
    found_config, found = load_weights(tmp_path / "llama.bin")
    assert found_config == config and bytes(found.pop(TOKENIZER)) == b"{}" and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert type(found[name]) is Blocks or found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(unpacked(found[name]), unpacked(tensor))
    result = list(generate(make_engine("kv", found_config, found, 40), [1, 2, 3], 5))
    assert result == list(generate(make_engine("naive", config, tensors, 40), [1, 2, 3], 5))


def test_files_that_cannot_be(rng, tmp_path):
    config = LlamaConfig(1, 2, 1, 16, 32, 64, 64, 61, 1e-5, 1e4, True)
    tensors = random_llama(config)
    for change, named in (
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"norm.weight": np.ones(31, np.float32)}, "norm.weight has shape"),
        ({"norm.weight": np.ones(32)}, "norm.weight has dtype float64"),
        ({"norm.weight": np.full(32, np.inf, np.float32)}, "a value of tensor norm.weight"),
        ({"layers.0.mlp.up_proj.weight": Blocks(np.full((64, 34), 255, np.uint8), "q8_0", (64, 32))}, "a scale of"),
    ):
        given = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        with pytest.raises(WeightsError, match=named):
            save_llama(tmp_path / "no.bin", config, given, b"{}")
    for field, value, named in (
        ("n_kv_head", 3, "n_head must be a multiple"), ("head_dim", 15, "must be even"), ("n_layer", 0, "n_layer is 0"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=named):
            LlamaConfig(**{**vars(config), field: value})


def test_a_long_text_streamed_and_cancelled(torch, transformers):
    """1500 tokens, one a step, in a pool that has just room for them; wherever it is cancelled, blocks come back."""
    from benchmarks.peers import TransformersLlama

    config, n = LlamaConfig(1, 2, 1, 16, 32, 64, 8192, 101, 1e-5, 1e5, True), 1500
    tensors, prompt = random_llama(config, seed=1), prompts(config)[-1]
    engine = Engine.of(config, tensors, "kv", num_blocks=-(-(len(prompt) + n) // 16) + 1, prefix_cache=False)
    with pytest.raises(RequestError, match="9000"):
        engine.submit(Request(prompt, 9000))
    for stop_after in (1, 17, 200, n):
        request, made, scores = engine.submit(Request(prompt, n, Sampling(2.0, seed=3), logprobs=0)), [], []
        while len(made) < stop_after:
            for output in engine.step():
                assert len(output.tokens) <= 1 and output.error is None
                made += output.tokens
                scores += [score.logprob for score in output.logprobs]
        if stop_after < n:
            engine.abort(request)
            while not engine.idle:
                engine.step()
        assert engine.idle and engine.pool.free == engine.pool.n_blocks
        engine.check()
    logits = TransformersLlama(config, tensors, device="cpu", dtype=torch.float32).logits([*prompt, *made])
    expected = torch.log_softmax(torch.from_numpy(logits[len(prompt) - 1 : -1]), 1)[np.arange(n), made]
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    assert len(set(made)) > 50
