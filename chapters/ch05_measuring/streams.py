"""Copying and computing at the same time: chunks on several streams.

A *stream* is a queue of its own. What is in one stream runs in order; what is in different streams may run at the same
time, and a GPU has separate engines for copying in, for copying out and for computing. Cut the work into chunks, give
each chunk copy, kernel, copy in one stream and the next chunk another stream: the second chunk comes in while
the first is computed. The arrays on the host must be *pinned*: held in place, so that the copy engine can read them
without the processor's help. A copy from ordinary memory goes through a buffer and makes everybody wait.

On the CPU backend every call has finished when it returns, and nothing overlaps: chunks only add launches.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
from numba import cuda

from chapters.ch05_measuring.kernels import fma_chain, fma_chain_launch

A, B = np.float32(1), np.float32(1)  # y = 1 * y + 1: adds the number of steps, exactly while below 2**24
ALIGN = 64  # floats: a chunk begins at a multiple of 256 bytes


@dataclass(frozen=True)
class Overlap:
    """Milliseconds of the three parts alone, of all in order, and of the same work in chunks on several streams."""

    copy_in: float
    compute: float
    copy_out: float
    in_order: float
    overlapped: float

    @property
    def ideal(self):
        """The longest part alone: what perfect overlap would take, with copies in both directions at once."""
        return max(self.copy_in, self.compute, self.copy_out)


def run_in_order(x, out, device, steps):
    """x to the device, fma_chain, back to out: one after another. Returns when all is done.

    x, out: (n,) float32 on the host. device: (n,) float32 on the device. steps: int.
    """
    device.copy_to_device(x)
    fma_chain[fma_chain_launch(x.size)](device, device, A, B, steps, x.size)
    device.copy_to_host(out)
    cuda.synchronize()


def run_overlapped(x, out, device, steps, chunks, streams):
    """Like :func:`run_in_order`, in ``chunks`` chunks that take turns on ``streams``. Returns when all is done.

    x, out: pinned. streams: a list of streams. Raises ValueError if there is no chunk or no stream.
    """
    if chunks < 1 or not streams:
        raise ValueError(f"{chunks} chunks on {len(streams)} streams: overlapping needs at least 1 of each")
    for number, part in enumerate(chunk_slices(x.size, chunks)):
        stream = streams[number % len(streams)]
        piece, n = device[part], part.stop - part.start
        piece.copy_to_device(x[part], stream=stream)
        grid, block = fma_chain_launch(n)
        fma_chain[grid, block, stream](piece, piece, A, B, steps, n)
        piece.copy_to_host(out[part], stream=stream)  # queued, not done: out is not to be read yet
    for stream in streams:
        stream.synchronize()


def chunk_slices(n, chunks):
    """``[slice, …]``: 0 … n cut into at most ``chunks`` parts, each beginning at a multiple of 64."""
    size = -(-n // chunks)
    size = (size + ALIGN - 1) // ALIGN * ALIGN
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


def overlap(n=1 << 22, steps=None, chunks=8, n_streams=3, rounds=5):
    """Time both ways on ``n`` floats: an :class:`Overlap`, medians of ``rounds`` rounds.

    steps: of fma_chain; by default as many as make the kernel take as long as a copy.
    Raises ValueError if a number is not positive, and RuntimeError if a way leaves a wrong result: on a GPU the sign
    of a missing ``synchronize``.
    """
    for name, value in (("n", n), ("chunks", chunks), ("n_streams", n_streams), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} = {value}: overlap needs at least 1")
    x, out = cuda.pinned_array(n, np.float32), cuda.pinned_array(n, np.float32)
    x[:] = np.arange(n) % 1000
    device = cuda.to_device(x)
    streams = [cuda.stream() for _ in range(n_streams)]
    grid, block = fma_chain_launch(n)

    def compute(count):
        fma_chain[grid, block](device, device, A, B, count, n)

    compute(1)  # compiled
    copy_in = _median(lambda: device.copy_to_device(x), rounds)
    copy_out = _median(lambda: device.copy_to_host(out), rounds)
    if steps is None:
        steps = max(1, round(256 * copy_in / _median(lambda: compute(256), rounds)))

    def checked(way, *arguments):
        out[:] = -1
        way(x, out, device, steps, *arguments)  # warm-up, and the one that is looked at
        if not np.array_equal(out, x + np.float32(steps)):
            raise RuntimeError(f"{way.__name__} left a wrong result")
        return _median(lambda: way(x, out, device, steps, *arguments), rounds)

    return Overlap(
        copy_in=copy_in,
        compute=_median(lambda: compute(steps), rounds),
        copy_out=copy_out,
        in_order=checked(run_in_order),
        overlapped=checked(run_overlapped, chunks, streams),
    )


def _median(work, rounds):
    """Milliseconds of ``work()`` and waiting for it on the host's clock: right for work of milliseconds."""
    times = []
    for _ in range(rounds):
        cuda.synchronize()
        start = time.perf_counter()
        work()
        cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
