"""Hopper's own tensor-core instruction, which four warps give together and which reads its operands from shared memory.

=========================================  ===========================================  =========
function                                   on the GPU                                   needs
=========================================  ===========================================  =========
``wgmma_m64n256k16(acc, tiles, a, b, k)``  ``wgmma.mma_async.sync.aligned.m64n256k16``  sm_90a
``wgmma_fence()``                          ``wgmma.fence.sync.aligned``                 sm_90a
``wgmma_commit()``                         ``wgmma.commit_group.sync.aligned``          sm_90a
``wgmma_wait(n)``                          ``wgmma.wait_group.sync.aligned n``          sm_90a
``fence_async_proxy()``                    ``fence.proxy.async.shared::cta``            sm_90
=========================================  ===========================================  =========

``mma_m16n8k16`` needs its operands in registers, and to bring them there from shared memory takes as long as the
product itself. ``wgmma`` leaves them where they are: a *warpgroup*, 4 neighbouring warps of which the first is a
multiple of 4, asks for 64 x N x 16 at once and goes on; only the sums are in registers.

**The layout of a tile** (K-major, 128-byte swizzle): rows of 64 float16, of which each keeps its 8 pieces of 8 in
another order: element k of row r stands at :func:`swizzle128`. The tile begins at a multiple of 8 rows, 1024 bytes.

**In this order**: copies arrive (``cp_async_wait``) → ``fence_async_proxy`` in each thread that copied, for the tensor
core reads past the path that ordinary loads take → a barrier → ``wgmma_fence`` → products … → ``wgmma_commit``; and
``wgmma_wait`` before anyone reads ``acc`` or writes the tile. The CPU backend computes at once and needs none of it.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". Other GPUs, newer ones too, do not have it.
"""

from llvmlite import ir
from numba import cuda

from .cpu.registry import cpu_equivalent
from .ptx import (
    F32,
    ON_CPU,
    U32,
    U64,
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
