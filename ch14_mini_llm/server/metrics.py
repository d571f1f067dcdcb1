"""What /metrics says, in Prometheus' form. Names are vLLM's, with this project's prefix.

``blocks_free + blocks_cached + blocks_owned`` is the whole pool at any time: a leak would be seen here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PREFIX = "mini_llm_"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAUGES = {
    "num_requests_running": "Sequences that the engine runs", "num_requests_waiting": "Sequences that wait for it",
    "blocks_free": "Blocks of the pool that are free", "blocks_cached": "Blocks that only the prefix cache has",
    "blocks_owned": "Blocks of sequences that run",
}  # fmt: skip
COUNTERS = {
    "num_preemptions": ("preemptions", "Sequences that gave their blocks back and were computed anew"),
    "prefix_cache_queries": ("prefix_cache_queries", "Tokens of prompts that were looked for in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "Those that were found"),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts"),
    "generation_tokens": ("generation_tokens", "New tokens"),
    "corrupted_requests": ("corrupted_requests", "Sequences that ended because their logits were no numbers"),
    "spec_decode_num_draft_tokens": ("spec_decode_num_draft_tokens", "Guesses of next tokens"),
    "spec_decode_num_accepted_tokens": ("spec_decode_num_accepted_tokens", "Those that were right"),
    "kv_host_puts": ("kv_host_puts", "Blocks that went from the device to the host's memory"),
    "kv_disk_puts": ("kv_disk_puts", "Blocks that were written to files"),
    "kv_host_hits": ("kv_host_hits", "Blocks that came back from the host's memory"),
    "kv_disk_hits": ("kv_disk_hits", "Blocks that came back from files"),
    "kv_refused": ("kv_refused", "Files of blocks that were not what they should be"),
    "kv_failed": ("kv_failed", "Files that could not be written"),
}  # name → the engine's name, meaning


disable_created_metrics()  # a time for each of them would be half of the page


class Metrics:
    """Counts of the HTTP side, and the engine's own. stats(): the engine's latest report."""

    def __init__(self, stats: Callable[[], dict]) -> None:
        self.registry, self._stats = CollectorRegistry(), stats
        self.registry.register(self)
        count = lambda name, text, labels=(): Counter(PREFIX + name, text, labels, registry=self.registry)
        times = lambda name, text: Histogram(PREFIX + name, text, buckets=SECONDS, registry=self.registry)
        self.received = count("requests_received", "Requests for tokens that came in")
        self.accepted = count("requests_accepted", "Those that were handed to the engine")
        self.rejected = count("admission_rejections", "Those that were answered with an error at once", ["status"])
        self.success = count("request_success", "Choices that ended as they should", ["finished_reason"])
        self.failed = count("request_failed", "Requests that ended with an error later on", ["code"])
        self.aborted = count("request_aborted", "Requests whose client went away")
        self.first = times("time_to_first_token_seconds", "From the request to its first token")
        self.between = times("inter_token_latency_seconds", "From tokens to the next ones of a choice")
        self.whole = times("e2e_request_latency_seconds", "From the request to a choice's end")

    def ended(self, choice, started: float, reason: str) -> None:
        """A choice has ended as it should. started: when the request came, by ``time.perf_counter``."""
        self.success.labels(reason).inc()
        self.whole.observe(time.perf_counter() - started)
        if choice.times:
            self.first.observe(choice.times[0] - started)
            for before, after in zip(choice.times, choice.times[1:]):
                self.between.observe(after - before)

    def collect(self):
        """The engine's, for the registry."""
        stats = self._stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=stats.get(name, 0))
        pool = sum(stats.get(name, 0) for name in ("blocks_free", "blocks_cached", "blocks_owned"))
        share = stats.get("blocks_owned", 0) / pool if pool else 0.0
        yield GaugeMetricFamily(PREFIX + "kv_cache_usage_perc", "Share of the pool that sequences own", value=share)
        for name, (key, text) in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, value=stats.get(key, 0))

    def text(self) -> bytes:
        return generate_latest(self.registry)
