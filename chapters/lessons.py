"""Keep the lessons true: what can be written from the code and the measured figures is written by this program.

    python -m chapters.lessons [--check]

A lesson (``chapters/chNN_…/README.md``) marks places, and what stands between a mark and ``<!-- end -->`` is replaced:

- ``<!-- source FILE FUNCTION -->``: the function as it stands in that file of the chapter, without its docstring;
- ``<!-- used -->``: the lines of the capstone that launch or call what the chapter defines;
- ``<!-- graded -->``: the chapter's exercises that the grader knows;
- ``<!-- bench NAME -->``: the plot and the tables of a measured ladder, from ``benchmarks/results/``.

``chapters/README.md``, the map of the book, is written as a whole. ``--check`` writes nothing, names the files that are
out of date and exits with 1 if there are any (a test does the same). It reads the code as text and runs none of it.
"""

import argparse
import ast
import json
import re
import textwrap
from pathlib import Path

from common import bench
from common.grade.exercise import load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- (bench|graded|source|used)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_CODE = {"__init__.py", "__main__.py", "bench.py"}


def folders():
    """The chapters' folders, in order."""
    return sorted(path.parent for path in (ROOT / "chapters").glob("ch??_*/__init__.py"))


def number(folder):
    """ "04" for ``chapters/ch04_memory``."""
    return folder.name[2:4]


# --- the code --------------------------------------------------------------------------------------------------------


def kernels(folder):
    """{name: (file, line, aliases, first sentence of the docstring)} of a chapter's kernels, in order of appearance.

    Device functions are left out. aliases: the plain names that are bound to the kernel, and the functions that choose
    it, by a line such as ``return kernel_64 if size <= 64 else kernel_128``.
    """
    found, bound, choices = {}, [], []
    for path in sorted(folder.glob("*.py"), key=lambda path: (path.name != "kernels.py", path.name)):
        if path.name in NOT_CODE:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(_is_kernel_mark(mark) for mark in node.decorator_list):
                first = re.split(r"(?<=[.:;])\s", ast.get_docstring(node) or "", maxsplit=1)[0]
                found[node.name] = (path.name, node.lineno, [], first.rstrip(".:;"))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
                bound.append(node)
            elif isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return):
                chosen = node.body[-1].value
                if isinstance(chosen, ast.IfExp):
                    options = chosen.body, chosen.orelse
                    choices += [(kernel.id, node.name) for kernel in options if isinstance(kernel, ast.Name)]
    for kernel, function in choices:
        if kernel in found:
            found[kernel][2].append(function)
    for node in bound:  # a plain name may stand in another file than its kernel
        if node.value.id in found:
            found[node.value.id][2].extend(t.id for t in node.targets if isinstance(t, ast.Name))
    return found


def _is_kernel_mark(mark):
    """Whether a decorator is ``cuda.jit`` for a kernel, not for a device function."""
    if isinstance(mark, ast.Call):
        device = any(k.arg == "device" and getattr(k.value, "value", True) for k in mark.keywords)
        return not device and _is_kernel_mark(mark.func)
    return isinstance(mark, ast.Attribute) and mark.attr == "jit"


def uses():
    """{(chapter folder's name, name): [(file, line), …]}: where the capstone uses what it imports from a chapter.

    file: relative to ``ch14_mini_llm/``, with slashes. Its exercises do not count.
    """
    found, capstone = {}, ROOT / "ch14_mini_llm"
    for path in sorted(capstone.rglob("*.py")):
        file = path.relative_to(capstone)
        if file.parts[0] == "exercises":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chapters.ch"):
                chapter = node.module.split(".")[1]
                imported |= {alias.asname or alias.name: (chapter, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in imported:
                found.setdefault(imported[node.id], []).append((file.as_posix(), node.lineno))
    return {key: sorted(set(places)) for key, places in found.items()}


def source_block(folder, file, function):
    """A function of a chapter as Markdown: its source without the docstring, and a link to its line.

    Raises ValueError if the file has no such function.
    """
    text = (folder / file).read_text(encoding="utf-8")
    node = next((n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function), None)
    if node is None:
        raise ValueError(f"{folder.name}/README.md shows {function} from {file}, which has no such function")
    first = min([mark.lineno for mark in node.decorator_list] + [node.lineno])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        del lines[doc.lineno - first : doc.end_lineno - first + 1]
    code = textwrap.dedent("\n".join(lines))
    return f"```python\n{code}\n```\n[{file}, line {node.lineno}]({file}#L{node.lineno})\n"


def used_block(folder):
    """The lines of the capstone that use what a chapter defines, as a Markdown list."""
    lines = []
    for (chapter, name), places in sorted(uses().items(), key=lambda item: (item[1][0], item[0])):
        if chapter == folder.name and not name.isupper():
            links = ", ".join(f"[{file}:{line}](../../ch14_mini_llm/{file}#L{line})" for file, line in places)
            lines.append(f"- `{name}`: {links}")
    return "\n".join(lines or ["Not by name."]) + "\n"


def graded_block(folder):
    """The exercises of a chapter that the grader knows, as a Markdown list."""
    lines = ["Graded, by [`make grade`](../exercises.md):", ""]
    for exercise in (load(path.parent) for path in sorted(folder.glob("exercises/*/exercise.toml"))):
        link = f"[{exercise.title}](exercises/{exercise.folder.name}/README.md)"
        lines.append(f"- {link}: `make grade EX={exercise.name}`, {exercise.points} points")
    return "\n".join(lines) + "\n\n"


# --- the figures -----------------------------------------------------------------------------------------------------


def results(chapter):
    """[result, …] of a chapter ("04") on each device that was measured, GPUs first."""
    found = sorted(RESULTS.glob(f"*/ch{chapter}.json"), key=lambda path: (path.parent.name == "cpu", path.parent.name))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def measured(chapter, name):
    """[(result, ladder), …]: ladder ``name`` of a chapter on each device that measured it."""
    pairs = [(result, ladder) for result in results(chapter) for ladder in result["ladders"]]
    return [(result, ladder) for result, ladder in pairs if ladder["name"] == name and ladder["sizes"]]


def bench_block(chapter, name):
    """The plot and the tables of a measured ladder, as Markdown."""
    found = measured(chapter, name)
    if not found:
        return "*Not measured yet.*\n"
    tables = [bench.markdown_table(result, ladder) for result, ladder in found]
    return f"![{found[0][1]['title']}](img/{name}.svg)\n\n" + "\n\n".join(tables) + "\n"


# --- the files -------------------------------------------------------------------------------------------------------


def filled(folder, text):
    """The text of a lesson with every marked block written anew. Raises ValueError on a mark it cannot fill."""

    def fill(match):
        kind, words = match[2], match[3].split()
        if kind == "source" and len(words) == 2:
            body = source_block(folder, *words)
        elif kind == "bench" and len(words) == 1:
            body = bench_block(number(folder), words[0])
        elif kind == "used" and not words:
            body = used_block(folder)
        elif kind == "graded" and not words:
            body = graded_block(folder)
        else:
            raise ValueError(f"{folder.name}/README.md: the mark {match[1].strip()} has the wrong number of words")
        return match[1] + body + match[4]

    return BLOCK.sub(fill, text)


def book_map():
    """The text of ``chapters/README.md``."""
    used = uses()
    lines = [
        "# The map of the book",
        "",
        "Each chapter is a lesson to read (`README.md`), a notebook to run (`lab.ipynb`, with `make lab`), a demo "
        "(`make ch04`) and its kernels, in *ladders* of versions. A name in brackets is the plain name by which later "
        "chapters and the capstone import the version they use. The last column links the lines of "
        "[the capstone](../ch14_mini_llm/naive/gpt2.py) that launch a kernel. [Exercises](exercises.md) of every "
        "chapter grade themselves.",
        "",
        "*Written by `python -m chapters.lessons` from the code; do not edit.*",
    ]
    for folder in folders():
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        title = doc.split(": ", 1)[1].rstrip(".")
        lines += ["", f"## [Chapter {int(number(folder))}: {title}]({folder.name}/README.md)", ""]
        lines += ["| kernel | what it does | in GPT-2 |", "|---|---|---|"]
        for name, (file, line, aliases, first) in kernels(folder).items():
            places = [place for n in (name, *aliases) for place in used.get((folder.name, n), [])]
            links = ", ".join(f"[{f}:{n}](../ch14_mini_llm/{f}#L{n})" for f, n in places)
            plain = f" (`{'`, `'.join(aliases)}`)" if aliases else ""
            what = first.replace("|", "\\|").replace("``", "`").replace("\n", " ")
            lines.append(f"| [`{name}`]({folder.name}/{file}#L{line}){plain} | {what} | {links} |")
    return "\n".join(lines) + "\n"


def written():
    """{path: its text as it should be} of the map and of every lesson."""
    found = {ROOT / "chapters" / "README.md": book_map()}
    for folder in folders():
        lesson = folder / "README.md"
        if lesson.exists():
            found[lesson] = filled(folder, lesson.read_text(encoding="utf-8"))
    return found


def stale():
    """Paths of the files that are not as they should be."""
    return [p for p, text in written().items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m chapters.lessons", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    options = parser.parse_args(argv)
    old = stale()
    for path in old:
        if not options.check:
            path.write_text(written()[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: " + ("out of date; run `make lessons`" if options.check else "written"))
    raise SystemExit(1 if old and options.check else 0)


if __name__ == "__main__":
    main()
