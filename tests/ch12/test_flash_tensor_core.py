"""Chapter 12: FlashAttention on tensor cores against NumPy and PyTorch, for caches, parts of prompts and odd sizes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

from chapters.ch12_flash.tensor_core import (
    flash_half,
    flash_half_reference,
    flash_v4,
    flash_v4_64,
    flash_v4_128,
    flash_v4_launch,
)
from common import BACKEND
from common.backend import package_problem

ROOT = Path(__file__).resolve().parents[2]
HEAD_DIM = {flash_v4_64: 64, flash_v4_128: 128}
TOKENS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200]
TAIL = 300  # elements behind each array: more than two rows, so that a row too many is seen

each_kernel = pytest.mark.parametrize("kernel", HEAD_DIM, ids=lambda k: k.__name__)
either = pytest.mark.parametrize("causal", [1, 0], ids=["causal", "all"])


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, array.dtype)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def scale_of(q):
    return np.float32(1 / np.sqrt(q.shape[2]))


def flash(q, k, v, causal, start=0, scale=None):
    """Attention on the device: ``(out, lse)``. NaN lies behind the inputs and 7 behind the results."""
    n_head, n_tokens, head_dim = q.shape
    inputs = [with_tail(a, np.nan)[1] for a in (q, k, v)]
    behind_out, out = with_tail(np.full((n_tokens, n_head * head_dim), np.nan, np.float16), 7)
    behind_lse, lse = with_tail(np.full((n_head, n_tokens), np.nan, np.float32), 7)
    flash_half(*inputs, out, lse, n_tokens, scale_of(q) if scale is None else scale, causal, start)
    for buffer, view in ((behind_out, out), (behind_lse, lse)):
        np.testing.assert_array_equal(buffer.copy_to_host()[view.size :], 7)
    return out.copy_to_host(), lse.copy_to_host()


def randoms(rng, n_head, n_tokens, head_dim, n_keys=None, spare=0):
    """q with n_tokens tokens, k and v with n_keys (the same by default) and NaN for ``spare`` more, as in a cache."""
    n_keys = n_tokens if n_keys is None else n_keys
    q = rng.standard_normal((n_head, n_tokens, head_dim)).astype(np.float16)
    k, v = rng.standard_normal((2, n_head, n_keys + spare, head_dim)).astype(np.float16)
    k[:, n_keys:] = v[:, n_keys:] = np.nan
    return q, k, v


def assert_close(out, lse, q, k, v, causal, start=0):
    """Within a first-order bound of the errors; only the first start + n_tokens of k and v count.

    Each weight p is rounded to float16: by 2^-11 of itself, or, below 2^-14, by 2^-25, where the largest is 1 and so
    their sum at least 1. out is rounded in the same way. All else is float32: a score is a sum of head_dim products,
    scaled and shifted, of which a tensor core may lose 2^-22 of |q| · |k| * scale at each step (it need not round to
    nearest); a weight's relative error is twice that, and some more for the power; sums over the keys add n steps.
    """
    n_keys, head_dim = start + q.shape[1], q.shape[2]
    k, v = k[:, :n_keys], v[:, :n_keys]
    scale, u = scale_of(q), 2.0**-22
    expected_out, expected_lse = flash_half_reference(q, k, v, scale, causal, start)
    size = np.abs(v.astype(np.float64))
    mean_size, _ = flash_half_reference(q, k, size, scale, causal, start)  # of |v|, with the same weights
    score = (head_dim + 8) * u * scale * (np.abs(q).astype(np.float64) @ np.abs(k).swapaxes(1, 2)).max()
    single = 2 * score + (n_keys + 16) * u
    bound = 2.0**-11 * (mean_size + np.abs(expected_out)) + ((n_keys + 1) * 2.0**-25 + single) * size.max()
    assert (np.abs(out - expected_out) <= bound).all()
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=single)


@each_kernel
@either
@pytest.mark.parametrize("n_tokens", TOKENS)
def test_flash(rng, kernel, causal, n_tokens):
    q, k, v = randoms(rng, 2, n_tokens, HEAD_DIM[kernel])
    assert_close(*flash(q, k, v, causal), q, k, v, causal)


@each_kernel
@either
@pytest.mark.parametrize("n_tokens, start, spare", [(70, 0, 5), (1, 1, 0), (65, 63, 1), (64, 64, 64), (33, 130, 200),
                                                    (1, 200, 7)])  # fmt: skip
def test_a_cache_that_is_longer_than_its_text(rng, kernel, causal, n_tokens, start, spare):
    """NaN lies in the cache behind the text: a key or value that does not count must not be multiplied, even by 0."""
    q, k, v = randoms(rng, 2, n_tokens, HEAD_DIM[kernel], start + n_tokens, spare)
    assert_close(*flash(q, k, v, causal, start), q, k, v, causal, start)


@each_kernel
def test_a_prompt_in_parts_is_the_whole_prompt_bit_for_bit(rng, kernel):
    q, k, v = randoms(rng, 2, 150, HEAD_DIM[kernel], spare=10)
    out, lse = flash(q, k, v, 1)
    for first, last in ((0, 40), (40, 41), (41, 150)):
        part_out, part_lse = flash(np.ascontiguousarray(q[:, first:last]), k, v, 1, first)
        np.testing.assert_array_equal(part_out, out[first:last])
        # a GPU's compiler may fuse the last addition in one place and not in another
        np.testing.assert_array_max_ulp(part_lse, lse[:, first:last], 0 if BACKEND == "cpu" else 1)


@pytest.mark.parametrize("head_dim", [8, 32, 40, 80, 96, 120])
def test_heads_of_other_sizes(rng, head_dim):
    assert flash_v4(head_dim) is (flash_v4_64 if head_dim < 64 else flash_v4_128)
    q, k, v = randoms(rng, 3, 70, head_dim, 75, 3)
    assert_close(*flash(q, k, v, 1, 5), q, k, v, 1, 5)


@each_kernel
@either
def test_against_torch(torch, rng, kernel, causal):
    head_dim = HEAD_DIM[kernel]
    q, k, v = randoms(rng, 2, 100, head_dim)
    doubles = (torch.from_numpy(a).double()[None] for a in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*doubles, is_causal=bool(causal))
    expected = expected[0].transpose(0, 1).reshape(100, 2 * head_dim).numpy()
    np.testing.assert_allclose(flash_half_reference(q, k, v, scale_of(q), causal)[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(flash(q, k, v, causal)[0], expected, rtol=0, atol=2.0**-10 * np.abs(v).max())


@each_kernel
@either
def test_large_scores_do_not_overflow(rng, kernel, causal):
    q, k, v = randoms(rng, 2, 130, HEAD_DIM[kernel])
    q, k = 20 * q, 20 * k  # scores of more than a thousand, of either sign
    assert (q.astype(np.float32) @ k.astype(np.float32).swapaxes(1, 2) * scale_of(q)).max() > 1000
    out, lse = flash(q, k, v, causal)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    expected_out, expected_lse = flash_half_reference(q, k, v, scale_of(q), causal)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=0.02)  # a score's rounding, 2^-24 of 1000s, in e^score
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


@each_kernel
def test_equal_scores_give_the_mean(rng, kernel):
    """Equal weights and values of whole numbers: out is rounded, and before it a power whose exponent is almost 0."""
    head_dim = HEAD_DIM[kernel]
    q = k = np.full((1, 70, head_dim), 3, np.float16)
    v = rng.integers(-8, 9, (1, 70, head_dim)).astype(np.float16)
    counts = np.arange(1, 71)
    out, lse = flash(q, k, v, 1, scale=0.25)
    mean = v[0].cumsum(axis=0, dtype=np.float64) / counts[:, None]
    np.testing.assert_allclose(out, mean, rtol=2.0**-11 + 2.0**-16, atol=0)
    np.testing.assert_allclose(lse[0], 9 * head_dim * 0.25 + np.log(counts), rtol=1e-6)


@each_kernel
def test_the_largest_score_may_come_last(rng, kernel):
    """Scores that rise by 50 from key to key: all that was added up before must shrink to nothing, again and again."""
    n, head_dim = 140, HEAD_DIM[kernel]
    k = np.zeros((1, n, head_dim), np.float16)
    k[0, :, 0] = 50
    k[0, :, 1] = np.arange(n)  # float16 holds both, not always their product
    q = np.zeros((1, n, head_dim), np.float16)
    q[0, :, 1] = 50
    v = rng.standard_normal((1, n, head_dim)).astype(np.float16)
    out, lse = flash(q, k, v, 1, scale=1)
    np.testing.assert_allclose(out, v[0], rtol=2.0**-10)  # scores of thousands: the largest weight is 1 to 11 bits only
    np.testing.assert_allclose(lse[0], 50 * np.arange(n), rtol=1e-6)


@each_kernel
@pytest.mark.parametrize("first", [1, 16, 63, 64, 128, 149])
def test_a_later_token_changes_no_bit_of_earlier_outputs(rng, kernel, first):
    q, k, v = randoms(rng, 2, 150, HEAD_DIM[kernel])
    before, before_lse = flash(q, k, v, 1)
    for a in (q, k, v):
        a[:, first:] = 100 * rng.standard_normal(a[:, first:].shape)
    after, after_lse = flash(q, k, v, 1)
    np.testing.assert_array_equal(after[:first], before[:first])
    np.testing.assert_array_equal(after_lse[:, :first], before_lse[:, :first])
    assert (after[first:] != before[first:]).any(axis=1).all()


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    q, k, v = randoms(rng, 1, 70, 64, 75, 3)
    assert_close(*flash(q, k, v, 1, 5), q, k, v, 1, 5)


def test_launch_has_heads_along_x_and_queries_along_y():
    assert flash_v4_launch(1, 12, 64) == ((12, 1), 128)
    assert flash_v4_launch(129, 12, 64) == ((12, 2), 128)
    assert flash_v4_launch(129, 100_000, 128) == ((100_000, 3), 128)


@pytest.mark.parametrize(
    "sizes, named",
    [((0, 1, 64), "0 tokens.*at least 1"), ((1, 0, 64), "0 heads.*at least 1"),
     ((1, 1, 20), "head_dim = 20: .*multiples of 8 up to 128"), ((1, 1, 136), "head_dim = 136: .*pad with zeros"),
     ((128 * 65535 + 1, 1, 64), "n_tokens = 8388481: .*at most 8388480"),
     ((64 * 65535 + 1, 1, 128), "n_tokens = 4194241: .*start")],
)  # fmt: skip
def test_launch_refuses(sizes, named):
    with pytest.raises(ValueError, match=named):
        flash_v4_launch(*sizes)


@pytest.mark.parametrize("start, tokens", [(-1, 4), (5, 4), (0, 9)])
def test_flash_half_refuses_more_tokens_than_the_cache_holds(start, tokens):
    q, k = np.zeros((1, 9, 64), np.float16), np.zeros((1, 8, 64), np.float16)
    with pytest.raises(ValueError, match=f"start = {start}, {tokens} tokens: k and v hold 8"):
        flash_half(q, k, k, None, None, tokens, 1, 1, start)


COMPILE = """
import sys
import common.ptx_check as check
from numba import cuda, types
from chapters.ch12_flash.tensor_core import flash_v4
cc = tuple(map(int, sys.argv[1:]))
check._stand_in_device(cc)
three, two, i = types.float16[:, :, ::1], types.float16[:, ::1], types.int64
signature = (three, three, three, two, types.float32[:, ::1], i, i, types.float32, i)
for head_dim, kernel in ((64, flash_v4(64)), (128, flash_v4(128))):
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=cc, launch_bounds=kernel.targetoptions["launch_bounds"])
    found = check.assemble(ptx, cc)
    counts = [ptx.count(word) for word in ("mma.sync", "ldmatrix.sync", "cp.async.cg", ".local")]
    print(head_dim, *counts, found["spilled"], found["shared"])
"""


@pytest.mark.skipif(bool(package_problem()), reason="numba-cuda is not installed")
@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (9, 0)], ids=lambda cc: "sm_{}{}".format(*cc))
def test_loops_are_unrolled_and_registers_hold_what_they_work_on(cc):
    command = [sys.executable, "-c", COMPILE, *map(str, cc)]
    environ = os.environ | {"MINI_BACKEND": "ptx"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {int(head_dim): row for head_dim, *row in map(str.split, done.stdout.splitlines())}
    # products: 2 x 8 x 4 for the scores and as many for the output; 1 x 6 x 8 and 1 x 16 x 3
    # ldmatrix: of q, k and v; copies: of q, of the first tiles of k and v, and of two more in the loop
    expected = {64: [128, 8 + 16 + 16, 8 + 4 * 4, 0], 128: [96, 8 + 24 + 24, 8 + 4 * 6, 0]}
    for head_dim, (mma, ldmatrix, copies, local) in expected.items():
        *counts, spilled, shared = found[head_dim]
        if cc < (8, 0):  # there a product is two, and a copy a load and a store
            mma, copies = 2 * mma, 0
        assert list(map(int, counts)) == [mma, ldmatrix, copies, local]
        if cc >= (8, 0):
            assert spilled in ("0", "None"), f"head_dim {head_dim}: {spilled} bytes are spilled"
            assert shared == "None" or int(shared) <= 49 << 10  # of which sm_90 keeps 1 KiB for itself
