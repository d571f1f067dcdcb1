"""What became of a test of a CUDA suite on the CPU backend: the rules of :mod:`tests.numba_suite`, and its table.

The classes, from the best to the worst; a test with several failures (subtests) is in the worst of theirs:

``pass``
    As on a GPU. Among them: a test that is expected to fail on a GPU, and is refused here.
``not applicable``
    About something that a CPU has no counterpart of. ``ABSENT`` lists the names of ``numba.cuda`` that stand for such a
    thing, ``TABLE`` tests; both with a reason. A test that is skipped is in here with the reason that it gives.
``refused``
    The backend has no such name in ``numba.cuda``, or on its objects; or the error is its own: one of
    ``common/cpu/errors.py``, or what a ``raise`` in ``common/cpu`` says.
``accepted``
    The test waits for an error, which a GPU gives, and none came. Among them: an expected failure that does not fail,
    or only in the end, by its result.
``unclear``
    Any other exception.
``wrong``
    An assertion failed, whatever it is about, and the backend had accepted everything.
``crash``
    The process ended in the test, or the test did not end in time.

An assertion about the *words* of an error is none about a result: where the text that was compared is that of an error
that the backend gave, and that the test waited for, the class is ``refused``. A test that waits for an error and is
content with the error for a missing name does not pass by that.

What these rules get wrong stands in ``TABLE``: a pattern of test ids, the class, the reason.
"""

import re
from fnmatch import fnmatchcase

PASS, NOT_APPLICABLE, REFUSED, ACCEPTED, UNCLEAR, WRONG, CRASH = CLASSES = (
    "pass",
    "not applicable",
    "refused",
    "accepted",
    "unclear",
    "wrong",
    "crash",
)
BAD = (WRONG, CRASH, UNCLEAR, ACCEPTED)
TITLES = {
    PASS: "pass",
    WRONG: "silently wrong",
    CRASH: "crash or hang",
    UNCLEAR: "unclear error",
    ACCEPTED: "accepted though a GPU refuses",
    REFUSED: "refused",
    NOT_APPLICABLE: "not applicable",
}

DRIVER = "the NVIDIA driver's contexts, modules and memory"
TEXT = "the text or the figures of PTX, LLVM or machine code for a GPU"
COMPILER = "the inside of numba-cuda's compiler"
LINKER = "linking with code that was compiled for a GPU"
SHARING = "memory shared between processes by the driver (IPC)"
LIBRARIES = "CUDA's libraries and where they are"
SIMULATOR = "the simulator"
SEVERAL = "several GPUs"
CACHE = "the files of Numba's own cache"
WARNINGS = "a warning about the speed of a GPU, or about debugging on one"
LATER = "what can be done before a launch is over: here it is over when it returns"
DUMPS = "what Numba's compiler prints when it is debugged"
PACKAGE = "a package that is not installed"
SETTLED = "a test that its authors skip"

# Names of numba.cuda, and attributes of its objects, that stand for something a CPU has not.
ABSENT = {
    "numba.cuda.cudadrv*": DRIVER,
    "numba.cuda.devicearray*": DRIVER,
    "numba.cuda.set_memory_manager*": DRIVER,
    "numba.cuda.simulator*": SIMULATOR,
    "numba.cuda.compile*": TEXT,
    "numba.cuda.codegen*": COMPILER,
    "numba.cuda.cudaimpl*": COMPILER,
    "numba.cuda.cudadecl*": COMPILER,
    "numba.cuda.core*": COMPILER,
    "numba.cuda.descriptor*": COMPILER,
    "numba.cuda.deviceufunc*": COMPILER,
    "numba.cuda.dispatcher*": COMPILER,
    "numba.cuda.flags*": COMPILER,
    "numba.cuda.libdevicefuncs*": COMPILER,
    "numba.cuda.declare_device*": LINKER,
    "numba.cuda.memory_management*": DRIVER,
    "numba.cuda.cuda_paths*": LIBRARIES,
    "numba.cuda.itanium_mangler*": COMPILER,
    "numba.cuda.kernels*": COMPILER,
    "numba.cuda.launchconfig*": COMPILER,
    "numba.cuda.lowering*": COMPILER,
    "numba.cuda.misc*": COMPILER,
    "numba.cuda.models*": COMPILER,
    "numba.cuda.np*": COMPILER,
    "numba.cuda.serialize*": COMPILER,
    "numba.cuda.target*": COMPILER,
    "numba.cuda.typeconv*": COMPILER,
    "numba.cuda.typing*": COMPILER,
    "*.memory_manager": DRIVER,
    "*.deallocations": DRIVER,
    "Context.mem*": DRIVER,
    "*.get_ipc_handle": SHARING,
    "*.gpu_data": DRIVER,
    "*._numba_type_": COMPILER,
    "*._compile_for_args": COMPILER,
    "*.inspect_*": TEXT,
    "_DeviceList.lst": DRIVER,
    "cffi*": PACKAGE,
    "ml_dtypes*": PACKAGE,
}

# What the rules get wrong: (pattern of test ids, class, reason). It is looked at for tests that are skipped, and for
# those that the rules put into a bad class; a crash stays one.
TABLE = [
    ("core.test_serialize.*", NOT_APPLICABLE, COMPILER),
    ("cudadrv.test_context_stack.*", NOT_APPLICABLE, DRIVER),
    ("cudadrv.test_detect.*", NOT_APPLICABLE, "what cuda.detect() prints about a GPU"),
    ("cudadrv.test_init.*", NOT_APPLICABLE, "a driver that does not start"),
    ("cudadrv.test_ptds.*", NOT_APPLICABLE, "the names of the driver's functions in a profile"),
    ("cudadrv.test_streams.TestCudaStream.test_cancelled_future", NOT_APPLICABLE, LATER),
    ("cudapy.test_bfloat16*", REFUSED, "no bfloat16"),
    ("cudapy.test_caching.*.test_caching", NOT_APPLICABLE, CACHE),
    ("cudapy.test_caching.*.test_closure", NOT_APPLICABLE, CACHE),
    ("cudapy.test_caching.*.test_cpu_and_cuda_targets", NOT_APPLICABLE, CACHE),
    ("cudapy.test_caching.*.test_many_locals", NOT_APPLICABLE, CACHE),
    ("cudapy.test_caching.*.test_recompile", NOT_APPLICABLE, CACHE),  # Numba's does not see that a global has changed
    ("cudapy.test_caching.LaunchConfigInsensitiveCachingTest.*", NOT_APPLICABLE, CACHE),
    ("cudapy.test_debug.TestDebugOutput.test_dump_*", NOT_APPLICABLE, DUMPS),
    ("cudapy.test_debuginfo.TestCudaDebugInfo.test_missing_source", NOT_APPLICABLE, WARNINGS),
    ("cudapy.test_flow_control.TestFlowControl.test_for_loop8*", REFUSED, "a range with step 0, which a GPU ignores"),
    ("cudapy.test_launch_config_sensitive.*", NOT_APPLICABLE, COMPILER),
    ("cudapy.test_lineinfo.TestCudaLineInfo.test_debug_and_lineinfo_warning", NOT_APPLICABLE, WARNINGS),
    ("cudapy.test_overload.TestOverload.*_cpu", REFUSED, "no numba.cuda.extending"),
    ("cudapy.test_print.TestPrint.test_too_many_args", ACCEPTED, "more than 32 things to print: a GPU prints a format"),
    ("cudapy.test_tracing.*", NOT_APPLICABLE, COMPILER),
    ("cudapy.test_warning.TestWarnings.*", NOT_APPLICABLE, WARNINGS),
    ("doc_examples.test_ffi.*.test_ex_extra_includes", NOT_APPLICABLE, LINKER),  # runs where cffi is installed
    ("nocuda.test_cache_version.*", NOT_APPLICABLE, CACHE),
    ("nocuda.test_dummyarray.TestEmptyArrayTypeInference.*", NOT_APPLICABLE, COMPILER),
    ("nocuda.test_import.*", NOT_APPLICABLE, "which of Numba's modules an import of numba.cuda takes along"),
]

PACKAGES = ("cffi", "cupy", "ml_dtypes", "cuda.core", "filecheck")

# Tests that are not run at all: (id, reason).
NOT_RUN = {
    "cudapy.test_multiprocessing.TestMultiprocessing.test_fork": "a driver's error after a fork; it waits for ever for"
    " a child that could not import numba.cuda.cudadrv",
}


SKIPS = {
    "of the simulator": SIMULATOR,
    "looks for CUDA's libraries": LIBRARIES,
    "compares the text of SASS": TEXT,
    "compares the text of PTX or LLVM": TEXT,
    "links with NVIDIA's tools": LINKER,
    "need more than 1 gpus": SEVERAL,
    "requires at least two GPUs": SEVERAL,
    "Need two different CCs for multi-CC cache test": SEVERAL,
}


def classify(test, record):
    """``(class, reason)`` of a test, from its id and what :mod:`tests.numba_suite_child` has recorded of it."""
    verdict = by_rules(record)
    if verdict[0] in (WRONG, UNCLEAR, ACCEPTED) or record["outcome"] == "skip":
        return next(((kind, reason) for pattern, kind, reason in TABLE if fnmatchcase(test, pattern)), verdict)
    return verdict


def by_rules(record):
    """``(class, reason)`` by the general rules alone."""
    outcome, errors = record["outcome"], record.get("errors", [])
    if outcome == "not run":
        return NOT_APPLICABLE, record["skip"]
    if outcome == "skip":
        return NOT_APPLICABLE, skip_reason(record["skip"])
    if outcome == "hang":
        return CRASH, "it did not end in time"
    if outcome == "crash":
        return CRASH, f"the process ended with {record['code']}"
    if outcome == "xpass":
        return ACCEPTED, "expected to fail on a GPU, and does not"
    if outcome == "xfail":
        verdict = classify_error(errors[0], [])
        if verdict[0] == WRONG:
            return ACCEPTED, f"expected to fail on a GPU, and fails by its result only: {verdict[1]}"
        return PASS, "expected to fail on a GPU, and fails"
    if outcome == "ok":
        errors = [error for error in record.get("caught", []) if absent_name(error)]
    if not errors:
        return PASS, ""
    return max((classify_error(e, record.get("caught", [])) for e in errors), key=lambda v: CLASSES.index(v[0]))


def skip_reason(words):
    """The reason for which a test is not applicable, from the words with which it was skipped."""
    if "cffi" in words or "could not import" in words or "CuPy" in words:
        return PACKAGE
    return SKIPS.get(words, f"skipped: {words}" if words else SETTLED)


def absent_name(error):
    """The name of ``numba.cuda`` that an error says is missing, or None."""
    text, kind = error["text"], error["type"].rpartition(".")[2]
    if kind == "AbsentError":
        return text.partition(":")[0]
    if match := re.search(r"(?:<absent |AbsentError\(')([\w.]+)", text):
        return match[1]
    attribute, owner = error.get("attribute"), error.get("owner", "")
    if "ImportError" in error["bases"] and (attribute or "").startswith("numba.cuda"):
        name = re.match(r"cannot import name '(\w+)'", text)
        return f"{attribute}.{name[1]}" if name else attribute
    if kind == "AttributeError" and (owner.startswith("numba.cuda") or owner.startswith("common.cpu")):
        return f"{owner.partition(':')[2] or owner}.{attribute}"
    return None


def without_place(message):
    """A message of the backend without the file and line that it begins with."""
    return re.sub(r"^\S+:\d+: ", "", message)


def classify_error(error, caught):
    """``(class, reason)`` of one failure; ``caught`` are the errors that the test waited for and that came."""
    first_line = error["text"].strip().partition("\n")[0]
    name = absent_name(error)
    if name is not None:
        for pattern, reason in ABSENT.items():
            if fnmatchcase(name, pattern):
                return NOT_APPLICABLE, reason
        return REFUSED, f"no {name}"
    if error["type"] == "ModuleNotFoundError" and error.get("attribute") in PACKAGES:
        return NOT_APPLICABLE, PACKAGE
    if "KernelError" in error["bases"]:
        return REFUSED, without_place(first_line)
    if error["type"].startswith("cuda."):  # NVIDIA's own packages for Python, which look for a driver
        return NOT_APPLICABLE, DRIVER
    child = error.get("child") or error["text"]  # what a process of the test's own has printed
    if own := re.findall(r"^common\.cpu\.errors\.\w+: (.*)", child, re.M):
        return REFUSED, without_place(own[-1])
    if "CalledProcessError" in error["bases"] or "process failed with code" in child:
        return UNCLEAR, child.strip().rpartition("\n")[2]
    if re.search(r"\bnot raised\b|DID NOT RAISE", error["text"]):
        return ACCEPTED, first_line
    if "AssertionError" in error["bases"]:
        for other in caught:
            words = other["text"].strip().partition("\n")[0][:40]
            if words and words in error["text"]:
                return REFUSED, f"in other words than Numba's: {words}"
        return WRONG, first_line
    last = error["frames"][-1] if error["frames"] else ["", 0, "", ""]
    if "/common/cpu/" in last[0] and last[3].startswith("raise"):
        return REFUSED, first_line
    return UNCLEAR, f"{error['type']}: {first_line}"
