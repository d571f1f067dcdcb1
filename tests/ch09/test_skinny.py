"""Chapter 9, products of some dozen rows: tiles of two sizes, K in parts, against one reference."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch09_gemm import skinny

SHAPES = [  # M, N, K, parts: odd M, N and K multiples of 8 only; parts that are short, or empty
    (1, 8, 8, 1), (31, 24, 72, 2), (33, 40, 200, 2), (65, 72, 264, 4), (100, 136, 448, 8), (32, 64, 64, 2),
    (33, 40, 1096, 1),
]  # fmt: skip
TAIL = 40

every_tile = pytest.mark.parametrize("tile", [skinny.LARGE, skinny.SMALL])


def kernel_of(tile):
    return skinny.gemm_parts_32 if tile == skinny.SMALL else skinny.gemm_parts_64


def parts_by(tile, A, Bt, n_parts):
    """The parts on the device. NaN lies behind the inputs and 7 behind the parts; checks that it is still there."""
    (M, K), N = A.shape, len(Bt)
    buffer = cuda.to_device(np.full(n_parts * M * N + TAIL, 7, np.float32))
    parts = buffer[: n_parts * M * N]
    inputs = []
    for array in (A, Bt):
        padded = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, np.nan, np.float16)]))
        inputs.append(padded[: array.size].reshape(array.shape))
    kernel_of(tile)[skinny.skinny_launch(M, N, tile, n_parts)](*inputs, parts, M, N, K)
    np.testing.assert_array_equal(buffer.copy_to_host()[n_parts * M * N :], 7)
    return parts.copy_to_host().reshape(n_parts, M, N)


def whole_numbers(rng, *shape):
    return rng.integers(-8, 9, shape).astype(np.float16)


@every_tile
@pytest.mark.parametrize("M, N, K, n_parts", SHAPES)
def test_parts_are_exact_on_whole_numbers(rng, tile, M, N, K, n_parts):
    A, Bt = whole_numbers(rng, M, K), whole_numbers(rng, N, K)
    np.testing.assert_array_equal(parts_by(tile, A, Bt, n_parts), skinny.gemm_parts_reference(A, Bt, n_parts))


@every_tile
def test_rows_and_columns_stay_apart(rng, tile):
    """A NaN in a row of A or of Bt spoils that row or column of one part and nothing else."""
    A, Bt = whole_numbers(rng, 70, 264), whole_numbers(rng, 72, 264)
    expected = skinny.gemm_parts_reference(A, Bt, 2)
    A[66, 263] = Bt[71, 0] = np.nan
    expected[1, 66, :] = expected[0, :, 71] = np.nan
    np.testing.assert_array_equal(parts_by(tile, A, Bt, 2), expected)


def test_rounding_and_bits_do_not_depend_on_the_tile_or_the_other_rows(rng):
    A, Bt = (rng.standard_normal((n, 320)).astype(np.float16) for n in (70, 48))
    found = parts_by(skinny.LARGE, A, Bt, 2)
    exact, size = A.astype(np.float64) @ Bt.astype(np.float64).T, np.abs(A.astype(float)) @ np.abs(Bt.astype(float)).T
    assert np.all(np.abs(found.sum(axis=0, dtype=np.float64) - exact) <= 321 * 2.0**-22 * size)
    np.testing.assert_array_equal(parts_by(skinny.SMALL, A, Bt, 2), found)
    np.testing.assert_array_equal(parts_by(skinny.SMALL, A[37:38], Bt, 2)[:, 0], found[:, 37])


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    A, Bt = whole_numbers(rng, 5, 72), whole_numbers(rng, 24, 72)
    np.testing.assert_array_equal(parts_by(skinny.SMALL, A, Bt, 2), skinny.gemm_parts_reference(A, Bt, 2))


def test_parts_of():
    """GPT-2's four products at some row counts; and bounds on any size."""
    sizes = {"qkv": (2304, 768), "proj": (768, 768), "up": (3072, 768), "down": (768, 3072)}
    by_rows = {rows: [skinny.parts_of(*sizes[name], rows) for name in sizes] for rows in (16, 64, 128, 512, 1024)}
    assert by_rows == {16: [4, 4, 4, 8], 64: [4, 4, 2, 8], 128: [4, 4, 4, 8], 512: [2, 4, 1, 4], 1024: [1, 1, 1, 2]}
    for N in (8, 768, 50264):
        for K in (8, 384, 3072, 16384):
            most = skinny.parts_of(N, K)
            for rows in (1, 64, 65, 4096):
                parts = skinny.parts_of(N, K, rows)
                assert 1 <= parts <= min(most, skinny.PARTS_MAX) and (parts == 1 or K >= 192 * parts)


def test_shared_memory_is_what_a_block_can_have_on_any_gpu():
    for tile in (skinny.SMALL, skinny.LARGE):
        assert skinny.skinny_launch(8, 8, tile)[3] <= 64 << 10  # sm_75


def test_launches_refuse():
    cases = ((0, 8, 32), "shape"), ((8, 8, 32, 9), "parts = 9"), ((8, 65536 * 32, 32), "tiles of 32 columns")
    for sizes, error in cases:
        with pytest.raises(ValueError, match=error):
            skinny.skinny_launch(*sizes)
    with pytest.raises(ValueError, match="0 rows"):
        skinny.parts_of(8, 8, 0)
