"""Device memory that nothing has written yet, for the sanitizer: ``cuda.device_array`` until somebody fills it."""

import weakref

import numpy as np

_made = {}  # first byte -> [weak reference to the memory, its bytes, one bool a byte: written?]


def unwatched_launch():
    """A kernel runs and nobody sees what it writes: from now on, memory made before it counts as written."""
    _made.clear()


def made(host):
    """An array was made without contents."""
    memory = host.base if host.base is not None else host
    low, high = np.lib.array_utils.byte_bounds(host)
    if high > low:
        forget = weakref.ref(memory, lambda _: _made.pop(low, None))
        _made[low] = [forget, high - low, None]


def written(host):
    """The host has written an array, or a part of one."""
    if not _made:
        return
    low, high = np.lib.array_utils.byte_bounds(host)
    found = written_map(low, high)
    if found:
        first, known = found
        if not host.flags.c_contiguous:
            steps = [np.arange(n) * s for n, s in zip(host.shape, host.strides)]
            places = host.__array_interface__["data"][0] - first + sum(np.meshgrid(*steps, indexing="ij")).ravel()
            known[places[:, None] + np.arange(host.itemsize)] = True
        else:
            known[low - first : high - first] = True


def written_map(low, high):
    """``(first byte, one bool a byte: written?)`` of the memory with these bytes; None if all counts as written."""
    for first, entry in _made.copy().items():  # memory may be given back meanwhile, by a collection or a thread
        memory, size, known = entry
        if first <= low and high <= first + size and memory() is not None:
            if known is None:
                entry[2] = np.zeros(size, bool)
            return first, entry[2]
    return None
