"""A new token for each row of a step that asks for one: settings of requests → arrays on the device → launches."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
from types import SimpleNamespace

import numpy as np
from numba import cuda

from ch14_mini_llm.engine.plan import Part
from ch14_mini_llm.engine.request import MAX_BIASES
from ch14_mini_llm.engine.sequence import RUNNING, Sequence
from ch14_mini_llm.forward.logprobs import PendingScores, ScoreRows
from ch14_mini_llm.forward.masks import Masks
from chapters.ch07_warp_reduce.argmax import argmax_launch, argmax_row
from chapters.ch13_llm_ops.sampling_masks import mask_launch, mask_rows
from chapters.ch13_llm_ops.sampling_rows import (
    adjust_launch,
    adjust_rows,
    count_launch,
    count_tokens,
    counts_of,
)
from chapters.ch13_llm_ops.sampling_slices import (
    best_slices,
    bin_rows,
    cut_rows,
    pick_rows,
    pick_rows_launch,
    shared_slices_launch,
    slices_launch,
    slices_of,
    slices_workspace,
)

LIKELIEST, DRAWS, ADJUSTS = range(3)  # what the rows of a step need; each includes what stands before it
SETTINGS = {  # by row, and what a row has that takes the likeliest token; 8 bytes each come first
    "temperature": (np.float64, 0), "top_p": (np.float64, 1), "min_p": (np.float64, 0), "seed": (np.uint64, 0),
    "step": (np.int64, 0), "presence": (np.float32, 0), "frequency": (np.float32, 0), "repetition": (np.float32, 1),
    "top_k": (np.int32, 0), "count_slot": (np.int32, -1), "mask_slot": (np.int32, -1), "active": (np.int32, 1),
}  # fmt: skip
BIASES = {"bias_ids": (np.int32, -1), "bias_values": (np.float32, 0)}  # MAX_BIASES a row
FLOAT32 = np.finfo(np.float32)


class RowSampler:
    """Settings of up to ``max_batch`` rows, at addresses that never change once `draws` has asked for them.

    A step is `set`, then `choose`, then perhaps `logprobs`. Arrays of max_batch · vocab_size elements are allocated by
    the first `set` that needs them. ``draws`` says what `choose` will launch: LIKELIEST (0), DRAWS or ADJUSTS; a graph
    of one is good for every step with the same value.
    """

    def __init__(self, max_batch: int, vocab_size: int) -> None:
        self.max_batch, self.vocab_size, self.draws = max_batch, vocab_size, LIKELIEST
        sizes = {name: np.dtype(dtype).itemsize * max_batch for name, (dtype, _) in SETTINGS.items()}
        self._n_settings = sum(sizes.values())  # bytes
        sizes |= dict.fromkeys(BIASES, 4 * max_batch * MAX_BIASES)
        self._host = np.zeros(sum(sizes.values()), np.uint8)
        self._device = cuda.to_device(self._host)
        self._device_settings = self._device[: self._n_settings]  # once: to cut an array takes numba-cuda 50 µs
        self._rows, self._arrays, at = SimpleNamespace(), SimpleNamespace(), 0
        for name, (dtype, _) in (SETTINGS | BIASES).items():
            for buffer, views in (self._host, self._rows), (self._device, self._arrays):
                view = buffer[at : at + sizes[name]].view(dtype)
                setattr(views, name, view.reshape(max_batch, MAX_BIASES) if name in BIASES else view)
            at += sizes[name]
        self._ahead = None  # the rows that the device's settings and steps were right for, so many steps ago
        self._moved = 0
        self._biased = True  # whether some row of the device's has biases
        self._slots: dict[Sequence, tuple[int, int]] = {}  # sequence → (row of counts, its life at that time)
        self._bins = self._best = self._adjusted = self._counts = self._masks = self._scores = None
        self._guards: list = []  # of the rows with a mask

    # --- settings ----------------------------------------------------------------------------------------------------

    def move_on(self) -> bool:
        """`set` for the sequences of the last call, each a token on: whether the device has gone on by itself."""
        if self.draws != LIKELIEST and self._ahead is None:
            return False
        self._moved += self.draws != LIKELIEST
        if self._guards:
            self._masks.upload(self._guards)
        return True

    def set(self, parts: list[Part]) -> None:
        """Row i is for parts[i], which samples. At most one copy, none if the device has gone on by itself; and one of
        masks, if a row has one."""
        sequences = [part.sequence for part in parts]
        self._guards = [one.guard for one in sequences if one.guard is not None]
        self.draws = max([needs(one) for one in sequences if one.sampling or one.guard], default=LIKELIEST)
        if self.draws == LIKELIEST:
            return
        self._allocate()
        rows = [(part.sequence, part.life, part.start + part.count - part.sequence.n_prompt) for part in parts]
        if rows != [(sequence, life, step + self._moved) for sequence, life, step in self._ahead or ()]:
            self._upload(parts, [step for _, _, step in rows])
        self._ahead, self._moved = rows, 1
        if self._guards:
            self._masks.upload(self._guards)

    def forget(self) -> None:
        """The launches of `choose` have run without a `set`, as when a graph is warmed up: upload and count anew.
        No step may be under way: its tokens would not be counted."""
        self._ahead = None
        self._slots.clear()

    def _upload(self, parts: list[Part], steps: list[int]) -> None:
        host, n = self._rows, len(parts)
        for name, (_, value) in SETTINGS.items():
            getattr(host, name)[:] = value
        host.active[n:] = 0
        host.step[:n] = steps
        if self._biased:
            host.bias_ids[:] = -1
        masked = [i for i, part in enumerate(parts) if part.sequence.guard is not None]
        host.mask_slot[masked] = range(len(masked))
        biased = False
        for i, part in enumerate(parts):
            s = part.sequence.sampling
            if s is None:
                continue
            if not s.greedy:
                host.temperature[i], host.top_p[i], host.min_p[i] = s.temperature, s.top_p, s.min_p
                host.top_k[i], host.seed[i] = s.top_k or 0, s.seed
            if s.penalises:
                host.presence[i], host.frequency[i] = s.presence_penalty, s.frequency_penalty
                host.repetition[i] = np.clip(s.repetition_penalty, FLOAT32.tiny, FLOAT32.max)
                host.count_slot[i] = self._slot(part)
            if s.logit_bias:
                biased, width = True, len(s.logit_bias)
                host.bias_ids[i, :width], host.bias_values[i, :width] = [*s.logit_bias], [*s.logit_bias.values()]
        if biased or self._biased:
            self._device.copy_to_device(self._host)
        else:
            self._device_settings.copy_to_device(self._host[: self._n_settings])
        self._biased = biased

    def _allocate(self) -> None:
        shape = self.max_batch, self.vocab_size
        if self._bins is None:
            self._bins = [cuda.to_device(np.zeros(size, dtype)) for size, dtype in slices_workspace(*shape)]
            size = self.max_batch, slices_of(self.vocab_size)
            self._best = cuda.device_array(size, np.float32), cuda.device_array(size, np.int32), size[1]
        if self.draws == ADJUSTS and self._counts is None:
            self._adjusted = cuda.to_device(np.zeros(shape, np.float32))  # padding's rows are read
            self._counts = cuda.to_device(np.zeros(shape, np.int32))
            self._masks = Masks(*shape)

    def _slot(self, part: Part) -> int:
        """The row of counts of a part's sequence; filled from its tokens when it is new, or new after a preemption."""
        sequence = part.sequence
        slot, life = self._slots.get(sequence, (None, None))
        if life != part.life:
            self._slots = {known: at for known, at in self._slots.items() if known.state == RUNNING}
            taken = {number for number, _ in self._slots.values()}
            slot = next(number for number in range(self.max_batch) if number not in taken)
            tokens, n = sequence.tokens[: part.start + part.count], sequence.n_prompt
            assert len(tokens) == part.start + part.count, "a token of its text is not known to the host"
            self._counts[slot].copy_to_device(counts_of(tokens[:n], tokens[n:], self.vocab_size))
            self._slots[sequence] = slot, part.life
        return slot

    # --- launches ----------------------------------------------------------------------------------------------------

    def choose(self, logits, chosen, n: int, best: tuple | None = None) -> None:
        """chosen[i] = the new token of row i < n: logits (n, vocab_size) float32, chosen (≥ n,) int32, on the device.

        -1 where no logit is a number. Rows behind those of `set` (the padding of a graph's bucket) get any token. best:
        the largest logits of parts of a row, their tokens, and how many parts there are, if a product has left them.
        """
        a, vocab_size = self._arrays, self.vocab_size
        if self.draws == ADJUSTS:
            penalties = a.presence, a.frequency, a.repetition, a.count_slot, self._counts
            adjust_rows[adjust_launch(n, vocab_size)](
                logits, self._adjusted, a.active, *penalties, a.bias_ids, a.bias_values, vocab_size
            )
            mask_rows[mask_launch(n, vocab_size)](self._adjusted, self._masks.device, a.mask_slot, vocab_size)
            logits, best = self._adjusted, None
        if self.draws:
            self._draw(logits, chosen, n, best)
        else:
            argmax_row[argmax_launch(n, vocab_size)](logits, chosen, vocab_size)
        if self.draws == ADJUSTS:
            count_tokens[count_launch(n)](chosen, a.active, a.count_slot, self._counts, n)

    def _draw(self, logits, chosen, n: int, best: tuple | None) -> None:
        a, vocab_size, (counts, masses, largest, *cut) = self._arrays, self.vocab_size, self._bins
        which, filters = (a.active, a.temperature), (a.top_k, a.top_p, a.min_p)
        shared = shared_slices_launch(n, vocab_size)
        if best is None:
            best = self._best
            best_slices[slices_launch(n, vocab_size)](logits, *best[:2], vocab_size)
        bins = counts, masses, largest
        bin_rows[shared](logits, best[0], best[2], *which, a.top_p, *bins, vocab_size)
        cut_rows[shared](logits, *bins, *which, *filters, *cut, vocab_size)
        pick_rows[pick_rows_launch(n)](
            logits, *best, *bins, *cut, chosen, *which, *filters, a.seed, a.step, vocab_size
        )  # fmt: skip

    def logprobs(self, logits, chosen, parts: list[Part]) -> PendingScores | None:
        """Launch the log-probabilities of the tokens chosen, of the logits as the model gave them; None if no part
        asks. ``read()`` of what is returned gives a `Logprob` a part, None for those that do not ask."""
        tops = [-1 if part.sequence.logprobs is None else part.sequence.logprobs for part in parts]
        if max(tops, default=-1) < 0:
            return None
        if self._scores is None:
            self._scores = ScoreRows(self.max_batch, self.vocab_size)
        self._scores.begin(tops)
        self._scores.launch(logits, chosen, 0, len(tops))
        return self._scores.pending()


def needs(sequence: Sequence) -> int:
    """What a row of a sequence needs: LIKELIEST, DRAWS or ADJUSTS."""
    sampling = sequence.sampling
    if sequence.guard is not None:
        return ADJUSTS
    if sampling is None:
        return LIKELIEST
    return ADJUSTS if sampling.adjusts else LIKELIEST if sampling.greedy else DRAWS
