"""The checks of ch06/tiled_matmul: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

TILE = 16


def matrices(M, N, K, seed=0):
    rng = random(seed)
    return rng.standard_normal((M, K)).astype(np.float32), rng.standard_normal((N, K)).astype(np.float32)


def right(C, A, B, on, hint="product"):
    """Compare C with NumPy's."""
    expected = A.astype(np.float64) @ B.T.astype(np.float64)
    same(C, expected.astype(np.float32), "C", on, rtol=1e-5, atol=1e-4, hint=hint)


def counted(student):
    """A product with what it asked of memory, and the shape. Counts are worth nothing if C is wrong."""
    M, N, K = 48, 80, 96
    on = f"M = {M}, N = {N}, K = {K}"
    A, B = matrices(M, N, K)
    answer = student.call("product", A, B, on=on, memory=True)
    right(answer.value, A, B, on)
    return answer, (M, N, K), on


def test_memory(student):
    for M, N, K in ((20, 33, 37), (3, 5, 7)):
        on = f"M = {M}, N = {N}, K = {K}"
        C = student.clean("product", *matrices(M, N, K), on=on).value
        check((C != -7).any(), f"your kernel has not written any element of C, on {on}", "product")


@pytest.mark.parametrize("M, N, K", [(16, 16, 16), (64, 64, 64), (32, 96, 48)])
def test_whole(student, M, N, K):
    A, B = matrices(M, N, K, seed=M + N + K)
    on = f"M = {M}, N = {N}, K = {K}"
    right(student.call("product", A, B, on=on).value, A, B, on)


@pytest.mark.parametrize(
    "M, N, K", [(1, 1, 1), (17, 17, 17), (15, 31, 33), (33, 16, 50), (16, 65, 16), (1, 300, 129), (127, 1, 40)]
)
def test_ragged(student, M, N, K):
    A, B = matrices(M, N, K, seed=M + N + K)
    on = f"M = {M}, N = {N}, K = {K}"
    right(student.call("product", A, B, on=on).value, A, B, on, "edge")


def test_reads(student):
    answer, (M, N, K), on = counted(student)
    needed, elements = 2 * M * N * K // TILE, answer.total("threads", space="global", access="read")
    shared_out(answer, on, "matmul_nt", warps=8)
    seen = f"threads read {elements} elements of A and B"
    check(elements <= needed, f"{seen}, {needed} are enough with tiles of {TILE} x {TILE}, on {on}", "once")
    shared_out(answer, on, "matmul_nt", warps=8, space="shared")


def test_coalesced(student):
    answer, _, on = counted(student)
    moved, best = (answer.total(what, space="global", access="read") for what in ("sectors", "ideal_sectors"))
    seen = f"the reads of A and B move {moved} pieces of 32 bytes, {best} would do"
    check(moved <= 1.1 * best, f"{seen}, on {on}", "coalesced")


def test_banks(student):
    answer, _, on = counted(student)
    turns, free = (answer.total(what, space="shared") for what in ("wavefronts", "ideal_wavefronts"))
    check(turns > 0, f"shared memory was not used, on {on}", "once")
    seen = f"shared memory takes {turns} turns, {free} would do without bank conflicts"
    check(turns <= 1.1 * free, f"{seen}, on {on}", "banks")
