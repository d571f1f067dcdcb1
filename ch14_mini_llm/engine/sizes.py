"""How large an engine is: blocks, sequences and rows, as asked for or as there is memory."""

from __future__ import annotations

from dataclasses import dataclass

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.cache.pages import block_bytes
from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.model.roles import Model
from chapters.ch12_flash.paged_half import BLOCK_SIZES

LEVELS = {"kv": np.float32, "fast": np.float16}  # and the type of keys and values
CPU_BYTES = 1 << 30  # for keys and values, unless num_blocks says otherwise
GPU_SHARE = 0.85  # of the memory that is free on a GPU
PROMPT_ROWS = {"kv": 64, "fast": 1024}  # of a step, besides those of sequences that decode
ROWS_STEP = 64


@dataclass(frozen=True)
class Sizes:
    """num_blocks: of the pool, of block_size tokens, without block 0. max_batch: sequences that run at a time.
    max_rows: tokens of a step. max_blocks: of a sequence."""

    num_blocks: int
    block_size: int
    max_batch: int
    max_rows: int
    max_blocks: int


def check_level(level: str) -> None:
    """Raises `RequestError` for another level than an engine's."""
    if level not in LEVELS:
        raise RequestError(f"level is {level!r}; an engine's is one of {', '.join(LEVELS)}")


def blocks_that_fit(
    model: Model, level: str, block_size: int, max_batch: int, gpu_share: float = GPU_SHARE, cpu_bytes: int = CPU_BYTES
) -> int:
    """Blocks for ``max_batch`` whole texts, or as many as there is memory for: a share of what is free on a GPU."""
    room = gpu_share * cuda.current_context().get_memory_info()[0] if common.BACKEND == "gpu" else cpu_bytes
    longest = -(-model.n_ctx // block_size)
    return max(1, min(max_batch * longest, int(room // block_bytes(model, block_size, LEVELS[level]))))


def choose_sizes(
    model: Model, level: str, num_blocks: int | None, block_size: int, max_batch: int, max_rows: int | None
) -> Sizes:
    """Sizes for an engine; None: as much as there is memory. Raises `RequestError`."""
    check_level(level)
    for name, value, low in ("block_size", block_size, 4), ("max_batch", max_batch, 1):
        if value < low:
            raise RequestError(f"{name} is {value}; it must be at least {low}")
    if block_size not in BLOCK_SIZES:
        raise RequestError(f"block_size is {block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if max_rows is None:
        max_rows = -(-(max_batch + PROMPT_ROWS[level]) // ROWS_STEP) * ROWS_STEP
    if max_rows <= max_batch:
        raise RequestError(f"max_rows is {max_rows}; it must be above max_batch, {max_batch}, or no prompt gets on")
    longest = -(-model.n_ctx // block_size)
    if num_blocks is None:
        num_blocks = blocks_that_fit(model, level, block_size, max_batch)
    if num_blocks < 1:
        raise RequestError(f"num_blocks is {num_blocks}; it must be at least 1")
    return Sizes(num_blocks, block_size, max_batch, max_rows, longest)
