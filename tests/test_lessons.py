"""The book hangs together: every chapter is complete, its pages are true, and its notebooks run."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
from nbclient import NotebookClient

from chapters import lessons

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = lessons.folders()
CAPSTONE = sorted((ROOT / "ch14_mini_llm").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "chapters" / "README.md", *(folder / "README.md" for folder in FOLDERS), *CAPSTONE]
SITTINGS = [*(folder / "README.md" for folder in FOLDERS), *(page for page in CAPSTONE if page.name != "README.md")]
LABS = [folder / "lab.ipynb" for folder in FOLDERS]


def name(path):
    return f"{path.parent.name}/{path.name}"


def test_all_chapters_are_there():
    assert [lessons.number(folder) for folder in FOLDERS] == [f"{n:02}" for n in range(2, 14)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
@pytest.mark.parametrize("file", ["README.md", "lab.ipynb", "kernels.py", "__main__.py", "bench.py"])
def test_every_chapter_has(folder, file):
    assert (folder / file).is_file()


def test_what_is_written_from_code_and_figures_is_up_to_date():
    assert [str(path.relative_to(ROOT)) for path in lessons.stale()] == [], "run `make lessons`"


def test_uses_are_found_in_the_folders_of_the_capstone_but_not_in_its_exercises(tmp_path, monkeypatch):
    launch = "from chapters.ch06_shared_tile.kernels import matmul_kernel\n\nmatmul_kernel[1, 1](A, B, C)\n"
    for file in ("run.py", "levels/fast.py", "levels/deeper/parts.py", "exercises/flash/solution.py"):
        path = tmp_path / "ch14_mini_llm" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(launch, encoding="utf-8")
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    places = [("levels/deeper/parts.py", 3), ("levels/fast.py", 3), ("run.py", 3)]
    assert lessons.uses() == {("ch06_shared_tile", "matmul_kernel"): places}
    link = "[levels/fast.py:3](../../ch14_mini_llm/levels/fast.py#L3)"
    assert link in lessons.used_block(ROOT / "chapters" / "ch06_shared_tile")


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]+(?:\n[^`\n]+)*`", "", prose)  # `kernel[4, 256](x)` is no link
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.relative_to(ROOT)} links {target}, which is not there"
        if match := re.fullmatch(r"L(\d+)", anchor):
            assert int(match[1]) <= len(path.read_text(encoding="utf-8").splitlines()), target
        elif anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)), target


@pytest.mark.parametrize("page", sorted(ROOT.glob("chapters/*/*.md")), ids=name)
def test_code_that_a_page_shows_is_the_files(page):
    """After ``<!-- from FILE, FUNCTION -->``: lines one after another, of which some may be left out."""
    for file, block in re.findall(r"<!-- from (\S+), \S+ -->\n```python\n(.*?)```", page.read_text(), re.DOTALL):
        source = iter([line.strip() for line in (page.parent / file).read_text().splitlines()])
        for line in filter(None, map(str.strip, block.splitlines())):
            assert line in ("…", "...") or line in source, f"{file} has no {line!r} there"


def test_a_function_that_chooses_a_kernel_is_a_name_of_it():
    found = lessons.kernels(next(folder for folder in FOLDERS if folder.name == "ch09_gemm"))
    assert found["gemm_parts_32"][2] == found["gemm_parts_64"][2] == ["gemm_parts"]
    assert found["gemm_v4_half_storage"][2] == []


@pytest.mark.parametrize("page", SITTINGS, ids=name)
def test_a_lesson_is_a_sitting_long(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|<!-- used -->.*?<!-- end -->|^\|[^\n]*$|<!--[^\n]*?-->", "", text, flags=re.S | re.M)
    assert 700 <= len(prose.split()) <= 2200


@pytest.mark.parametrize("lab", LABS, ids=lambda p: p.parent.name)
def test_a_notebook_is_stripped_and_defines_no_kernel_of_the_book(lab):
    notebook = nbformat.read(lab, as_version=4)
    known = {kernel for folder in FOLDERS for kernel in lessons.kernels(folder)}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "strip the outputs: make strip"
            assert not known & set(re.findall(r"^def (\w+)", cell.source, re.MULTILINE))


@pytest.mark.parametrize("lab", LABS, ids=lambda p: p.parent.name)
def test_a_notebook_runs_from_top_to_bottom(lab):
    notebook = nbformat.read(lab, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(lab.parent)}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code"
               for output in cell.outputs), "a notebook draws at least one plot"  # fmt: skip
