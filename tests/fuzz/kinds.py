"""The names of what a random kernel may contain."""

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
