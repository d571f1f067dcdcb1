"""Which tokens of which sequences the next step runs over: continuous batching, one iteration at a time.

A step is a `Plan`: parts of sequences, laid one behind the other. Sequences that decode come first, a row each; what is
left of the budget of rows goes to prompts, in chunks, so that a long prompt holds nobody up. A sequence joins as soon
as there is room, and leaves as soon as it has ended; none waits for another.

    step 1   A A A A A A          A's prompt
    step 2   A B B B B B          A decodes, a chunk of B's prompt
    step 3   A B B C C C          … the rest of it, and C joins
    step 4   A B C

Which blocks a sequence has for that is another matter: `engine.owners`.

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
from ch14_mini_llm.engine.guesses import Guesses
from ch14_mini_llm.engine.plan import Output, Part, Plan, Scores, mixed_rows
from ch14_mini_llm.engine.sequence import RUNNING, Logprob, Sequence
from ch14_mini_llm.engine.steady import Again, Steady


class Scheduler(Guesses):
    """Sequences that wait and run, over one `BlockPool`.

    cache: or None. block_size: in tokens. max_batch: sequences that run at a time. max_rows: tokens of a step, more;
    where sequences decode, and wait for it, a step is no larger than `mixed_rows` allows.
    """

    def __init__(
        self, pool: BlockPool, cache: RadixCache | None, block_size: int, max_batch: int, max_rows: int
    ) -> None:
        assert max_rows > max_batch > 0
        super().__init__(pool, cache, block_size, max_batch)
        self.max_rows = max_rows
        self.corrupted = 0  # sequences that ended because there was no number among the logits
        self._tickets = 0  # the last one
        self._last: list[Sequence] = []  # of the last step, if each had a row and a token followed
        self._steady: Steady | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody waits or runs, and no step is under way."""
        return not self.waiting and not self.running and self._read == self._tickets

    @property
    def counts(self) -> dict[str, int]:
        """Sequences that ended for want of numbers, guesses, and those of them that were right, so far."""
        return {"corrupted_requests": self.corrupted, "spec_decode_num_draft_tokens": self.n_drafts,
                "spec_decode_num_accepted_tokens": self.n_accepted}  # fmt: skip

    def abort(self, sequence: Sequence) -> None:
        """End a sequence in whatever state it is; nothing happens if it has ended."""
        self.settle()
        self._end(sequence, "abort")

    # --- the next step -----------------------------------------------------------------------------------------------

    def next(self) -> Plan | None:
        """The next step; None if there is nothing to run before a step under way has been read."""
        if self._steady is not None:
            if not self.waiting or len(self.running) == self.max_batch:
                plan = self._steady.next(self._tickets + 1, self._take)
                if plan is not None:
                    self._tickets += 1
                    return plan
            self.settle()
            self._steady = None
        parts: list[Part] = []
        guesses: list[Part] = []
        others = []
        guessed = self._guess()
        for sequence in list(self.running):
            if sequence in guessed and (part := self._with_guesses(sequence, guessed[sequence])) is not None:
                guesses.append(part)
                continue
            part = self._step(sequence)
            (others if part is None else parts).append(sequence if part is None else part)
        n_steps = len(parts)
        parts += guesses
        room = mixed_rows(len(self.running) + len(self.waiting)) if parts else self.max_rows
        budget = min(room, self.max_rows) - n_steps - sum([part.count for part in guesses])
        for sequence in others:
            if budget > 0 and sequence.state == RUNNING and sequence.left > 1:
                parts.append(self._part(sequence, min(sequence.left, budget)))
                budget -= parts[-1].count
        while budget > 0 and self.waiting and len(self.running) < self.max_batch and self._admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=lambda one: one.rank)
            parts.append(self._part(sequence, min(sequence.left, budget)))
            budget -= parts[-1].count
        if not parts:
            return None
        self._tickets += 1
        for part in parts:
            part.sequence.ticket = self._tickets
        single = all([part.samples for part in parts]) and all(part.count == 1 for part in parts[n_steps:])
        before, self._last = self._last, [part.sequence for part in parts] if single else []
        plan = Plan(self._tickets, tuple(parts), single and self._last == before)
        if plan.same_as_last and not (self.waiting and len(self.running) < self.max_batch):
            free = len(self.running) < self.max_batch  # places for guesses
            ask = [one for one in plan.sequences if one.guard is not None or free and one.guesser is not None]
            if not any([sequence.left for sequence in others]) and not ask:
                self._steady = Steady(plan, self.block_size)
        return plan

    def _step(self, sequence: Sequence) -> Part | None:
        """The row of a sequence that decodes; None if it does not, or has no room. Hundreds a step: it must be fast."""
        start, length = sequence.n_computed, len(sequence.tokens) + sequence.n_pending
        made, room = length - sequence.n_prompt, len(sequence.blocks) * self.block_size
        samples = made < sequence.max_new
        if start + 1 != length or sequence.state != RUNNING or not (samples or made == 0):
            return None
        if sequence.guard is not None and sequence.n_pending:  # its mask needs the token under way
            return None
        if start >= room and not self._has_room(sequence):
            return None
        sequence.n_computed = length
        sequence.n_pending += samples
        if length == room:
            self._reserve(sequence)
        return Part(sequence, start, 1, samples, sequence.life)

    def _part(self, sequence: Sequence, count: int) -> Part:
        start, length = sequence.n_computed, sequence.length
        sequence.n_computed += count
        samples = sequence.n_computed == length and length - sequence.n_prompt < sequence.max_new
        sequence.n_pending += samples
        return Part(sequence, start, count, samples, sequence.life)

    # --- after a step ------------------------------------------------------------------------------------------------

    def done(self, plan: Plan, tokens: Listed[int], scores: Scores | None = None) -> None:
        """A step has ended, the oldest under way: what it wrote can be shared, and its tokens are known.

        tokens: of the parts that sample, in their order; one below 0 says that there was no number among the logits.
        scores: log-probabilities, if a part asks for some.
        """
        assert plan.ticket == self._read + 1, "a step was left out"
        self._read, steady = plan.ticket, self._steady
        if isinstance(plan, Again) and plan.steps is steady and scores is None:
            outputs = steady.read(tokens)
            if outputs is not None:
                self.outputs += outputs
                for sequence, n_written in steady.whole(plan.number) if self.cache is not None else ():
                    self._enter(sequence, n_written)
                self.pool.retire(plan.ticket)
                return
        self.settle()
        drawn = iter(tokens)
        new, prompts = (iter(scores.new), scores.prompt) if scores else (itertools.repeat(None), {})
        for number, (sequence, start, count, samples, life, _, drafts) in enumerate(plan.parts):
            if drafts:
                tokens = [next(drawn) for _ in range(count)]
                self._verify(plan.parts[number], tokens, [next(new) for _ in range(count)])
                continue
            token, score = (next(drawn), next(new)) if samples else (None, None)
            if life == sequence.life:
                prompt = prompts.get(number, ())
                if prompt:
                    sequence.prompt_scores[start + 1 : start + 1 + len(prompt)] = prompt
                self._advance(sequence, start + count, token, score, prompt)
        if self._steady is not None:
            self._steady.count_tokens()
        self.pool.retire(plan.ticket)

    def _advance(
        self, sequence: Sequence, written: int, token: int | None, score: Logprob | None, prompt: Listed[Logprob]
    ) -> None:
        """What a step did for a sequence, which has ``written`` keys and values now. For hundreds a step: be fast."""
        reason, error = None, None
        sequence.n_written = written
        if self.cache is not None and written // self.block_size > sequence.n_entered:
            self._enter(sequence, written)
        sequence.n_pending -= token is not None
        if (token is not None and token < 0) or prompt and any(entry.logprob != entry.logprob for entry in prompt):
            self.corrupted += 1
            n = min(len(sequence.tokens), written)
            reason, error = "error", f"after {n} tokens all logits are NaN: the weights overflow"
        else:
            if sequence.prompt_logprobs is not None and (known := sequence.show_prompt()) is not None:
                self.outputs.append(Output(sequence.id, prompt_logprobs=known))
            if token in sequence.stop_tokens:
                reason = "stop"
            elif token is not None:
                sequence.tokens.append(token)
                if sequence.guard is not None:
                    reason, error = sequence.guard.advance(token)
                self.outputs.append(Output(sequence.id, (token,), None, None, (score,) if score else ()))
            whole = len(sequence.tokens) - sequence.n_prompt == sequence.max_new
            if whole and reason is None and written >= sequence.n_prompt:
                reason = "length"
        if reason is not None:
            self._end(sequence, reason, error)

    def failed(self, plan: Plan, error: str) -> None:
        """A step could not be run: its requests end with an error, the others go on."""
        self.settle()
        for part in plan.parts:
            if part.life == part.sequence.life:
                self._end(part.sequence, "error", error)
        self._read = plan.ticket
        self.pool.retire(plan.ticket)

    def settle(self) -> None:
        """Bring what sequences say of themselves up to date, see `engine.steady`."""
        if self._steady is not None:
            self._steady.settle()

    def _left(self) -> None:
        self._last, self._steady = [], None
