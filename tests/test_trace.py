"""common.trace: every launch, in order, as what it is."""

import re
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing import kernels as ch03
from common import trace as tracing
from common.trace import defined_at, format_table, summarize, trace

ROOT = Path(__file__).resolve().parent.parent


@cuda.jit
def write_index(out):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = i


def add(n):
    x = cuda.to_device(np.ones(n, np.float32))
    ch03.residual_add[ch03.blocks_1d(n)](x, x, x, n)


def test_every_launch_in_order():
    out = cuda.device_array(40, np.float32)
    matrix, bias = cuda.to_device(np.zeros((9, 70), np.float32)), cuda.to_device(np.zeros(70, np.float32))
    with trace() as launches:
        add(1000)
        write_index[2, 32](out)
        ch03.bias_add[ch03.blocks_2d(9, 70)](matrix, bias, matrix, 9, 70)
        add(1)
    assert [launch.kernel for launch in launches] == [ch03.residual_add, write_index, ch03.bias_add, ch03.residual_add]
    assert launches[0].kernel is ch03.residual_add
    assert [launch.name for launch in launches] == ["residual_add", "write_index", "bias_add", "residual_add"]
    assert [launch.grid for launch in launches] == [(4, 1, 1), (2, 1, 1), (3, 2, 1), (1, 1, 1)]
    assert [launch.block for launch in launches] == [(256, 1, 1), (32, 1, 1), (32, 8, 1), (256, 1, 1)]
    assert all(0 < launch.ms < 60_000 for launch in launches)
    np.testing.assert_array_equal(out.copy_to_host(), np.arange(40))


def test_nothing_outside_the_block():
    add(5)
    with trace() as launches:
        pass
    add(5)
    assert launches == []
    assert format_table(launches) == "no kernel was launched"


def test_an_exception_ends_the_trace():
    with pytest.raises(RuntimeError, match="mine"), trace() as launches:
        add(5)
        raise RuntimeError("mine")
    add(5)
    assert len(launches) == 1 and launches[0].ms > 0


def test_nested_traces_both_see_a_launch():
    with trace() as outer:
        add(5)
        with trace() as inner:
            add(300)
        add(5)
    add(5)
    assert [launch.grid[0] for launch in outer] == [1, 2, 1]
    assert [launch.grid[0] for launch in inner] == [2]


def test_time_grows_with_the_work():
    big, small = 1 << 23, 100
    x = cuda.to_device(np.ones(big, np.float32))
    ch03.residual_add[ch03.blocks_1d(big)](x, x, x, big)
    with trace() as launches:
        for _ in range(5):
            ch03.residual_add[ch03.blocks_1d(small)](x, x, x, small)
            ch03.residual_add[ch03.blocks_1d(big)](x, x, x, big)
    assert min(one.ms for one in launches[1::2]) > min(one.ms for one in launches[::2])


def test_defined_at_is_the_line_of_the_def():
    for kernel in (ch03.embed, ch03.bias_add, write_index):
        name, line = defined_at(kernel).split(":")
        assert re.match(rf"def {kernel.py_func.__name__}\(", (ROOT / name).read_text().splitlines()[int(line) - 1])
    assert defined_at(ch03.embed).startswith("chapters/ch03_indexing/kernels.py:")


def test_defined_at_outside_the_repository(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from numba import cuda\n\n\n@cuda.jit\ndef mine(x):\n    x[0] = 1\n")
    space = {}
    exec(compile(file.read_text(), str(file), "exec"), space)
    assert defined_at(space["mine"]) == f"{file.as_posix()}:5"


def test_summary_and_table():
    with trace() as launches:
        add(5)
        add(300)
        write_index[1, 32](cuda.device_array(40, np.float32))
    for launch, ms in zip(launches, (1.0, 2.5, 3.0), strict=True):
        launch.ms = ms
    assert [(first.name, count, ms) for first, count, ms in summarize(launches)] == [
        ("residual_add", 2, 3.5),
        ("write_index", 1, 3.0),
    ]
    table = format_table(launches)
    assert "largest: residual_add with 3.500 of 6.500 ms (53.8 %)" in table
    lines = table.splitlines()
    assert len(lines) == 1 + 3 + 1 + 1 + 2 + 1 + 1  # headings, launches, an empty line, kernels, the sum, the verdict
    for line, launch in zip(lines[1:4], launches, strict=True):
        assert launch.name in line and launch.defined_at in line and f"{launch.ms:.3f}" in line
    assert re.search(r"residual_add +2 +256", lines[2])


def test_dims_of_a_three_dimensional_launch():
    assert tracing._dims((3, 1, 2)) == "3 x 1 x 2"
    assert tracing._dims((1, 1, 1)) == "1"
