"""The chapter's demo: ``make ch08``."""

import numpy as np
from numba import cuda

from chapters.ch08_atomics_scan.bench import LADDERS, QUICK
from chapters.ch08_atomics_scan.compact import compact
from chapters.ch08_atomics_scan.kernels import histogram_kernel, histogram_launch
from chapters.ch08_atomics_scan.scan import scan_block, scan_block_launch
from chapters.ch08_atomics_scan.scan_array import scan_scratch, tiles_of
from chapters.ch08_atomics_scan.topk import top_k, top_k_launch
from common import bench

text = "counts become places"
keys = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
counts, starts = cuda.to_device(np.zeros(128, np.int32)), cuda.device_array(128, np.int32)
histogram_kernel[histogram_launch(keys.size, 128)](cuda.to_device(keys), counts, keys.size, 128)
scan_block[scan_block_launch(128)](counts, starts, 128)  # what the histogram left on the device is scanned there
counts, starts = counts.copy_to_host(), starts.copy_to_host()
used = np.flatnonzero(counts)
print(f"text:                  {text!r}")
print("letters:               " + " ".join(f"{chr(b):>2}" for b in used))
print("how many (histogram):  " + " ".join(f"{counts[b]:2}" for b in used))
print("first place (scan):    " + " ".join(f"{starts[b]:2}" for b in used))
print(f"the letters, sorted:   {''.join(chr(b) * counts[b] for b in used)!r}: each begins at its first place")

x = np.array([0.5, -2, 7, 3, 7, 0, -1, 4], np.float32)
values, indices = cuda.device_array(x.size, np.float32), cuda.device_array(x.size, np.int32)
counts = cuda.device_array(scan_scratch(x.size), np.int32)
compact(cuda.to_device(x), counts, values, indices, x.size, np.float32(0))
kept = counts.copy_to_host()[tiles_of(x.size)]  # the scan's last number says how many there are
print(f"\nnumbers:               {x.tolist()}")
print(f"those above 0:         {values.copy_to_host()[:kept].tolist()} at {indices.copy_to_host()[:kept]} (compaction)")

values, indices = cuda.device_array(3, np.float32), cuda.device_array(3, np.int32)
top_k[top_k_launch(x.size, 3)](cuda.to_device(x), values, indices, x.size, 3)
print(f"the 3 largest:         {values.copy_to_host().tolist()} at {indices.copy_to_host()} (radix select)")
bench.show(LADDERS, QUICK)
