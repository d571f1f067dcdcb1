"""The checks of ch09/register_tile: see `common.grade`."""

import numpy as np
import pytest

from common.grade import check, same

TILE, EACH = 32, 4


def matrices(M, N, K, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((K, M)).astype(np.float32), random.standard_normal((K, N)).astype(np.float32)


def right(C, A, B, on, hint="product"):
    """Compare C with NumPy's."""
    expected = A.T.astype(np.float64) @ B.astype(np.float64)
    if np.shape(C) == expected.shape and (C == -7).any():
        hint = "missing"
    same(C, expected.astype(np.float32), "C", on, rtol=1e-5, atol=1e-4, hint=hint)


def counted(student):
    """What `traffic` says, and the shape it was seen on. Counts are worth nothing if C is wrong."""
    M, N, K = 64, 96, 48
    on = f"M = {M}, N = {N}, K = {K}"
    A, B = matrices(M, N, K)
    told = student.call("traffic", A, B, on=on, cpu=True).value
    right(told["C"], A, B, on)
    return told, (M, N, K), on


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
    told, (M, N, K), on = counted(student)
    needed = 2 * M * N * K // EACH
    check(told["shared"] > 0, f"shared memory was not used, on {on}", "once")
    seen = f"threads read {told['shared']} numbers from shared memory for {M * N * K} multiply-adds"
    check(told["shared"] <= needed, f"{seen}, {needed} are enough, on {on}", "registers")


def test_reads(student):
    told, (M, N, K), on = counted(student)
    needed = 2 * M * N * K // TILE
    seen = f"threads read {told['elements']} elements of A and B"
    check(told["elements"] <= needed, f"{seen}, {needed} are enough with tiles of {TILE} x {TILE}, on {on}", "once")


def test_coalesced(student):
    told, _, on = counted(student)
    seen = f"reads of A and B and stores to C move {told['sectors']} pieces of 32 bytes, {told['best']} would do"
    check(told["sectors"] <= 1.1 * told["best"], f"{seen}, on {on}", "coalesced")
