"""Whose the rows of a step are: the arrays that the kernels read, made from a `Plan`."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.plan import Plan
from chapters.ch12_flash.paged import paged_slots

FIELDS = ("tokens", "positions", "row_seq", "slot_mapping", "logits_rows")


class Batch:
    """Room for ``max_rows`` rows of ``max_seqs`` sequences of up to ``max_blocks`` blocks, at fixed addresses.

    On the device, int32, after `fill`: tokens, positions, row_seq, slot_mapping (rows,), logits_rows (n_logits,), and
    block_table (max_seqs, max_blocks): see chapter 12's ``ragged.py``.
    """

    def __init__(self, max_rows: int, max_seqs: int, max_blocks: int) -> None:
        self._host = np.zeros((len(FIELDS), max_rows), np.int32)
        self._rows = cuda.device_array((len(FIELDS), max_rows), np.int32)
        self._table = np.zeros((max_seqs, max_blocks), np.int32)
        self.block_table = cuda.to_device(self._table)
        self.tokens, self.positions, self.row_seq, self.slot_mapping, self.logits_rows = (
            self._rows[i] for i in range(len(FIELDS))
        )
        self.rows = self.n_logits = 0

    def fill(self, plan: Plan, block_size: int) -> None:
        """Describe a plan's rows, in two copies. All tokens that it runs over must be known to the host."""
        tokens, positions, row_seq, slot_mapping, logits_rows = self._host
        row = self.n_logits = 0
        for seq, part in enumerate(plan.parts):
            end, blocks = row + part.count, part.sequence.blocks
            tokens[row:end] = part.sequence.tokens[part.start : part.start + part.count]
            positions[row:end], row_seq[row:end] = range(part.start, part.start + part.count), seq
            self._table[seq, : len(blocks)] = blocks
            if part.samples:
                logits_rows[self.n_logits] = end - 1
                self.n_logits += 1
            row = end
        slot_mapping[:row] = paged_slots(self._table, row_seq[:row], positions[:row], block_size)
        self.rows = row
        self._rows.copy_to_device(self._host)
        self.block_table.copy_to_device(self._table)
