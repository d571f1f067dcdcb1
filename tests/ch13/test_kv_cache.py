"""Chapter 13: the key-value cache: append at a position on the device, the guard at its end, and reading."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch13_llm_ops import kv_cache as ch13

SHAPES = [(1, 1, 1), (3, 1, 64), (2, 33, 31), (5, 9, 127)]  # n_head, T, head_dim
TAIL = 40  # elements behind each cache


class Cache:
    """Caches for keys and values, empty slots -1 and 7 behind each; and ``pos``."""

    def __init__(self, n_head, T_max, head_dim, pos=0):
        self.shape = n_head, T_max, head_dim
        self.size = n_head * T_max * head_dim
        both = np.full((2, self.size + TAIL), -1, np.float32)
        both[:, self.size :] = 7
        self.buffers = [cuda.to_device(one) for one in both]
        self.views = [one[: self.size].reshape(self.shape) for one in self.buffers]
        self.pos = cuda.to_device(np.array([pos], np.int32))

    def append(self, k, v):
        n_head, T, head_dim = k.shape
        launch = ch13.kv_launch(n_head, T, head_dim)
        ch13.kv_append[launch](cuda.to_device(k), cuda.to_device(v), *self.views, self.pos, T, self.shape[1], head_dim)
        ch13.kv_advance[ch13.kv_advance_launch()](self.pos, T)

    def host(self):
        for buffer in self.buffers:
            assert (buffer.copy_to_host()[self.size :] == 7).all()
        return [view.copy_to_host() for view in self.views]


def tokens(rng, n_head, T, head_dim):
    return rng.standard_normal((2, n_head, T, head_dim), dtype=np.float32)


@pytest.mark.parametrize("pos", [0, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_append(rng, shape, pos):
    n_head, T, head_dim = shape
    cache, (k, v) = Cache(n_head, T + 7, head_dim, pos), tokens(rng, *shape)
    expected = ch13.kv_append_reference(k, v, *cache.host(), pos)
    cache.append(k, v)
    np.testing.assert_array_equal(cache.host(), expected)
    np.testing.assert_array_equal(cache.host()[0][:, pos : pos + T], k)
    assert (expected[0] != -1).sum() == k.size  # nothing else was written
    assert cache.pos.copy_to_host()[0] == pos + T


def test_text_in_pieces_is_the_same_as_at_once(rng):
    k, v = tokens(rng, 3, 20, 33)
    at_once, in_pieces = Cache(3, 20, 33), Cache(3, 20, 33)
    at_once.append(k, v)
    for begin, end in [(0, 11), (11, 12), (12, 13), (13, 20)]:
        in_pieces.append(k[:, begin:end].copy(), v[:, begin:end].copy())
    np.testing.assert_array_equal(in_pieces.host(), at_once.host())
    np.testing.assert_array_equal(at_once.host(), [k, v])
    assert in_pieces.pos.copy_to_host()[0] == 20


@pytest.mark.parametrize("pos, stored", [(7, 3), (9, 1), (10, 0), (11, 0), (2**31 - 10, 0), (-2, 2), (-9, 0)])
def test_tokens_outside_the_cache_are_not_stored(rng, pos, stored):
    cache, (k, v) = Cache(2, 10, 5, pos), tokens(rng, 2, 4, 5)
    expected = ch13.kv_append_reference(k, v, *cache.host(), pos)
    cache.append(k, v)
    np.testing.assert_array_equal(cache.host(), expected)
    assert (expected[1] != -1).sum() == 2 * stored * 5
    if pos < 12:
        assert (cache.pos.copy_to_host()[0] > 10) == (pos + 4 > 10)  # so the host can tell that tokens were lost


def read(kernel, cache, T, *slots):
    """kv_read or kv_gather; NaN lies behind the cache, 7 behind the result, which must still be there."""
    n_head, T_max, head_dim = cache.shape
    size = n_head * T * head_dim
    behind = np.full(TAIL, np.nan, np.float32)
    device_cache = cuda.to_device(np.concatenate([cache.ravel(), behind]))[: cache.size].reshape(cache.shape)
    buffer = cuda.to_device(np.full(size + TAIL, 7, np.float32))
    out = buffer[:size].reshape(n_head, T, head_dim)
    kernel[ch13.kv_launch(n_head, T, head_dim)](device_cache, *map(cuda.to_device, slots), out, T, T_max, head_dim)
    assert (buffer.copy_to_host()[size:] == 7).all()
    return out.copy_to_host()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_read_gives_the_first_tokens(rng, shape):
    n_head, T, head_dim = shape
    cache = rng.standard_normal((n_head, T + 7, head_dim), dtype=np.float32)
    found = read(ch13.kv_read, cache, T)
    np.testing.assert_array_equal(found, cache[:, :T])
    np.testing.assert_array_equal(ch13.kv_read_reference(cache, T), cache[:, :T])


def test_read_past_the_end_gives_zeros(rng):
    cache = rng.standard_normal((2, 5, 3), dtype=np.float32)
    found = read(ch13.kv_read, cache, 8)
    np.testing.assert_array_equal(found[:, :5], cache)
    assert (found[:, 5:] == 0).all()
    np.testing.assert_array_equal(ch13.kv_read_reference(cache, 8), found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather(rng, shape):
    n_head, T, head_dim = shape
    cache = rng.standard_normal((n_head, 11, head_dim), dtype=np.float32)
    slots = rng.integers(0, 11, T).astype(np.int32)
    np.testing.assert_array_equal(read(ch13.kv_gather, cache, T, slots), cache[:, slots])
    np.testing.assert_array_equal(ch13.kv_gather_reference(cache, slots), cache[:, slots])


def test_gather_of_slots_that_are_not_there_gives_zeros(rng):
    cache = rng.standard_normal((2, 5, 3), dtype=np.float32)
    slots = np.array([4, -1, 5, 0, 2**31 - 1, -(2**31)], np.int32)
    found = read(ch13.kv_gather, cache, 6, slots)
    np.testing.assert_array_equal(found[:, [0, 3]], cache[:, [4, 0]])
    assert (found[:, [1, 2, 4, 5]] == 0).all()
    np.testing.assert_array_equal(ch13.kv_gather_reference(cache, slots), found)


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    cache, (k, v) = Cache(2, 10, 5, 8), tokens(rng, 2, 9, 5)
    cache.append(k, v)
    np.testing.assert_array_equal(cache.host()[0][:, 8:], k[:, :2])
    assert read(ch13.kv_read, k, 12).shape == (2, 12, 5)
    assert read(ch13.kv_gather, k, 3, np.array([-1, 0, 9], np.int32)).shape == (2, 3, 5)


def test_launch_refuses_empty():
    for sizes in [(0, 5, 64), (2, 0, 64), (2, 5, 0)]:
        with pytest.raises(ValueError, match="at least 1"):
            ch13.kv_launch(*sizes)
