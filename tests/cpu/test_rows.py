"""Parts of local, shared and global arrays as values: rows, columns, slices. Values were read off a GPU."""

import numpy as np
import pytest
from numba import cuda

import common


@cuda.jit(device=True)
def total(row):
    s = 0.0
    for j in range(row.shape[0]):
        s += row[j]
    return s


@cuda.jit(device=True)
def fill(row, value):
    for j in range(len(row)):
        row[j] = value + j


@cuda.jit(device=True)
def sum_of_all(m):
    s = 0.0
    for i in range(m.shape[0]):
        for j in range(m.shape[1]):
            s += m[i, j]
    return s


HEAD = """
def kernel(out):
    i = cuda.threadIdx.x
    m = cuda.local.array((2, 3), np.float64)
    q = cuda.local.array((2, 2, 2), np.int64)
    for a in range(2):
        for b in range(3):
            m[a, b] = 10 * a + b + 100 * i
        for b in range(2):
            for c in range(2):
                q[a, b, c] = 4 * a + 2 * b + c + 10 * i
"""
T = np.arange(4)

LOCAL = {  # statements, and what the four threads store (t: the thread)
    "out[i] = m[1][2]": 12 + 100 * T,
    "r = m[1]; out[i] = r[2]": 12 + 100 * T,
    "r = m[1]; r[0] = 7; out[i] = m[1, 0]": 7 + 0 * T,
    "r = m[i % 2]; r[0] = 7; out[i] = m[0, 0] + 1000 * m[1, 0]": [7 + 10000, 100 + 7000, 7 + 210000, 300 + 7000],
    "out[i] = m[1].shape[0] + 10 * m.shape[0]": 23 + 0 * T,
    "out[i] = len(m[1]) + 10 * len(m)": 23 + 0 * T,
    "out[i] = m[1].size + 10 * m[1].ndim + 100 * m.ndim": 213 + 0 * T,
    "out[i] = m[1][1:][0]": 11 + 100 * T,
    "out[i] = m[:, 1][1]": 11 + 100 * T,
    "s = m[0:1]; s[0, 2] = 5; out[i] = m[0, 2]": 5 + 0 * T,
    "m[0] = i; out[i] = m[0, 0] + m[0, 2]": 2 * T,
    "m[0] = 7, 8, 9; out[i] = m[0, 1] + 10 * m[1, 1]": 8 + 110 + 1000 * T,
    "m[:, 1] = i; out[i] = m[1, 1] + m[0, 1]": 2 * T,
    "m[:] = i + 1; out[i] = m[1, 1] + m[0, 2]": 2 * T + 2,
    "m[1][2] += 5; out[i] = m[1, 2]": 17 + 100 * T,
    "out[i] = m[-1][-1]": 12 + 100 * T,
    "out[i] = m[1, :][2]": 12 + 100 * T,
    "out[i] = m[..., 1][1]": 11 + 100 * T,
    "out[i] = m[1][::2][1]": 12 + 100 * T,
    "out[i] = m[1][::-1][0]": 12 + 100 * T,
    "a = m[0]; b = m[1]; m[0, 0], m[1, 0] = m[1, 0], m[0, 0]; out[i] = a[0] * 1000 + b[0]": 10000 + 100100 * T,
    "r = m[0]\n    if i > 1:\n        r = m[1]\n    r[1] = -1; out[i] = m[0, 1] + 1000 * m[1, 1]": [
        10999, 110999, -799, -699,
    ],
    "k = 0; r = m[k]; k = 1; out[i] = r[1] + k": 2 + 100 * T,
    "r = m[1]; s = r[1:]; s[0] = 3; out[i] = m[1, 1] + r[1]": 6 + 0 * T,
    "r = m[0]\n    for j in range(3):\n        r[j] = j * i\n    out[i] = m[0, 1] + 10 * m[0, 2]": T + 20 * T,
    "out[i] = total(m[1])": 33 + 300 * T,
    "r = m[i % 2][1:]; n = r[::2].shape[0]; out[i] = 10 * n + r.shape[0]": 12 + 0 * T,
    "out[i] = total(m[:, 2])": 14 + 200 * T,
    "fill(m[1], i); out[i] = m[1, 0] + 10 * m[1, 2] + 1000 * m[0, 0]": 11 * T + 20 + 100000 * T,
    "out[i] = sum_of_all(m)": 36 + 600 * T,
    "out[i] = q[1][0][1]": 5 + 10 * T,
    "r = q[1]; s = r[0]; s[1] = -2; out[i] = q[1, 0, 1] + r.shape[1]": 0 * T,
    "r = q[1, 0]; out[i] = r[1]": 5 + 10 * T,
    "q[1, 0] = 8, 9; out[i] = q[1, 0, 1] + 10 * q[1, 1, 0]": 9 + 60 + 100 * T,
    "out[i] = sum_of_all(q[1])": 22 + 40 * T,
    "r = m[1]; cuda.syncthreads(); out[i] = r[2]": 12 + 100 * T,
    "r = m[1] if i > 1 else m[0]; cuda.syncthreads(); out[i] = r[2]": [2, 102, 212, 312],
    "r = m[:, 1] if i > 1 else m[:, 0]; cuda.syncthreads(); r[1] = 5; out[i] = m[1, 1] + m[1, 0]": [16, 116, 215, 315],
    "r = q[1][0] if i > 1 else q[0][1]; cuda.syncthreads(); out[i] = r[1]": [3, 13, 25, 35],
    "r = m[0, ::2] if i > 1 else m[0, ::2]; cuda.syncthreads(); r[1] = 5; out[i] = m[0, 2]": 5 + 0 * T,
}  # fmt: skip


def compiled(tmp_path, text):
    """A kernel from its text, in a file."""
    path = tmp_path / "rows.py"
    path.write_text(text)
    names = {"cuda": cuda, "np": np, "total": total, "fill": fill, "sum_of_all": sum_of_all, "bump": bump}
    exec(compile(text, path, "exec"), names)
    return cuda.jit(names["kernel"])


def launched(kernel, *args, threads=4):
    out = cuda.to_device(np.zeros(threads))
    kernel[1, threads](out, *args)
    return out.copy_to_host()


@pytest.mark.parametrize("body", LOCAL)
def test_parts_of_local_arrays(tmp_path, body):
    kernel = compiled(tmp_path, HEAD + f"    {body}\n")
    np.testing.assert_array_equal(launched(kernel), LOCAL[body])


@pytest.mark.parametrize("body", ["out[i] = m[1][2]", "r = m[1]; r[0] = 7; out[i] = m[1, 0]", "out[i] = total(m[1])"])
def test_more_threads_than_a_row_has_elements(tmp_path, body):
    kernel = compiled(tmp_path, HEAD + f"    {body}\n")
    expected = {"out[i] = m[1][2]": 12 + 100 * np.arange(64), "out[i] = total(m[1])": 33 + 300 * np.arange(64)}
    np.testing.assert_array_equal(launched(kernel, threads=64), expected.get(body, np.full(64, 7)))


SHARED = """
def kernel(out):
    i = cuda.threadIdx.x
    m = cuda.shared.array((4, 3), np.float64)
    for b in range(3):
        m[i, b] = 10 * i + b
    cuda.syncthreads()
    {body}
"""


@pytest.mark.parametrize("body, expected", [
    ("r = m[i]; out[i] = r[1]", 10 * T + 1), ("out[i] = m[:, 1][i]", 10 * T + 1), ("m[i] = i; out[i] = m[i, 2]", T),
    ("out[i] = m[3 - i][2]", 32 - 10 * T), ("m[i] = 7, 8, 9; out[i] = m[i, 2]", 9 + 0 * T),
    ("r = m[3 - i]; cuda.syncthreads(); out[i] = r[0]", 30 - 10 * T), ("out[i] = total(m[i])", 30 * T + 3),
    ("r = m[1]; r[i % 3] = i; cuda.syncthreads(); out[i] = m[1, 1] + m[2, 2]", 23 + 0 * T),
    ("fill(m[i], i); out[i] = m[i, 2]", T + 2), ("out[i] = m[1:3, i % 3][1]", [20, 21, 22, 20]),
])  # fmt: skip
def test_parts_of_shared_arrays(tmp_path, body, expected):
    np.testing.assert_array_equal(launched(compiled(tmp_path, SHARED.format(body=body))), expected)


def test_parts_of_arguments(tmp_path):
    body = "    r = a[i]; r[0] = 5; a[i, 1] = a[i][2] + total(a[i, 1:]); out[i] = r[1]\n"
    kernel = compiled(tmp_path, "def kernel(out, a):\n    i = cuda.threadIdx.x\n" + body)
    a = cuda.to_device(np.arange(12.0).reshape(4, 3))
    np.testing.assert_array_equal(launched(kernel, a), [2 + 3, 5 + 9, 8 + 15, 11 + 21])
    assert a.copy_to_host()[:, 0].tolist() == [5] * 4


@cuda.jit(device=True)
def bump(row, j):
    cuda.atomic.add(row, j, 2)


ATOMIC = """
def kernel(out, a):
    i = cuda.threadIdx.x
    s = cuda.shared.array((2, 3), np.int32)
    if i < 2:
        s[i, 0] = s[i, 1] = s[i, 2] = 0
    cuda.syncthreads()
    {body}
    cuda.syncthreads()
    out[i] = s[i % 2, 1]
"""


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("body, shared, given", [
    ("r = a[i % 2]; cuda.atomic.add(r, i % 3, 1)", [0, 0], [[1, 0, 1], [1, 1, 0]]),
    ("cuda.atomic.max(a[1], 2, i)", [0, 0], [[0, 0, 0], [0, 0, 3]]),
    ("r = s[i % 2]; cuda.atomic.add(r, 1, i)", [2, 4], [[0] * 3] * 2),
    ("cuda.atomic.add(s[0], i // 4 + 1, 1); cuda.atomic.sub(s[1], 1, i)", [4, -6], [[0] * 3] * 2),
    ("bump(a[i % 2], i % 3); bump(s[1], 1)", [0, 8], [[2, 0, 2], [2, 2, 0]]),
    ("r = a[1]; cuda.syncthreads(); cuda.atomic.cas(r, i % 3, 0, 5)", [0, 0], [[0] * 3, [5] * 3]),
    ("cuda.atomic.compare_and_swap(a[1], 0, 7); cuda.atomic.exch(a[0], 1, 9)", [0, 0], [[0, 9, 0], [7, 0, 0]]),
])  # fmt: skip
def test_atomics_on_parts(tmp_path, monkeypatch, body, shared, given, check):
    monkeypatch.setenv("MINI_CHECK", check)
    a = cuda.to_device(np.zeros((2, 3), np.int32))
    kernel = compiled(tmp_path, ATOMIC.format(body=body))
    np.testing.assert_array_equal(launched(kernel, a), shared * 2)
    assert a.copy_to_host().tolist() == given


@pytest.mark.skipif(common.BACKEND != "cpu", reason="numba-cuda takes slices")
@pytest.mark.parametrize("part", ["a[0][1:]", "a[:, 1]", "a[0, 0:2]"])
def test_an_atomic_on_a_slice_is_refused(tmp_path, part):
    kernel = compiled(tmp_path, ATOMIC.format(body=f"cuda.atomic.add({part}, 0, 1)"))
    with pytest.raises(Exception, match="an atomic operation on a slice of an array"):
        launched(kernel, cuda.to_device(np.zeros((2, 3))))


@pytest.mark.parametrize("body", [
    "m[0] = m[1]; out[i] = m[0, 2]",  # a copy of an array needs memory that a thread cannot ask for
    "m[0] += 1; out[i] = m[0, 1]",
    "m[0] = m[1] + m[0]; out[i] = m[0, 1]",
    "m[0] = i * 1.0, 2, 3; out[i] = m[0, 1]",  # a tuple of two types
])  # fmt: skip
def test_what_a_gpu_refuses(tmp_path, body):
    with pytest.raises(Exception) as caught:
        launched(compiled(tmp_path, HEAD + f"    {body}\n"))
    if common.BACKEND == "cpu":
        assert type(caught.value).__name__ == "KernelTypeError"


@pytest.mark.skipif(common.BACKEND != "cpu", reason="a GPU's thread ends there without a word")
def test_too_few_values_for_a_row(tmp_path):
    with pytest.raises(Exception, match="2 values for a row of 3"):
        launched(compiled(tmp_path, HEAD + "    m[0] = 7, 8; out[i] = m[0, 1]\n"))
    kernel = compiled(tmp_path, "def kernel(out, a):\n    a[0] = 7, 8\n    out[0] = a[0, 1]\n")
    with pytest.raises(Exception, match="a thread of kernel failed"):
        launched(kernel, cuda.to_device(np.zeros((2, 3), np.int64)))


@pytest.mark.parametrize("check", ["0", "1"])
def test_a_tuple_as_an_index(tmp_path, monkeypatch, check):
    monkeypatch.setenv("MINI_CHECK", check)
    text = "def kernel(out, a):\n    t = cuda.grid(2)\n    a[t] = 3\n    s = t[0] % 4, 1\n    out[t[0]] = a[s] + a[t]\n"
    a = cuda.to_device(np.zeros((4, 2)))
    np.testing.assert_array_equal(launched(compiled(tmp_path, text), a), [3] * 4)
    assert a.copy_to_host().tolist() == [[3, 0]] * 4


@pytest.mark.skipif(common.BACKEND != "cpu", reason="the sanitizer is the CPU backend's")
def test_what_is_written_through_a_row_does_not_count_as_unwritten(tmp_path):
    body = "m[0] = i; m[1] = 1, 2, 3; s = cuda.shared.array((4, 3), np.int64); s[i] = i; cuda.syncthreads()"
    result = "out[i] = m[0, 1] + m[1, 2] + s[3 - i, 1]"
    kernel = compiled(tmp_path, HEAD.partition("    for a")[0] + f"    {body}; {result}\n")
    with common.sanitize() as report:
        np.testing.assert_array_equal(launched(kernel), [6] * 4)
    assert not report.findings and any("a part of m is taken" in note for note in report.notices)


@pytest.mark.skipif(common.BACKEND != "cpu", reason="the sanitizer is the CPU backend's")
@pytest.mark.parametrize("part, unwritten", [("a[i, 0:]", False), ("a[i]", True)])
def test_what_one_launch_may_have_written_through_a_part_the_next_may_read(tmp_path, part, unwritten):
    """A part that is looked at is another matter: its last elements are read, and nothing has written them."""
    writes = compiled(tmp_path, f"def kernel(a):\n    i = cuda.threadIdx.x\n    r = {part}\n    r[0] = r[1] = i\n")
    reads = compiled(tmp_path, "def kernel(out, a):\n    i = cuda.threadIdx.x\n    out[i] = a[i, 1] + a[i, 2]\n")
    a = cuda.device_array((4, 3))
    with common.sanitize() as report:
        writes[1, 4](a)
        launched(reads, a)
    assert [finding.kind for finding in report.findings] == ["uninitialized-global"] * unwritten


@pytest.mark.skipif(common.BACKEND != "cpu", reason="MINI_CHECK is the CPU backend's")
@pytest.mark.parametrize("body, words", [
    ("r = m[1]; out[i] = r[i]", "m: index 3 on axis 1 is outside 0 … 2"),
    ("out[i] = m[i][0]", "m: index 2 on axis 0 is outside 0 … 1"),
    ("r = m[i]; r[0] = 1; out[i] = r[1]", "m: index 2 on axis 0"),
    ("out[i] = m[..., i][1]", "m: index 3 on axis -"),
    ("out[i] = total(m[i])", "m: index 2 on axis 0"),
])  # fmt: skip
def test_parts_are_checked(tmp_path, monkeypatch, body, words):
    monkeypatch.setenv("MINI_CHECK", "1")
    with pytest.raises(IndexError, match=words):
        launched(compiled(tmp_path, HEAD + f"    {body}\n"))
