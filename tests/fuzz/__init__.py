"""The parts of the random kernels of tests/fuzz_kernels.py.

    kinds        the names of what a kernel may contain, and how often it is chosen
    features     what a set of kernels must contain, to be found in their text
    parts        levels, launch geometries, expressions, variables, arrays
    body         one function being written: its names, scopes, modes of shared arrays
    expressions  integers, floats, conditions, loads, calls
    statements   assignments, branches, loops, barriers, stores, names
    idioms       reductions, scans, votes, double buffers: what people write
    module       device functions, the kernel with its arguments, the whole case
"""
