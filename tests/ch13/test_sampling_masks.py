"""Chapter 13: masks of rows, against NumPy, bit by bit."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch13_llm_ops import sampling_masks as ch13

SIZES = [1, 31, 33, 1025, 2049, 5001, 50257]


def masked(logits, masks, slot, threads=None):
    """The kernel's result."""
    n, vocab_size = logits.shape
    grid, block = ch13.mask_launch(n, vocab_size)
    out = cuda.to_device(logits)
    words = cuda.to_device(np.asarray(masks, np.uint32))
    ch13.mask_rows[grid, threads or block](out, words, cuda.to_device(np.array(slot, np.int32)), vocab_size)
    return out.copy_to_host()


def random_masks(rng, n, vocab_size):
    return rng.integers(0, 2**32, (n, ch13.mask_words(vocab_size)), dtype=np.uint32)


@pytest.mark.parametrize("vocab_size", SIZES)
def test_a_token_whose_bit_is_0_is_minus_infinity(rng, vocab_size):
    logits = rng.standard_normal((5, vocab_size), dtype=np.float32)
    masks, slot = random_masks(rng, 3, vocab_size), [2, -1, 0, -1, 2]
    got = masked(logits, masks, slot)
    for row, before, place in zip(got, logits, slot):
        expected = before if place < 0 else ch13.mask_reference(before, masks[place])
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_any_block_will_do(rng, threads):
    logits, masks = rng.standard_normal((2, 5001), dtype=np.float32), random_masks(rng, 2, 5001)
    np.testing.assert_array_equal(masked(logits, masks, [0, 1], threads), masked(logits, masks, [0, 1]))


@pytest.mark.parametrize("token", [0, 31, 32, 2047, 2048, 5000])
def test_a_single_bit_leaves_a_single_token(rng, token):
    """The first and the last of a word, and of a block's slice."""
    logits, masks = rng.standard_normal((1, 5001), dtype=np.float32), np.zeros((1, ch13.mask_words(5001)), np.uint32)
    masks[0, token // 32] = 1 << token % 32
    got = masked(logits, masks, [0])[0]
    assert np.flatnonzero(got != -np.inf).tolist() == [token] and got[token] == logits[0, token]


def test_what_is_allowed_keeps_every_bit(rng):
    """NaN, infinities, zeros of both signs: what is allowed stays, what is not is -inf whatever it was."""
    logits = np.array([[np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, np.nan]], np.float32)
    got = masked(logits, [[0b0111111]], [0])
    np.testing.assert_array_equal(got.view(np.int32)[:, :6], logits.view(np.int32)[:, :6])
    assert got[0, 6] == -np.inf


def test_bits_behind_the_vocabulary_mean_nothing(rng):
    """The last word has 31 bits to spare, and behind the row is another one."""
    logits = rng.standard_normal((3, 33), dtype=np.float32)
    for spare in (0, 0xFFFFFFFE):
        got = masked(logits, [[0xFFFFFFFF, 1 | spare], [0, spare]], [0, 1, -1])
        np.testing.assert_array_equal(got[[0, 2]], logits[[0, 2]])
        assert (got[1] == -np.inf).all()


def test_words():
    assert [ch13.mask_words(n) for n in (1, 32, 33, 50257)] == [1, 1, 2, 1571]
    assert ch13.mask_launch(3, 2049)[0] == (2, 3)
