"""Chapter 14: Ctrl-C in the middle of a step. The engine's books add up afterwards, and its next answers are right."""

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from numba import cuda
from test_engine import SMALL
from test_engines import random_model

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.interrupts import Interrupts
from ch14_mini_llm.engine.request import Request
from ch14_mini_llm.model.upload import float16_model, panels_model
from chapters.ch07_warp_reduce.rmsnorm import rmsnorm_launch, rmsnorm_row

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")


@pytest.fixture(scope="module", params=["kv", "fast"])
def made(request):
    """(engine, requests, their tokens)"""
    model = {"kv": panels_model, "fast": float16_model}[request.param](*random_model(3, **SMALL))
    engine = Engine(model, request.param, block_size=4, max_batch=4, deterministic=True)
    draws = random.Random(5)
    requests = [Request([draws.randrange(SMALL["vocab_size"]) for _ in range(n)], 12) for n in (3, 9, 14)]
    return engine, requests, [result.tokens for result in engine.run(requests)]


def end_all(engine):
    """What `levels.single` and the chat do after an interrupt."""
    for id in engine.alive:
        engine.abort(id)
    while not engine.idle:
        engine.step()
    engine.check()


def is_right(engine, requests, tokens):
    assert [result.tokens for result in engine.run(requests)] == tokens and engine.idle
    engine.check()


@pytest.mark.parametrize("where", ["next", "launch", "done"])
def test_in_each_part_of_a_step(made, monkeypatch, where):
    engine, requests, tokens = made
    owner = engine.runner if where == "launch" else engine.scheduler
    part, calls = getattr(owner, where), []

    def interrupted(*arguments):
        calls.append(len(calls))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return part(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.run(requests)
    assert len(calls) == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    engine.check()
    end_all(engine)
    is_right(engine, requests, tokens)


def test_at_any_time(made):
    engine, requests, tokens = made
    start = time.perf_counter()
    engine.run(requests)
    whole, draws, caught = time.perf_counter() - start, random.Random(1), 0
    for _ in range(25):
        timer = threading.Timer(draws.random() * whole, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            timer.start()
            engine.run(requests)
            timer.join()
            time.sleep(0.01)  # for the signal, if the answers were faster
        except KeyboardInterrupt:
            caught += 1
        end_all(engine)
    assert caught == 25
    is_right(engine, requests, tokens)


def test_launches_are_not_waited_for(made, monkeypatch):
    engine, requests, tokens = made
    launch = engine.runner.launch

    def endless(plan):
        ticket = launch(plan)
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        while time.monotonic() < start + 60:
            rmsnorm_row[rmsnorm_launch(300, 500)](x, weight, out, 500, np.float32(1e-5))
        return ticket

    x, out = (cuda.to_device(np.ones((300, 500), np.float32)) for _ in range(2))
    weight = cuda.to_device(np.ones(500, np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", endless)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine.run(requests)
        assert time.monotonic() - start < 20
    assert isinstance(engine.failure, KeyboardInterrupt)
    end_all(engine)
    is_right(engine, requests, tokens)


def test_handlers_of_others_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
            assert heard == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_and_errors_are_left_alone():
    failed = []

    def work():
        try:
            with Interrupts() as interrupts, interrupts.let_through():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    with pytest.raises(ValueError, match="first"), Interrupts():  # what went wrong before counts
        signal.raise_signal(signal.SIGINT)
        raise ValueError("first")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
