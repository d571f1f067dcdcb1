"""The chapter's demo: ``make ch03``."""

import numpy as np
from numba import cuda

from chapters.ch03_indexing.bench import LADDERS, QUICK
from chapters.ch03_indexing.kernels import blocks_2d, embed, vector_add
from common import bench

tokens = np.array([4, 0, 4], np.int32)
wte = np.arange(5 * 6, dtype=np.float32).reshape(5, 6)  # a vocabulary of 5 tokens, 6 floats each
wpe = np.array([[100], [200], [300]], np.float32) * np.ones(6, np.float32)
out = cuda.device_array((3, 6), np.float32)
grid, block = blocks_2d(3, 6)
embed[grid, block](cuda.to_device(tokens), cuda.to_device(wte), cuda.to_device(wpe), out, 3, 6)
print(f"embed[{grid}, {block}]: rows 4, 0 and 4 of a table that counts up, plus 100, 200, 300 by position")
print(out.copy_to_host().astype(int))

ones = cuda.to_device(np.ones(1000, np.float32))
total = cuda.device_array(1000, np.float32)
for grid, block in ((4, 256), (1, 32), (1, 1)):
    vector_add[grid, block](ones, ones, total, 1000)
    right = bool((total.copy_to_host() == 2).all())
    print(f"vector_add[{grid}, {block}] on 1000 elements, a grid-stride loop: {'right' if right else 'WRONG'}")
print()
bench.show(LADDERS, QUICK)
