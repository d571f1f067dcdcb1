"""Chapter 13, blocks of a paged cache that leave the device and come back: all their pieces in one launch.

A block of chapter 12's pages is one number in a block table, but not one piece of memory: its keys and values lie in
every layer's arrays, 2 * n_layer pieces far apart. A copy from the host takes each piece by a call of its own, some
microseconds for some kilobytes; 125 blocks of 60 pieces are 7500 calls. These kernels read and write the host's memory
themselves (``cuda.mapped_array``: page-locked, and at an address that the device knows), so the bus is used as it is by
a copy, and the number of pieces costs nothing.

================  ==============================================  ===================================================
kernel            what it does                                    bytes over the bus
================  ==============================================  ===================================================
``blocks_out``    blocks of the pages to slots of the host        a block's, once
``blocks_in``     slots of the host to blocks of the pages        the same
================  ==============================================  ===================================================

They copy bits and know no types: pages of float32 or float16 are handed over as words of 64 bits (``array.view``). So a
thread has 8 bytes, and a warp asks the bus for 256 in a row.

*They lose* to a plain copy where a block is one piece, or where there are few pieces, each of a megabyte or more.
"""

import numpy as np
from numba import cuda

from chapters.ch02_launch.kernels import MAX_GRID, blocks_for

BLOCK_THREADS = 128


def blocks_launch(n, n_pieces, size):
    """Launch of both kernels, a thread for each word of a piece (x), pieces (y), blocks (z): ``(grid, block)``.

    Raises ValueError if a number is not positive, or above what a grid takes.
    """
    for name, value, most in ("n", n, MAX_GRID[2]), ("n_pieces", n_pieces, MAX_GRID[1]):
        if not 1 <= value <= most:
            raise ValueError(f"{name} = {value}: a launch needs 1 to {most}; copy more of them in several launches")
    return (blocks_for(size, BLOCK_THREADS), n_pieces, n), BLOCK_THREADS


@cuda.jit
def blocks_out(pages, blocks, slots, host, size):
    """host[slots[i], piece] = pages[piece, blocks[i]], for all pieces.

    pages: (n_pieces, n_blocks, size), host: (n_slots, n_pieces, size), of one type of 8 bytes, no overlap; host may lie
    in the host's memory (``cuda.mapped_array``). blocks, slots: (n,) int32, checked by the caller; no slot twice. size:
    int32. Launch: ``blocks_out[blocks_launch(n, n_pieces, size)](…)``.
    """
    word = cuda.grid(1)
    piece, i = cuda.blockIdx.y, cuda.blockIdx.z
    if word < size:
        host[slots[i], piece, word] = pages[piece, blocks[i], word]


def blocks_out_reference(pages, blocks, slots, host):
    """NumPy reference of :func:`blocks_out`: returns host afterwards, as a new array."""
    host = host.copy()
    host[np.asarray(slots)] = pages[:, np.asarray(blocks)].swapaxes(0, 1)
    return host


@cuda.jit
def blocks_in(host, slots, blocks, pages, size):
    """pages[piece, blocks[i]] = host[slots[i], piece], for all pieces: the way back of :func:`blocks_out`.

    Arguments as there; no block twice. Launch: ``blocks_in[blocks_launch(n, n_pieces, size)](…)``.
    """
    word = cuda.grid(1)
    piece, i = cuda.blockIdx.y, cuda.blockIdx.z
    if word < size:
        pages[piece, blocks[i], word] = host[slots[i], piece, word]


def blocks_in_reference(host, slots, blocks, pages):
    """NumPy reference of :func:`blocks_in`: returns pages afterwards, as a new array."""
    pages = pages.copy()
    pages[:, np.asarray(blocks)] = host[np.asarray(slots)].swapaxes(0, 1)
    return pages
