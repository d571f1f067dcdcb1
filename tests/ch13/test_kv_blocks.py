"""Chapter 13: blocks of a paged cache, out to the host and in again: every word of those named, and no other."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch13_llm_ops import kv_blocks as ch13

SIZES = [(1, 1, 1, 1, 1), (5, 3, 33, 7, 9), (4, 2, 128, 5, 6), (3, 5, 129, 3, 3)]  # n, pieces, size, blocks, slots


def drawn(rng, n, n_pieces, size, n_blocks, n_slots):
    pages = rng.integers(-(2**63), 2**63 - 1, (n_pieces, n_blocks, size), np.int64)
    host = rng.integers(-(2**63), 2**63 - 1, (n_slots, n_pieces, size), np.int64)
    return pages, host, *(rng.permutation(most)[:n].astype(np.int32) for most in (n_blocks, n_slots))


def mapped(values):
    array = cuda.mapped_array(values.shape, values.dtype)
    array[...] = values
    return array


@pytest.mark.parametrize("kernel", ["blocks_out", "blocks_in"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_way(rng, sizes, kernel):
    pages, host, blocks, slots = drawn(rng, *sizes)
    there, back = cuda.to_device(pages), mapped(host)
    on_device, launch = [cuda.to_device(one) for one in (blocks, slots)], ch13.blocks_launch(*sizes[:3])
    if kernel == "blocks_out":
        ch13.blocks_out[launch](there, *on_device, back, sizes[2])
        host = ch13.blocks_out_reference(pages, blocks, slots, host)
    else:
        ch13.blocks_in[launch](back, *reversed(on_device), there, sizes[2])
        pages = ch13.blocks_in_reference(host, slots, blocks, pages)
    cuda.synchronize()
    np.testing.assert_array_equal(back, host)
    np.testing.assert_array_equal(there.copy_to_host(), pages)


def test_another_block_and_arrays_of_the_device(rng):
    """More threads a block than were asked for, and a host side that is no host's."""
    pages, host, blocks, slots = drawn(rng, *SIZES[1])
    there, back = cuda.to_device(pages), cuda.to_device(host)
    (_, *grid), _ = ch13.blocks_launch(*SIZES[1][:3])
    ch13.blocks_out[(2, *grid), 32](there, cuda.to_device(blocks), cuda.to_device(slots), back, 33)
    np.testing.assert_array_equal(back.copy_to_host(), ch13.blocks_out_reference(pages, blocks, slots, host))


def test_the_bits_of_any_number_survive(rng):
    """NaNs with payloads, -0, denormals: what is copied is never read as a number."""
    bits = rng.integers(0, 1 << 32, (2, 3, 16), np.uint32)
    bits[0, 1] = np.resize(np.array([0x7FA00001, 0x80000000, 1, 0xFFC12345], np.uint32), 16)
    pages = cuda.to_device(bits.view(np.float32))
    back = mapped(np.zeros((1, 2, 8), np.int64))
    one = cuda.to_device(np.array([1], np.int32))
    zero = cuda.to_device(np.zeros(1, np.int32))
    ch13.blocks_out[ch13.blocks_launch(1, 2, 8)](pages.view(np.int64), one, zero, back, 8)
    cuda.synchronize()
    np.testing.assert_array_equal(np.asarray(back).view(np.uint32)[0], bits[:, 1])


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (65536, 1, 1), (1, 65536, 1)], ids=str)
def test_launches_that_are_refused(sizes):
    with pytest.raises(ValueError):
        ch13.blocks_launch(*sizes)
