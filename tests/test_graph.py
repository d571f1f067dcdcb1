"""Graphs: a replay does what the launches did, again: as a CUDA graph, or as launches that were kept."""

import numpy as np
import pytest
from numba import cuda
from numba.types import float16

from common import launching
from common.graph import Graph
from common.ptx import griddep_launch, griddep_wait


@cuda.jit
def double(x, n):
    i = cuda.grid(1)
    if i < n:
        x[i] *= 2


@cuda.jit
def add_dependent(x, y, n):
    """y += x, begun before the kernel in front has ended."""
    i = cuda.grid(1)
    griddep_launch()
    griddep_wait()
    if i < n:
        y[i] += x[i]


@cuda.jit
def through_shared(x, y, n):
    """y = x, by way of dynamic shared memory."""
    tile = cuda.shared.array(0, float16)
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        tile[i] = x[i]
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        y[i] = tile[n - 1 - i]


@pytest.mark.parametrize("dependent", [False, True])
def test_a_replay_does_it_again(dependent):
    n = 1000
    x, y = cuda.to_device(np.ones(n)), cuda.to_device(np.zeros(n))

    def step():
        double[4, 256](x, n)
        add_dependent[4, 256](x, y, n)
        add_dependent[4, 256](x, y, n)

    graph = Graph(step, dependent=dependent)  # runs it once: x = 2, y = 4
    for _ in range(3):
        graph.replay()  # x = 4, 8, 16; y = 12, 28, 60
    graph.synchronize()
    np.testing.assert_array_equal(x.copy_to_host(), 16)
    np.testing.assert_array_equal(y.copy_to_host(), 60)


@cuda.jit(device=True)
def wait_inside():
    griddep_wait()


@cuda.jit
def add_dependent_inside(x, y, n):
    wait_inside()
    i = cuda.grid(1)
    if i < n:
        y[i] += x[i]


@pytest.mark.gpu
def test_those_that_wait_are_launched_as_dependents(monkeypatch):
    if cuda.get_current_device().compute_capability < (9, 0):
        pytest.skip("no dependent launches before sm_90")
    found, launch = [], launching._launch_dependent

    def seen(kernel, *args):
        found.append(kernel.entry_name)
        launch(kernel, *args)

    monkeypatch.setattr(launching, "_launch_dependent", seen)
    x, y = cuda.to_device(np.ones(10)), cuda.to_device(np.zeros(10))

    def step():
        for kernel in (double, add_dependent, add_dependent_inside):
            args = (x, 10) if kernel is double else (x, y, 10)
            kernel[1, 32](*args)

    graph = Graph(step)
    graph.replay()
    graph.synchronize()
    assert len(found) == 2 and all("add_dependent" in name for name in found)
    np.testing.assert_array_equal(y.copy_to_host(), 2 * 2 + 2 * 4)


def test_warm_launches_are_recorded_and_not_run_on_a_gpu():
    x = cuda.to_device(np.ones(10))
    double[1, 32](x, 10)
    graph = Graph(lambda: double[1, 32](x, 10), warm=True)
    np.testing.assert_array_equal(x.copy_to_host(), 2)
    done = graph.mark()
    done()
    graph.replay()
    graph.mark()()
    np.testing.assert_array_equal(x.copy_to_host(), 4)


def test_arrays_may_be_freed_while_launches_are_recorded():
    x, dropped = cuda.to_device(np.ones(10)), [cuda.device_array(1) for _ in range(100)]
    double[1, 32](x, 10)

    def step():
        dropped.clear()
        double[1, 32](x, 10)

    graph = Graph(step, warm=True)
    graph.replay()
    graph.synchronize()
    np.testing.assert_array_equal(x.copy_to_host(), 4)


def test_seconds_are_those_of_a_replay():
    x = cuda.to_device(np.ones(1 << 20))
    graph = Graph(lambda: double[4096, 256](x, 1 << 20))
    assert 0 < graph.seconds() < 1
    np.testing.assert_array_equal(x.copy_to_host()[:5], 4)


@pytest.mark.gpu  # the CPU backend records nothing
def test_nothing_launched_is_refused():
    with pytest.raises(ValueError, match="nothing was launched"):
        Graph(lambda: None)


@pytest.mark.parametrize("kib", [48, 96])
def test_more_than_48_kib_of_shared_memory(kib):
    n = kib * 512
    x = np.arange(n).astype(np.float16)
    y = cuda.to_device(np.zeros(n, np.float16))
    through_shared[1, 256, 0, 2 * n](cuda.to_device(x), y, n)
    np.testing.assert_array_equal(y.copy_to_host(), x[::-1])


def test_too_much_shared_memory_is_refused():
    x = cuda.to_device(np.zeros(8, np.float16))
    with pytest.raises(Exception, match="400000 bytes of"):
        through_shared[1, 256, 0, 400000](x, x, 8)
