"""What ``make bench CH=09`` measures: the products in float32 and float16, and a matrix times one row of both."""

import numpy as np
from numba import cuda

from chapters.ch06_shared_tile import kernels as ch06
from chapters.ch09_gemm import gemv, gemv_half, gemv_tensor, hopper, pipeline, tensor_core
from chapters.ch09_gemm import kernels as ch09
from common import BACKEND
from common.bench import Ladder


def _product(rng, size, dtype):
    M, N, K = size
    A = rng.standard_normal((M, K), dtype=np.float32).astype(dtype)
    B = rng.standard_normal((K, N), dtype=np.float32).astype(dtype)
    return {"A": A, "B": B, "out": np.zeros((M, N), np.float32), "M": M, "N": N, "K": K}


def _half_product(rng, size):
    arrays = _product(rng, size, np.float16)
    return {**arrays, "Bt": np.ascontiguousarray(arrays["B"].T)}


def _launch_bt(kernel, launch):
    return lambda a: kernel[launch(a.M, a.N)](a.A, a.Bt, a.out, a.M, a.N, a.K)


def _gemm_v8(a):
    if not hasattr(a, "maps"):  # once, as a network would for its weights
        a.maps = hopper.gemm_v8_maps(a.A, a.Bt)
    hopper.gemm_v8_tma[hopper.gemm_v7_launch(a.M, a.N)](*a.maps, a.out, a.M, a.N, a.K)


def _fits(name, size):
    """The products of warpgroups take Hopper; the CPU backend runs them too, slowly."""
    if name not in ("gemm_v7_warpgroup", "gemm_v8_tma") or BACKEND == "cpu":
        return True
    return tuple(cuda.get_current_device().compute_capability)[:2] == (9, 0)


def _launch(kernel, launch):
    return lambda a: kernel[launch(a.M, a.N)](a.A, a.B, a.out, a.M, a.N, a.K)


def _torch_matmul(a):
    import torch

    torch.matmul(a.A, a.B, out=a.out)


def _torch_half(a):
    import torch

    a.out = torch.matmul(a.A, a.B)  # cuBLAS writes float16; ours float32


def _torch_gemv(a):
    import torch

    torch.mv(a.wte, a.x, out=a.out)


def _gemv(rng, size):
    rows, cols = size
    wte = rng.standard_normal((rows, cols), dtype=np.float32)
    x = rng.standard_normal(cols, dtype=np.float32)
    return {"x": x, "wte": wte, "out": np.zeros(rows, np.float32), "rows": rows, "cols": cols}


def _gemv_half(rng, size):
    rows, cols = size
    W = rng.standard_normal((rows, cols), dtype=np.float32).astype(np.float16)
    x = rng.standard_normal(cols, dtype=np.float32).astype(np.float16)
    bias, out = np.zeros(rows, np.float32), np.zeros((1, rows), np.float32)
    return {"x": x, "W": W, "bias": bias, "out": out, "rows": rows, "cols": cols}


def _gemv_v4(a):
    split = gemv_half.gemv_split(a.rows, a.cols)
    out = a.out.reshape(a.rows)
    gemv_half.gemv_v4_half[gemv_half.gemv_half_launch(a.rows, a.cols)](a.x, a.W, out, a.rows, a.cols, split)


def _gemv_v5(a):
    launch = gemv_tensor.gemv_tensor_launch(a.rows, a.cols)
    gemv_tensor.gemv_v5_tensor_core[launch](a.x, a.W, a.out, 1, a.rows, a.cols)


def _gemv_residual(a):
    launch = gemv_tensor.gemv_residual_launch(a.rows, a.cols)
    out = a.out.reshape(a.rows)
    gemv_tensor.gemv_bias_residual[launch](a.x, a.W, a.bias, out, 1, a.rows, a.cols)


def _gemv_wide(a):
    out = a.out.reshape(a.rows)
    launch = gemv_tensor.gemv_tensor_launch(a.rows, a.cols)
    gemv_tensor.gemv_wide_residual[launch](a.x, a.W, a.bias, out, 1, a.rows, a.cols)


def _numpy_gemv_half(a):
    a.out[...] = a.W.astype(np.float32) @ a.x.astype(np.float32)


def _torch_gemv_half(a):
    import torch

    a.out = torch.mv(a.W, a.x)[None]


def _gemv_launch(kernel, launch):
    return lambda a: kernel[launch(a.rows)](a.x, a.wte, a.out, a.rows, a.cols)


LADDERS = [
    Ladder(
        name="gemm",
        title="C = A @ B in float32, (M, N, K)",
        unit="GFLOP/s",
        share="library",
        sizes={
            "cpu": [(256, 256, 256), (1024, 1024, 1024)],
            "gpu": [(512, 512, 512), (2048, 2048, 2048), (4096, 4096, 4096), (1024, 3072, 768)],
        },
        make=lambda rng, s: _product(rng, s, np.float32),
        work=lambda s: 2 * s[0] * s[1] * s[2],
        versions={
            "matmul_v1_naive": _launch(ch06.matmul_v1_naive, ch06.matmul_launch),
            "matmul_v3_any_shape": _launch(ch06.matmul_v3_any_shape, ch06.matmul_launch),
            "gemm_v1_register_tile": _launch(ch09.gemm_v1_register_tile, ch09.gemm_v1_launch),
            "gemm_v2_vector_loads": _launch(ch09.gemm_v2_vector_loads, ch09.gemm_launch),
            "gemm_v3_double_buffer": _launch(ch09.gemm_v3_double_buffer, ch09.gemm_launch),
        },
        expected=lambda a: ch09.gemm_reference(a.A, a.B),
        library={"cpu": ("NumPy", lambda a: np.matmul(a.A, a.B, out=a.out)), "gpu": ("cuBLAS (torch)", _torch_matmul)},
        tolerance=1e-4,
    ),
    Ladder(
        name="gemm_half",
        title="C = A @ B, A and B in float16, (M, N, K)",
        unit="GFLOP/s",
        share="library",
        sizes={"cpu": [(128, 128, 128)], "gpu": [(512, 512, 512), (2048, 2048, 2048), (4096, 4096, 4096)]},
        make=_half_product,
        work=lambda s: 2 * s[0] * s[1] * s[2],
        versions={
            "gemm_v4_half_storage": _launch(tensor_core.gemm_v4_half_storage, ch09.gemm_launch),
            "gemm_v5_tensor_core": _launch(tensor_core.gemm_v5_tensor_core, tensor_core.gemm_v5_launch),
            "gemm_v6_pipeline": _launch_bt(pipeline.gemm_v6_pipeline, pipeline.gemm_v6_launch),
            "gemm_v7_warpgroup": _launch_bt(hopper.gemm_v7_warpgroup, hopper.gemm_v7_launch),
            "gemm_v8_tma": _gemm_v8,
        },
        fits=_fits,
        expected=lambda a: tensor_core.gemm_half_reference(a.A, a.B),
        library={
            "cpu": ("NumPy", lambda a: np.matmul(a.A.astype(np.float32), a.B.astype(np.float32), out=a.out)),
            "gpu": ("cuBLAS (torch)", _torch_half),
        },
        tolerance=2e-3,
    ),
    Ladder(
        name="gemv",
        title="Matrix times vector, (rows, columns)",
        unit="GB/s",
        sizes={"cpu": [(768, 768), (50257, 768)], "gpu": [(768, 768), (50257, 768), (65536, 4096)]},
        make=_gemv,
        work=lambda s: 4 * s[0] * s[1],
        versions={
            "gemv_v1_thread_per_row": _gemv_launch(gemv.gemv_v1_thread_per_row, gemv.gemv_v1_launch),
            "gemv_v2_warp_per_row": _gemv_launch(gemv.gemv_v2_warp_per_row, gemv.gemv_logits_launch),
            "gemv_v3_vector": _gemv_launch(gemv.gemv_v3_vector, gemv.gemv_logits_launch),
        },
        expected=lambda a: gemv.gemv_logits_reference(a.x, a.wte),
        library={"cpu": ("NumPy", lambda a: np.dot(a.wte, a.x, out=a.out)), "gpu": ("cuBLAS (torch)", _torch_gemv)},
        tolerance=1e-4,
    ),
    Ladder(
        name="gemv_half",
        title="Matrix times vector in float16, (rows, columns): GPT-2's four, its head, and a Llama's of 7B",
        unit="GB/s",
        sizes={
            "cpu": [(768, 768), (50257, 768)],
            "gpu": [(2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768), (4096, 11008)],
        },
        make=_gemv_half,
        work=lambda s: 2 * s[0] * s[1],
        versions={
            "gemv_v4_half": _gemv_v4,
            "gemv_v5_tensor_core": _gemv_v5,
            "gemv_bias_residual": _gemv_residual,  # they add to out, which is 0 when the result is looked at
            "gemv_wide_residual": _gemv_wide,
        },
        expected=lambda a: gemv_half.gemv_half_reference(a.x, a.W)[None],
        library={"cpu": ("NumPy, by way of float32", _numpy_gemv_half), "gpu": ("cuBLAS (torch)", _torch_gemv_half)},
        tolerance=2e-3,
    ),
]
QUICK = {"gemm": [(256, 256, 256)], "gemm_half": [(128, 128, 128)], "gemv": [(4096, 768)],
         "gemv_half": [(768, 768)]}  # fmt: skip
