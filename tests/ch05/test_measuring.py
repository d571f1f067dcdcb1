"""Chapter 5's instruments: the ways to take a time, occupancy, the roofline, and overlap."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda

from chapters import BACKEND
from chapters.ch05_measuring import kernels as ch05
from chapters.ch05_measuring import streams, timing
from chapters.ch05_measuring.occupancy import LIMITS, Occupancy, occupancy, ridge, roofline

N = 1000
ONE = np.float32(1)


def arrays(_=0):
    return SimpleNamespace(x=cuda.to_device(np.zeros(N, np.float32)), out=cuda.device_array(N, np.float32))


def chain(steps, kernel=ch05.fma_chain_v1_one):
    return lambda a: kernel[ch05.fma_chain_launch(N)](a.x, a.out, ONE, ONE, steps, N)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_time_right_grows_with_the_work():
    sets = [arrays(), arrays()]
    short = timing.time_right(chain(100), sets, rounds=5, batch_ms=1)
    long = timing.time_right(chain(20_000), sets, rounds=5, batch_ms=1)
    assert 0 < short.fastest <= short.median <= short.slowest
    assert long.median > 5 * short.median  # 200 times the steps
    assert short.launches % 2 == 0 and short.launches <= timing.MAX_BATCH
    np.testing.assert_array_equal(sets[1].out.copy_to_host(), 20_000)


def test_time_right_takes_turns():
    seen = []
    timing.time_right(seen.append, ["a", "b", "c"], rounds=2, batch_ms=0.001)
    assert seen[:6] == ["a", "b", "c", "a", "b", "c"]
    assert seen.count("a") == seen.count("b") == seen.count("c") == len(seen) / 3


@pytest.mark.parametrize("sets, rounds", [([], 3), (["a"], 0)])
def test_time_right_refuses(sets, rounds):
    with pytest.raises(ValueError, match="at least 1 of each"):
        timing.time_right(lambda a: None, sets, rounds)


def test_the_first_launch_compiles():
    fresh = timing.fresh_kernel(ch05.fma_chain_v1_one)
    assert fresh is not ch05.fma_chain_v1_one
    first = timing.time_wrong_with_compile(chain(1, fresh), arrays())
    assert first > 5 * timing.time_right(chain(1, fresh), [arrays()], rounds=5, batch_ms=1).median


def test_without_waiting_only_the_launch_is_timed():
    work = chain(300_000)
    wrong = timing.time_wrong_no_sync(work, arrays(), launches=3)
    right = timing.time_right(work, [arrays()], rounds=3, batch_ms=1).median
    if BACKEND == "gpu":
        assert wrong < right / 2
    else:
        assert wrong > right / 4  # there the work is done when a launch returns


def test_the_same_array_is_one_set():
    seen = []
    found = timing.time_wrong_same_array(seen.append, "a")
    assert set(seen) == {"a"} and isinstance(found, timing.Timing)


def test_with_copies_takes_host_arrays():
    host = SimpleNamespace(x=np.arange(N, dtype=np.float32), out=np.zeros(N, np.float32))
    assert timing.time_with_copies(chain(3), host, launches=2) > 0
    np.testing.assert_array_equal(host.out, host.x + 3)


def test_input_sets():
    assert timing.input_sets(lambda i: i, n_bytes=30, at_least=100) == [0, 1, 2, 3]
    assert timing.input_sets(lambda i: i, n_bytes=300, at_least=100) == [0]
    assert len(timing.input_sets(lambda i: i, n_bytes=1, at_least=1 << 30)) == timing.MAX_SETS
    with pytest.raises(ValueError, match="n_bytes = 0"):
        timing.input_sets(lambda i: i, 0)


def test_hold_keeps_a_gpu_waiting_and_nobody_else():
    timing.hold(1)  # calibrated
    cuda.synchronize()
    start, end = cuda.event(), cuda.event()
    start.record()
    timing.hold(20)
    end.record()
    end.synchronize()
    ms = cuda.event_elapsed_time(start, end)
    assert 10 < ms < 100 if BACKEND == "gpu" else ms < 5
    timing.hold(0)
    timing.hold(-1)


# --- occupancy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "threads, registers, shared_bytes, arch, expected",
    [
        # 8 blocks of 8 warps fill the 64 warps of an A100; on a T4 (32 warps) it is 4
        (256, 32, 0, "sm_80", Occupancy(8, 64, 1.0, "warps")),
        (256, 32, 0, "sm_75", Occupancy(4, 32, 1.0, "warps")),
        # 32 warps a block: one fits beside nothing in 48 warps
        (1024, 32, 0, "sm_86", Occupancy(1, 32, 32 / 48, "warps")),
        # 64 registers * 32 lanes = 2048 a warp; 65536 / 2048 = 32 warps
        (1024, 64, 0, "sm_90", Occupancy(1, 32, 0.5, "registers")),
        # 33 * 32 = 1056, rounded up to 1280; a quarter has 16384: 12 warps, 48 in all, 6 blocks of 8
        (256, 33, 0, "sm_90", Occupancy(6, 48, 0.75, "registers")),
        # 255 * 32 = 8160, rounded up to 8192: 2 warps a quarter
        (128, 255, 0, "sm_89", Occupancy(2, 8, 8 / 48, "registers")),
        # one warp a block: the number of blocks is the limit
        (32, 16, 0, "sm_80", Occupancy(32, 32, 0.5, "blocks")),
        (32, 16, 0, "sm_86", Occupancy(16, 16, 16 / 48, "blocks")),
        (32, 16, 0, "sm_89", Occupancy(24, 24, 0.5, "blocks")),
        # 48 KiB and 1 KiB for the system: 228 / 49 = 4; on a T4 64 / 48 = 1
        (128, 32, 48 << 10, "sm_90", Occupancy(4, 16, 0.25, "shared memory")),
        (128, 32, 48 << 10, "sm_75", Occupancy(1, 4, 0.125, "shared memory")),
        # a block of 31 threads is a warp, one of 33 is two
        (31, 16, 0, "sm_90", Occupancy(32, 32, 0.5, "blocks")),
        (33, 16, 0, "sm_90", Occupancy(32, 64, 1.0, "warps")),
        # three warps a block: 64 // 3 = 21 blocks
        (96, 32, 0, "sm_90", Occupancy(21, 63, 63 / 64, "warps")),
    ],
)
def test_occupancy_by_hand(threads, registers, shared_bytes, arch, expected):
    assert occupancy(threads, registers, shared_bytes, arch) == expected


@pytest.mark.parametrize(
    "arguments, needle",
    [
        ((0, 32, 0, "sm_80"), "threads = 0"),
        ((1025, 32, 0, "sm_80"), "threads = 1025"),
        ((256, 0, 0, "sm_80"), "registers = 0"),
        ((256, 256, 0, "sm_80"), "registers = 256"),
        ((256, 32, -1, "sm_80"), "shared_bytes = -1"),
        ((256, 32, 99 * 1024 + 1, "sm_86"), "shared_bytes = 101377"),
        ((1024, 65, 0, "sm_90"), "1024 threads of 65 registers"),
        ((256, 32, 0, "sm_60"), "arch = 'sm_60'"),
    ],
)
def test_occupancy_refuses(arguments, needle):
    with pytest.raises(ValueError, match=needle):
        occupancy(*arguments)


@settings(max_examples=60, deadline=None)
@given(
    threads=st.integers(1, 1024),
    registers=st.integers(1, 64),
    shared=st.integers(0, 48 << 10),
    arch=st.sampled_from(list(LIMITS)),
)
def test_occupancy_stays_within_all_limits(threads, registers, shared, arch):
    found, have = occupancy(threads, registers, shared, arch), LIMITS[arch]
    assert 1 <= found.blocks <= have.blocks and found.warps <= have.warps
    assert found.blocks * threads * registers <= 65536
    assert found.blocks * shared <= have.shared
    assert found.share == found.warps / have.warps
    if shared:  # more of anything never raises it
        assert occupancy(threads, registers, shared - 1, arch).blocks >= found.blocks
    if registers > 1:
        assert occupancy(threads, registers - 1, shared, arch).blocks >= found.blocks


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [32, 96, 256, 1024])
@pytest.mark.parametrize("shared", [0, 10_000, 40_000])
def test_occupancy_is_what_the_driver_says(threads, shared):
    major, minor = cuda.get_current_device().compute_capability[:2]
    arch = f"sm_{major}{minor}"
    if arch not in LIMITS:
        pytest.skip(f"{arch} is not in the table")
    chain(1)(arrays())
    (kernel,) = ch05.fma_chain_v1_one.overloads.values()
    function = kernel._codelibrary.get_cufunc()
    expected = cuda.current_context().get_active_blocks_per_multiprocessor(function, threads, shared)
    assert occupancy(threads, function.attrs.regs, shared, arch).blocks == int(expected)


# --- roofline --------------------------------------------------------------------------------------------------------


def test_roofline():
    assert roofline(1, 100, 10) == 10
    assert roofline(10, 100, 10) == 100 == roofline(1000, 100, 10)
    assert ridge(100, 10) == 10
    np.testing.assert_array_equal(roofline(np.array([0, 5, 20]), 100, 10), [0, 50, 100])


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, chunks", [(1, 1), (1, 8), (63, 2), (64, 2), (65, 2), (1025, 3), (4096, 8)])
def test_chunks_cover_everything_once(n, chunks):
    parts = streams.chunk_slices(n, chunks)
    assert 1 <= len(parts) <= chunks
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    assert all(part.start % 64 == 0 for part in parts)


@pytest.mark.parametrize("n", [1, 33, 1025, 5000])
@pytest.mark.parametrize("chunks, n_streams", [(1, 1), (4, 2), (7, 3)])
def test_both_ways_give_the_same(rng, n, chunks, n_streams):
    x, out = cuda.pinned_array(n, np.float32), cuda.pinned_array(n, np.float32)
    x[:] = rng.integers(-8, 9, n)
    device = cuda.device_array(n, np.float32)
    streams.run_in_order(x, out, device, 9)
    np.testing.assert_array_equal(out, x + 9)
    out[:] = -1
    streams.run_overlapped(x, out, device, 9, chunks, [cuda.stream() for _ in range(n_streams)])
    np.testing.assert_array_equal(out, x + 9)


def test_overlap(request):
    found = streams.overlap(n=1 << 16, steps=20, chunks=4, n_streams=2, rounds=3)
    assert min(found.copy_in, found.compute, found.copy_out) > 0
    assert found.ideal == max(found.copy_in, found.compute, found.copy_out)
    assert found.in_order > 0 and found.overlapped > 0
    if not request.config.getoption("--sanitize"):  # which makes kernels so slow that times say nothing
        for _ in range(4):  # other programs may stretch one of the times
            if found.in_order > found.ideal / 2:
                break
            found = streams.overlap(n=1 << 16, steps=20, chunks=4, n_streams=2, rounds=3)
        assert found.in_order > found.ideal / 2


def test_overlap_notices_a_wrong_result(monkeypatch):
    monkeypatch.setattr(streams, "run_overlapped", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="wrong result"):
        streams.overlap(n=1000, steps=1, rounds=1)


@pytest.mark.parametrize("wrong", ["n", "chunks", "n_streams", "rounds"])
def test_overlap_refuses(wrong):
    with pytest.raises(ValueError, match=f"{wrong} = 0"):
        streams.overlap(**{wrong: 0})
    with pytest.raises(ValueError, match="0 streams"):
        streams.run_overlapped(np.zeros(1), np.zeros(1), None, 1, 1, [])
