"""The house stands: imports point down only, the capstone defines no kernel, and no kernel is defined twice."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"common": 0, "chapters": 1, "ch14_mini_llm": 2}  # a folder may import from its own floor and below
ABOVE = {"data": 3, "benchmarks": 3, "tests": 4}


def imported_modules(source, package):
    """Dotted names of all modules that ``source`` imports, wherever in the file; ``package`` resolves leading dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}  # the names may be modules
    return found


def chapter_number(name):
    """The number of the chapter that a dotted or slashed name speaks of, or None."""
    match = re.match(r"chapters[./]ch(\d+)_", name)
    return int(match[1]) if match else None


def upward_imports(source, path):
    """Names imported by the file ``path`` (relative, with slashes) from a higher floor or a later chapter."""
    floor, chapter = FLOORS[path.split("/")[0]], chapter_number(path)
    wrong = []
    for name in sorted(imported_modules(source, ".".join(path.split("/")[:-1]))):
        other = {**FLOORS, **ABOVE}.get(name.split(".")[0])
        later = chapter is not None and (chapter_number(name) or 0) > chapter
        if other is not None and other > floor or later:
            wrong.append(name)
    return wrong


def jit_functions(source):
    """Names of the functions with a decorator ``jit`` of any kind, and the line of every other use of ``jit``."""
    functions, others = [], []
    decorators = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marked = [child for mark in node.decorator_list for child in ast.walk(mark) if _is_jit(child)]
            if marked:
                functions.append(node.name)
                decorators |= set(map(id, marked))
    for node in ast.walk(ast.parse(source)):
        imported = isinstance(node, ast.ImportFrom) and any(alias.name == "jit" for alias in node.names)
        if imported or isinstance(node, ast.Call) and _is_jit(node.func):
            others.append(node.lineno)
    return functions, others


def _is_jit(node):
    return isinstance(node, ast.Attribute) and node.attr == "jit" or isinstance(node, ast.Name) and node.id == "jit"


def sources(folder):
    """(relative path, text) of every Python file under ``folder``."""
    return [
        (p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in sorted((ROOT / folder).rglob("*.py"))
    ]


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_point_down_only(folder):
    files = sources(folder)
    assert files
    wrong = [f"{path} imports {name}" for path, text in files for name in upward_imports(text, path)]
    assert not wrong


def test_the_capstone_defines_no_kernel():
    wrong = [path for path, text in sources("ch14_mini_llm") if any(jit_functions(text))]
    assert not wrong


def test_every_kernel_is_defined_in_exactly_one_chapter():
    defined = defaultdict(list)
    for path, text in sources("chapters"):
        if len(path.split("/")) == 3:  # a chapter's own files; exercises repeat names on purpose
            for name in jit_functions(text)[0]:
                defined[name].append(path)
    assert len(defined) > 10
    assert not {name: paths for name, paths in defined.items() if len(paths) > 1}


CH03, CH07 = "chapters/ch03_indexing/kernels.py", "chapters.ch07_warp_reduce"


@pytest.mark.parametrize(
    "path, line, name",
    [
        ("common/a.py", "import chapters.ch03_indexing", "chapters.ch03_indexing"),
        ("common/cpu/a.py", "def f():\n    from ch14_mini_llm import naive", "ch14_mini_llm"),
        (CH03, f"from {CH07} import kernels", CH07),
        (CH03, "from ..ch07_warp_reduce.kernels import warp_sum", f"{CH07}.kernels"),
        (CH03, "from chapters import ch07_warp_reduce", CH07),
        (CH03, "from ch14_mini_llm.naive.gpt2 import GPT2", "ch14_mini_llm.naive.gpt2"),
        ("ch14_mini_llm/naive/gpt2.py", "import data.train_tiny", "data.train_tiny"),
    ],
)
def test_an_upward_import_is_found(path, line, name):
    assert name in upward_imports(line, path)


def test_a_downward_import_is_fine():
    assert not upward_imports(f"from {CH07}.kernels import x\nimport common", "ch14_mini_llm/naive/gpt2.py")
    assert not upward_imports("from ..ch07_warp_reduce.kernels import x", "chapters/ch10_softmax/kernels.py")


@pytest.mark.parametrize(
    "text",
    [
        "@cuda.jit\ndef f(x): pass",
        "@cuda.jit(device=True)\ndef f(x): pass",
        "@jit\ndef f(x): pass",
        "f = cuda.jit(g)",
        "from numba.cuda import jit as fast",
    ],
)
def test_a_kernel_is_found(text):
    assert any(jit_functions(text))
