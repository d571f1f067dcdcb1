"""Chapter 12: every version of FlashAttention against NumPy, PyTorch and chapter 11, on sizes that fit no tile."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch11_attention import kernels as ch11
from chapters.ch12_flash import kernels as ch12

VERSIONS = {
    ch12.flash_v1_warp_per_query: ch12.flash_v1_launch,
    ch12.flash_v2_shared_tiles: ch12.flash_v2_launch,
    ch12.flash_v3_register_tiles: ch12.flash_v3_launch,
}
assert ch12.flash_attention in VERSIONS and ch12.flash_launch is VERSIONS[ch12.flash_attention]
SHAPES = [  # n_head, n_tokens, head_dim
    (1, 1, 32), (2, 2, 64), (3, 31, 32), (1, 33, 128), (3, 65, 36), (2, 127, 64), (1, 200, 128), (2, 200, 32),
]  # fmt: skip
TAIL = 300  # elements behind each array: more than two rows, so that a row too many is seen

each_version = pytest.mark.parametrize("kernel", VERSIONS, ids=lambda k: k.__name__)
either = pytest.mark.parametrize("causal", [1, 0], ids=["causal", "all"])


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, np.float32)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def flash(kernel, q, k, v, causal, scale=None):
    """Attention on the device: ``(out, lse)``. NaN lies behind the inputs and 7 behind the results."""
    n_head, n_tokens, head_dim = q.shape
    inputs = [with_tail(a, np.nan)[1] for a in (q, k, v)]
    behind_out, out = with_tail(np.full((n_tokens, n_head * head_dim), np.nan, np.float32), 7)
    behind_lse, lse = with_tail(np.full((n_head, n_tokens), np.nan, np.float32), 7)
    kernel[VERSIONS[kernel](n_tokens, n_head, head_dim)](
        *inputs, out, lse, n_tokens, head_dim, scale_of(q) if scale is None else scale, causal
    )
    for buffer, view in ((behind_out, out), (behind_lse, lse)):
        np.testing.assert_array_equal(buffer.copy_to_host()[view.size :], 7)
    return out.copy_to_host(), lse.copy_to_host()


def scale_of(q):
    return np.float32(1 / np.sqrt(q.shape[2]))


def bounds(q, k, v):
    """First-order bounds of the errors of ``out`` and ``lse`` in float32, whatever the order of the sums.

    A score is a sum of head_dim products, scaled and shifted: its error is below (head_dim + 8) u |q| · |k| * scale. A
    weight's relative error is twice that and some u for exp; a weighted mean of v adds n_tokens + 8 roundings.
    """
    u, (_, n_tokens, head_dim) = 2.0**-24, q.shape
    score = (head_dim + 8) * u * scale_of(q) * (np.abs(q).astype(np.float64) @ np.abs(k).swapaxes(1, 2)).max()
    return (2 * score + (n_tokens + 16) * u) * np.abs(v).max(), 2 * score + (n_tokens + 16) * u


def randoms(rng, n_head, n_tokens, head_dim):
    return rng.standard_normal((3, n_head, n_tokens, head_dim), dtype=np.float32)


@each_version
@either
@pytest.mark.parametrize("shape", SHAPES)
def test_flash(rng, kernel, causal, shape):
    q, k, v = randoms(rng, *shape)
    out, lse = flash(kernel, q, k, v, causal)
    expected_out, expected_lse = ch12.flash_reference(q, k, v, scale_of(q), causal)
    out_bound, lse_bound = bounds(q, k, v)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=out_bound)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=lse_bound)


@each_version
def test_equals_mha_naive(rng, kernel):
    """Both are within the bound of the exact result, so within twice the bound of each other."""
    q, k, v = randoms(rng, 3, 127, 64)
    out, scores = cuda.device_array((127, 192), np.float32), cuda.device_array((3, 127, 127), np.float32)
    ch11.mha_naive(*map(cuda.to_device, (q, k, v)), scores, out, 127, 3, 64)
    bound, _ = bounds(q, k, v)
    np.testing.assert_allclose(flash(kernel, q, k, v, 1)[0], out.copy_to_host(), rtol=0, atol=2 * bound)


@each_version
@either
def test_against_torch(torch, rng, kernel, causal):
    q, k, v = randoms(rng, 2, 100, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(a).double()[None] for a in (q, k, v)), is_causal=bool(causal)
    )
    expected = expected[0].transpose(0, 1).reshape(100, 128).numpy()
    np.testing.assert_allclose(flash(kernel, q, k, v, causal)[0], expected, rtol=0, atol=bounds(q, k, v)[0])


@each_version
@either
def test_large_scores_do_not_overflow(rng, kernel, causal):
    q, k, v = randoms(rng, 2, 70, 32)
    q, k = 20 * q, 20 * k  # scores of more than a thousand, of either sign
    assert (q @ k.swapaxes(1, 2) * scale_of(q)).max() > 1000
    out, lse = flash(kernel, q, k, v, causal)
    expected_out, expected_lse = ch12.flash_reference(q, k, v, scale_of(q), causal)
    out_bound, lse_bound = bounds(q, k, v)
    assert out_bound < 0.1
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=out_bound)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=lse_bound)


@each_version
def test_equal_scores_give_the_mean(rng, kernel):
    """Weights of exactly 1 and values of whole numbers: only the division rounds (and once more in v3, for 1 / n)."""
    q = k = np.full((1, 70, 32), 3, np.float32)
    v = rng.integers(-8, 9, (1, 70, 32)).astype(np.float32)
    counts = np.arange(1, 71)
    out, lse = flash(kernel, q, k, v, 1, np.float32(0.25))
    np.testing.assert_allclose(out, v[0].cumsum(axis=0, dtype=np.float64) / counts[:, None], rtol=2.0**-22, atol=0)
    np.testing.assert_allclose(lse[0], 72 + np.log(counts), rtol=2e-7)


@each_version
def test_the_largest_score_may_come_last(kernel):
    """Scores that rise by 50 from key to key: all that was added up before must shrink to nothing, again and again."""
    n = 70
    k = np.zeros((1, n, 32), np.float32)
    k[0, :, 0] = 50 * np.arange(n)
    q, v = np.ones((1, n, 32), np.float32), np.arange(n * 32, dtype=np.float32).reshape(1, n, 32)
    out, lse = flash(kernel, q, k, v, 1, np.float32(1))
    np.testing.assert_allclose(out, v[0], rtol=1e-6)
    np.testing.assert_array_equal(lse[0], k[0, :, 0])


@each_version
@pytest.mark.parametrize("first", [1, 16, 63, 64, 69])
def test_a_later_token_changes_no_bit_of_earlier_outputs(rng, kernel, first):
    q, k, v = randoms(rng, 2, 70, 32)
    before, _ = flash(kernel, q, k, v, 1)
    for a in (q, k, v):
        a[:, first:] = 100 * rng.standard_normal(a[:, first:].shape, dtype=np.float32)
    after, _ = flash(kernel, q, k, v, 1)
    np.testing.assert_array_equal(after[:first], before[:first])
    assert (after[first:] != before[first:]).any(axis=1).all()


@each_version
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    q, k, v = randoms(rng, 2, 33, 36)
    expected, _ = ch12.flash_reference(q, k, v, scale_of(q), 1)
    np.testing.assert_allclose(flash(kernel, q, k, v, 1)[0], expected, rtol=0, atol=bounds(q, k, v)[0])


def test_memory_grows_with_the_tokens_not_with_their_square():
    assert ch11.attention_scores_bytes(12, 1024) == 48 << 20
    assert ch11.attention_scores_bytes(12, 1024, np.float16) == 24 << 20
    assert ch12.flash_extra_bytes(12, 1024) == np.zeros((12, 1024), np.float32).nbytes
    assert ch12.flash_extra_bytes(12, 2048) == 2 * ch12.flash_extra_bytes(12, 1024)
    assert ch11.attention_scores_bytes(12, 2048) == 4 * ch11.attention_scores_bytes(12, 1024)


@pytest.mark.parametrize("launch", VERSIONS.values(), ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "sizes, named",
    [((0, 1, 64), "at least 1"), ((1, 0, 64), "at least 1"), ((1, 1, 0), "at least 1"), ((1, 1, 132), "head_dim = 132"),
     ((1, 65536, 64), "n_head = 65536")],
)  # fmt: skip
def test_launch_refuses(launch, sizes, named):
    with pytest.raises(ValueError, match=named):
        launch(*sizes)


def test_launch_of_v3_refuses_rows_that_are_not_16_bytes_long():
    assert ch12.flash_v2_launch(70, 3, 5) == ((9, 3), 256)
    assert ch12.flash_launch(70, 3, 36) == ((2, 3), 256)
    with pytest.raises(ValueError, match="head_dim = 34: .*flash_v2_shared_tiles"):
        ch12.flash_launch(70, 3, 34)
