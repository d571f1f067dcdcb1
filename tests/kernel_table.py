"""The table of what the tests do with each kernel of the book, written down while they run.

A row a kernel; it is whole if

* ``reference``: a test fails when the kernel does nothing;
* ``odd``: it has run on an array whose elements do not fill whole warps, or stands in `WHOLE` with the reason;
* ``shapes``: it has run with two block shapes, or stands in `ONE_SHAPE` with the reason;
* ``sanitized``: it has run under the sanitizer (``make sanitize``).

A test that has passed is run again for the first of these, with the kernel's launches left out, and for the third, with
another block: as long as no other test has shown it, on the CPU backend, and not if hypothesis made it.

The tests are run in parts. Each run that is green adds what it saw to a file in pytest's cache folder, which counts
as long as the sources are the same; ``--kernel-table`` makes a run print what is missing in all of them, and fail.
"""

import hashlib
import os
import signal
import threading
from collections import defaultdict

import pytest

from common.cpu import launch as launcher

PATIENCE = 240  # seconds for a test that is run again: without its kernel's results, another's loop may have no end
TRIES = 6  # tests that are run again for a kernel, by each worker, before it is given up

# Kernels whose block is part of what they are.
ONE_SHAPE = {
    "a thread an element of a tile in shared memory": [
        "transpose_v2_tile", "transpose_v3_padded", "transpose_v4_unrolled", "transpose_v5_float4", "matmul_v2_tiled",
        "matmul_v3_any_shape", "sum_v1_shared_tree", "scan_v1_hillis_steele", "scan_v2_blelloch", "scan_v3_warp",
        "attention_scores_v2_tiled", "attention_values_v2_tiled",
    ],
    "its threads share a tile of the result between them, in registers": [
        "gemm_v1_register_tile", "gemm_v2_vector_loads", "gemm_v3_double_buffer", "gemm_v4_half_storage",
        "gemm_v5_tensor_core", "gemm_v6_pipeline", "gemm_v7_warpgroup", "gemm_v8_tma", "gemm_bias",
        "gemm_bias_residual", "gemm_bias_gelu", "flash_v2_shared_tiles", "flash_v3_register_tiles", "flash_v4_64",
        "flash_v4_128", "flash_v5_pages_64", "flash_v5_pages_128", "gemm_parts_32", "gemm_parts_64",
        "gemm_qkv_pages_32", "gemm_qkv_pages_64", "gemm_gelu_32", "gemm_gelu_64", "gemm_logits_32", "gemm_logits_64",
        "gemm_qkv_rope_32", "gemm_qkv_rope_64", "gemm_swiglu_32", "gemm_swiglu_64",
    ],
    "so many warps share the rows or keys, and have room for their sums": [
        "gemv_v4_half", "gemv_v5_tensor_core", "gemv_bias_residual", "gemv_wide_residual", "gemv_ln",
        "gemv_ln_gelu", "gemv_ln_qkv",
        "gemv_parts_residual", "gemv_ln_logits", "gemv_rms_qkv_rope", "gemv_rms_swiglu", "gemv_rms_logits",
        "decode_v1_block_per_head", "decode_v2_split_k", "decode_v3_chunks",
        "decode_v4_parts", "paged_v1_block_per_head", "paged_v2_split_k", "scan_tile_offsets",
        "paged_v3_rows", "paged_v4_parts", "paged_v6_segments",
    ],
    "a thread has so many of the bins, or of the tokens of a slice": [
        "bin_rows", "cut_rows", "pick_rows",
    ],
    "a lane for each row of a square of the matrix": ["gemv_rows"],
    "a thread for each column of a panel": [
        "linear_v1_column", "linear_v2_panels", "linear_v3_rows", "pack_columns", "pack_rows", "pack_q8", "pack_q4",
        "quant_v1_bytes", "quant_v2_nibbles", "quant_v3_rows", "quant_v4_rows",
    ],
    "a thread for each two of the results that it sorts": ["top_k_v1_radix_select"],
    "a thread for 8 numbers of the result, whose launch counts on it": ["combine_parts", "combine_segments"],
    "a lane for each of 32 keys, and then for each element of a value": ["paged_v7_key_per_lane"],
    "a lane for each of 32 queries": ["paged_v8_query_per_lane"],
    "a single thread sets a number": ["clear_count", "kv_advance"],
}  # fmt: skip
# Kernels with shared memory that does not depend on the block: any block of whole warps will do.
ANY_BLOCK = [
    "sum_v3_warp_then_block", "sum_v4_float4", "histogram_v2_privatised", "histogram_v3_coarsened",
    "histogram_v4_copies", "softmax_v1_naive", "logsumexp_row", "pick_best", "draw_token_at", "draw_rows",
    "best_slices",
]  # fmt: skip
# Kernels that take no size at which a warp would be cut.
WHOLE = {
    "whole tiles only; version 3 takes any shape": ["matmul_v2_tiled"],
    "it sets one number": ["clear_count", "kv_advance"],
    "it only takes its time": ["busy_kernel"],
}
ONE_SHAPE, WHOLE = ({name: why for why, names in table.items() for name in names} for table in (ONE_SHAPE, WHOLE))


class Table:
    """What one process has seen: ``rows[kernel] = {"reference", "odd", "sanitized": bool, "shapes": set}``."""

    def __init__(self):
        self.rows = defaultdict(lambda: {"reference": False, "odd": False, "sanitized": False, "shapes": set()})
        self.change = {}  # {kernel: what becomes of its launches' (grid, block)}; None for a launch that is left out
        self.launched = []  # by the test that is running
        self.tries = defaultdict(int)

    def watch(self):
        """From now on every launch on the CPU backend is noted."""
        original = launcher.Dispatcher._launch

        def _launch(kernel, grid, block, shared_bytes, args):
            if kernel in self.change:
                getattr(launcher._mine, "steps", []).append(None)  # no graph may keep this (see common.cpu.replay)
                geometry = self.change[kernel](grid, block)
                return geometry and original(kernel, *geometry, shared_bytes, args)
            result = original(kernel, grid, block, shared_bytes, args)
            name = name_of(kernel)
            if name is not None:
                self._note(name, kernel, block, args)
            return result

        launcher.Dispatcher._launch = _launch

    def _note(self, name, kernel, block, args):
        row = self.rows[name]
        row["shapes"].add(tuple(block))
        row["odd"] = row["odd"] or any(getattr(array, "size", 0) % 32 and array.size > 32 for array in args)
        row["sanitized"] = row["sanitized"] or launcher._sanitizer is not None
        if kernel not in self.launched:
            self.launched.append(kernel)

    def begin(self):
        """A test begins."""
        self.launched = []

    def again(self, test):
        """``test`` has passed: does it fail if one of its kernels does nothing, and pass if that has another block?"""
        for kernel in self.launched:
            name, row = kernel.py_func.__name__, self.rows[name_of(kernel)]
            fixed = name in ONE_SHAPE or (uses_shared(kernel.py_func) and name not in ANY_BLOCK)
            wanted = len(row["shapes"]) == 1 and not fixed
            if (row["reference"] and not wanted) or self.tries[kernel] == TRIES:
                continue
            self.tries[kernel] += 1
            if self._passes(test, kernel, left_out):
                continue  # it looks at something else
            row["reference"] = True
            if wanted and any(self._passes(test, kernel, change) for change in (as_many_threads, as_many_blocks)):
                row["shapes"].add(other_block(*row["shapes"]))

    def _passes(self, test, kernel, change):
        """Whether a test passes, in `PATIENCE` seconds, while a kernel's launches are changed."""
        self.change = {kernel: change}
        late = threading.Event()
        timer = threading.Timer(PATIENCE, lambda: (late.set(), os.kill(os.getpid(), signal.SIGINT)))
        timer.daemon = True
        timer.start()
        try:
            test()
            return True
        except (Exception, SystemExit, pytest.fail.Exception):
            return False
        except KeyboardInterrupt:
            if not late.is_set():
                raise
            return False
        finally:
            timer.cancel()
            self.change = {}

    def dump(self):
        """The rows as JSON takes them."""
        return {name: row | {"shapes": sorted(map(list, row["shapes"]))} for name, row in self.rows.items()}


def uses_shared(function):
    """Whether a kernel, or a device function that it calls, has shared memory."""
    code = function.__code__
    called = (getattr(function.__globals__.get(name), "py_func", None) for name in code.co_names)
    return "shared" in code.co_names or any(uses_shared(inner) for inner in called if inner not in (None, function))


def left_out(grid, block):
    """No launch."""
    return None


def as_many_threads(grid, block):
    """``(grid, block)`` of another block, and of as many threads or more along each axis."""
    shape = other_block(block)
    return tuple(-(-blocks * old // new) for blocks, old, new in zip(grid, block, shape)), shape


def as_many_blocks(grid, block):
    """``(grid, block)`` of another block, and the same grid: for blocks that have work of their own."""
    return grid, other_block(block)


def other_block(block):
    """Another block of as many axes, of whole warps."""
    return tuple(new if size > 1 else 1 for size, new in zip(block, (64, 3, 3) if block[1] > 1 else (96, 1, 1)))


def name_of(kernel):
    """``"ch09_gemm.gemm_v1_register_tile"``; None for a kernel that is not one of the book."""
    module = (kernel.py_func.__module__ or "").split(".")
    if module[0] != "chapters" or "exercises" in module or "<" in kernel.py_func.__qualname__:
        return None
    return f"{module[1]}.{kernel.py_func.__name__}"


def merged(parts):
    """The rows of several runs or processes as one table."""
    table = {}
    for part in parts:
        for name, row in part.items():
            into = table.setdefault(name, {"reference": False, "odd": False, "sanitized": False, "shapes": []})
            for key in ("reference", "odd", "sanitized"):
                into[key] = into[key] or row[key]
            into["shapes"] += [shape for shape in row["shapes"] if shape not in into["shapes"]]
    return table


def missing(table, kernels):
    """A line for each of ``kernels`` that lacks something in ``table``, and for each exception of no kernel's."""
    known = {name.partition(".")[2] for name in kernels}
    lines = [f"{name}: an exception, but no kernel" for name in sorted((ONE_SHAPE.keys() | WHOLE.keys()) - known)]
    for name in kernels:
        row = table.get(name)
        if row is None:
            lines.append(f"{name}: no test launches it")
            continue
        lacks = [what for key, what in LACKS.items() if not row[key]]
        kernel = name.partition(".")[2]
        if not row["odd"] and kernel not in WHOLE:
            lacks.append("no odd size")
        if len(row["shapes"]) < 2 and kernel not in ONE_SHAPE:
            lacks.append(f"no block shape but {row['shapes'][0]}")
        if lacks:
            lines.append(f"{name}: {', '.join(lacks)}")
    return lines


LACKS = {
    "reference": "no test fails when it does nothing",
    "sanitized": "not run under the sanitizer",
}


def sources_digest(root):
    """A digest of the kernels, of their tests and of what both run on: rows of other sources say nothing."""
    digest = hashlib.sha256()
    for folder in ("chapters", "ch14_mini_llm", "common", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def all_kernels():
    """The names of the book's kernels, from the chapters' sources."""
    from chapters import lessons

    return [f"{folder.name}.{name}" for folder in lessons.folders() for name in lessons.kernels(folder)]
