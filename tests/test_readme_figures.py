"""The figures of the README and of chapter 14's pages are those of the committed files."""

import json

import pytest

from benchmarks import batching_plot, engine_plot, readme


def test_readme_says_what_was_measured():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.BLOCK.search(text)[0]
    expected = readme.render(readme.ROOT / "benchmarks" / "results" / "h100")
    assert block == f"<!-- measured -->\n{expected}<!-- end -->", "run make plots"


@pytest.mark.parametrize("page", batching_plot.PAGES, ids=lambda page: page.name)
def test_a_page_says_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    results = batching_plot.measured(readme.ROOT / "benchmarks" / "results")
    assert batching_plot.BLOCK.search(text) and batching_plot.filled(text, results) == text, "run make plots"


def test_the_page_of_graphs_says_what_was_measured():
    text = (engine_plot.CHAPTER / "graphs.md").read_text(encoding="utf-8")
    assert len(engine_plot.BLOCK.findall(text)) == 3
    assert engine_plot.filled(text, engine_plot.measured(), engine_plot.profiled()) == text, "run make plots"


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3.2-1B", "Llama-2-7B"])
def test_the_llamas_of_14_5_are_as_fast_as_measured(name):
    found = json.loads((readme.ROOT / f"benchmarks/results/h200/engine_{name.lower()}.json").read_text())
    ours, peer = found["decode"]["rows"]
    rate, theirs = ours["tokens_s"][0], peer["tokens_s"][0]
    line = f"| {name} | {rate:.0f} | {100 * ours['share']:.0f} % | {theirs:.0f} | {rate / theirs:.1f} |"
    assert line in (readme.ROOT / "ch14_mini_llm/llama.md").read_text(encoding="utf-8")
    assert peer["name"].startswith("torch.compile") and peer["note"] is None


def test_only_the_block_is_written(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nbehind\n", encoding="utf-8")
    readme.main([f"--readme={page}"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- measured -->\n| |") and text.endswith("*\n<!-- end -->\nbehind\n")
    rows = readme.read(readme.ROOT / "benchmarks/results/h100", "gpt2")["rows"]
    fast = next(row for row in rows if row["name"] == "fast")
    assert f"| `fast` | {fast['tokens_s'][0]:.0f} |" in text


@pytest.mark.parametrize("page, words", [("nothing here", "has no <!-- measured -->"), (None, "gpt2.json is missing")])
def test_what_is_missing_is_told(tmp_path, capsys, page, words):
    file = tmp_path / "README.md"
    file.write_text(page or "<!-- measured -->\n<!-- end -->", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        readme.main([f"--readme={file}", f"--results={tmp_path}"])
    assert stop.value.code == 2 and words in capsys.readouterr().err
