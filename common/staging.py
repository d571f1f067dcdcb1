"""Arrays that the host writes and kernels read: copied in one go, without waiting.

    rows = Staging({"tokens": 96, "positions": 96}, copies=3)
    host = rows.next()             # NumPy views, pinned: free again once the copy before the last has ended
    host["tokens"][:3] = 1, 2, 3
    rows.upload(stream)            # returns at once; kernels launched later on the stream read rows.device["tokens"]

``copy_to_device`` costs some 50 µs of Python, and waits if the host's memory is not pinned. Here one call of the driver
copies everything. Source: CUDA Driver API, ``cuMemcpyHtoDAsync``; asynchronous only from pinned memory.
"""

from . import BACKEND  # before numba.cuda

# isort: split
import numpy as np
from numba import cuda


class Staging:
    """int32 arrays by name, each of some shape, one behind the other in one buffer.

    copies: how many of them the host may have under way at a time. device: name -> the array on the device, zeros at
    first. Raises ValueError if copies is not positive.
    """

    def __init__(self, shapes, copies=3):
        if copies < 1:
            raise ValueError(f"copies = {copies}: at least 1 is needed")
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        self._n = sum(sizes.values())
        buffer = cuda.to_device(np.zeros(self._n, np.int32))
        self._buffer, self._now = buffer, 0
        self._hosts = [cuda.pinned_array(self._n, np.int32) for _ in range(copies)]
        self.device, self._views, end = {}, [{} for _ in range(copies)], 0
        for name, shape in shapes.items():
            start, end = end, end + sizes[name]
            self.device[name] = buffer[start:end].reshape(shape)
            for host, views in zip(self._hosts, self._views):
                host[:] = 0
                views[name] = host[start:end].reshape(shape)
        if BACKEND == "gpu":
            self._address = int(buffer.__cuda_array_interface__["data"][0])

    def next(self):
        """The host's arrays to be written next, by name."""
        self._now = (self._now + 1) % len(self._hosts)
        return self._views[self._now]

    def upload(self, stream):
        """Copy what `next` gave to the device, behind what was launched on ``stream`` before."""
        host = self._hosts[self._now]
        if BACKEND != "gpu":
            np.copyto(self._buffer.host, host)  # checks of `copy_to_device` would take longer than the copy
            return
        from cuda.bindings import driver

        handle = driver.CUstream(int(stream.handle))
        (answer,) = driver.cuMemcpyHtoDAsync(self._address, host.ctypes.data, self._n * 4, handle)
        if answer != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver answered {answer.name} to a copy of {self._n * 4} bytes")
