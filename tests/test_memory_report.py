"""The memory report, against counts made by hand: sectors, wavefronts, branches, barriers, operations."""

import common

# isort: split
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda, float32, float64, int32

from chapters.ch03_indexing.kernels import blocks_1d
from chapters.ch04_memory import kernels as ch04
from chapters.ch04_memory import transpose as turn
from chapters.ch06_shared_tile import kernels as ch06
from chapters.ch07_warp_reduce import kernels as ch07
from common.ptx import load_float4

pytestmark = pytest.mark.skipif(
    common.BACKEND != "cpu", reason="the memory report is a mode of the CPU backend; on a GPU, ncu reads the counters"
)

ROOT = Path(__file__).resolve().parent.parent
N = 4096
WARPS = N // 32


def floats(*shape):
    return cuda.to_device(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))


def report_of(kernel, launch, *args, **options):
    with common.memory_report(**options) as report:
        kernel[launch](*args)
    return report


def line(report, array, access="read", space="global", text=None):
    """The only `Line` of a report for an array and access."""
    found = [x for x in report.lines if (x.array, x.access, x.space) == (array, access, space)]
    assert len(found) == 1, report.lines
    return found[0]


# --- global memory: sectors ------------------------------------------------------------------------------------------


def test_copy_moves_four_sectors_a_request():
    out = floats(N)
    report = report_of(ch04.copy_v1_element, blocks_1d(N), floats(N), out, N)
    for x in (line(report, "x"), line(report, "out", "write")):
        assert (x.requests, x.threads, x.bytes, x.used) == (WARPS, N, 4 * N, 4 * N)
        assert (x.sectors, x.ideal_sectors, x.lines) == (4 * WARPS, 4 * WARPS, WARPS)
        assert x.efficiency == 1 and x.sectors_per_request == 4 and x.ways is None and x.conflicts == 0
    assert report.launches == 1 and report.sectors == 8 * WARPS and report.bytes == 8 * N == report.dram_bytes
    assert report.barriers == report.flops == 0
    assert (out.copy_to_host() == np.arange(N)).all()


@pytest.mark.parametrize("stride, sectors, lines", [(1, 4, 1), (2, 8, 2), (8, 32, 8), (32, 32, 32)])
def test_strided_copy(stride, sectors, lines):
    report = report_of(ch04.copy_strided, blocks_1d(N), floats(N * stride), floats(N), N, stride)
    x = line(report, "x")
    assert (x.sectors_per_request, x.lines) == (sectors, lines * WARPS)
    assert x.efficiency == pytest.approx(min(4 / sectors, 1))
    assert line(report, "out", "write").sectors_per_request == 4
    assert report.dram_bytes == 32 * WARPS * (sectors + 4)


def test_an_offset_costs_a_sector():
    report = report_of(ch04.copy_offset, blocks_1d(N), floats(N + 8), floats(N), N, 1)
    assert line(report, "x").sectors_per_request == 5
    assert report.dram_bytes == 8 * N + 32  # the sectors between two warps' are asked for twice, but moved once
    report = report_of(ch04.copy_offset, blocks_1d(N), floats(N + 8), floats(N), N, 8)
    assert line(report, "x").sectors_per_request == 4


def test_a_slice_begins_where_it_begins():
    x = floats(N + 8)
    report = report_of(ch04.copy_v1_element, blocks_1d(N), x[1 : N + 1], floats(N), N)
    assert line(report, "x").sectors_per_request == 5


def test_float4_is_one_request_of_sixteen_sectors():
    n = N - 1
    report = report_of(ch04.copy_v2_float4, ch04.copy_float4_launch(n), floats(N), floats(N), n)
    wide, tail = sorted((x for x in report.lines if x.array == "x"), key=lambda x: -x.bytes)
    assert (wide.requests, wide.threads, wide.bytes) == (N // 128, n // 4, 16 * (n // 4))
    assert wide.sectors == N // 128 * 16  # the last 3 floats are read one by one, and share a sector with 4 others
    assert (tail.requests, tail.threads, tail.sectors) == (3, 3, 3)
    ends = [b for b in report.divergence if b.diverged]
    assert [b.diverged for b in ends] == [1]  # of the last warp, in `if i + 3 < n`


def test_structures_of_arrays():
    n = 1024
    aos = report_of(ch04.kinetic_energy_aos, blocks_1d(n), floats(n, 8), floats(n), n)
    reads = [x for x in aos.lines if x.array == "particles"]
    assert sum(x.requests for x in reads) == 4 * n // 32
    assert {x.sectors_per_request for x in reads} == {32}
    assert aos.dram_bytes == 32 * n + 4 * n  # all four fields lie in one sector
    soa = report_of(ch04.kinetic_energy_soa, blocks_1d(n), floats(8, n), floats(n), n)
    assert {x.sectors_per_request for x in soa.lines} == {4}
    assert soa.dram_bytes == 16 * n + 4 * n
    assert aos.operations == soa.operations == {"float32": 7 * n}  # 0.5 * m * (x * x + y * y + z * z)


def test_a_broadcast_is_one_sector():
    @cuda.jit
    def kernel(x, out):
        i = cuda.grid(1)
        out[i] = x[i // 32]

    x = line(report_of(kernel, (4, 64), floats(8), floats(256)), "x")
    assert (x.requests, x.threads, x.sectors, x.ideal_sectors, x.used) == (8, 256, 8, 8, 32)


def test_the_last_block_is_ragged():
    n = 1000
    report = report_of(ch04.copy_v1_element, (4, 256), floats(n), floats(n), n)
    x = line(report, "x")
    assert (x.requests, x.threads, x.sectors) == (32, 1000, 125)  # 31 full warps, and 8 lanes of another
    assert [(b.executions, b.diverged) for b in report.divergence] == [(32, 1)]


def test_blocks_that_are_no_full_warps():
    @cuda.jit
    def kernel(out):
        out[cuda.blockIdx.x, cuda.threadIdx.y, cuda.threadIdx.x] = 1

    x = line(report_of(kernel, (2, (12, 4)), floats(2, 4, 12)), "out", "write")
    assert (x.requests, x.threads) == (4, 96)  # 48 threads are a warp and a half
    assert x.sectors == 2 * (4 + 2)


# --- shared memory: banks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel, reads, ways",
    [(turn.transpose_v2_tile, 32, 32), (turn.transpose_v3_padded, 1, 1), (turn.transpose_v4_unrolled, 1, 1)],
)
def test_transposes(kernel, reads, ways):
    x, out = floats(64, 64), floats(64, 64)
    report = report_of(kernel, turn.transpose_launch(64, 64), x, out, 64, 64)
    assert line(report, "tile", "read", "shared").ways == ways
    assert line(report, "tile", "write", "shared").ways == 1
    assert report.conflicts == 128 * (ways - 1)
    assert line(report, "x").sectors_per_request == line(report, "out", "write").sectors_per_request == 4
    assert report.barriers == 4
    assert (out.copy_to_host() == x.copy_to_host().T).all()


def test_naive_transpose():
    report = report_of(turn.transpose_v1_naive, turn.transpose_launch(64, 64), floats(64, 64), floats(64, 64), 64, 64)
    assert line(report, "x").sectors_per_request == 4
    assert line(report, "out", "write").sectors_per_request == 32
    assert report.sectors == 128 * 36 and report.dram_bytes == 2 * 64 * 64 * 4


def test_wide_transpose_has_two_ways():
    launch = turn.transpose_float4_launch(64, 64)
    report = report_of(turn.transpose_v5_float4, launch, floats(64, 64), floats(64, 64), 64, 64)
    assert {x.ways for x in report.lines if x.space == "shared"} == {2}
    assert {x.sectors_per_request for x in report.lines if x.space == "global"} == {16}


def test_tiled_product():
    M, N, K = 32, 48, 64
    A, B, C = floats(M, K), floats(K, N), floats(M, N)
    report = report_of(ch06.matmul_v2_tiled, ch06.matmul_launch(M, N), A, B, C, M, N, K)
    warps, tiles = 6 * 8, K // 16
    assert report.conflicts == 0 and report.barriers == 6 * 2 * tiles
    for name in ("a_tile", "b_tile"):
        assert line(report, name, "read", "shared").requests == warps * K
        assert line(report, name, "write", "shared").requests == warps * tiles
    assert line(report, "A").sectors == line(report, "B").sectors == 4 * warps * tiles  # two rows of 16 floats
    assert report.operations == {"float32": 2 * M * N * K}
    assert report.dram_bytes == 4 * (M * K + K * N + M * N)
    assert report.intensity == pytest.approx(2 * M * N * K / report.dram_bytes)
    assert report.uncached_intensity == pytest.approx(2 * M * N * K / (32 * report.sectors))
    assert report.roofline() == pytest.approx(report.intensity * report.peak_bytes)
    assert report.roofline(1e9) == report.peak_flops


def test_naive_product_loops_in_each_lane_the_same():
    M, N, K = 16, 16, 5
    report = report_of(ch06.matmul_v1_naive, ch06.matmul_launch(M, N), *map(floats, (M, K, M), (K, N, N)), M, N, K)
    assert line(report, "A").requests == line(report, "B").requests == 8 * K
    assert line(report, "A").threads == 256 * K
    assert line(report, "A").used == 8 * K * 2 * 4  # two rows a warp, each lane of a row the same element


@pytest.mark.parametrize(
    "dtype, step, ways",
    [(float32, 1, 1), (float32, 2, 2), (float32, 3, 1), (float32, 32, 32), (float64, 1, 1), (float64, 2, 2),
     (float64, 16, 16), (float32, 0, 1)],
)  # fmt: skip
def test_bank_conflicts_by_stride(dtype, step, ways):
    @cuda.jit
    def kernel(out):
        tile = cuda.shared.array(1024, dtype)
        i = cuda.threadIdx.x
        tile[i * step] = 0
        cuda.syncthreads()
        out[i] = tile[i * step]

    report = report_of(kernel, (1, 32), floats(32))
    x = line(report, "tile", "read", "shared")
    assert x.ways == ways and x.ideal_wavefronts == (2 if dtype == float64 else 1)
    assert line(report, "tile", "write", "shared").ways == ways


def test_wide_shared_reads_go_by_quarter_warps():
    @cuda.jit
    def kernel(out, step):
        tile = cuda.shared.array(1024, float32, alignment=16)
        i = cuda.threadIdx.x
        for k in range(32):
            tile[32 * k + i] = 0
        cuda.syncthreads()
        a, b, c, d = load_float4(tile, 4 * i * step)
        out[i] = a + b + c + d

    for step, waves in ((1, 4), (2, 8)):
        x = line(report_of(kernel, (1, 32), floats(32), step), "tile", "read", "shared")
        assert (x.requests, x.wavefronts, x.ideal_wavefronts) == (1, waves, 4)


def test_atomics_on_one_word_take_turns():
    @cuda.jit
    def kernel(out):
        hist = cuda.shared.array(32, int32)
        i = cuda.threadIdx.x
        hist[i] = 0
        cuda.syncthreads()
        cuda.atomic.add(hist, i // 4, 1)
        cuda.syncthreads()
        out[i] = hist[i]

    out = cuda.to_device(np.zeros(32, np.int32))
    x = line(report_of(kernel, (1, 32), out), "hist", "atomic", "shared")
    assert (x.requests, x.wavefronts) == (1, 4)
    assert out.copy_to_host().tolist() == [4] * 8 + [0] * 24


def test_dynamic_shared_memory():
    @cuda.jit
    def kernel(out):
        tile = cuda.shared.array(0, float32)
        i = cuda.threadIdx.x
        tile[i * 4] = i
        cuda.syncwarp()
        out[i] = tile[i * 4]

    report = report_of(kernel, (1, 32, 0, 512), floats(32))
    assert line(report, "tile", "read", "shared").ways == 4


def test_local_memory_lies_lane_beside_lane():
    @cuda.jit
    def kernel(x, out):
        own = cuda.local.array(8, float32)
        i = cuda.grid(1)
        for k in range(8):
            own[k] = x[k * 32 + i]
        out[i] = own[i % 8]

    report = report_of(kernel, (1, 32), floats(256), floats(32))
    assert line(report, "own", "write", "local").sectors_per_request == 4
    read = line(report, "own", "read", "local")
    assert (read.sectors, read.bytes) == (32, 128)  # each lane another element: other words, other sectors
    assert report.sectors == 9 * 4  # of global memory only


# --- control flow ----------------------------------------------------------------------------------------------------


def test_two_ways_of_a_branch():
    @cuda.jit
    def kernel(x):
        i = cuda.grid(1)
        if i % 2:
            x[i] = 1
        else:
            x[i] = 2
        if i // 32 == 0:
            x[i] = 3

    report = report_of(kernel, (2, 64), floats(128))
    assert [(b.executions, b.diverged) for b in report.divergence] == [(4, 4), (4, 0)]
    odd, even, last = (x for x in report.lines)
    assert (odd.requests, odd.threads, even.requests, even.threads) == (4, 64, 4, 64)
    assert (last.requests, last.threads) == (1, 32)


def test_lanes_that_skip_rounds_do_not_shift_the_others():
    @cuda.jit
    def kernel(x, out, n):
        i = cuda.grid(1)
        total = float32(0)
        for k in range(n):
            if (i + k) % 2:  # every other round: half of the lanes, in turn
                total += x[32 * k + i]
        out[i] = total

    x = line(report_of(kernel, (1, 32), floats(128), floats(32), 4), "x")
    assert (x.requests, x.threads, x.sectors) == (4, 64, 16)


def test_loops_of_different_lengths():
    @cuda.jit
    def kernel(x, out):
        i = cuda.grid(1)
        total = float32(0)
        for k in range(i // 8):
            total += x[k]
        out[i] = total
        j = i
        while j > 15:
            j -= 16

    report = report_of(kernel, (1, 32), floats(4), floats(32))
    ends = {b.line: (b.executions, b.diverged) for b in report.divergence}
    assert list(ends.values()) == [(4, 3), (2, 1)]  # 0, 1, 2 or 3 rounds: lanes leave three times while others stay
    x = line(report, "x")
    assert (x.requests, x.threads) == (3, 24 + 0 * 8 + 16 + 8)


def test_a_loop_too_long_to_keep_is_thinned():
    @cuda.jit
    def kernel(x, out, n):
        i = cuda.grid(1)
        total = float32(0)
        for k in range(i % 2, n, 2):
            total += x[(k * 8) % 1024]
        out[i] = total

    n = 200_000
    report = report_of(kernel, (1, 32), floats(1024), floats(32), n)
    x = line(report, "x")
    assert "too long" in report.notices[0]
    assert x.requests == pytest.approx(n / 2, rel=0.03) and x.sectors_per_request == 2


def test_barriers_are_counted_by_blocks():
    n = 5000
    out = floats(1)
    report = report_of(ch07.sum_v1_shared_tree, ch07.sum_launch(n), floats(n), out, n)
    blocks = ch07.sum_launch(n)[0]
    assert report.barriers == 9 * blocks
    halving = next(b for b in report.divergence if b.executions == 8 * 8 * blocks)
    assert halving.diverged == 5 * blocks  # strides 16, 8, 4, 2, 1 cut through the first warp


def test_device_functions_are_looked_into():
    @cuda.jit(device=True)
    def scaled(a, b):
        return a * b + float32(1)

    @cuda.jit(device=True)
    def second(x, i):
        return x[i, 1]

    @cuda.jit
    def kernel(x, out):
        i = cuda.grid(1)
        out[i] = scaled(second(x, i), float32(2))

    report = report_of(kernel, (1, 64), floats(64, 2), floats(64))
    assert line(report, "x").sectors_per_request == 8
    assert report.operations == {"float32": 128} and not report.notices


def test_operations_by_type():
    import math

    @cuda.jit
    def kernel(x, out, n):
        i = cuda.grid(1)
        if i < n:
            y = x[i] * 2.0  # a Python float is a float64
            out[i] = math.exp(x[i]) + x[i] * x[i]
            out[i] += y
            j = i * 2 + 1
            out[j % n] -= x[i]

    n = 40
    operations = report_of(kernel, (1, 64), floats(n), floats(n), n).operations
    assert operations == {"float32": 3 * n, "float64": 2 * n, "math": n}


# --- the report ------------------------------------------------------------------------------------------------------


def test_sampled_blocks_are_scaled_and_all_results_there():
    n = 1 << 14
    out = floats(n)
    report = report_of(ch04.copy_strided, blocks_1d(n), floats(2 * n), out, n, 2, blocks=5)
    assert line(report, "x").sectors == pytest.approx(n / 32 * 8)
    assert report.dram_bytes == pytest.approx(12 * n)
    assert (out.copy_to_host() == 2 * np.arange(n)).all()
    assert "blocks were looked at" in report.notices[0]


def test_several_launches_add_up():
    x, out = floats(N), floats(N)
    with common.memory_report() as report:
        for _ in range(3):
            ch04.copy_v1_element[blocks_1d(N)](x, out, N)
        with common.memory_report() as inner:
            ch04.copy_v1_element[blocks_1d(N)](x, out, N)
    assert (report.launches, inner.launches) == (3, 1)
    assert line(report, "x").requests == 3 * WARPS and line(inner, "x").requests == WARPS


def test_text():
    text = str(report_of(turn.transpose_v2_tile, turn.transpose_launch(64, 64), floats(64, 64), floats(64, 64), 64, 64))
    assert max(map(len, text.splitlines())) <= 120
    assert "out[x_col + i, x_row + tx] = tile[tx, i]" in text
    assert re.search(r"tile +shared +read +128 +4 096 +32\.0", text)
    assert "3 968 of them for bank conflicts" in text and "4 barriers" in text
    text = str(report_of(ch06.matmul_v2_tiled, ch06.matmul_launch(16, 16), *[floats(16, 16)] * 3, 16, 16, 16))
    assert "GFLOP/s" in text and "memory-bound" in text


def test_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg", force=True)
    import matplotlib.pyplot as plt

    report = report_of(ch04.copy_strided, blocks_1d(N), floats(8 * N), floats(N), N, 8)
    figure = report.picture("out[i] = x[i * stride]", warp=1, array="x")
    assert "32 sectors" in figure.axes[0].get_title()
    assert len(figure.axes[0].lines) == 32
    report = report_of(turn.transpose_v2_tile, turn.transpose_launch(64, 64), floats(64, 64), floats(64, 64), 64, 64)
    number = line(report, "tile", "read", "shared").line
    figure = report.picture(number, request=2, array="tile")
    assert "32 different words in 1 bank" in figure.axes[0].get_title()
    with pytest.raises(KeyError, match="was counted on line"):
        report.picture("no such line")
    with pytest.raises(KeyError, match="was not kept"):
        report.picture(number, warp=500)
    plt.close("all")


def test_what_goes_wrong():
    @cuda.jit
    def kernel(x):
        x[cuda.grid(1)] = 1

    with pytest.raises(Exception, match="x: index 32 is outside 0 … 31"):
        report_of(kernel, (1, 64), floats(32))
    with pytest.raises(ValueError, match="blocks = 0"):
        report_of(kernel, (1, 32), floats(32), blocks=0)


def test_a_program(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, common\nimport numpy as np\nfrom numba import cuda\n\n\n@cuda.jit\ndef fill(x):\n"
        "    x[cuda.grid(1)] = 1\n\n\nfill[2, 32](np.zeros(64, np.float32))\nsys.exit(int(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "common.memory", str(script), "3"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 3
    assert "fill: 1 launch, grid 2, block 32" in done.stderr and "Warning" not in done.stderr
    assert re.search(r"x +global write +2 +8 +4\.0", done.stderr)
