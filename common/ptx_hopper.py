"""Hopper's own: a product that four warps ask for together, out of shared memory, and copies of whole tiles to there.

=========================================  =================================================  =========
function                                   on the GPU                                         needs
=========================================  =================================================  =========
``wgmma_m64n256k16(acc, tiles, a, b, k)``  ``wgmma.mma_async.sync.aligned.m64n256k16``        sm_90a
``wgmma_fence()``                          ``wgmma.fence.sync.aligned``                       sm_90a
``wgmma_commit()``                         ``wgmma.commit_group.sync.aligned``                sm_90a
``wgmma_wait(n)``                          ``wgmma.wait_group.sync.aligned n``                sm_90a
``fence_async_proxy()``                    ``fence.proxy.async.shared::cta``                  sm_90
``arrivals_init(arrived, i, count)``       ``mbarrier.init``, ``fence.mbarrier_init``         sm_90
``arrivals_wait(arrived, i, phase)``       ``mbarrier.try_wait.parity``                       sm_90
``copy_tile_async(tiles, at, X_map, …)``   ``mbarrier.arrive.expect_tx``,                     sm_90
                                           ``cp.async.bulk.tensor.2d``
=========================================  =================================================  =========

``mma_m16n8k16`` needs its operands in registers, and to bring them there from shared memory takes as long as the
product itself. ``wgmma`` leaves them where they are: a *warpgroup*, 4 neighbouring warps of which the first is a
multiple of 4, asks for 64 x N x 16 at once and goes on; only the sums are in registers.

**The layout of a tile** (K-major, 128-byte swizzle): rows of 64 float16, of which each keeps its 8 pieces of 8 in
another order: element k of row r stands at :func:`swizzle128`. The tile begins at a multiple of 8 rows, 1024 bytes.

**In this order**: copies arrive (``cp_async_wait``) → ``fence_async_proxy`` in each thread that copied, for the tensor
core reads past the path that ordinary loads take → a barrier → ``wgmma_fence`` → products … → ``wgmma_commit``; and
``wgmma_wait`` before anyone reads ``acc`` or writes the tile. The CPU backend computes at once and needs none of it.

**Copies of tiles.** A unit beside the warps, the *tensor memory accelerator* (TMA), copies a whole tile and works out
addresses, edges and the swizzle itself. One thread asks for it. What the unit has to know of a matrix, the host writes
down once: :func:`tile_map`. That a tile is there, an *mbarrier* in shared memory says, which counts arrivals and bytes.
It goes through phases, 0, 1, 0, …: each time that all it was told to expect has arrived, a phase ends.

Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier", "cp.async.bulk.tensor"; CUDA Driver
API, "Tensor Map Object Management". Other GPUs do not have the product, newer ones too; the copies have come to stay.
"""

import numpy as np
from llvmlite import ir
from numba import cuda

from .cpu.registry import cpu_equivalent
from .ptx import (
    F32,
    ON_CPU,
    U32,
    U64,
    VOID,
    TypingError,
    _assembly,
    _order,
    _require,
    _shared_address,
    _wait_order,
    intrinsic,
    ldmatrix_x4,
    mma_m16n8k16,
    signature,
    types,
)

ROW = 64  # float16 of a tile's row: 128 bytes
MAP_ROWS_MAX = 256  # of a tile that is copied at once


@cuda.jit(device=True, forceinline=True)
def swizzle128(row, k):
    """Where element k (0 … 63) of row ``row`` stands in the row, for :func:`wgmma_m64n256k16`."""
    return (k // 8 ^ row % 8) * 8 + k % 8


if ON_CPU:

    @cuda.jit(device=True)
    def wgmma_m64n256k16(acc, tiles, a, b, k):
        """acc += A @ B.T for A of (64, 16) and B of (256, 16) float16, by a warpgroup.

        acc: (32, 4) float32, local: element [n, e] of this thread has row 16 * warp + lane // 4 + e // 2 * 8 and column
        8 * n + lane % 4 * 2 + e % 2, warp counted within the warpgroup.
        tiles: flat float16, shared. a, b: where there the first row of the tile of A, and of B, begins, multiples of
        512. k: the first of the 16 columns of both, a multiple of 16 below 64. The whole warpgroup calls it alike.
        """
        lane = cuda.threadIdx.x % 32
        a_row = cuda.threadIdx.x // 32 % 4 * 16 + lane % 16
        b_row = lane // 16 * 8 + lane % 8
        a0, a1, a2, a3 = ldmatrix_x4(tiles, a + a_row * ROW + swizzle128(a_row, k + lane // 16 * 8))
        for n in range(0, acc.shape[0], 2):
            row = b_row + 8 * n
            b0, b1, b2, b3 = ldmatrix_x4(tiles, b + row * ROW + swizzle128(row, k + lane // 8 % 2 * 8))
            acc[n, 0], acc[n, 1], acc[n, 2], acc[n, 3] = mma_m16n8k16(
                a0, a1, a2, a3, b0, b1, acc[n, 0], acc[n, 1], acc[n, 2], acc[n, 3]
            )
            acc[n + 1, 0], acc[n + 1, 1], acc[n + 1, 2], acc[n + 1, 3] = mma_m16n8k16(
                a0, a1, a2, a3, b2, b3, acc[n + 1, 0], acc[n + 1, 1], acc[n + 1, 2], acc[n + 1, 3]
            )
else:

    def _descriptor(builder, address):
        """The 64 bits that describe a K-major tile with 128-byte swizzle: its address, and 1024 bytes for 8 rows."""
        place = builder.zext(builder.lshr(builder.and_(address, U32(0x3FFFF)), U32(4)), U64)
        return builder.or_(place, U64(1 << 62 | (1024 >> 4) << 32 | 1 << 16))

    SUMS = 128  # a thread's
    PRODUCT = (
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
        f"{{{', '.join(f'${i}' for i in range(SUMS))}}}, ${2 * SUMS}, ${2 * SUMS + 1}, 1, 1, 1, 0, 0;"
    )
    OPERANDS = ",".join(["=f"] * SUMS + [str(i) for i in range(SUMS)] + ["l", "l"])

    @intrinsic
    def wgmma_m64n256k16(typingctx, acc, tiles, a, b, k):
        """acc += A @ B.T for A of (64, 16), B of (256, 16), by a warpgroup: see the CPU's version above."""
        if not (isinstance(acc, types.Array) and acc.dtype == types.float32 and acc.layout == "C"):
            raise TypingError(f"wgmma_m64n256k16 adds to a local array of {SUMS} float32, not to {acc}")
        _require("wgmma_m64n256k16", tiles, a, types.float16)
        _require("wgmma_m64n256k16", tiles, b, types.float16)

        def codegen(context, builder, sig, args):
            offset = builder.shl(context.cast(builder, args[4], k, types.uint32), U32(1))
            descriptors = []
            for place, kind in ((args[2], a), (args[3], b)):
                address = _shared_address(context, builder, tiles, kind, args[1], place)
                descriptors.append(_descriptor(builder, builder.add(address, offset)))
            sums = context.make_array(acc)(context, builder, args[0]).data
            places = [builder.gep(sums, [U32(i)]) for i in range(SUMS)]
            before = [builder.load(place) for place in places]
            result = _assembly(builder, PRODUCT, OPERANDS, ir.LiteralStructType([F32] * SUMS), before + descriptors)
            for i, place in enumerate(places):
                builder.store(builder.extract_value(result, i), place)
            return context.get_dummy_value()

        return signature(types.none, acc, tiles, a, b, k), codegen


@intrinsic
def wgmma_fence(typingctx):
    """What registers hold is what the products that follow begin with: before the first, and after acc was touched."""
    return _order("wgmma.fence.sync.aligned;")


@intrinsic
def wgmma_commit(typingctx):
    """The products asked for since the last call are a group."""
    return _order("wgmma.commit_group.sync.aligned;")


@intrinsic
def wgmma_wait(typingctx, n):
    """Wait until all but the last n groups are done. n: a constant."""
    return _wait_order("wgmma_wait", "wgmma.wait_group.sync.aligned", n)


@intrinsic
def fence_async_proxy(typingctx):
    """What this thread wrote to shared memory, or copied there, is what a tensor core reads there after a barrier."""
    return _order("fence.proxy.async.shared::cta;")


for _function in (wgmma_fence, wgmma_commit, wgmma_wait, fence_async_proxy):
    cpu_equivalent(_function)(_function)


# --- copies of whole tiles -------------------------------------------------------------------------------------------


def tile_map(X, tile_rows):
    """What :func:`copy_tile_async` takes for a matrix: how X lies in memory, in tiles of ``tile_rows`` rows of 64.

    X: (rows, K) float16 on the device, C-contiguous, from a multiple of 16 bytes on, K a multiple of 8; the map knows
    its address, so X has to live as long as the map is used. tile_rows: from 1 to 256.
    Returns a device array of 128 bytes; on the CPU backend, X. Raises ValueError if X or tile_rows is none of these,
    or the driver refuses.
    """
    if X.ndim != 2 or X.dtype != np.float16 or 0 in X.shape:
        raise ValueError(f"X is {X.dtype} of shape {X.shape}: a map of tiles is for (rows, K) float16, 1 row at least")
    if X.shape[1] % 8:
        raise ValueError(f"K = {X.shape[1]}: rows must begin at multiples of 16 bytes; pad K to a multiple of 8")
    if not 1 <= tile_rows <= MAP_ROWS_MAX:
        raise ValueError(f"tile_rows = {tile_rows}: a tile of a map has 1 to {MAP_ROWS_MAX} rows")
    return X if ON_CPU else _encode(X, tile_rows)


def _encode(X, tile_rows):
    from cuda.bindings import driver

    (rows, K), words = X.shape, driver.cuuint64_t
    strides, steps = [words(2 * K)], [driver.cuuint32_t(1)] * 2
    shape, box = [words(K), words(rows)], [driver.cuuint32_t(ROW), driver.cuuint32_t(tile_rows)]
    answer, made = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, X.__cuda_array_interface__["data"][0],
        shape, strides, box, steps,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,  # what lies outside arrives as 0
    )  # fmt: skip
    if answer != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"the driver makes no map of X, {X.shape}, in tiles of {tile_rows} rows: {answer.name}")
    return cuda.to_device(np.array([int(word) for word in made.opaque], np.uint64))


if ON_CPU:

    @cuda.jit(device=True)
    def copy_tile_async(tiles, at, X_map, row0, k0, rows, arrived, i):
        """Begin to copy X[row0 : row0 + rows, k0 : k0 + 64] to shared memory; one thread asks for all of it.

        tiles: flat float16, shared. at: where the tile begins there, a multiple of 512; it gets the layout above, and 0
        for what lies outside of X. X_map: from ``tile_map(X, rows)``. rows: a constant, that of the map. arrived[i]
        expects one arrival for each such call, and after it :func:`arrivals_wait` may end. Nobody may still read the
        tile, and a block must not end before its copies have. On the CPU backend the copy is done at once.
        """
        for r in range(rows):
            for c in range(ROW):
                inside = row0 + r < X_map.shape[0] and k0 + c < X_map.shape[1]
                tiles[at + r * ROW + swizzle128(r, c)] = X_map[row0 + r, k0 + c] if inside else np.float16(0)

    @cuda.jit(device=True)
    def arrivals_init(arrived, i, count):
        """arrived[i] is a new mbarrier, whose phases end with ``count`` arrivals each, and the bytes they announce.

        arrived: uint64, shared. One thread does it; a barrier has to follow before others look. Nothing on the CPU.
        """

    @cuda.jit(device=True)
    def arrivals_wait(arrived, i, phase):
        """Wait for the end of the phase of arrived[i] whose number, counted from 0, is ``phase`` modulo 2.

        The caller then sees what has arrived. On the CPU backend everything arrives at once, for the thread that asked;
        for others after a barrier. Nothing to wait for.
        """

else:

    def _mbarrier(context, builder, arrived, kind, args):
        """The 32-bit address of arrived[i], for ``args`` of both."""
        if not (isinstance(arrived, types.Array) and arrived.dtype == types.uint64 and arrived.ndim == 1):
            raise TypingError(f"an mbarrier is an element of a shared array of uint64, not of {arrived}")
        return _shared_address(context, builder, arrived, kind, *args)

    @intrinsic
    def copy_tile_async(typingctx, tiles, at, X_map, row0, k0, rows, arrived, i):
        """Begin to copy a tile of 64 columns to shared memory: see the CPU's version above."""
        _require("copy_tile_async", tiles, at, types.float16)
        if not (isinstance(X_map, types.Array) and X_map.dtype == types.uint64):
            raise TypingError(f"copy_tile_async takes a map, from tile_map(X, rows), not {X_map}")

        def codegen(context, builder, sig, args):
            barrier = _mbarrier(context, builder, arrived, i, args[6:])
            n_bytes = builder.mul(context.cast(builder, args[5], rows, types.uint32), U32(2 * ROW))
            _assembly(builder, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "r,r,~{memory}", VOID,
                      [barrier, n_bytes])  # fmt: skip
            target = _shared_address(context, builder, tiles, at, args[0], args[1])
            described = builder.ptrtoint(context.make_array(X_map)(context, builder, args[2]).data, U64)
            column = context.cast(builder, args[4], k0, types.int32)
            row = context.cast(builder, args[3], row0, types.int32)
            text = (
                "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                "[$0], [$1, {$2, $3}], [$4];"
            )
            _assembly(builder, text, "r,l,r,r,r,~{memory}", VOID, [target, described, column, row, barrier])
            return context.get_dummy_value()

        return signature(types.none, tiles, at, X_map, row0, k0, rows, arrived, i), codegen

    @intrinsic
    def arrivals_init(typingctx, arrived, i, count):
        """A new mbarrier: see the CPU's version above."""

        def codegen(context, builder, sig, args):
            barrier = _mbarrier(context, builder, arrived, i, args[:2])
            expected = context.cast(builder, args[2], count, types.uint32)
            text = "mbarrier.init.shared::cta.b64 [$0], $1; fence.mbarrier_init.release.cluster;"
            _assembly(builder, text, "r,r,~{memory}", VOID, [barrier, expected])
            return context.get_dummy_value()

        return signature(types.none, arrived, i, count), codegen

    @intrinsic
    def arrivals_wait(typingctx, arrived, i, phase):
        """Wait for the end of a phase of an mbarrier: see the CPU's version above."""

        def codegen(context, builder, sig, args):
            barrier = _mbarrier(context, builder, arrived, i, args[:2])
            parity = context.cast(builder, args[2], phase, types.uint32)
            text = (
                "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
                "@!p bra again; }"
            )
            _assembly(builder, text, "r,r,~{memory}", VOID, [barrier, parity])
            return context.get_dummy_value()

        return signature(types.none, arrived, i, phase), codegen
