"""What ``make bench CH=08`` measures: histograms, scans, stream compaction and the k largest."""

import numpy as np

from chapters.ch08_atomics_scan import compact as compacts
from chapters.ch08_atomics_scan import kernels as ch08
from chapters.ch08_atomics_scan import scan as block_scans
from chapters.ch08_atomics_scan import scan_array, topk
from common.bench import Ladder

ALIKE = [0, 50, 90, 100]  # percent of the keys that are the same one
THRESHOLD = np.float32(0.5)


def _keys(rng, n, n_bins, alike=0):
    """n keys drawn from n_bins, ``alike`` percent of them replaced by one and the same."""
    keys = rng.integers(0, n_bins, n, dtype=np.int32)
    keys[rng.random(n) < alike / 100] = n_bins // 2
    return {"keys": keys, "out": np.zeros(n_bins, np.int32), "n": n, "n_bins": n_bins}


def _numbers(rng, n):
    return rng.integers(-100, 100, n, dtype=np.int32)


def _scan_block_inputs(rng, n):
    """An inclusive scan of the numbers moved one place to the right is their exclusive scan: one reference for all."""
    x = _numbers(rng, n)
    return {"x": x, "moved": np.concatenate([[0], x[:-1]]).astype(np.int32), "out": np.zeros_like(x), "n": n}


def _scan_inputs(rng, n):
    x = _numbers(rng, n)
    return {"x": x, "sums": np.zeros(scan_array.scan_scratch(n), np.int32), "out": np.zeros_like(x), "n": n}


def _compact_inputs(rng, size):
    """Ones to keep and zeros to drop: whatever the order in which they are kept, the result looks alike."""
    n, percent = size
    return {
        "x": (rng.random(n) < percent / 100).astype(np.float32),
        "out": np.zeros(n, np.float32),
        "indices": np.zeros(n, np.int32),
        "count": np.zeros(1, np.int32),
        "counts": np.zeros(scan_array.scan_scratch(n), np.int32),
        "n": n,
    }


def _compact_expected(a):
    out = np.zeros(a.n, np.float32)
    values, _ = compacts.compact_reference(a.x, THRESHOLD)
    out[: len(values)] = values
    return out


def _top_k_inputs(rng, size):
    n, k = size
    x = rng.standard_normal(n, dtype=np.float32)
    return {"x": x, "out": np.zeros(k, np.float32), "indices": np.zeros(k, np.int32), "n": n, "k": k}


def _counted(kernel):
    """A launch of a compaction with a counter; the counter is set to 0 by a launch of its own."""

    def launch(a):
        compacts.clear_count[1, 1](a.count)
        kernel[compacts.compact_launch(a.n)](a.x, a.out, a.indices, a.count, a.n, THRESHOLD)

    return launch


def _numpy_histogram(a):
    a.out[...] = np.bincount(a.keys, minlength=a.n_bins)


def _torch_histogram(a):
    import torch

    a.out.copy_(torch.histc(a.keys, a.n_bins, 0, a.n_bins))  # bincount waits for the host, which no graph allows


def _numpy_compact(a):
    indices = np.flatnonzero(a.x > THRESHOLD)
    a.indices[: len(indices)] = indices
    np.compress(a.x > THRESHOLD, a.x, out=a.out[: len(indices)])


def _numpy_top_k(a):
    indices = np.argpartition(a.x, a.n - a.k)[a.n - a.k :]
    a.indices[...] = indices[np.argsort(-a.x[indices])]
    a.out[...] = a.x[a.indices]


def _torch_cumsum(a):
    import torch

    torch.cumsum(a.moved if hasattr(a, "moved") else a.x, 0, dtype=torch.int32, out=a.out)


def _torch_top_k(a):
    import torch

    values, indices = torch.topk(a.x, a.k)
    a.out.copy_(values)
    a.indices.copy_(indices)


HISTOGRAMS = {
    "histogram_v1_global": lambda a: ch08.histogram_v1_global[ch08.histogram_v1_launch(a.n)](
        a.keys, a.out, a.n, a.n_bins
    )
} | {
    kernel.__name__: lambda a, kernel=kernel: kernel[ch08.histogram_launch(a.n, a.n_bins)](a.keys, a.out, a.n, a.n_bins)
    for kernel in (ch08.histogram_v2_privatised, ch08.histogram_v3_coarsened, ch08.histogram_v4_copies)
}
HISTOGRAM_LIBRARY = {"cpu": ("`numpy.bincount`", _numpy_histogram), "gpu": ("`torch.histc`", _torch_histogram)}

LADDERS = [
    Ladder(
        name="histogram",
        title="Histogram of n int32 keys, 256 bins, all equally likely",
        unit="GB/s",
        sizes={"cpu": [1 << 16, 1 << 22], "gpu": [1 << 16, 1 << 20, 1 << 26]},
        make=lambda rng, n: _keys(rng, n, 256),
        work=lambda n: 4 * n,
        versions=HISTOGRAMS,
        expected=lambda a: ch08.histogram_reference(a.keys, a.n_bins),
        library=HISTOGRAM_LIBRARY,
        tolerance=0,
    ),
    Ladder(
        name="histogram_skew",
        title="Histogram in 256 bins, by how many of the keys are one and the same",
        unit="GB/s",
        sizes={"cpu": [(1 << 20, s) for s in ALIKE], "gpu": [(1 << 24, s) for s in ALIKE]},
        make=lambda rng, size: _keys(rng, size[0], 256, size[1]),
        work=lambda size: 4 * size[0],
        versions=HISTOGRAMS,
        expected=lambda a: ch08.histogram_reference(a.keys, a.n_bins),
        library=HISTOGRAM_LIBRARY,
        tolerance=0,
        label=lambda size: f"{size[1]} %",
    ),
    Ladder(
        name="histogram_bins",
        title="Histogram of n keys in n_bins bins (n × n_bins)",
        unit="GB/s",
        sizes={
            "cpu": [(1 << 14, 4096), (1 << 20, 16), (1 << 20, 4096), (1 << 20, 50257)],
            "gpu": [(1 << 14, 4096), (1 << 24, 16), (1 << 24, 4096), (1 << 24, 50257)],
        },
        make=lambda rng, size: _keys(rng, *size),
        work=lambda size: 4 * size[0],
        versions=HISTOGRAMS,
        expected=lambda a: ch08.histogram_reference(a.keys, a.n_bins),
        library=HISTOGRAM_LIBRARY,
        fits=lambda name, size: name == "histogram_v1_global" or size[1] <= ch08.MAX_SHARED_BINS,
        tolerance=0,
    ),
    Ladder(
        name="scan_block",
        title="Scan of n int32 by one block, millions a second",
        unit="M/s",
        sizes={"cpu": [32, 1024], "gpu": [32, 1024]},
        make=_scan_block_inputs,
        work=lambda n: n,
        versions={
            "scan_v1_hillis_steele": lambda a: block_scans.scan_v1_hillis_steele[block_scans.scan_block_launch(a.n)](
                a.moved, a.out, a.n
            ),
            "scan_v2_blelloch": lambda a: block_scans.scan_v2_blelloch[block_scans.scan_block_launch(a.n, 2)](
                a.x, a.out, a.n
            ),
            "scan_v3_warp": lambda a: block_scans.scan_v3_warp[block_scans.scan_block_launch(a.n)](a.x, a.out, a.n),
        },
        expected=lambda a: block_scans.scan_reference(a.x, exclusive=True),
        library={
            "cpu": ("`numpy.cumsum`", lambda a: np.cumsum(a.moved, dtype=np.int32, out=a.out)),
            "gpu": ("`torch.cumsum`", _torch_cumsum),
        },
        tolerance=0,
        share="library",
    ),
    Ladder(
        name="scan",
        title="Inclusive scan of n int32",
        unit="GB/s",
        sizes={"cpu": [1 << 10, 1 << 16, 1 << 22], "gpu": [1 << 10, 1 << 20, 1 << 24, 1 << 26]},
        make=_scan_inputs,
        work=lambda n: 8 * n,
        versions={
            "scan_v1_hillis_steele": lambda a: block_scans.scan_v1_hillis_steele[block_scans.scan_block_launch(a.n)](
                a.x, a.out, a.n
            ),
            "scan": lambda a: scan_array.scan(a.x, a.sums, a.out, a.n),
        },
        expected=lambda a: block_scans.scan_reference(a.x),
        library={
            "cpu": ("`numpy.cumsum`", lambda a: np.cumsum(a.x, dtype=np.int32, out=a.out)),
            "gpu": ("`torch.cumsum`", _torch_cumsum),
        },
        fits=lambda name, n: name == "scan" or n <= block_scans.TILE,
        tolerance=0,
    ),
    Ladder(
        name="compact",
        title="Stream compaction of n floats, by the share that is kept",
        unit="GB/s",
        sizes={
            "cpu": [(1 << 12, 50), (1 << 20, 1), (1 << 20, 50), (1 << 20, 99)],
            "gpu": [(1 << 12, 50), (1 << 24, 1), (1 << 24, 50), (1 << 24, 99)],
        },
        make=_compact_inputs,
        work=lambda size: 4 * size[0] + 8 * size[0] * size[1] / 100,
        versions={
            "compact_v1_atomic": _counted(compacts.compact_v1_atomic),
            "compact_v2_warp_atomic": _counted(compacts.compact_v2_warp_atomic),
            "compact": lambda a: compacts.compact(a.x, a.counts, a.out, a.indices, a.n, THRESHOLD),
        },
        expected=_compact_expected,
        library={"cpu": ("`numpy.compress`", _numpy_compact)},
        tolerance=0,
        label=lambda size: f"{size[0]:,}".replace(",", " ") + f", {size[1]} %",
    ),
    Ladder(
        name="top_k",
        title="The k largest of n floats (n × k), millions of n a second",
        unit="M/s",
        sizes={
            "cpu": [(4096, 40), (50257, 40), (50257, 1000)],
            "gpu": [(4096, 40), (50257, 40), (50257, 1000), (1 << 20, 40)],
        },
        make=_top_k_inputs,
        work=lambda size: size[0],
        versions={
            "top_k_v1_radix_select": lambda a: topk.top_k[topk.top_k_launch(a.n, a.k)](a.x, a.out, a.indices, a.n, a.k)
        },
        expected=lambda a: topk.top_k_reference(a.x, a.k)[0],
        library={"cpu": ("`numpy.argpartition`", _numpy_top_k), "gpu": ("`torch.topk`", _torch_top_k)},
        tolerance=0,
        share="library",
    ),
]
QUICK = {  # for the demo
    "histogram": [1 << 18],
    "histogram_skew": [(1 << 18, 0), (1 << 18, 100)],
    "histogram_bins": [(1 << 14, 4096), (1 << 18, 16)],
    "scan_block": [1024],
    "scan": [1 << 18],
    "compact": [(1 << 18, 50)],
    "top_k": [(50257, 40)],
}
