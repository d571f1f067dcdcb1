"""What the programs have in common: how they read arguments, and how they end.

A mistake of the user's is one line and exit code 2, whatever the mistake: a bad argument, a number in the environment
that is none, a file, or an output that is closed or full.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable

from ch14_mini_llm.engine.request import RequestError

# Numbers that libraries take from the environment: they fail on others, and not by name. (lowest, whether integers)
ENVIRONMENT = {
    "NUMBA_NUM_THREADS": (1, True),
    "HF_HUB_ETAG_TIMEOUT": (1, True),
    "HF_HUB_DOWNLOAD_TIMEOUT": (1, True),
    **dict.fromkeys(("TQDM_MININTERVAL", "TQDM_MAXINTERVAL", "TQDM_SMOOTHING", "TQDM_DELAY", "TQDM_TOTAL"), (0, False)),
    **dict.fromkeys(("TQDM_NCOLS", "TQDM_NROWS", "TQDM_POSITION", "TQDM_MINITERS", "TQDM_INITIAL"), (0, True)),
    "TQDM_UNIT_DIVISOR": (1, True),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line: a `RequestError`."""

    def error(self, message):
        raise RequestError(message)


def integer(text: str) -> int:
    """An integer of the command line."""
    if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
        raise argparse.ArgumentTypeError(f"{cut(text)} is not an integer; give one such as 64")
    if len(text.strip()) > 100:  # Python reads 4300 digits
        raise argparse.ArgumentTypeError(f"{cut(text)} has {len(text.strip())} digits; give a number such as 64")
    return int(text)


def number(text: str) -> float:
    """A number of the command line."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{cut(text)} is not a number; give one such as 0.8") from None


def cut(text: str) -> str:
    """`text` quoted and not longer than a line."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def one_line(error: object) -> str:
    """A message without line breaks and control characters, whatever names of files or tensors are in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))


def check_environment(environ=None) -> None:
    """Raises `RequestError`, by name, for a variable of `ENVIRONMENT` that is set to something else than a number."""
    environ = os.environ if environ is None else environ
    for name, (lowest, whole) in ENVIRONMENT.items():
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            fits = (int if whole else float)(text) >= lowest
        except ValueError:
            fits = False
        if not fits:
            kind = "an integer" if whole else "a number"
            raise RequestError(
                f"{name} is {cut(text)} in the environment; it must be {kind} from {lowest} on: set it so, or unset it"
            )


def run_program(
    name: str, work: Callable[[], object], mistakes: Iterable[type[Exception]] = (), stopped: str = "interrupted"
) -> int:
    """Run a program; returns its exit code. What the user has to know if it fails is one line on the standard error.

    0: `work` is done. 2: it raised `RequestError`, one of `mistakes`, or MemoryError, or the standard output is closed
    or cannot be written. 130: interrupted; the line is `stopped`. 141: whoever read the output has gone (``head``).
    Messages that the standard error does not take are lost, and the program goes on.
    """
    output, errors = sys.stdout, sys.stderr
    _open_closed_streams()
    for stream in (output, errors):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    sys.stderr = _Messages(errors or open(os.devnull, "w", encoding="utf-8"))
    try:
        if output is None:
            raise _OutputError("is closed; open it, or send it to a file or to /dev/null")
        sys.stdout = _Output(output)
        check_environment()
        try:
            work()
        except SystemExit:
            sys.stdout.flush()  # of --help
            raise
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        _silence(output)  # Python flushes once more at its end
        return 141
    except _OutputError as error:
        _silence(output)
        print(f"{name}: error: the standard output {error}", file=sys.stderr)
        return 2
    except (RequestError, *mistakes) as error:
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"{name}: error: there is not enough memory: {one_line(error) or 'use a smaller model'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: {stopped}", file=sys.stderr)
        return 130
    finally:
        sys.stdout, sys.stderr = output, errors


class _OutputError(Exception):
    """The standard output cannot be written; not an OSError, which argparse takes in silence."""


class _Output:
    """The standard output, with errors of a kind of their own: an OSError may also be about a file."""

    def __init__(self, stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do, *arguments):
        try:
            return do(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _OutputError(f"cannot be written ({error.strerror})") from None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class _Messages:
    """The standard error as a stream that cannot fail: what it does not take is lost."""

    def __init__(self, stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # full or gone; closed
            _silence(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _silence(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _open_closed_streams() -> None:
    """Give the numbers 0 to 2 to the null device where they are free: else a file that is opened gets them."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != stream:
                os.dup2(null, stream)
                os.close(null)


def _silence(stream) -> None:
    """Send what a stream still holds, and whatever comes, to nowhere."""
    try:
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass  # there is no file behind it
