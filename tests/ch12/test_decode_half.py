"""Chapter 12: decoding in float16, by chunks that the last block combines, against NumPy in float64."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch12_flash import decode_half as decoding
from common.ptx import store_half8

LENGTHS = [1, 2, 31, 33, 127, 128, 129, 257, 300]
SIZES = [(head_dim, length) for head_dim in (8, 32, 64, 128, 256) for length in LENGTHS]
SIZES += [(8, 1024), (8, 1025), (16, 513)]  # a whole chunk of short heads, and one token more
TAIL = 40  # elements behind q, out and each cache


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, array.dtype)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def scale_of(q):
    return np.float32(1 / np.sqrt(q.shape[-1]))


class Step:
    """What a launch needs, on the device: caches with room for max_tokens, NaN but for the tokens of ``set``."""

    def __init__(self, q, max_tokens):
        self.shape = n_head, self.head_dim = q.shape
        _, self.q = with_tail(q.ravel(), np.nan)
        self.scale = scale_of(q)
        empty = np.full((n_head, max_tokens, self.head_dim), np.nan, np.float16)
        self.k, self.v = (with_tail(empty, np.nan)[1] for _ in range(2))
        self.launch = decoding.chunks_launch(max_tokens, n_head, self.head_dim)
        pairs, sums, arrived = decoding.chunks_workspace(max_tokens, n_head, self.head_dim)
        self.pairs, self.sums = (cuda.to_device(np.full(shape, np.nan, np.float32)) for shape in (pairs, sums))
        self.arrived = cuda.to_device(np.zeros(arrived, np.int32))
        self.pos = cuda.to_device(np.zeros(1, np.int32))

    def set(self, k, v):
        """The tokens that the cache holds; the last one is this step's."""
        for cache, tokens in ((self.k, k), (self.v, v)):
            held = np.full(cache.shape, np.nan, np.float16)
            held[:, : tokens.shape[1]] = tokens
            cache.copy_to_device(held)
        self.pos.copy_to_device(np.int32([k.shape[1] - 1]))

    def run(self):
        """One launch's out; 7 lies behind it, and counters and position are as before."""
        pos = self.pos.copy_to_host()
        buffer, out = with_tail(np.full(np.prod(self.shape), np.nan, np.float16), 7)
        decoding.decode_v3_chunks[self.launch](
            self.q, self.k, self.v, out, self.pairs, self.sums, self.arrived, self.pos, self.head_dim, self.scale
        )
        np.testing.assert_array_equal(buffer.copy_to_host()[-TAIL:], 7)
        np.testing.assert_array_equal(self.arrived.copy_to_host(), 0)
        np.testing.assert_array_equal(self.pos.copy_to_host(), pos)
        return out.copy_to_host().reshape(self.shape)


@cuda.jit
def combine(parts, lse, n_active, out, head_dim, lse_stride, width):
    """What a kernel does with load_combined: 8 elements a thread."""
    col = cuda.grid(1) * 8
    if col < width:
        p0, p1, p2, p3 = decoding.load_combined(parts, lse, n_active, 0, col, col // head_dim, lse_stride, width)
        store_half8(out, col, p0, p1, p2, p3)


class PartsStep(Step):
    """The same for decode_v4_parts, whose parts are combined by a kernel of this file."""

    def __init__(self, q, max_tokens):
        super().__init__(q, max_tokens)
        work = decoding.parts_workspace(max_tokens, *self.shape)
        self.parts, self.lse = (cuda.to_device(np.full(n, np.nan, t)) for n, t in zip(work, (np.float16, np.float32)))

    def run(self):
        pos, width = self.pos.copy_to_host(), int(np.prod(self.shape))
        buffer, out = with_tail(np.full(width, np.nan, np.float16), 7)
        decoding.decode_v4_parts[self.launch](
            self.q, self.k, self.v, self.parts, self.lse, self.pos, self.head_dim, self.scale
        )
        n_active, stride = int(pos[0]) * self.head_dim // 8192 + 1, decoding.lse_stride_of(self.launch[0][0])
        combine[(width // 8 + 63) // 64, 64](self.parts, self.lse, n_active, out, self.head_dim, stride, width)
        np.testing.assert_array_equal(buffer.copy_to_host()[-TAIL:], 7)
        np.testing.assert_array_equal(self.pos.copy_to_host(), pos)
        return out.copy_to_host().reshape(self.shape)


def decode(q, k, v, spare=5, step=Step):
    step = step(q, k.shape[1] + spare)
    step.set(k, v)
    return step.run()


def randoms(rng, n_head, n_tokens, head_dim):
    k, v = rng.standard_normal((2, n_head, n_tokens, head_dim)).astype(np.float16)
    return rng.standard_normal((n_head, head_dim)).astype(np.float16), k, v


def assert_right(out, q, k, v, parts=0):
    """``out`` within what roundings can do, on top of the one to float16.

    A score is a float32 sum of head_dim products, of which each addition may round (Higham 2002, section 3.1); an error
    of d in a score makes its weight wrong by d, relatively. So do exp2_approx (2 ** -22, and as much again where chunks
    are scaled) and the additions of n weights. Wrong are the weights of the sum and those of the division.
    """
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    n_tokens, head_dim = k.shape[1:]
    sizes = np.einsum("hi,hki->hk", np.abs(q), np.abs(k)) / np.sqrt(head_dim)
    scores = np.einsum("hi,hki->hk", q, k) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    wrong = 2 * (head_dim + 4) * 2.0**-24 * sizes.max(axis=1) + 4 * 2.0**-22 + (n_tokens + 8) * 2.0**-24
    wrong += 2.0**-11 * parts  # each part in float16
    expected = np.einsum("hk,hki->hi", weights, v)
    allowed = 2 * wrong[:, None] * np.einsum("hk,hki->hi", weights, np.abs(v))
    assert (np.abs(out - expected) <= 1.01 * (allowed + 2.0**-11 * np.abs(expected) + 2.0**-25)).all()


@pytest.mark.parametrize("head_dim, n_tokens", SIZES)
def test_decode(rng, head_dim, n_tokens):
    q, k, v = randoms(rng, 3, n_tokens, head_dim)
    assert_right(decode(q, k, v), q, k, v)
    assert_right(decoding.decode_half_reference(q, k, v, n_tokens, scale_of(q)), q, k, v)


@pytest.mark.parametrize("head_dim, n_tokens", SIZES)
def test_decode_in_parts(rng, head_dim, n_tokens):
    q, k, v = randoms(rng, 3, n_tokens, head_dim)
    assert_right(decode(q, k, v, step=PartsStep), q, k, v, parts=1)


@pytest.mark.parametrize("kind", [Step, PartsStep])
@pytest.mark.parametrize("head_dim", [8, 64, 256])
def test_one_launch_serves_every_length(rng, head_dim, kind):
    """Arguments and grid stay, only ``pos`` and the cache change; blocks behind the end change no bit."""
    q, k, v = randoms(rng, 2, 300, head_dim)
    step = kind(q, 3 * decoding.chunk_tokens(head_dim) + 300)
    for length in LENGTHS + LENGTHS[::-1]:
        step.set(k[:, :length], v[:, :length])
        alone = decode(q, k[:, :length], v[:, :length], spare=0, step=kind)
        np.testing.assert_array_equal(step.run(), alone)


@pytest.mark.parametrize("n_tokens", [33, 300])
def test_twice_is_bit_equal(rng, n_tokens):
    """Whichever block comes last."""
    q, k, v = randoms(rng, 12, n_tokens, 64)
    step = Step(q, n_tokens)
    step.set(k, v)
    first = step.run()
    for _ in range(3):
        np.testing.assert_array_equal(step.run(), first)


def test_heads_do_not_depend_on_each_other(rng):
    q, k, v = randoms(rng, 5, 150, 64)
    together = decode(q, k, v)
    k[1], v[2], q[4] = np.nan, np.nan, np.nan
    spoilt = decode(q, k, v)
    np.testing.assert_array_equal(spoilt[[0, 3]], together[[0, 3]])
    assert np.isnan(spoilt[[1, 2, 4]]).all()
    np.testing.assert_array_equal(decode(q[3:4], k[3:4], v[3:4])[0], together[3])


@pytest.mark.parametrize("head_dim, n_tokens", [(32, 100), (128, 300)])
def test_large_scores_do_not_overflow(rng, head_dim, n_tokens):
    """All scores are some thousands below zero but one, some thousands above: out is that token's value, exactly."""
    q, k, v = randoms(rng, 2, n_tokens, head_dim)
    q[:] = 30
    for winner in (0, 31, 70, n_tokens - 1):
        k[:] = -40 - rng.random((2, n_tokens, 1))
        k[:, winner] = 50
        np.testing.assert_array_equal(decode(q, k, v), v[:, winner])


@pytest.mark.parametrize("head_dim", [8, 256])
def test_equal_scores_give_the_mean(rng, head_dim):
    q, k, v = randoms(rng, 1, 64, head_dim)
    k[:], v = k[:, :1], rng.integers(-8, 9, v.shape).astype(np.float16)
    np.testing.assert_array_equal(decode(q, k, v), v.mean(axis=1, dtype=np.float64))  # 64 whole numbers: exact


@pytest.mark.parametrize("head_dim, n_tokens", [(8, 33), (256, 33)])
def test_no_index_outside_the_arrays(rng, monkeypatch, head_dim, n_tokens):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    q, k, v = randoms(rng, 2, n_tokens, head_dim)
    assert_right(decode(q, k, v, spare=0), q, k, v)


def test_launch_and_workspace():
    assert [decoding.chunk_tokens(head_dim) for head_dim in (8, 64, 256)] == [1024, 128, 32]
    assert decoding.chunks_launch(1, 12, 64) == ((1, 12), 256)
    assert decoding.chunks_launch(128, 1, 64)[0] == (1, 1) and decoding.chunks_launch(129, 1, 64)[0] == (2, 1)
    assert decoding.chunks_workspace(1024, 12, 64) == ((12, 8, 2), (12, 8, 64), (12,))
    assert decoding.parts_workspace(1024, 12, 64) == (8 * 768, 12 * 8)
    assert decoding.parts_workspace(129, 12, 64) == (2 * 768, 12 * 4)


@pytest.mark.parametrize("launch", [decoding.chunks_launch, decoding.chunks_workspace, decoding.parts_workspace])
@pytest.mark.parametrize(
    "sizes, named",
    [
        ((0, 1, 64), "0 tokens, 1 heads: .*at least 1"),
        ((1, 0, 64), "1 tokens, 0 heads: .*at least 1"),
        ((1, 1, 48), "head_dim = 48: .*8, 16, 32, 64, 128, 256; decode_v2_split_k"),
        ((1, 1, 4), "head_dim = 4: "),
        ((1, 1, 512), "head_dim = 512: "),
    ],
)
def test_launches_refuse(launch, sizes, named):
    with pytest.raises(ValueError, match=named):
        launch(*sizes)
