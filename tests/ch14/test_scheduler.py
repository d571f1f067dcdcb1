"""Chapter 14: blocks, prefix cache and scheduler, on a device made of a dict: no kernel runs here.

What the device writes into a block is the token it ran over, and a new token is a hash of all that its step reads
through the block table. So a block that is lent twice, shared too early or taken back too soon changes what comes out.
"""

import zlib
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.engine.plan import Plan, mixed_rows
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.engine.sequence import ENDED, Sequence
from ch14_mini_llm.engine.speculate import MOST, Guesser
from ch14_mini_llm.engine.steady import Again
from ch14_mini_llm.forward.shapes import rounded

VOCAB = 50


def next_token(context):
    return zlib.crc32(bytes(context)) % VOCAB


def alone(prompt, max_new, stop=()):
    """What a request gives that nobody disturbs."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new:
        token = next_token(tokens)
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class Device:
    """Runs plans in order, each some time after it was launched, on the block tables as they were at the launch."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.memory = {}  # (block, place in it) -> token
        self.made = {}  # (sequence, life) -> {position: token}, as a sampled token lies on the device
        self.under_way = deque()

    def launch(self, plan):
        self.under_way.append((plan, [list(part.sequence.blocks) for part in plan.parts]))

    def finish_one(self):
        plan, tables = self.under_way.popleft()
        size, tokens = self.scheduler.block_size, []
        for part, table in zip(plan.parts, tables):
            sequence, made = part.sequence, self.made.setdefault((part.sequence, part.life), {})
            for position in range(part.start, part.start + part.count):
                block = table[position // size]
                assert self.scheduler.pool.uses[block], "a step writes to a block that was given away"
                if part.drafts and position > part.start:
                    token = part.drafts[position - part.start - 1]
                else:
                    token = made[position] if position in made else sequence.tokens[position]
                self.memory[block, position % size] = token
            for end in range(part.start + (1 if part.drafts else part.count), part.start + part.count + 1):
                if part.samples:
                    read = [self.memory.get((table[p // size], p % size), VOCAB + 1) for p in range(end)]
                    tokens.append(next_token(read))
                    if not part.drafts:
                        made[end] = tokens[-1]
        self.scheduler.done(plan, tokens)


class HalfRight(Guesser):
    """Guesses the tokens that will come, but some of them wrong."""

    def _find(self, tokens, most):
        text = list(tokens)
        for _ in range(most):
            token = next_token(text)
            text.append(token if zlib.crc32(bytes([token, len(text) % 251])) % 4 else (token + 1) % VOCAB)
        return text[len(tokens) :]


class Run:
    """A scheduler, its device, and what has come out. guesser: of some of the sequences."""

    guesser = None

    def __init__(self, n_blocks, block_size, max_batch=4, max_rows=9, cache=True, ahead=2, kind=Scheduler):
        self.pool = BlockPool(n_blocks)
        tree = RadixCache(self.pool, block_size) if cache else None
        self.scheduler = kind(self.pool, tree, block_size, max_batch, max_rows)
        self.device, self.ahead = Device(self.scheduler), ahead
        self.sequences, self.ends, self.last, self.sampled = [], {}, None, set()

    def submit(self, prompt, max_new, stop=(), priority=0):
        number = len(self.sequences)
        guesser = self.guesser() if self.guesser is not None and number % 3 < 2 else None
        sequence = Sequence(
            number, list(prompt), max_new, number, priority, stop_tokens=frozenset(stop), guesser=guesser
        )
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        while self.device.under_way and self.scheduler.wants_tokens:
            self.device.finish_one()
        plan = self.scheduler.next() if len(self.device.under_way) < self.ahead else None
        if plan is not None:
            self.device.launch(plan)
            assert plan.rows <= self.scheduler.max_rows and len(plan.sampling) <= self.scheduler.max_batch
            assert len({id(part.sequence) for part in plan.parts}) == len(plan.parts)
            rows = [(part.sequence, part.life, part.start) for part in plan.parts]
            if plan.same_as_last:  # the device has moved these rows on by itself
                assert self.last == [(sequence, life, start - 1) for sequence, life, start in rows]
            self.last = rows if all(part.count == 1 and part.samples for part in plan.parts) else None
            for part in plan.parts:  # with two steps under way, a token not known to the host is the last step's
                assert part.start < len(part.sequence.tokens) or part.sequence in self.sampled or self.ahead > 2
            self.sampled = {part.sequence for part in plan.parts if part.samples}
        elif self.device.under_way:
            self.device.finish_one()
        self.fetch()
        return plan

    def fetch(self):
        for output in self.scheduler.outputs:
            assert output.id not in self.ends, "something came after the end"
            if output.finish_reason is not None:
                self.ends[output.id] = output
        self.scheduler.outputs.clear()

    def act(self, actions):
        """Submit, abort and step as some bytes say; the scheduler is checked each time."""
        room = self.pool.n_blocks * self.scheduler.block_size
        for action in actions:
            kind, value = action % 4, action // 4
            if kind == 0 and len(self.sequences) < 12:
                stop = [value % VOCAB] if value % 3 == 0 else ()
                self.submit([value % 2] * min(1 + value % 11, room), value // 8, stop, priority=value % 5 // 4)
            elif kind == 1 and self.sequences:
                self.scheduler.abort(self.sequences[value % len(self.sequences)])
                self.fetch()
            else:
                self.step()
            self.scheduler.check()
        return self

    def finish(self):
        for _ in range(20_000):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle, "it hangs"
        self.scheduler.check()
        assert not self.pool.late and sum(self.pool.uses) == 0
        assert self.pool.free + self.pool.cached == self.pool.n_blocks
        for sequence in self.sequences:
            assert sequence.state == ENDED and self.ends[sequence.id].finish_reason == sequence.finish_reason
            wanted = alone(sequence.tokens[: sequence.n_prompt], sequence.max_new, sequence.stop_tokens)
            got = sequence.new_tokens
            assert got == (wanted[: len(got)] if sequence.error or sequence.finish_reason == "abort" else wanted)
        return self


# --- the pool --------------------------------------------------------------------------------------------------------


def test_blocks_are_taken_all_or_none():
    pool = BlockPool(3)
    assert pool.take(4) is None and pool.free == 3
    assert sorted(pool.take(3)) == [1, 2, 3] and pool.take(1) is None and pool.take(0) == []


def test_a_block_comes_back_when_the_last_use_is_dropped():
    pool = BlockPool(2)
    blocks = pool.take(2)
    pool.hold(blocks[:1])
    pool.drop(blocks)
    assert pool.free == 1
    pool.drop(blocks[:1], until=7)
    assert pool.free == 1 and pool.late == 1
    pool.retire(6)
    assert pool.free == 1
    pool.retire(7)
    assert pool.free == 2 and not pool.late


def test_check_finds_what_does_not_add_up():
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.check([blocks], [])
    for tables, known in ([], []), ([blocks, blocks], []), ([blocks], blocks):
        with pytest.raises(AssertionError):
            pool.check(tables, known)


# --- the prefix cache ------------------------------------------------------------------------------------------------


def cached(*texts, n_blocks=20, size=4):
    """A pool, a cache with these texts, and the blocks of each text."""
    pool = BlockPool(n_blocks)
    cache = RadixCache(pool, size)
    tables = []
    for text in texts:
        match = cache.match(text)
        table = match.blocks + pool.take(-(-len(text) // size) - len(match.blocks))
        cache.insert(text, table)
        tables.append(table)
    return pool, cache, tables


def test_a_match_is_whole_blocks_and_never_the_last_token():
    text = list(range(12))
    pool, cache, (table,) = cached(text)
    for n in range(1, 13):
        match = cache.match(text[:n])
        assert match.n_tokens == (n - 1) // 4 * 4 and match.blocks == table[: (n - 1) // 4]
        pool.drop(match.blocks)
    assert cache.match([*text, 1]).n_tokens == 12 and cache.match([9, *text]).n_tokens == 0
    assert cache.known([*text[:8], 99, 99]) == 8


def test_texts_share_what_they_begin_with():
    a, b = [*range(8), 50, 51, 52, 53], [*range(8), 60, 61, 62, 63]
    pool, cache, (first, second) = cached(a, b)
    assert first[:2] == second[:2] and first[2] != second[2] and len(cache) == 4
    pool.drop(first)
    pool.drop(second)
    assert pool.cached == 4 and pool.free == 16


def test_the_least_recently_used_leaves_first():
    a, b, c = [1] * 8, [2] * 8, [3] * 8
    pool, cache, tables = cached(a, b, c)
    for table in tables:
        pool.drop(table)
    pool.drop(cache.match([*a, 0]).blocks)  # a is used again
    assert cache.evict(3) == 3
    assert [cache.known([*text, 0]) for text in (a, b, c)] == [8, 0, 4]  # of c its end
    assert cache.evict(9) == 3 and len(cache) == 0 and pool.free == 20


def test_what_is_owned_stays():
    a = [1] * 8
    pool, cache, (table,) = cached(a)
    assert cache.evict(5) == 0
    pool.drop(table)
    held = cache.match([1] * 5)
    assert cache.evict(5) == 1 and cache.known([1] * 9) == 4
    pool.drop(held.blocks)


def test_equal_texts_side_by_side_keep_the_first_ones_blocks():
    pool = BlockPool(8)
    cache = RadixCache(pool, 4)
    text = list(range(12))
    first, second = pool.take(3), pool.take(3)
    cache.insert(text[:4], first)
    cache.insert(text, second)  # its first block is not in the tree, so nor is what hangs from it
    assert len(cache) == 1
    cache.insert(text, first)
    assert len(cache) == 3
    pool.check([first, second], cache.blocks())


# --- the scheduler ---------------------------------------------------------------------------------------------------


def test_one_request():
    run = Run(8, 4)
    run.submit([1, 2, 3], 10)
    run.finish()
    assert run.sequences[0].finish_reason == "length" and len(run.sequences[0].new_tokens) == 10


def test_a_stop_token_ends_the_text_and_is_left_out():
    wanted = alone([1, 2, 3], 10)
    run = Run(8, 4)
    run.submit([1, 2, 3], 10, stop=[wanted[5]])
    run.finish()
    assert run.sequences[0].finish_reason == "stop" and run.sequences[0].new_tokens == wanted[: wanted.index(wanted[5])]


def test_nothing_new_is_a_prompt_that_was_run_over():
    run = Run(8, 4, max_rows=5)
    sequence = run.submit(range(11), 0)
    run.finish()
    assert sequence.finish_reason == "length" and sequence.new_tokens == []
    assert run.scheduler.cache.known(range(12)) == 8


def test_sequences_join_and_leave_at_any_step():
    run = Run(40, 4, max_rows=20)
    run.submit([1] * 5, 30)
    for _ in range(8):
        run.step()
    late = run.submit([2] * 5, 3)
    plans = [plan for plan in (run.step() for _ in range(12)) if plan]
    assert any(len(plan.parts) == 2 for plan in plans) and late.state == ENDED
    assert run.sequences[0].state != ENDED
    run.finish()


def test_decoding_comes_before_prompts_and_chunks_fit_the_budget():
    run = Run(100, 4, max_batch=4, max_rows=8)
    run.submit([1] * 3, 50)
    while not run.sequences[0].new_tokens:
        run.step()
    run.submit([2] * 30, 2)
    rows = []
    while not run.sequences[1].new_tokens:
        plan = run.step()
        if plan:
            rows.append([part.count for part in plan.parts])
    assert rows[0] == [1, 7] and all(counts[0] == 1 for counts in rows)
    run.finish()


@pytest.mark.parametrize("decoding, prompt_rows", [(0, 2000), (1, 255), (97, 384 - 97), (200, 568)])
def test_a_step_that_others_wait_for_is_short(decoding, prompt_rows):
    run = Run(1500, 16, max_batch=201, max_rows=2048)
    for _ in range(decoding):
        run.submit([1], 9)
    while any(not sequence.new_tokens for sequence in run.sequences):
        run.step()
    long = run.submit([2] * 2000, 1)
    parts = next(filter(None, iter(run.step, 0))).parts
    assert [part.count for part in parts] == [1] * decoding + [prompt_rows] and parts[-1].sequence is long
    run.finish()


def test_a_mixed_step_is_as_large_as_its_shape():
    sizes = [mixed_rows(n) for n in range(1, 1000)]
    assert sizes == sorted(sizes) and [rounded(size // 64) * 64 for size in sizes] == sizes
    assert all(size <= max(256, 4 * n) and size >= n + 160 for n, size in enumerate(sizes, 1))


@pytest.mark.parametrize("n", [15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("times", [1, 4])
def test_lengths_round_whole_blocks(n, times):
    run = Run(40, 16, max_rows=64)
    for _ in range(3):
        for _ in range(times):
            run.submit(range(n), 5)
        run.finish()
    assert all(sequence.n_cached <= n - 1 for sequence in run.sequences)
    assert run.sequences[-1].n_cached == (n - 1) // 16 * 16


def test_equal_prompts_in_one_step_on_an_empty_cache():
    run = Run(60, 4, max_batch=8, max_rows=200)
    for _ in range(8):
        run.submit(range(13), 9)
    run.finish()


def test_a_longer_request_takes_up_where_a_shorter_one_decoded():
    run = Run(60, 4)
    first = run.submit(range(8), 20)
    run.finish()
    second = run.submit([*first.tokens, 7], 5)
    run.finish()
    assert second.n_cached == 24  # 27 of 28 tokens have keys and values, 24 in whole blocks


# (n_blocks, block_size, prompt, new): a pool that the request outgrows
@pytest.mark.parametrize("cache", [True, False])
def test_a_request_that_outgrows_the_pool_ends_and_says_so(cache):
    run = Run(2, 4, cache=cache)
    run.submit(range(6), 20)
    run.finish()
    end = run.ends[0]
    assert end.finish_reason == "length" and "the pool of 2 blocks of 4 tokens is full" in end.error
    assert len(run.sequences[0].new_tokens) == 3  # the last one's key and value have no place, and need none
    assert run.submit([5], 3).id == 1 and run.finish().sequences[1].error is None


@pytest.mark.parametrize("cache", [True, False])
def test_a_pool_for_one_and_a_third_serves_eight(cache):
    run = Run(10, 4, max_batch=8, max_rows=30, cache=cache)
    for k in range(8):
        run.submit([k] * 10, 20)
    run.finish()
    assert [end.id for end in run.ends.values()] == list(range(8))
    made = sum(len(sequence.new_tokens) for sequence in run.sequences)
    assert 0 < sum(sequence.preemptions for sequence in run.sequences) < made / 4


def test_a_preempted_request_meets_its_own_blocks():
    run = Run(10, 4, max_batch=2, max_rows=30)
    for k in range(2):
        run.submit([k] * 9, 26)
    run.finish()
    assert run.sequences[1].preemptions and not run.sequences[0].preemptions


def test_a_larger_priority_runs_first():
    run = Run(30, 4, max_batch=1, max_rows=9)
    for priority in (0, 1, 5, 1):
        run.submit([priority] * 3, 4, priority=priority)
    run.finish()
    assert list(run.ends) == [2, 1, 3, 0]


@pytest.mark.parametrize("when", range(40))
def test_an_abort_in_any_state(when):
    run = Run(9, 4, max_batch=2, max_rows=5)
    for k in range(4):
        run.submit([k] * (3 + 4 * k), 6)
    for _ in range(when):
        run.step()
    for sequence in run.sequences[1:3]:
        run.scheduler.abort(sequence)
        run.scheduler.abort(sequence)
    run.fetch()
    run.scheduler.check()
    for _ in range(5):
        run.step()
    run.finish()


def test_a_step_like_the_last_one_says_so():
    run = Run(40, 16, ahead=1)
    for k in range(3):
        run.submit([k] * 3, 20)
    plans = [plan for plan in (run.step() for _ in range(30)) if plan]
    assert [plan.same_as_last for plan in plans] == [False, False, *[True] * (len(plans) - 2)]


ACTIONS = st.binary(max_size=40)


class OneByOne(Scheduler):
    """Never counts steps: each sequence is looked at each time."""

    def next(self):
        self.settle()
        self._steady = None
        return super().next()


def plans_of(kind, actions, block_size, ahead, cache):
    """Every plan with its blocks, as they are when it is made; and what kinds of plans there are."""
    run, plans, kinds = Run(300, block_size, ahead=ahead, cache=cache, kind=kind), [], set()
    launch = run.device.launch

    def note(plan):
        kinds.add(type(plan))
        rows = [(*part[1:4], part.sequence.id, list(part.sequence.blocks)) for part in plan.parts]
        plans.append((plan.ticket, plan.same_as_last, plan.rows, rows, [plan.start_of(i) for i in range(len(rows))]))
        launch(plan)

    run.device.launch = note
    run.act(actions).finish()
    return plans, kinds


LONG_ACTIONS = st.lists(st.integers(0, 800), max_size=40)  # up to 25 new tokens


@settings(max_examples=500, deadline=None)
@given(LONG_ACTIONS, st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_counted_steps_are_those_that_one_by_one_makes(actions, block_size, ahead, cache):
    counted, one_by_one = (plans_of(kind, actions, block_size, ahead, cache) for kind in (Scheduler, OneByOne))
    assert counted[0] == one_by_one[0] and one_by_one[1] <= {Plan}


@settings(max_examples=500, deadline=None)
@given(LONG_ACTIONS, st.integers(4, 30), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_counted_steps_in_a_small_pool(actions, n_blocks, block_size, ahead, cache):
    Run(n_blocks, block_size, cache=cache, ahead=ahead).act(actions).finish()


@pytest.mark.parametrize("cache", [True, False])
def test_most_steps_are_counted(cache):
    plans, kinds = plans_of(Scheduler, [4 * 160, 4 * 184], 4, 2, cache)
    assert kinds == {Plan, Again} and len(plans) > 20


@settings(max_examples=10_000, deadline=None)
@given(ACTIONS, st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_random_schedules(actions, n_blocks, block_size, max_batch, more_rows, cache):
    """Submits, steps and aborts in any order: all requests end as they would alone, and no block is lost."""
    run = Run(n_blocks, block_size, max_batch, max_batch + more_rows, cache, ahead=1 + n_blocks % 3)
    run.act(actions).finish()


# --- guesses ---------------------------------------------------------------------------------------------------------


class Guessing(Run):
    guesser = HalfRight


class Right(Guesser):
    """Guesses what comes."""

    def _find(self, tokens, most):
        return alone(tokens, most)


@settings(max_examples=3000, deadline=None)
@given(ACTIONS, st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_random_schedules_with_guesses(actions, n_blocks, block_size, max_batch, more_rows, cache):
    """As without: guesses change no token, and take no block from anybody."""
    run = Guessing(n_blocks, block_size, max_batch, max_batch + more_rows, cache, ahead=1 + n_blocks % 3)
    run.act(actions).finish()
    assert run.scheduler.n_accepted <= run.scheduler.n_drafts


@pytest.mark.parametrize("max_new", range(1, 3 * MOST))
@pytest.mark.parametrize("ahead", [1, 2])
def test_no_more_tokens_than_asked_for(max_new, ahead):
    run = Guessing(20, 4, 1 + MOST, 40, ahead=ahead)
    run.guesser = Right
    run.submit([1, 2, 3], max_new)
    run.finish()
    assert len(run.sequences[0].new_tokens) == max_new
    assert run.scheduler.n_accepted == run.scheduler.n_drafts


def test_right_guesses_make_fewer_steps():
    run, plans = Guessing(20, 4, 1 + MOST, 40, ahead=1), []
    run.guesser = Right
    run.submit([1, 2, 3], 40)
    while not run.scheduler.idle:
        plans.append(run.step())
    assert [len(plan.sampling) for plan in plans if plan] == [1, 4, 7, 8, 8, 8, 4]  # 3 guesses, 6, 7 at most


def test_guesses_take_only_places_that_nobody_wants():
    run = Guessing(40, 4, 4, 40, ahead=1)
    run.guesser = Right
    for _ in range(7):
        run.submit([1, 2, 3], 12)
    plans = []
    while len(run.sequences) - len(run.ends) > 4:
        plans.append(run.step())
    assert not any(part.drafts for plan in plans if plan for part in plan.parts)
    run.finish()
    assert run.scheduler.n_drafts


def test_a_stop_token_among_right_guesses_ends_the_text():
    text = alone([1, 2, 3], 12)
    stop = text[5]
    run = Guessing(20, 4, 1 + MOST, 40, ahead=1)
    run.guesser = Right
    sequence = run.submit([1, 2, 3], 12, [stop])
    run.finish()
    assert sequence.new_tokens == text[: text.index(stop)] and sequence.finish_reason == "stop"


def test_wrong_guesses_become_rare():
    class Wrong(Guesser):
        def _find(self, tokens, most):
            return [(token + 1) % VOCAB for token in alone(tokens, most)]

    run = Guessing(80, 4, 1 + MOST, 40, ahead=1)
    run.guesser = Wrong
    run.submit([1, 2, 3], 200)
    run.finish()
    assert 5 < run.scheduler.n_drafts < 15 and run.scheduler.n_accepted == 0


def test_a_full_batch_is_planned_as_without_guesses():
    """Nobody waits for tokens, and most of its steps are counted."""
    run = Guessing(80, 4, 3, 40, ahead=2)
    run.guesser = Right
    for _ in range(3):
        run.submit([1, 2, 3], 30)
    plans, wanted = [], []
    while not run.ends:
        plans.append(run.step())
        wanted.append(run.scheduler.wants_tokens)
    assert sum(isinstance(plan, Again) for plan in plans) > 20 and not any(wanted)
    run.finish()
