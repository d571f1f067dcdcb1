"""The engine behind glass: what it does in each step, for the page that shows it, and a way to stop it, to step it, and
to slow it down to what an eye can follow.

Lives in the engine's process. It looks only while somebody watches; then a view is sent a few times a second, and after
each step while the engine is stopped.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

from ch14_mini_llm.engine.sequence import ENDED

EVERY = 0.1  # seconds between two views
MOST_KNOWN = 4000  # blocks of the prefix cache that a view has


class Glass:
    """keys: the engine's ids → the clients' numbers of their requests. stats(): the engine's, since it serves."""

    def __init__(self, engine, keys: Mapping[int, int], stats: Callable[[], dict]) -> None:
        self._stats = stats
        self.engine, self.watched, self.paused, self.allowed = engine, False, False, 0
        self.pace, self._next = 0, 0.0  # steps a second, 0: as fast as it can; when the next one may begin
        self._keys, self._plan, self._sent, self._known = keys, None, 0.0, None
        engine.on_step = self._stepped

    def rest(self) -> float:
        """Seconds for which the engine is to wait; infinite: until it is asked for steps."""
        if self.paused:
            return math.inf if self.allowed <= 0 else 0.0
        return max(0.0, self._next - time.monotonic()) if self.pace else 0.0

    def command(self, kind: str, value) -> None:
        """("watch", whether) · ("pause", None) · ("steps", how many more) · ("resume", None) ·
        ("pace", steps a second or 0)"""
        if kind == "watch":
            self.watched, self._known, self._sent = value, None, 0.0
        elif kind == "steps":
            self.paused, self.allowed = True, self.allowed + value
        elif kind == "pace":
            self.pace, self._next = value, 0.0
        else:
            self.paused, self.allowed, self._sent = kind == "pause", 0, 0.0

    def _stepped(self, plan, outputs) -> None:
        if plan is not None:
            self._plan = plan
            self.allowed -= self.paused
            if self.pace:
                self._next = max(time.monotonic(), self._next + 1 / self.pace)

    def view(self, now: bool = False) -> dict | None:
        """What there is to be seen; None if nobody watches, or it is too early. now: it is not."""
        if not self.watched or not (now or self.paused or time.monotonic() - self._sent > EVERY):
            return None
        self._sent = time.monotonic()
        engine, stats = self.engine, self._stats()
        name = lambda sequence: self._keys.get(sequence.id, -1)
        running = [
            {"id": name(one), "prompt": one.n_prompt, "length": len(one.tokens),
             "cached": one.n_cached or 0, "blocks": list(one.blocks)}
            for one in engine.scheduler.running
        ]  # fmt: skip
        rows = [] if engine.idle or self._plan is None else [
            [name(part.sequence), part.start, part.count, int(part.start < part.sequence.n_prompt)]
            for part in self._plan.parts if part.sequence.state != ENDED
        ]  # fmt: skip
        view = {
            "step": stats["steps"], "tokens": stats["generation_tokens"], "at": time.monotonic(), "paused": self.paused,
            "pace": self.pace,
            "n_blocks": engine.pool.n_blocks, "free": stats["blocks_free"], "cached": stats["blocks_cached"],
            "running": running, "rows": rows, "preemptions": stats["preemptions"],
            "hits": stats["prefix_cache_hits"], "queries": stats["prefix_cache_queries"],
            "waiting": [[name(one), one.n_prompt] for one in engine.scheduler.waiting],
        }  # fmt: skip
        known = self._tree()
        if known != self._known:
            self._known = view["known"] = known
        return view

    def _tree(self) -> list[list[int]]:
        """[block, the block in front of it] of the prefix cache; 0 in front of a text's first."""
        if self.engine.prefix_cache is None:
            return []
        return [[node.block, node.parent.block] for node in self.engine.prefix_cache.nodes()[:MOST_KNOWN]]


def kernels_of(launches) -> list[list]:
    """[name, its chapter's folder or "", how often] of traced launches, in the order in which they first came."""
    counts, chapters = Counter(), {}
    for launch in launches:
        counts[launch.name] += 1
        parts = launch.defined_at.split("/")
        chapters[launch.name] = parts[1] if parts[0] == "chapters" and len(parts) > 2 else ""
    return [[name, chapters[name], count] for name, count in counts.items()]
