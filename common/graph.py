"""CUDA graphs: a sequence of kernel launches, recorded once and replayed as one.

    step = Graph(lambda: (layernorm_row[…](…), gemv_logits[…](…), greedy_argmax[…](…)))
    step.replay()
    step.synchronize()

Python needs some 20 µs to launch a kernel, which is longer than many kernels run. A graph keeps the launches with their
arguments, and the driver issues all of them within about a microsecond each. Arguments are kept as they were: the
arrays must live as long as the graph (it holds on to the launches' function), and a number that should change from
replay to replay has to be in device memory.

**Dependent launches.** From sm_90 on, a kernel that calls ``common.ptx.griddep_wait`` is recorded such that it may
begin before the kernel in front of it has ended: it does what does not depend on the other, and waits. Which kernels
do so is seen from their code; all others begin when the one in front has ended.

On the CPU backend the launches are kept as well (`common.cpu.replay`): there, too, a launch costs more than many a
kernel. Source: CUDA Programming Guide, "CUDA Graphs" and "Programmatic Dependent Launch".
"""

from . import BACKEND  # before numba.cuda
from .launching import launches_on

# isort: split
from numba import cuda


class GraphError(RuntimeError):
    """The CUDA driver could not record or run a graph; the message has its own word for it."""


class Graph:
    """Kernel launches, recorded and ready to be replayed on a stream of their own.

    launches: a function without arguments that launches kernels on the default stream; it is called once before (that
    compiles the kernels, and so does their work once) unless ``warm`` says that they are compiled, and once to be
    recorded, where nothing runs. dependent: False records all kernels as full successors of the one before. stream: to
    be replayed on, so that several graphs run one after the other; by default a new one.
    Raises GraphError, and ValueError if nothing was launched.
    """

    def __init__(self, launches, warm=False, dependent=True, stream=None):
        self._launches = launches
        if not warm:
            launches()
        if BACKEND == "gpu":
            self._stream = cuda.stream() if stream is None else stream
            self._handle = _driver().CUstream(int(self._stream.handle))
            cuda.synchronize()
            self._graph = _capture(launches, self._stream, self._handle, dependent)
        else:
            from .cpu.replay import Replay

            self._replay = Replay(launches)

    def replay(self):
        """Launch everything again, in order; returns at once on a GPU, like a launch."""
        if BACKEND == "gpu":
            _ok(_driver().cuGraphLaunch(self._graph, self._handle))
        else:
            self._replay.run()

    def synchronize(self):
        """Wait until all replays so far are done."""
        if BACKEND == "gpu":
            self._stream.synchronize()

    def mark(self):
        """A point in the stream behind the replays so far: a function that waits until they are done."""
        if BACKEND != "gpu":
            return lambda: None
        event = cuda.event(timing=False)
        event.record(self._stream)
        return event.synchronize

    def seconds(self):
        """Replay once and wait; returns the seconds it took on the device."""
        start, end = cuda.event(), cuda.event()
        stream = self._stream if BACKEND == "gpu" else 0
        start.record(stream)
        self.replay()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _driver():
    from cuda.bindings import driver

    return driver


def _ok(result):
    if result[0] != _driver().CUresult.CUDA_SUCCESS:
        raise GraphError(f"the CUDA driver answered {result[0].name} while a graph was made or run")
    return result[1] if len(result) == 2 else result[1:]


def _capture(launches, stream, handle, dependent):
    """The executable graph of what ``launches()`` launches."""
    driver = _driver()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with launches_on(stream, dependent), cuda.defer_cleanup():  # freeing an array meanwhile would end the recording
        _ok(driver.cuStreamBeginCapture(handle, mode))
        try:
            launches()
        finally:
            graph = _ok(driver.cuStreamEndCapture(handle))
    if not _ok(driver.cuGraphGetNodes(graph))[1]:
        raise ValueError("nothing was launched, so there is no graph to replay")
    return _ok(driver.cuGraphInstantiate(graph, 0))
