"""From a program's arguments to a model on a backend, with a word about each on the standard error."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from ch14_mini_llm.cli import cut
from ch14_mini_llm.engine.dtypes import DTYPES
from ch14_mini_llm.levels import make_engine

ROOT = Path(__file__).resolve().parent.parent
OLDEST_FAST = 7, 5  # compute capability: tensor cores as the level fast uses them
SHOW_UPLOAD = 20_000_000  # values; smaller models are on the device before a progress bar could be read
RARELY = 1000  # collections of a generation, before there is one of the next: the youngest has 700 objects


class BackendProblem(Exception):
    """The backend asked for cannot be had."""


def pick_backend() -> tuple[str, str, str]:
    """(name, device, reason) of the backend; raises `BackendProblem`."""
    try:
        import common
    except RuntimeError as error:  # its BackendError, whose class cannot be imported when the package cannot
        raise BackendProblem(error) from None
    from common.backend import describe

    facts = describe(common.choice)
    if facts["backend"] == "cpu":
        from common.cpu.launch import workers

        try:
            workers()
        except (ValueError, RuntimeError) as error:  # now, not at the first launch
            named = "" if "MINI_THREADS" in str(error) else f"MINI_THREADS is {cut(os.environ['MINI_THREADS'])}: "
            raise BackendProblem(f"{named}{error}") from None
    return facts["backend"], facts["device"], facts["reason"]


def introduce(path, config) -> tuple[str, str]:
    """Pick the backend, and say what the weights are and where they run; returns (backend, device)."""
    backend, device, reason = pick_backend()
    say(f"weights: {shown(path)} ({describe(config)})")
    say(f"backend: {backend}, {device} ({reason})")
    return backend, device


def best_level(config, backend: str, dtype: str | None = None) -> str:
    """The fastest level for a model on a backend ("gpu" or "cpu"), of those that take ``dtype``."""
    from ch14_mini_llm.model.upload import why_not_fast

    if backend == "gpu" and dtype in (None, *DTYPES["fast"]) and why_not_fast(config) is None:
        from numba import cuda

        if cuda.get_current_device().compute_capability >= OLDEST_FAST:
            return "fast"
    return "kv"


@contextmanager
def loading(config):
    """A progress bar if a model is large; gives what is to be called with the name and size of each tensor. Afterwards
    the garbage collector lets alone what there is, see `calm_collector`."""
    from tqdm import tqdm

    with tqdm(
        total=config.n_parameters, unit=" weights", unit_scale=True, desc="loading", leave=False, mininterval=0.3,
        file=sys.stderr, disable=config.n_parameters < SHOW_UPLOAD,
    ) as bar:  # fmt: skip
        yield lambda _, size: bar.update(size)
    calm_collector()


def calm_collector():
    """Have Python's garbage collector let alone what there is, and seldom look through what comes and stays.

    Numba makes a million objects that live to the end; to look through them took 90 ms at a time, in the middle of an
    answer, and 1 to 10 ms through those that it makes later, with each kernel's first launch. The middle generation,
    7000 objects, cost a millisecond every two hundred steps. A step makes no cycles.
    """
    gc.freeze()
    gc.set_threshold(gc.get_threshold()[0], RARELY, RARELY)


def upload(config, tensors, max_length, engine="naive", dtype=None, speculate=None):
    """The model of a level on the device."""
    with loading(config) as on_tensor:
        return make_engine(engine, config, tensors, max_length, on_tensor, dtype, speculate)


def describe(config) -> str:
    """The sizes of a model in a few words."""
    millions = config.n_parameters / 1e6
    return (
        f"{millions:.1f}M parameters, {config.n_layer} layers, {config.n_head} heads, d_model {config.d_model}, "
        f"n_ctx {config.n_ctx}"
    )


def shown(path) -> str:
    """A path for people: relative to the repository if it lies in it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def say(message: str) -> None:
    """A message on the standard error."""
    print(message, file=sys.stderr, flush=True)
