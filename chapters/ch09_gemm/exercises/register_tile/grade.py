"""The checks of ch09/register_tile: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, random, same, shared_out

TILE, EACH = 32, 4


def matrices(M, N, K, seed=0):
    rng = random(seed)
    return rng.standard_normal((K, M)).astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)


def right(C, A, B, on, hint="product"):
    """Compare C with NumPy's."""
    expected = A.T.astype(np.float64) @ B.astype(np.float64)
    if np.shape(C) == expected.shape and (C == -7).any():
        hint = "missing"
    same(C, expected.astype(np.float32), "C", on, rtol=1e-5, atol=1e-4, hint=hint)


def counted(student):
    """A product with what it asked of memory, and the shape. Counts are worth nothing if C is wrong."""
    M, N, K = 64, 96, 48
    on = f"M = {M}, N = {N}, K = {K}"
    A, B = matrices(M, N, K)
    answer = student.call("product", A, B, on=on, memory=True)
    right(answer.value, A, B, on)
    return answer, (M, N, K), on


def test_memory(student):
    for M, N, K in ((37, 45, 19), (3, 5, 6)):
        on = f"M = {M}, N = {N}, K = {K}"
        C = student.clean("product", *matrices(M, N, K), on=on).value
        check((C != -7).any(), f"your kernel has not written any element of C, on {on}", "missing")


@pytest.mark.parametrize("M, N, K", [(32, 32, 8), (32, 64, 64), (128, 96, 40)])
def test_whole(student, M, N, K):
    A, B = matrices(M, N, K, seed=M + N + K)
    on = f"M = {M}, N = {N}, K = {K}"
    right(student.call("product", A, B, on=on).value, A, B, on)


@pytest.mark.parametrize(
    "M, N, K",
    [(1, 1, 1), (33, 33, 9), (31, 65, 17), (40, 8, 50), (32, 65, 16), (1, 300, 129), (127, 1, 39), (100, 70, 1)],
)
def test_ragged(student, M, N, K):
    A, B = matrices(M, N, K, seed=M + N + K)
    on = f"M = {M}, N = {N}, K = {K}"
    right(student.call("product", A, B, on=on).value, A, B, on, "edge")


def test_registers(student):
    answer, (M, N, K), on = counted(student)
    needed, shared = 2 * M * N * K // EACH, answer.total("threads", space="shared", access="read")
    check(shared > 0, f"shared memory was not used, on {on}", "once")
    shared_out(answer, on, "matmul_tn", warps=8, space="shared")
    seen = f"threads read {shared} numbers from shared memory for {M * N * K} multiply-adds"
    check(shared <= needed, f"{seen}, {needed} are enough, on {on}", "registers")


def test_reads(student):
    answer, (M, N, K), on = counted(student)
    needed, elements = 2 * M * N * K // TILE, answer.total("threads", space="global", access="read")
    shared_out(answer, on, "matmul_tn", warps=8)
    seen = f"threads read {elements} elements of A and B"
    check(elements <= needed, f"{seen}, {needed} are enough with tiles of {TILE} x {TILE}, on {on}", "once")


def test_coalesced(student):
    answer, _, on = counted(student)
    moved, best = (answer.total(what, space="global") for what in ("sectors", "ideal_sectors"))
    seen = f"reads of A and B and stores to C move {moved} pieces of 32 bytes, {best} would do"
    check(moved <= 1.1 * best, f"{seen}, on {on}", "coalesced")
