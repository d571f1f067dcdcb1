"""Chapter 9: the lesson's drawing of who holds what in a tensor-core product is what lanes hold."""

from pathlib import Path

import numpy as np
from numba import cuda

from chapters.ch09_gemm import tensor_core
from common.ptx import load_half2, mma_m16n8k16, unpack_half2

LESSON = Path(tensor_core.__file__).with_name("README.md")


@cuda.jit
def load_fragments(A, B, C, held_a, held_b, held_c, D):
    """One warp: D = A @ B + C, and the numbers in each lane's registers. B is transposed, (8, 16)."""
    lane = cuda.threadIdx.x
    group = lane // 4
    two = lane % 4 * 2
    a0, a1 = load_half2(A, (group, two)), load_half2(A, (group + 8, two))
    a2, a3 = load_half2(A, (group, two + 8)), load_half2(A, (group + 8, two + 8))
    b0, b1 = load_half2(B, (group, two)), load_half2(B, (group, two + 8))
    c0, c1, c2, c3 = C[group, two], C[group, two + 1], C[group + 8, two], C[group + 8, two + 1]
    held_a[lane, 0], held_a[lane, 1] = unpack_half2(a0)
    held_a[lane, 2], held_a[lane, 3] = unpack_half2(a1)
    held_a[lane, 4], held_a[lane, 5] = unpack_half2(a2)
    held_a[lane, 6], held_a[lane, 7] = unpack_half2(a3)
    held_b[lane, 0], held_b[lane, 1] = unpack_half2(b0)
    held_b[lane, 2], held_b[lane, 3] = unpack_half2(b1)
    held_c[lane, 0], held_c[lane, 1], held_c[lane, 2], held_c[lane, 3] = c0, c1, c2, c3
    c0, c1, c2, c3 = mma_m16n8k16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
    D[group, two], D[group, two + 1], D[group + 8, two], D[group + 8, two + 1] = c0, c1, c2, c3


def held():
    """What the lanes hold of matrices whose elements are their own numbers: a (32, 8), b (32, 4), c (32, 4)."""
    A = np.arange(256, dtype=np.float16).reshape(16, 16)
    B = np.arange(128, dtype=np.float16).reshape(16, 8)
    C = np.arange(128, dtype=np.float32).reshape(16, 8)
    found = [cuda.to_device(np.full((32, width), -1, np.float32)) for width in (8, 4, 4)]
    D = cuda.to_device(np.zeros((16, 8), np.float32))
    load_fragments[1, 32](cuda.to_device(A), cuda.to_device(np.ascontiguousarray(B.T)), cuda.to_device(C), *found, D)
    np.testing.assert_array_equal(D.copy_to_host(), A.astype(np.float64) @ B.astype(np.float64) + C)
    return [one.copy_to_host().astype(int) for one in found]


def owners(held, shape):
    """The lane that holds each element of a matrix of this shape."""
    lanes = np.full(shape[0] * shape[1], -1)
    for lane, elements in enumerate(held):
        lanes[elements] = lane
    return lanes.reshape(shape)


def drawing():
    """The three matrices as text, B above C and A beside it, a number for each pair."""
    a, b, c = (owners(one, shape) for one, shape in zip(held(), ((16, 16), (16, 8), (16, 8))))
    for upper, lower in ((a[:, ::2], a[:, 1::2]), (b[::2], b[1::2]), (c[:, ::2], c[:, 1::2])):
        np.testing.assert_array_equal(upper, lower)  # a pair has one owner
    a, b, c = a[:, ::2], b[::2], c[:, ::2]

    def numbers(row, width=3):
        return "".join(f"{lane:{width}}" for lane in row)

    lines = [f"{'B':>43}{numbers(range(8))}"]
    lines += [f"{f'k {2 * k}, {2 * k + 1}':>43}{numbers(b[k])}   b{k // 4}" for k in range(8)]
    lines.append(f"A       {'k 0 … 7':>12}   {'k 8 … 15':12}{'C':>8}{numbers(range(0, 8, 2), 6)}")
    for row in range(16):
        of_a, of_c = ("a0 │ a2", "c0 c1") if row < 8 else ("a1 │ a3", "c2 c3")
        left = f"row {row:2}  {numbers(a[row, :4])} │{numbers(a[row, 4:])}   {of_a}"
        lines.append(f"{left:43}{numbers(c[row], 6)}   {of_c}")
    return "\n".join(lines)


def test_the_drawing_of_the_fragments_is_what_lanes_hold():
    assert drawing() in LESSON.read_text(encoding="utf-8")
