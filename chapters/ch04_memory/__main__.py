"""The chapter's demo: ``make ch04``."""

import numpy as np
from numba import cuda

from chapters.ch04_memory.bench import LADDERS, QUICK
from chapters.ch04_memory.transpose import transpose_kernel, transpose_launch
from common import bench

x = np.arange(15, dtype=np.float32).reshape(3, 5)
out = cuda.device_array((5, 3), np.float32)
transpose_kernel[transpose_launch(3, 5)](cuda.to_device(x), out, 3, 5)
print("a (3, 5) matrix, in the order it lies in memory:  ", x.ravel().astype(int))
print("its transpose (5, 3), in the order it lies there: ", out.copy_to_host().ravel().astype(int))
bench.show(LADDERS, QUICK)
