"""What `run.py` shows of a text that is being written: the text itself, and what it took."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager

from ch14_mini_llm.start import say
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer, StreamDecoder

SLOW = 1.5  # seconds without a first token until a message says what takes so long


class Stream:
    """Writes tokens to the standard output as text, whole characters at a time."""

    def __init__(self, enabled: bool, tokenizer: GPT2Tokenizer) -> None:
        self.enabled, self.decoder = enabled, StreamDecoder(tokenizer)

    def write(self, tokens) -> None:
        """Show the text of `tokens`."""
        if self.enabled:
            sys.stdout.write("".join(self.decoder.push(token) for token in tokens))
            sys.stdout.flush()

    def finish(self, tokens) -> None:
        """Show `tokens`, what is left of a character cut off, and an empty line."""
        self.write(tokens)
        if self.enabled:
            print(self.decoder.finish() + "\n", flush=True)


@contextmanager
def notice_when_slow(backend):
    """Says so if the first token is slow to come because of kernels that are compiled; gives the function to call when
    it is there."""
    there = threading.Event()
    threading.Thread(target=_notice, args=(backend, there), daemon=True).start()
    try:
        yield there.set
    finally:
        there.set()


def _notice(backend, there):
    if backend == "cpu":
        from common.cpu.machine_code import count

        before = count["compiled"]
    if there.wait(SLOW):
        return
    while backend == "cpu" and count["compiled"] == before:  # they were on disk: it is the machine that is slow
        if there.wait(SLOW / 10):
            return
    kept = "; they are kept for the next start" if backend == "cpu" else ""
    say(f"the kernels are being compiled{kept} ...")


def rate(start: float, times: list[float]) -> float:
    """Tokens per second after the first one (whose time is shown by itself); with one token only, 1 / its time."""
    if len(times) > 1:
        return (len(times) - 1) / (times[-1] - times[0])
    return 1 / (times[0] - start) if times else 0.0


def print_trace(launches, n_tokens: int, engine: str) -> None:
    """Every launch of one step as a table, and the time of each kernel."""
    from common.trace import format_table

    over = f"{n_tokens} token{'' if n_tokens == 1 else 's'}"
    print(f"kernel launches of one step over {over if engine == 'naive' else f'the last of {over}'}")
    print(format_table(launches) + "\n")


def print_stats(result: dict, n_new: int) -> None:
    """Speed, backend and device."""
    print(f"tokens made:   {n_new}, stopped by {result['stopped']}")
    print(f"speed:         {result['tokens_per_s']:.2f} tokens/s after the first token")
    print(
        f"first token:   after {result['first_token_s']:.2f} s, "
        f"{result['first_token_from_program_start_s']:.2f} s from the start of the program"
    )
    print(f"engine:        {result['engine']}")
    print(f"backend:       {result['backend']}")
    print(f"device:        {result['device']}\n")
