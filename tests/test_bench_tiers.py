"""The benchmark of the tiers below the device: it measures what it says, on a small model."""

import json

import pytest

from benchmarks import tiers
from ch14_mini_llm.cache.pages import PagedCache
from ch14_mini_llm.model.config import LlamaConfig

SMALL = LlamaConfig(2, 4, 2, 64, 128, 192, 256, 500, 1e-5, 1e4, True)


def test_each_way_on_a_small_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tiers.SHAPES, "small", SMALL)
    tiers.main(["--shapes=small", "--tokens=40,160", "--repeats=1", f"--out={tmp_path}", f"--folder={tmp_path}"])
    result = json.loads(next(tmp_path.rglob("tiers.json")).read_text())
    (one,) = result["shapes"]
    assert [row["tokens"] for row in one["rows"]] == [40, 160]
    assert all(len(row[way]) == 1 and row[way][0] > 0 for row in one["rows"] for way in tiers.WAYS)
    assert one["copy"]["pieces"] == 4 and one["copy"]["bytes"] == one["copy"]["blocks"] * one["block_bytes"]
    assert set(one["even"]) == {*tiers.WAYS[1:]}
    printed = capsys.readouterr().out
    assert "\n".join(tiers.format_table(result)) in printed and "\n".join(tiers.copy_table(result)) in printed
    assert [path.name for path in tmp_path.iterdir()] == [tiers.device_folder()]  # the files of blocks are gone


def test_other_bits_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tiers.SHAPES, "small", SMALL)
    right = PagedCache.write

    def wrong(self, memory, slots, blocks):
        memory[slots[-1], -1, -1] ^= 1
        right(self, memory, slots, blocks)

    monkeypatch.setattr(PagedCache, "write", wrong)
    with pytest.raises(SystemExit) as caught:
        tiers.main(["--shapes=small", "--tokens=40", "--repeats=1", f"--out={tmp_path}"])
    assert caught.value.code == 1 and "bits" in capsys.readouterr().err and not list(tmp_path.rglob("tiers.json"))


def test_where_ways_are_even():
    row = lambda tokens, anew, host: {"tokens": tokens, "anew": [anew], "host": [host]}
    assert tiers.even([row(100, 1, 3), row(200, 2, 2.5), row(400, 6, 4)], "host") == 240
    assert tiers.even([row(100, 3, 1), row(200, 6, 2)], "host") == 100
    assert tiers.even([row(100, 1, 3), row(200, 2, 4)], "host") is None
    assert tiers.even([row(100, 3, 1), row(200, 2, 4)], "host") is None


def test_the_pages_have_the_committed_figures():
    pages = [page.read_text(encoding="utf-8") for page in tiers.PAGES]
    assert sorted(match[2] for page in pages for match in tiers.BLOCK.finditer(page)) == sorted(tiers.TABLES)
    assert [tiers.filled(page) for page in pages] == pages, "run make plots"


@pytest.mark.parametrize(
    "arguments", [["--tokens=0"], ["--tokens=9999"], ["--tokens=x"], ["--repeats=0"], ["--shapes=gpt-5"]]
)
def test_mistakes(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        tiers.main(arguments)
    assert caught.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()[-1]) < 300
