"""Which tests `make test` runs: a newcomer's part of all tests, in minutes. `make test-all` runs the rest as well.

The quick part has, for each test of a chapter's kernels, one case a kernel (at an odd size), without those that only
compile it again with checks; the engines; the CPU backend; and of the grader's tests one wrong solution for each class
of mistakes. It needs no PyTorch.
"""

from fnmatch import fnmatch

NAMES = ("all", "quick", "rest")
WHOLE = (  # files of which all tests are quick
    "tests/ch14/test_engines.py", "tests/ch14/test_run.py", "tests/ch14/test_model.py", "tests/ch14/test_weights.py",
    "tests/ch14/test_tokenizer.py", "tests/ch14/test_small_step.py", "tests/ch14/test_scheduler.py",
    "tests/ch14/test_engine.py", "tests/ch14/test_sampler.py", "tests/ch14/test_static.py",
    "tests/ch14/test_watch.py", "tests/ch14/server/test_text.py", "tests/ch14/server/test_fields.py",
    "tests/ch14/server/test_prompts.py", "tests/ch14/server/test_api.py", "tests/ch14/server/test_grammar.py",
    "tests/ch14/test_constraint.py", "tests/cpu/test_cache.py",
    "tests/cpu/test_compile.py", "tests/cpu/test_errors.py", "tests/cpu/test_numbers.py", "tests/cpu/test_rows.py",
    "tests/cpu/test_signatures.py", "tests/cpu/test_threads.py", "tests/cpu/test_device.py",
    "tests/test_imports.py", "tests/test_backend.py",
    "tests/test_trace.py", "tests/test_graph.py", "tests/test_readme_figures.py", "tests/test_oracle.py",
    "tests/test_exercises_page.py",
)  # fmt: skip
ONE_SIZE = ("tests/ch0?/*.py", "tests/ch1[0-3]/*.py", "tests/cpu/test_atomics.py", "tests/cpu/test_half.py")
EACH_TENTH = ("tests/cpu/test_conformance.py", "tests/test_fuzz.py", "tests/test_planted_bugs.py")
CHECKED = "*no_index_outside*"  # tests that compile their kernels once more, with checks; the sanitizer checks the same
PARITY = {"torch", "transformers"}  # fixtures
KERNEL = ("kernel", "version", "op", "pairing", "warpgroup")  # parameters of tests that say which kernel it is


def one_size(items):
    """The last case of each test for each kernel: sizes and shapes are dropped, kernels are not."""
    kept = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kernel = tuple(str(params[name]) for name in KERNEL if name in params)
        kept[item.nodeid.split("[")[0], kernel] = item
    return list(kept.values())


def has_quick_tests(path):
    """Whether a file of tests has some in the quick part; the others may need what is not installed."""
    return any(fnmatch(path, pattern) for pattern in (*WHOLE, *ONE_SIZE, *EACH_TENTH))


def choose(items, name):
    """Those of ``items`` (pytest's) that belong to the part ``name``, in order. Quick and rest together are all."""
    if name == "all":
        return list(items)
    quick = {id(item) for item in _quick([item for item in items if not PARITY & set(item.fixturenames)])}
    return [item for item in items if (id(item) in quick) == (name == "quick")]


def _quick(items):
    def among(patterns):
        return [item for item in items if any(fnmatch(item.nodeid.split("::")[0], p) for p in patterns)]

    kernels = [item for item in among(ONE_SIZE) if not fnmatch(item.name, CHECKED)]
    return [*among(WHOLE), *one_size(kernels), *among(EACH_TENTH)[::10]]
