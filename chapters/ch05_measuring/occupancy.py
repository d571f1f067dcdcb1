"""Two calculations that need no GPU: how many warps a multiprocessor can hold, and how fast a kernel could be at best.

The limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; how registers
and shared memory are handed out is described with NVIDIA's occupancy calculator (Nsight Compute).
"""

from dataclasses import dataclass

import numpy as np

from chapters.ch02_launch.kernels import MAX_THREADS, WARP

REGISTERS = 65536  # of a multiprocessor, and at most as many for a block; the same on all architectures below
MAX_REGISTERS = 255  # of a thread
REGISTER_UNIT = 256  # registers are given to a warp in pieces of this size
PARTS = 4  # a multiprocessor has four parts, each with a quarter of the registers; a warp lives in one of them


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has for all blocks together. Shared memory in bytes.

    shared_block: the most one block can get. shared_reserved: taken for each block by the system. shared_unit: shared
    memory is handed out in pieces of this size.
    """

    warps: int
    blocks: int
    shared: int
    shared_block: int
    shared_reserved: int
    shared_unit: int


KIB = 1024
LIMITS = {
    "sm_75": Limits(32, 16, 64 * KIB, 64 * KIB, 0, 256),
    "sm_80": Limits(64, 32, 164 * KIB, 163 * KIB, KIB, 128),
    "sm_86": Limits(48, 16, 100 * KIB, 99 * KIB, KIB, 128),
    "sm_89": Limits(48, 24, 100 * KIB, 99 * KIB, KIB, 128),
    "sm_90": Limits(64, 32, 228 * KIB, 227 * KIB, KIB, 128),
}


@dataclass(frozen=True)
class Occupancy:
    """How many blocks and warps a multiprocessor holds, as a share of the warps it could hold, and what stops it.

    limit: "warps", "blocks", "registers" or "shared memory"; of several that allow equally many, the first named here.
    """

    blocks: int
    warps: int
    share: float
    limit: str


def occupancy(threads, registers, shared_bytes, arch):
    """:class:`Occupancy` of a kernel on an architecture.

    threads: of a block. registers: of a thread, at least 1, as ``python -m common.ptx_check`` and, on a GPU,
    ``kernel.get_regs_per_thread()`` tell. shared_bytes: of a block, static and dynamic together. arch: "sm_75",
    "sm_80", "sm_86", "sm_89" or "sm_90". Raises ValueError for an architecture that is not in the table, and for a
    block that no multiprocessor of it can hold.
    """
    if arch not in LIMITS:
        raise ValueError(f"arch = {arch!r}: the table has {', '.join(LIMITS)}")
    have = LIMITS[arch]
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads = {threads}: a block has 1 to {MAX_THREADS} threads; use more blocks instead")
    if not 1 <= registers <= MAX_REGISTERS:
        raise ValueError(f"registers = {registers}: a thread has 1 to {MAX_REGISTERS}; beyond, the compiler spills")
    if not 0 <= shared_bytes <= have.shared_block:
        raise ValueError(f"shared_bytes = {shared_bytes}: a block of {arch} has 0 to {have.shared_block}; use less")
    warps = _divided(threads, WARP)
    warp_registers = _rounded(registers * WARP, REGISTER_UNIT)
    if warp_registers * _rounded(warps, PARTS) > REGISTERS:
        raise ValueError(
            f"{threads} threads of {registers} registers: a block has at most {REGISTERS} registers in all, handed out "
            f"in pieces of {REGISTER_UNIT} a warp; use smaller blocks, or @cuda.jit(max_registers=…)"
        )
    block_shared = _rounded(shared_bytes + have.shared_reserved, have.shared_unit)
    allowed = {
        "warps": have.warps // warps,
        "blocks": have.blocks,
        "registers": REGISTERS // PARTS // warp_registers * PARTS // warps,  # whole warps in each part
        "shared memory": have.shared // block_shared if block_shared else have.blocks,
    }
    limit = min(allowed, key=allowed.get)
    blocks = allowed[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / have.warps, limit)


def roofline(intensity, peak_flops, bandwidth):
    """The most operations a second a kernel can do: what memory can feed, and never more than the peak.

    intensity: operations a byte moved. peak_flops: operations a second. bandwidth: bytes a second. Numbers or arrays.
    Source: Williams, Waterman, Patterson 2009, "Roofline".
    """
    return np.minimum(peak_flops, np.asarray(intensity) * bandwidth)


def ridge(peak_flops, bandwidth):
    """Operations a byte at which memory and arithmetic take equally long: left of it a kernel is *memory-bound*,
    right of it *compute-bound*."""
    return peak_flops / bandwidth


def _divided(number, unit):
    """number / unit, rounded up."""
    return (number + unit - 1) // unit


def _rounded(number, unit):
    """The smallest multiple of ``unit`` that is not below ``number``."""
    return _divided(number, unit) * unit
