"""Draft."""

import math

import numpy as np
from numba import cuda, float32, uint32
from numba.types import float16

from chapters.ch07_warp_reduce.kernels import FULL_WARP
from chapters.ch10_softmax.kernels import LOWEST
from common.ptx import (
    cp_async_commit,
    cp_async_half8,
    cp_async_wait,
    exp2_approx,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k16,
    pack_half2,
    store_half2,
)

WARP = 32
THREADS = 128
TWO_BLOCKS = (THREADS, 2)
LOG2_E = np.float32(1 / math.log(2))
LN_2 = np.float32(math.log(2))


@cuda.jit(device=True, forceinline=True)
def swizzle(row, piece):
    return (piece ^ (row % 8)) * 8


@cuda.jit(device=True, forceinline=True)
def load_rows(tile, x, head, row0, rows):
    pieces = tile.shape[1] // 8
    piece = (cuda.threadIdx.x & 127) % pieces
    first = (cuda.threadIdx.x & 127) // pieces
    for i in range(0, tile.shape[0], THREADS // pieces):
        row = first + i
        cp_async_half8(tile, (row, swizzle(row, piece)), x, (head, row0 + row, 8 * piece), row0 + row < rows)


@cuda.jit(device=True, forceinline=True)
def scores_of_tile(q_pairs, k_tile, scores):
    lane = cuda.threadIdx.x & 31
    k_row, k_piece = lane // 16 * 8 + lane % 8, lane // 8 % 2
    for m in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            for e in range(4):
                scores[m, n, e] = float32(0)
    for kk in range(q_pairs.shape[1]):
        for n in range(0, scores.shape[1], 2):
            row = k_row + 8 * n
            b0, b1, b2, b3 = ldmatrix_x4(k_tile, (row, swizzle(row, 2 * kk + k_piece)))
            for m in range(scores.shape[0]):
                scores[m, n, 0], scores[m, n, 1], scores[m, n, 2], scores[m, n, 3] = mma_m16n8k16(
                    q_pairs[m, kk, 0], q_pairs[m, kk, 1], q_pairs[m, kk, 2], q_pairs[m, kk, 3], b0, b1,
                    scores[m, n, 0], scores[m, n, 1], scores[m, n, 2], scores[m, n, 3],
                )  # fmt: skip
                scores[m, n + 1, 0], scores[m, n + 1, 1], scores[m, n + 1, 2], scores[m, n + 1, 3] = mma_m16n8k16(
                    q_pairs[m, kk, 0], q_pairs[m, kk, 1], q_pairs[m, kk, 2], q_pairs[m, kk, 3], b2, b3,
                    scores[m, n + 1, 0], scores[m, n + 1, 1], scores[m, n + 1, 2], scores[m, n + 1, 3],
                )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def mask_tile(scores, limits, key0):
    first = key0 + (cuda.threadIdx.x & 3) * 2
    for m in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            for e in range(4):
                if first + 8 * n + e % 2 >= limits[m, e // 2]:
                    scores[m, n, e] = float32(-math.inf)


@cuda.jit(device=True, forceinline=True)
def softmax_step(scores, factor, largest, total, acc):
    for m in range(scores.shape[0]):
        for half in range(2):
            top = scores[m, 0, 2 * half]
            for n in range(scores.shape[1]):
                top = max(top, max(scores[m, n, 2 * half], scores[m, n, 2 * half + 1]))
            top = max(top, cuda.shfl_xor_sync(FULL_WARP, top, 1))
            top = max(top, cuda.shfl_xor_sync(FULL_WARP, top, 2))
            top = max(largest[m, half], top * factor)
            shrink = exp2_approx(largest[m, half] - top)
            largest[m, half] = top
            part = total[m, half] * shrink
            for n in range(scores.shape[1]):
                scores[m, n, 2 * half] = exp2_approx(scores[m, n, 2 * half] * factor - top)
                scores[m, n, 2 * half + 1] = exp2_approx(scores[m, n, 2 * half + 1] * factor - top)
                part += scores[m, n, 2 * half]
                part += scores[m, n, 2 * half + 1]
            total[m, half] = part
            for d in range(acc.shape[1]):
                acc[m, d, 2 * half] *= shrink
                acc[m, d, 2 * half + 1] *= shrink


@cuda.jit(device=True, forceinline=True)
def add_values(scores, v_tile, p_pairs, acc):
    lane = cuda.threadIdx.x & 31
    v_row, v_piece = lane % 16, lane // 16
    for kk in range(scores.shape[1] // 2):
        for m in range(scores.shape[0]):
            p_pairs[m, 0] = pack_half2(scores[m, 2 * kk, 0], scores[m, 2 * kk, 1])
            p_pairs[m, 1] = pack_half2(scores[m, 2 * kk, 2], scores[m, 2 * kk, 3])
            p_pairs[m, 2] = pack_half2(scores[m, 2 * kk + 1, 0], scores[m, 2 * kk + 1, 1])
            p_pairs[m, 3] = pack_half2(scores[m, 2 * kk + 1, 2], scores[m, 2 * kk + 1, 3])
        row = 16 * kk + v_row
        for d in range(0, acc.shape[1], 2):
            b0, b1, b2, b3 = ldmatrix_x4_trans(v_tile, (row, swizzle(row, d + v_piece)))
            for m in range(scores.shape[0]):
                acc[m, d, 0], acc[m, d, 1], acc[m, d, 2], acc[m, d, 3] = mma_m16n8k16(
                    p_pairs[m, 0], p_pairs[m, 1], p_pairs[m, 2], p_pairs[m, 3], b0, b1,
                    acc[m, d, 0], acc[m, d, 1], acc[m, d, 2], acc[m, d, 3],
                )  # fmt: skip
                acc[m, d + 1, 0], acc[m, d + 1, 1], acc[m, d + 1, 2], acc[m, d + 1, 3] = mma_m16n8k16(
                    p_pairs[m, 0], p_pairs[m, 1], p_pairs[m, 2], p_pairs[m, 3], b2, b3,
                    acc[m, d + 1, 0], acc[m, d + 1, 1], acc[m, d + 1, 2], acc[m, d + 1, 3],
                )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def attend(q, k, v, out, lse, n_tokens, start, scale, causal, q_tile, k_tile, v_tile,
           q_pairs, p_pairs, scores, acc, largest, total, limits):  # fmt: skip
    lane = cuda.threadIdx.x & 31
    head = cuda.blockIdx.y
    query0 = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * q_tile.shape[0]
    warp_row = (cuda.threadIdx.x & 127) // WARP * 16 * q_pairs.shape[0]
    n_keys = start + n_tokens
    whole = n_keys  # tiles up to this key need no mask
    end = n_keys
    if causal:
        whole = min(n_keys, start + query0 + 1)
        end = min(n_keys, start + query0 + q_tile.shape[0])
    factor = scale * LOG2_E
    load_rows(q_tile, q, head, query0, n_tokens)
    load_rows(k_tile, k, head, 0, n_keys)
    cp_async_commit()
    for m in range(acc.shape[0]):
        for half in range(2):
            largest[m, half] = LOWEST
            total[m, half] = float32(0)
            position = start + query0 + warp_row + 16 * m + 8 * half + lane // 4
            limits[m, half] = min(n_keys, position + 1) if causal else n_keys
        for d in range(acc.shape[1]):
            for e in range(4):
                acc[m, d, e] = float32(0)
    cp_async_wait(0)
    cuda.syncthreads()
    q_row, q_piece = warp_row + lane % 16, lane // 16
    for m in range(q_pairs.shape[0]):
        for kk in range(q_pairs.shape[1]):
            row = q_row + 16 * m
            q_pairs[m, kk, 0], q_pairs[m, kk, 1], q_pairs[m, kk, 2], q_pairs[m, kk, 3] = ldmatrix_x4(
                q_tile, (row, swizzle(row, 2 * kk + q_piece))
            )
    for key0 in range(0, end, k_tile.shape[0]):
        cp_async_wait(0)
        cuda.syncthreads()  # tile of k is there; all have read v
        load_rows(v_tile, v, head, key0, n_keys)
        cp_async_commit()
        scores_of_tile(q_pairs, k_tile, scores)
        cp_async_wait(0)
        cuda.syncthreads()  # tile of v is there; all have read k
        load_rows(k_tile, k, head, key0 + k_tile.shape[0], n_keys)
        cp_async_commit()
        if key0 + k_tile.shape[0] > whole:
            mask_tile(scores, limits, key0)
        softmax_step(scores, factor, largest, total, acc)
        add_values(scores, v_tile, p_pairs, acc)
    cp_async_wait(0)
    col0 = head * q_tile.shape[1] + lane % 4 * 2
    for m in range(acc.shape[0]):
        for half in range(2):
            query = query0 + warp_row + 16 * m + 8 * half + lane // 4
            row_total = total[m, half]
            row_total += cuda.shfl_xor_sync(FULL_WARP, row_total, 1)
            row_total += cuda.shfl_xor_sync(FULL_WARP, row_total, 2)
            if query < n_tokens:
                inverse = float32(1) / row_total
                for d in range(acc.shape[1]):
                    pair = pack_half2(acc[m, d, 2 * half] * inverse, acc[m, d, 2 * half + 1] * inverse)
                    store_half2(out, (query, col0 + 8 * d), pair)
                if lane % 4 == 0:
                    lse[head, query] = largest[m, half] * LN_2 + math.log(row_total)


@cuda.jit(launch_bounds=TWO_BLOCKS)
def flash_v4_64(q, k, v, out, lse, n_tokens, start, scale, causal):
    q_tile = cuda.shared.array((128, 64), float16, alignment=16)
    k_tile = cuda.shared.array((64, 64), float16, alignment=16)
    v_tile = cuda.shared.array((64, 64), float16, alignment=16)
    q_pairs = cuda.local.array((2, 4, 4), uint32)
    p_pairs = cuda.local.array((2, 4), uint32)
    scores = cuda.local.array((2, 8, 4), float32)
    acc = cuda.local.array((2, 8, 4), float32)
    largest = cuda.local.array((2, 2), float32)
    total = cuda.local.array((2, 2), float32)
    limits = cuda.local.array((2, 2), np.int32)
    attend(q, k, v, out, lse, n_tokens, start, scale, causal, q_tile, k_tile, v_tile,
           q_pairs, p_pairs, scores, acc, largest, total, limits)  # fmt: skip


@cuda.jit(launch_bounds=TWO_BLOCKS)
def flash_v4_128(q, k, v, out, lse, n_tokens, start, scale, causal):
    q_tile = cuda.shared.array((64, 128), float16, alignment=16)
    k_tile = cuda.shared.array((64, 128), float16, alignment=16)
    v_tile = cuda.shared.array((64, 128), float16, alignment=16)
    q_pairs = cuda.local.array((1, 8, 4), uint32)
    p_pairs = cuda.local.array((1, 4), uint32)
    scores = cuda.local.array((1, 8, 4), float32)
    acc = cuda.local.array((1, 16, 4), float32)
    largest = cuda.local.array((1, 2), float32)
    total = cuda.local.array((1, 2), float32)
    limits = cuda.local.array((1, 2), np.int32)
    attend(q, k, v, out, lse, n_tokens, start, scale, causal, q_tile, k_tile, v_tile,
           q_pairs, p_pairs, scores, acc, largest, total, limits)  # fmt: skip
