"""Whose the rows of a step are: the arrays that the kernels read, made from a `Plan`.

They lie on the device at fixed addresses. After a step in which every sequence had one row, the kernels themselves have
moved them one token on (chapter 13's ``append_rows``): if the next step has the same sequences, nothing is copied but
the blocks that are new. So the host need not know a step's tokens to launch the next one.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.plan import Plan, Scores
from ch14_mini_llm.forward.shapes import Shape
from ch14_mini_llm.model.roles import Model
from chapters.ch12_flash.paged import paged_slots
from chapters.ch12_flash.paged_half import TILE_FIELDS, query_tiles, segment_keys
from chapters.ch12_flash.tensor_core import queries_of
from chapters.ch13_llm_ops.batch import place_rows, place_rows_launch
from common.staging import Staging

FIELDS = ("tokens", "source", "positions", "row_seq", "slot_mapping", "logits_rows", "ring")
PLACES = 4  # steps whose tokens the host may not have read yet, and some more


def last_embedding(model: Model) -> tuple:
    """The two tables with which a step's last kernel embeds its tokens; the second, of positions, has no line in a
    model that has none."""
    wte, wpe = model.embedding
    return wte, cuda.to_device(np.zeros((0, model.d_model), np.float32)) if wpe is None else wpe


class Batch:
    """Room for ``max_rows`` rows of ``max_seqs`` sequences of up to ``max_blocks`` blocks.

    On the device, int32, after `fill`: tokens, source, positions, row_seq, slot_mapping (rows,) and logits_rows, ring
    (n_logits,), as chapter 13's ``embed_rows`` and ``append_rows`` have them; block_table (max_seqs, max_blocks);
    tiles (n_tiles, 7), of chapter 12's ``query_tiles``; n_steps (1,), how many rows in front are a sequence each;
    chosen (n_logits,), each step's new tokens. shown: (4, max_seqs), in the host's memory: the last steps' tokens.
    """

    def __init__(self, max_rows: int, max_seqs: int, max_blocks: int, block_size: int, head_dim: int) -> None:
        max_tokens = max_blocks * block_size
        self.segment = segment_keys(max_tokens)  # of keys, among which a prompt's long tiles are divided
        n_tiles = -(-max_rows // queries_of(head_dim)) + max_seqs
        self.max_tiles, self.head_dim = n_tiles * -(-max_tokens // self.segment), head_dim
        self.block_size = block_size
        rows = dict.fromkeys(FIELDS, max_rows) | {"tiles": (self.max_tiles, TILE_FIELDS), "n_steps": 1}
        self._rows = Staging(rows)
        for name, array in self._rows.device.items():
            setattr(self, name, array)
        self._tables = Staging({"block_table": (max_seqs, max_blocks)})
        self.block_table = self._tables.device["block_table"]
        self.chosen = cuda.device_array(max_seqs, np.int32)
        self.shown = cuda.mapped_array((PLACES, max_seqs), np.int32)
        self.stream = cuda.stream()
        places = self.positions, self.slot_mapping, self.block_table, block_size
        self.ends = self.chosen, *places, self.ring, self.shown  # what a step's last kernel moves on
        self._table = np.zeros(self.block_table.shape, np.int32)
        self._numbers = np.arange(max_seqs, dtype=np.int32)
        self._n_blocks: list[int] = []  # of each sequence, in the table
        self._lines: dict[int, int] = {}  # a sequence's life → its line of the table
        self._chosen_at: dict[int, int] = {}  # the last step's, in chosen, by their lives
        self._place = self._n_chosen = 0

    def fill(self, plan: Plan, shape: Shape) -> None:
        """Describe a plan's rows, and padding up to the shape. Tokens that the host does not know yet must be the last
        step's."""
        host = self._rows.next()
        tokens, source, positions, row_seq, slot_mapping, logits_rows, ring, tiles, n_steps = host.values()
        parts, n = plan.parts, plan.n_steps
        starts = [part.start for part in parts[:n]]  # hundreds, as in the next lines: they must be fast
        texts = [part.sequence.tokens for part in parts[:n]]
        known = [text[start] if start < len(text) else -1 for text, start in zip(texts, starts)]
        unknown = [row for row, token in enumerate(known) if token < 0]  # still on the device
        last = [row for row, part in enumerate(parts[:n]) if part.samples]
        positions[:n], row_seq[:n], source[: shape.rows] = starts, self._numbers[:n], -1
        source[unknown] = [self._chosen_at[parts[row].life] for row in unknown]
        for seq, (sequence, start, count, samples, life, _, drafts) in enumerate(parts[n:], n):
            row, end = len(known), start + count
            if start < len(sequence.tokens):
                known += sequence.tokens[start:end]
                known += drafts
            else:
                source[row] = self._chosen_at[life]
                known.append(-1)
            positions[row : len(known)], row_seq[row : len(known)] = np.arange(start, end), seq
            if samples:
                last += range(len(known) - 1 - len(drafts), len(known))
        rows, n_logits = len(known), len(last)
        tokens[:rows] = known
        self._lay_lines(plan)
        self._put_blocks(plan)
        slot_mapping[:rows] = paged_slots(self._table, row_seq[:rows], positions[:rows], self.block_size)
        logits_rows[:n_logits], ring[:n_logits] = last, self._place
        tokens[rows : shape.rows] = row_seq[rows : shape.rows] = 0
        positions[rows : shape.rows] = slot_mapping[rows : shape.rows] = -1
        logits_rows[n_logits : shape.n_logits], ring[n_logits : shape.n_logits] = 0, -1
        if shape.n_tiles:
            keys = self.segment if shape.split else None
            work = query_tiles(*zip(*((part.start, part.count) for part in parts[n:])), self.head_dim, keys)
            work[:, [0, 2]] += n  # rows and sequences in front
            tiles[: len(work)], tiles[len(work) : shape.n_tiles] = work, 0
        n_steps[0] = n
        self._rows.upload(self.stream)

    def follow(self, plan: Plan) -> None:
        """Make ready for a plan of the same sequences as the last, a row each: the kernels have done the rest."""
        before, sizes = self._n_blocks, [len(sequence.blocks) for sequence in plan.sequences]
        if sizes == before:
            return
        grown = [i for i, (old, new) in enumerate(zip(before, sizes)) if new > old]
        self._put_blocks(plan)
        if any(plan.start_of(i) >= before[i] * self.block_size for i in grown):  # the step before did not know its page
            n = plan.rows
            slots = self.slot_mapping, self.block_table, self.positions, n, self.block_size
            place_rows[place_rows_launch(n)](*slots)

    def launched(self, plan: Plan) -> tuple[int, int]:
        """Note that the plan's step has been launched; returns where its tokens will be: ``(place, count)``."""
        place = self._place
        if not plan.same_as_last:
            self._chosen_at = {part.life: i for i, part in enumerate(plan.sampling)}
            self._n_chosen = len(plan.sampling)
        if self._n_chosen:
            self._place = (place + 1) % PLACES
        return place, self._n_chosen

    def read(self, place: int, count: int) -> Listed[int]:
        """The tokens of a step that has ended."""
        return self.shown[place, :count].tolist()

    def _lay_lines(self, plan: Plan) -> None:
        """Move the table's lines to where their sequences are now: what a line has of a sequence's blocks stays right
        until the sequence is given up."""
        lives = [part.life for part in plan.parts]
        found = [-1 if line is None else line for line in map(self._lines.get, lives)]
        self._table[: len(found)] = self._table[found]
        self._n_blocks = [0 if line < 0 else self._n_blocks[line] for line in found]
        self._lines = dict(zip(lives, range(len(lives))))

    def _put_blocks(self, plan: Plan) -> None:
        tables = [sequence.blocks for sequence in plan.sequences]
        for seq, (n, blocks) in enumerate(zip(self._n_blocks, tables)):
            if len(blocks) > n:
                self._table[seq, n : len(blocks)] = blocks[n:]
        self._n_blocks = list(map(len, tables))
        self._tables.next()["block_table"][:] = self._table
        self._tables.upload(self.stream)


class Ticket:
    """A step under way. new, prompts: log-probabilities that were launched with it, or None."""

    def __init__(self, plan: Plan, batch: Batch, place: int, count: int, event, new=None, prompts=None) -> None:
        self.plan, self._batch, self._place, self._count, self._event = plan, batch, place, count, event
        self._new, self._prompts = new, prompts

    def tokens(self) -> list[int]:
        """Wait for the step; its new tokens, in the order of the parts that sample."""
        self._event.synchronize()
        return self._batch.read(self._place, self._count)

    def scores(self) -> Scores | None:
        """Wait for the step; its log-probabilities, None if no part asks for some."""
        if self._new is None and self._prompts is None:
            return None
        new = self._new.read() if self._new is not None else [None] * self._count
        return Scores(new, self._prompts.read() if self._prompts is not None else {})
