"""The names of what a random kernel may contain.

STATEMENTS and EXTRAS may be in every kernel unless they are left out. KINDS are features of the language that are in
none unless they are asked for; a kernel takes one or two of those asked for, by its seed.
"""

# How often each kind of statement is chosen. `without` of generate() takes these names and those of EXTRAS.
STATEMENTS = {
    "assign": 9, "reassign": 7, "augment": 5, "tuple": 4, "if": 8, "block_if": 8, "warp_if": 7, "for": 7, "while": 4,
    "accumulate": 5, "barrier": 8, "syncwarp": 4, "vote_barrier": 4, "shared_write": 9, "collective": 8, "match": 2,
    "activemask": 3, "local": 4, "output": 6, "stride_loop": 4, "atomic": 6, "own_atomic": 5, "reuse": 4, "maybe": 4,
    "loop_variable": 2, "early_return": 5, "call_block": 7, "tree_reduce": 3, "scan": 2, "butterfly": 2, "warp_scan": 2,
    "warp_down": 2, "compact": 2, "match_group": 2, "submask": 4, "vote_loop": 4, "double_buffer": 2, "break": 6,
    "continue": 4, "return": 6, "place_loop": 4,
}
EXTRAS = ("dynamic_shared", "dynamic_alias", "float16", "const_array", "device_pure", "device_warp", "device_block",
          "uniform_break", "uniform_load", "shfl_wrap", "device_return_barrier", "negative_index")

KINDS = {
    "rows": "parts of local and shared arrays of rank 2 and 3: named, passed on, sliced, filled by tuples and scalars",
    "rows_across": "the same with other statements, barriers too, between them",
    "iterate": "loops over the elements of a row, rows unpacked",
    "signatures": "kernels and device functions with explicit signatures, narrow and mixed types",
    "recursion": "device functions that call themselves",
    "constants": "constants in enums, named tuples, tuples, and modules of packages",
    "class_constants": "constants that are attributes of classes, dataclasses and namespaces (numba-cuda refuses them)",
    "returns": "early returns in nested branches and loops",
    "casts": "narrow integer types: arrays, casts that wrap, floats in range",
    "wild": "floats outside an integer's range, shifts beyond the width: answered as PTX's instructions do",
}
GPU_KINDS = tuple(k for k in KINDS if k not in ("class_constants", "wild"))   # what every GPU runs, with one answer
DEFAULT_KINDS = ("rows", "signatures", "recursion", "constants", "returns", "casts")

# The statements that a kind brings along.
KIND_STATEMENTS = {
    "rows": {"rows": 9, "array_rows": 6}, "casts": {"cast": 5}, "signatures": {"typed": 5}, "wild": {"wild": 7},
    "recursion": {"recursive_call": 9}, "returns": {"nested_return": 15, "call_returning": 4},
}
