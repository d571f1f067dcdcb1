"""The benchmark of guesses: it measures what it says, on the tiny model."""

import json

import pytest

from benchmarks import speculation
from ch14_mini_llm.engine.speculate import Ngrams
from ch14_mini_llm.model.weights import DATA_DIR

TINY = DATA_DIR / "tiny-gpt2.bin"
SMALL = [f"--weights={TINY}", "--dtype=float32", "--new=40", "--repeats=2"]


@pytest.fixture
def few_prompts(monkeypatch, tmp_path):
    """Two prompts of each kind."""
    known = json.loads(speculation.PROMPTS.read_text(encoding="utf-8"))
    assert {kind: len(some) for kind, some in known.items()} == {"repeating": 6, "other": 6}
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({kind: some[:2] for kind, some in known.items()}))
    monkeypatch.setattr(speculation, "PROMPTS", path)


def test_ways_on_the_tiny_model(few_prompts, tmp_path, capsys):
    assert speculation.main([*SMALL, "--how=ngram,layers:6", f"--out={tmp_path}"]) is None
    result = json.loads(next(tmp_path.rglob("speculation.json")).read_text())
    assert result["how"] == ["none", "ngram", "layers:6"] and len(result["rows"]) == 4
    for row in result["rows"]:
        assert row["none"]["guesses"] == 0 and row["none"]["steps"] == row["tokens"] - 1
        for how in result["how"]:
            way = row[how]
            assert way["right"] <= way["guesses"] and len(way["ms"]) == 2 and way["ms"][0] > 0
            assert way["steps"] == row["tokens"] - 1 - way["right"]
    assert sum(row["layers:6"]["guesses"] for row in result["rows"]) > 0
    assert "1" in result["steps_ms"] and all(ms > 0 for ms in result["steps_ms"].values())
    printed = capsys.readouterr().out
    assert all("\n".join(table(result)) in printed for table in speculation.TABLES.values())


def test_other_tokens_are_found(few_prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ch14_mini_llm.engine.guesses.n_right", lambda guesses, tokens: len(guesses))  # all are right
    monkeypatch.setattr(Ngrams, "_find", lambda self, tokens, most: [7] * most)
    with pytest.raises(SystemExit) as caught:
        speculation.main([*SMALL, f"--out={tmp_path}"])
    assert caught.value.code == 1 and "not the tokens" in capsys.readouterr().err
    assert not list(tmp_path.rglob("speculation.json"))


@pytest.mark.parametrize(
    "arguments",
    [["--new=1"], ["--repeats=0"], ["--weights=no.bin"], [*SMALL, "--how=luck"], [*SMALL, "--how=layers:9"]],
)
def test_mistakes(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        speculation.main([*arguments, f"--out={tmp_path}"])
    assert caught.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()[-1]) < 300


def test_the_page_has_the_committed_figures():
    page = speculation.PAGE.read_text(encoding="utf-8")
    assert len(speculation.BLOCK.findall(page)) == len(speculation.TABLES)
    assert speculation.filled(page) == page, "run make plots"
