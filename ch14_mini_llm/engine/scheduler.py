"""Which tokens of which sequences the next step runs over: continuous batching, one iteration at a time.

A step is a `Plan`: parts of sequences, laid one behind the other. Sequences that decode come first, a row each; what is
left of the budget of rows goes to prompts, in chunks, so that a long prompt holds nobody up. A sequence joins as soon
as there is room, and leaves as soon as it has ended; none waits for another.

    step 1   A A A A A A          A's prompt
    step 2   A B B B B B          A decodes, a chunk of B's prompt
    step 3   A B B C C C          … the rest of it, and C joins
    step 4   A B C

Blocks of the pool: a prompt's are taken when its sequence is admitted, all or none; then one at a time. When there is
none left, cached blocks go first, and then the sequence that comes last (lowest priority, then latest) gives its blocks
back and is computed anew later. The first in line never gives way, so there is always one that gets on.

The host plans ahead: a step may be planned before the tokens of the one before it have been read. So `next` counts on
tokens that it does not know yet, and what it gives up while a step is under way stays owned until that step has been
read (`BlockPool.drop`). `done` finds out what the tokens were; those of a sequence given up meanwhile are made again.

Sources: Yu et al. 2022, "Orca"; Kwon et al. 2023, "PagedAttention"; Agrawal et al. 2024, "Sarathi-Serve" (chunks).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence as Listed

from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.engine.plan import Output, Part, Plan, Scores, mixed_rows
from ch14_mini_llm.engine.sequence import ENDED, RUNNING, WAITING, Logprob, Sequence


class Scheduler:
    """Sequences that wait and run, over one `BlockPool`.

    cache: or None. block_size: in tokens. max_batch: sequences that run at a time. max_rows: tokens of a step, more;
    where sequences decode, and wait for it, a step is no larger than `mixed_rows` allows.
    """

    def __init__(
        self, pool: BlockPool, cache: RadixCache | None, block_size: int, max_batch: int, max_rows: int
    ) -> None:
        assert max_rows > max_batch > 0
        self.pool, self.cache, self.block_size = pool, cache, block_size
        self.max_batch, self.max_rows = max_batch, max_rows
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.outputs: list[Output] = []  # not fetched yet
        self.corrupted = 0  # sequences that ended because there was no number among the logits
        self._tickets = self._read = 0  # the last ticket, and the last whose tokens have been read
        self._last: tuple[Sequence, ...] = ()  # of the last step, if each had a row and a token followed

    @property
    def idle(self) -> bool:
        """Whether nobody waits or runs, and no step is under way."""
        return not self.waiting and not self.running and self._read == self._tickets

    # --- requests ----------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A new sequence. Its prompt must fit the pool: what can never run is refused by who takes requests."""
        assert self._blocks_for(len(sequence.tokens)) <= self.pool.n_blocks
        bisect.insort(self.waiting, sequence, key=lambda one: one.rank)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence in whatever state it is; nothing happens if it has ended."""
        self._end(sequence, "abort")

    # --- the next step -----------------------------------------------------------------------------------------------

    def next(self) -> Plan | None:
        """The next step; None if there is nothing to run before a step under way has been read."""
        parts = [part for sequence in list(self.running) if (part := self._step(sequence)) is not None]
        room = mixed_rows(len(parts)) if parts else self.max_rows
        budget = min(room, self.max_rows) - len(parts)
        for sequence in self.running if len(parts) < len(self.running) else ():
            if budget and sequence.left > 1:
                parts.append(self._part(sequence, min(sequence.left, budget)))
                budget -= parts[-1].count
        while budget and self.waiting and len(self.running) < self.max_batch and self._admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=lambda one: one.rank)
            parts.append(self._part(sequence, min(sequence.left, budget)))
            budget -= parts[-1].count
        if not parts:
            return None
        self._tickets += 1
        for part in parts:
            part.sequence.ticket = self._tickets
        single = all(part.count == 1 and part.samples for part in parts)
        before, self._last = self._last, tuple(part.sequence for part in parts) if single else ()
        return Plan(self._tickets, tuple(parts), bool(self._last) and self._last == before)

    def _step(self, sequence: Sequence) -> Part | None:
        """The row of a sequence that decodes; None if it does not, or has no room. Hundreds a step: it must be fast."""
        start, made = sequence.n_computed, len(sequence.tokens) + sequence.n_pending - sequence.n_prompt
        samples = made < sequence.max_new
        other = start + 1 - sequence.n_prompt != made or sequence.state != RUNNING or not (samples or made == 0)
        other = other or sequence.n_pending and sequence.guard is not None  # its mask needs the token under way
        if other or start >= len(sequence.blocks) * self.block_size and not self._has_room(sequence):
            return None
        sequence.n_computed = start + 1
        sequence.n_pending += samples
        if sequence.n_computed == len(sequence.blocks) * self.block_size:
            self._reserve(sequence)
        return Part(sequence, start, 1, samples, sequence.life)

    def _part(self, sequence: Sequence, count: int) -> Part:
        start, length = sequence.n_computed, sequence.length
        sequence.n_computed += count
        samples = sequence.n_computed == length and length - sequence.n_prompt < sequence.max_new
        sequence.n_pending += samples
        return Part(sequence, start, count, samples, sequence.life)

    def _admit(self, sequence: Sequence) -> bool:
        """Take the blocks of all tokens that a waiting sequence has; False, and nothing is taken, if there are not."""
        blocks = self.cache.match(sequence.tokens).blocks if self.cache is not None and sequence.reads_cache else []
        more = self._take(self._blocks_for(len(sequence.tokens)) - len(blocks))
        if more is None:
            self.pool.drop(blocks)
            return False
        n_tokens = len(blocks) * self.block_size
        sequence.blocks, sequence.n_computed, sequence.n_written = blocks + more, n_tokens, n_tokens
        sequence.n_entered = len(blocks)
        sequence.state = RUNNING
        sequence.n_cached = n_tokens if sequence.n_cached is None else sequence.n_cached
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the blocks of a sequence reach to its next token, after one was taken, from others if need be."""
        if self._blocks_for(sequence.n_computed + 1) <= len(sequence.blocks):
            return True
        while True:
            more = self._take(1)
            if more is not None:
                sequence.blocks += more
                return True
            if self.pool.late:
                return False  # some come back when a step under way has been read
            last = self.running[-1]
            if last is sequence and len(self.running) == 1:
                if sequence.n_pending == 0:
                    pool = f"the pool of {self.pool.n_blocks} blocks of {self.block_size} tokens is full"
                    self._end(sequence, "length", f"{pool}, with {len(sequence.tokens)} of this request alone")
                return False
            self._preempt(last)
            if last is sequence:
                return False

    def _reserve(self, sequence: Sequence) -> None:
        """Take the block of the step after this one if there is a free one: then the device finds it by itself."""
        if sequence.n_computed == len(sequence.blocks) * self.block_size and sequence.left and self.pool.free:
            sequence.blocks += self.pool.take(1)

    def _take(self, n: int) -> list[int] | None:
        if (missing := n - self.pool.free) > 0:
            if self.cache is None or self.pool.cached < missing:
                return None
            self.cache.evict(missing)
        return self.pool.take(n)

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.block_size)

    # --- giving up ---------------------------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks from a running sequence; it will be computed anew."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.state = WAITING
        sequence.preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda one: one.rank)

    def _end(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        """The one place where a sequence ends, whatever its state and the reason."""
        if sequence.state == ENDED:
            return
        (self.waiting if sequence.state == WAITING else self.running).remove(sequence)
        self._release(sequence)
        sequence.state, sequence.finish_reason, sequence.error = ENDED, reason, error
        self.outputs.append(Output(sequence.id, (), reason, error, cached_tokens=sequence.n_cached or 0))

    def _release(self, sequence: Sequence) -> None:
        """Give its blocks back; those that a step under way may write, once that has been read."""
        under_way = sequence.ticket is not None and sequence.ticket > self._read
        self.pool.drop(sequence.blocks, until=sequence.ticket if under_way else None)
        sequence.blocks = []
        sequence.n_computed = sequence.n_written = sequence.n_entered = sequence.n_pending = 0
        sequence.life += 1
        self._last = ()

    # --- after a step ------------------------------------------------------------------------------------------------

    def done(self, plan: Plan, tokens: Listed[int], scores: Scores | None = None) -> None:
        """A step has ended, the oldest under way: what it wrote can be shared, and its tokens are known.

        tokens: of the parts that sample, in their order; one below 0 says that there was no number among the logits.
        scores: log-probabilities, if a part asks for some.
        """
        assert plan.ticket == self._read + 1, "a step was left out"
        self._read = plan.ticket
        drawn = zip(tokens, scores.new if scores else itertools.repeat(None))
        for number, part in enumerate(plan.parts):
            token, score = next(drawn) if part.samples else (None, None)
            if part.life == part.sequence.life:
                self._advance(part, token, score, scores.prompt.get(number, ()) if scores else ())
        self.pool.retire(plan.ticket)

    def _advance(self, part: Part, token: int | None, score: Logprob | None, prompt: Listed[Logprob]) -> None:
        sequence, reason, error = part.sequence, None, None
        if prompt:
            sequence.prompt_scores[part.start + 1 : part.start + 1 + len(prompt)] = prompt
        sequence.n_written = part.start + part.count
        if self.cache is not None and sequence.n_written // self.block_size > sequence.n_entered:
            sequence.n_entered = sequence.n_written // self.block_size
            self.cache.insert(sequence.tokens[: sequence.n_written], sequence.blocks)
        sequence.n_pending -= token is not None
        if (token is not None and token < 0) or prompt and any(entry.logprob != entry.logprob for entry in prompt):
            self.corrupted += 1
            n = min(len(sequence.tokens), sequence.n_written)
            reason, error = "error", f"after {n} tokens all logits are NaN: the weights overflow"
        else:
            if sequence.prompt_logprobs is not None and (known := sequence.show_prompt()) is not None:
                self.outputs.append(Output(sequence.id, prompt_logprobs=known))
            if token in sequence.stop_tokens:
                reason = "stop"
            elif token is not None:
                reason, error = sequence.take(token)
                self.outputs.append(Output(sequence.id, (token,), None, None, (score,) if score else ()))
        whole = len(sequence.tokens) - sequence.n_prompt == sequence.max_new
        if reason is None and whole and sequence.n_written >= sequence.n_prompt:
            reason = "length"
        if reason is not None:
            self._end(sequence, reason, error)

    def failed(self, plan: Plan, error: str) -> None:
        """A step could not be run: its requests end with an error, the others go on."""
        for part in plan.parts:
            if part.life == part.sequence.life:
                self._end(part.sequence, "error", error)
        self._read = plan.ticket
        self.pool.retire(plan.ticket)

    def check(self) -> None:
        """Raises AssertionError unless each block is free, owned or cached, as the sequences and the cache say."""
        self.pool.check([one.blocks for one in self.running], [] if self.cache is None else self.cache.blocks())
        assert all(not sequence.blocks for sequence in self.waiting)
