"""What a set of random kernels must contain, and how to find it in their text."""

import re

# A regular expression for a line, or a pair (or triple) of them for a line inside a suite whose head matches the first
# (inside ...).
FEATURES = {
    "block 1-D": r"^BLOCK = \(\d+,\)", "block 2-D": r"^BLOCK = \(\d+, \d+\)",
    "block 3-D": r"^BLOCK = \(\d+, \d+, \d+\)",
    "several blocks": r"^GRID = (?!\(1,\))", "ragged warp": r"^# .* ragged",
    "barrier": r"cuda\.syncthreads\(\)", "barrier in for": (r"for ", r"cuda\.syncthreads"),
    "barrier in while": (r"while ", r"cuda\.syncthreads"), "barrier in if": (r"if ", r"cuda\.syncthreads"),
    "barrier in else": (r"else", r"cuda\.syncthreads"),
    "barrier in loop in if": (r"if ", r"for |while ", r"cuda\.syncthreads"),
    "barrier in if in loop": (r"for |while ", r"if ", r"cuda\.syncthreads"),
    "syncthreads_count": r"syncthreads_count", "syncthreads_and": r"syncthreads_and",
    "syncthreads_or": r"syncthreads_or",
    "syncwarp": r"syncwarp\(\)", "syncwarp mask": r"syncwarp\([^)]", "shfl_sync": r"shfl_sync",
    "shfl_up_sync": r"shfl_up_sync", "shfl_down_sync": r"shfl_down_sync", "shfl_xor_sync": r"shfl_xor_sync",
    "all_sync": r"all_sync", "any_sync": r"any_sync", "eq_sync": r"eq_sync", "ballot_sync": r"ballot_sync",
    "match_any_sync": r"match_any_sync", "match_all_sync": r"match_all_sync", "activemask": r"activemask",
    "lanemask_lt": r"lanemask_lt", "collective in for": (r"for ", r"_sync\("),
    "collective in while": (r"while ", r"_sync\("), "collective in if": (r"if ", r"_sync\("),
    "collective in warp branch": (r"if .*(?:warp|// 32)", r"cuda\.\w+_sync\("),
    "collective in while test": r"while .*_(?:sync|or)\(.*:$", "collective in if test": r"if .*_sync\(.*:$",
    "nested collectives": r"_sync\(.*_sync\(", "sub-mask": r"_sync\(0x(?:FFFF|FF|F),",
    "laneid": r"cuda\.laneid", "warpsize": r"cuda\.warpsize", "gridDim": r"cuda\.gridDim",
    "grid(1)": r"cuda\.grid\(1\)", "grid(2)": r"cuda\.grid\(2\)", "gridsize": r"cuda\.gridsize",
    "shared 1-D": r"shared\.array\([1-9N]", "shared 2-D": r"shared\.array\(\(", "dynamic shared": r"shared\.array\(0",
    "two dynamic arrays": r"dz = cuda\.shared\.array\(0", "several shared arrays": r"[ts]1 = cuda\.shared\.array",
    "local array": r"local\.array", "const array": r"const\.array_like", "atomic global": r"atomic\.\w+\(g",
    "atomic shared": r"atomic\.\w+\(h", "atomic old value": r"= cuda\.atomic", "atomic add": r"atomic\.add",
    "atomic max or min": r"atomic\.m(?:ax|in)", "atomic bits": r"atomic\.(?:or_|and_|xor)",
    "atomic exch or cas": r"atomic\.(?:exch|cas)", "atomic tuple index": r"atomic\.\w+\(\w+, \(.*, .*\), ",
    "int32 array": r"int32 array", "int64 array": r"int64 array", "uint32 array": r"uint32 array",
    "float32 array": r"float32 array", "float64 array": r"float64 array", "bool array": r"bool array",
    "float16 array": r"float16 array", "global 2-D": r"o\d\[g(?:id|y), ",
    "device function": r"^@cuda\.jit\(device=True\)",
    "device barrier": (r"def d", r"cuda\.syncthreads"), "device shuffle": (r"def d", r"cuda\.shfl"),
    "device return in branch": (r"def d", r"if ", r"return"), "device calls device": (r"def d", r"d[pwb]\d\("),
    "call in expression": r"[+*] d[pwb]\d\(|d[pwb]\d\(.*\) [+*]", "early return": r"^        return$",
    "break": r"^ +break$", "continue": r"^ +continue$", "while": r"^ +while ", "while True": r"while True:",
    "negative step": r"range\(.*, -\d+\):", "loop over scalar argument": r"range\((?:\w+, )?na\d\)",
    "loop over tuple": r"for \w+ in \(", "divergent loop": r"for \w+ in range\(.*(?:tid|lane|%)",
    "grid stride": r"for \w+ in range\(gid, ", "block stride": r"for \w+ in range\(tid, ", "elif": r"^ +elif",
    "else": r"^ +else:", "conditional expression": r" if .* else ", "nested conditional": r" if .* else .* if .* else ",
    "and": r" and ", "or": r" or ", "not": r"not ", "chained comparison": r"[^<>=]<=? [^<>=]+ <=? ",
    "augmented": r"^ +\w+ [-+*/%&|^]+= ", "augmented element": r"^ +\w+\[.*\] [-+*/%&|^]+= ",
    "tuple assignment": r"^ +\w+, \w+ = ", "swap": r"^ +(\w+), (\w+) = \2, \1$", "floor division": r"//",
    "negative index": r"- \d+\]|\[-", "shape": r"\.shape\[", "popc": r"popc", "clz": r"clz", "ffs": r"ffs",
    "brev": r"brev", "selp": r"selp", "fma": r"cuda\.fma", "math": r"math\.", "min or max": r"\b(?:min|max)\(",
    "np.float32": r"np\.float32\(", "int()": r"\bint\(", "int wraparound": r"6364136223846793005|2654435761",
    "name reused": r"reused", "maybe assigned": r"only if assigned", "loop variable after loop": r"left by the loop",
    "place in loops in branch": (r"if ", r"for \w+ in range\(\d+\):$", r"= .* % \d+\) \+ "),
    "keeps old value": r"keeps its value", "scalar float": r"fa\d", "scalar bool": r"ba\d",
}

# What a set of cases with a feature must contain: by the feature's name in kinds.py.
FEATURES_OF_KINDS = {
    "rows": {
        "local rank 2": r"local\.array\(\(\d, \d\)", "local rank 3": r"local\.array\(\(\d, \d, \d\)",
        "shared rank 3": r"shared\.array\(\(\d+, \d, \d\)", "row of a shared array": r"w0\[tid\]",
        "part named": r"^ +row\d+ = \w+\[", "part of a part": r"^ +row\d+ = row\d+\[", "row passed": r"dr\d\(\w+\[",
        "row function writes": (r"def dr", r"^ +row\[.*\] = "), "tuple to a part": r"^ +\w+\[.*\] = [^=]*, ",
        "scalar to a part": r"^ +\w+\[[^=]*:[^=]*\] = [^,]*$", "column": r"\w\[:, ", "stride": r"::2",
        "backwards": r"::-1", "several subscripts": r"(?:l|row)\d+\[[^]]*\]\[", "shape of a part": r"\]\.shape",
        "either part": r"^ +row\d+ = .* if .* else ", "pair of parts": r"^ +row\d+ = \(",
    },
    "iterate": {"loop over a row": r"for v\d+ in \w+\[.*\]:"},
    "signatures": {
        "device string": r'^@cuda\.jit\("\w+\(.*\)", device=True\)', "device list": r"^@cuda\.jit\(\[.*device",
        "device types": r"^@cuda\.jit\(\w+\(.*\), device=True", "kernel string": r'^@cuda\.jit\("(?:void)?\([^"]*"\)$',
        "kernel tuple": r"^@cuda\.jit\(\(\w", "kernel call": r"^@cuda\.jit\(void\(",
        "kernel list": r'^@cuda\.jit\(\["void.*", "void',
        "narrow parameter": r"u?int(?:8|16)\b.*device=True", "unsigned result": r"jit\(\W*uint\d+\(",
        "float parameter, integer result": r"jit\(\W*u?int\d+\(.*float", "array parameter": r"jit\(.*\[:.*device=True",
        "converted at the launch": r"def kernel\(.*nc0", "negative": r"\(-p\d\)", "inverse": r"\(~p\d\)",
    },
    "recursion": {
        "recursion": (r"def dx", r"dx\d\("), "two recursive calls": (r"def dx", r"dx\d\(.*dx\d\("),
        "recursion with a signature": r"^@cuda\.jit\(.*int64\((?:int64, int64|int64, float64)\)",
    },
    "constants": {
        "enum": r"class Mode\(IntEnum\)", "member": r"[^.]Mode\.\w+ |Mode\.\w+\)", "value": r"Mode\.\w+\.value",
        "named tuple": r"CONFIG\.\w+[^,]*$", "module": r"^ .*pkg\.sub\.", "tuple": r"^ .*TRIPLE\[",
    },
    "returns": {
        "nested return": (r"def dn", r"if |for |while ", r"if |for |while ", r"return"),
        "return in a loop": (r"def dn", r"for |while ", r"return"),
        "nested return of the kernel": (r"def kernel", r"if |for |while ", r"if ", r"^ +return$"),
    },
    "casts": {
        "narrow": r"np\.u?int(?:8|16)\(", "twice": r"np\.u?int\d+\(np\.u?int\d+\(",
        "narrow array": r"int8 array|int16 array", "float in range": r"np\.u?int\d+\(.*\* \d\.0\)",
    },
}



def features_of(source, features=FEATURES):
    """The names in `features` that occur in a case's source."""
    lines = [(len(text) - len(text.lstrip()), text) for text in source.splitlines() if text.strip()]

    def inside(patterns, start, stop):
        for k in range(start, stop):
            if re.search(patterns[0], lines[k][1]):
                if len(patterns) == 1:
                    return True
                end = k + 1
                while end < len(lines) and lines[end][0] > lines[k][0]:
                    end += 1
                if inside(patterns[1:], k + 1, end):
                    return True
        return False

    return {name for name, p in features.items() if inside((p,) if isinstance(p, str) else p, 0, len(lines))}
