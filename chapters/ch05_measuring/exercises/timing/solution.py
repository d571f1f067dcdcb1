"""Exercise ch05/timing: how long does a launch take on the device?

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch05/timing
"""

import statistics

import numpy as np
from numba import cuda, float32

QUEUE_MS = 0.02  # what a launch costs the host of the simulated GPU


def time_kernel(launch, repeat, batch, gpu=cuda):
    """Milliseconds that a launch takes on the device, a float: the median of ``repeat`` batches.

    launch(): queues the kernel once and returns. repeat, batch: int, at least 1. gpu: what has ``event``,
    ``event_elapsed_time`` and ``synchronize``: numba's cuda, or a `SimulatedGPU`. launch is called once to warm up, and
    then ``repeat`` times ``batch`` times.
    """
    # --- your code begins ---
    launch()  # warm-up: compiles
    gpu.synchronize()
    start, end = gpu.event(), gpu.event()
    times = []
    for _ in range(repeat):
        start.record()
        for _ in range(batch):
            launch()
        end.record()
        end.synchronize()  # before asking: the event may not have happened yet
        times.append(gpu.event_elapsed_time(start, end) / batch)
    return statistics.median(times)
    # --- your code ends ---


# What follows is given: a GPU that is the same on every machine, and a kernel for the real one.


class SimulatedGPU:
    """A GPU by the book, with a clock of its own: launches queue up, the device works through them, the host goes on.

    works: milliseconds that the first launch takes on the device, the second, and so on; the last one holds for all
    that follow. compile_ms: what the first launch costs the host in addition. log: what was done, a list of "launch",
    "record" and "wait".
    """

    def __init__(self, works, compile_ms):
        self.works, self.compile_ms = works, compile_ms
        self.host = 0.0  # the time at which the host is now, in ms
        self.device = 0.0  # the time at which the device will have done what is queued
        self.log = []

    def launch(self):
        number = self.log.count("launch")
        self.host += QUEUE_MS + (self.compile_ms if number == 0 else 0)
        self.device = max(self.device, self.host) + self.works[min(number, len(self.works) - 1)]
        self.log.append("launch")

    def synchronize(self):
        self.wait_until(self.device)

    def wait_until(self, time):
        self.host = max(self.host, time)
        self.log.append("wait")

    def event(self):
        return SimulatedEvent(self)

    def event_elapsed_time(self, start, end):
        for which, event in (("start", start), ("end", end)):
            if event.time is None:
                raise RuntimeError(f"the {which} event was never recorded")
            if event.time > self.host:
                raise RuntimeError(f"not ready: the {which} event has been queued, but it has not happened yet")
        return end.time - start.time


class SimulatedEvent:
    """A mark in the queue of a `SimulatedGPU`. time: when the device comes past it, None before it was recorded."""

    def __init__(self, gpu):
        self.gpu, self.time = gpu, None

    def record(self):
        self.time = max(self.gpu.host, self.gpu.device)
        self.gpu.log.append("record")

    def synchronize(self):
        self.gpu.wait_until(self.gpu.host if self.time is None else self.time)

    def elapsed_time(self, end):
        return self.gpu.event_elapsed_time(self, end)


def simulate(works, compile_ms, repeat, batch):
    """What time_kernel gives for a simulated kernel, "ms", and what it did to get it, "log"."""
    gpu = SimulatedGPU(works, compile_ms)
    return {"ms": time_kernel(gpu.launch, repeat, batch, gpu), "log": gpu.log}


@cuda.jit
def chain_kernel(out, steps):
    """out[0] = a chain of ``steps`` multiply-adds: ten times the steps, ten times the work."""
    y = float32(1)
    for _ in range(steps):
        y = float32(0.999) * y + float32(0.5)
    out[0] = y


def measure(steps, repeat, batch):
    """What time_kernel gives for chain_kernel in one thread, on the backend that is in use."""
    out = cuda.to_device(np.zeros(1, np.float32))
    return time_kernel(lambda: chain_kernel[1, 1](out, steps), repeat, batch)
