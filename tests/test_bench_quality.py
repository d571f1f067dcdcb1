"""The benchmark of what few bits lose: its figures are those of the engine's log-probabilities."""

import math

import pytest

from benchmarks import quality
from ch14_mini_llm.model.weights import DATA_DIR

TINY = DATA_DIR / "tiny-gpt2.bin"
TEXTS = ["Once upon a time there was a little girl who loved to play in the garden.", "The dog was happy.", "x"]


def test_perplexity_of_two_texts(capsys):
    n, rows = quality.measure(TINY, TEXTS, ("float16", "int8", "int4"))
    assert [row["dtype"] for row in rows] == ["float16", "int8", "int4"] and n > 15
    tokens, loss, likeliest = quality.scores(TINY, "float16", TEXTS)
    assert tokens == n == len(likeliest) and rows[0]["perplexity"] == round(math.exp(loss / n), 4)
    assert rows[0]["over_float16"] == rows[0]["same_token"] == 1
    assert abs(rows[1]["over_float16"] - 1) < 0.02 and 0.5 < rows[2]["over_float16"] < 1.5
    assert rows[1]["same_token"] > 0.9
    lines = quality.format_table({"model": "tiny", "rows": rows, "tokens": n, "stories": 3})
    assert lines[2].startswith("| float16 |") and "+0.00 % | 100.0 %" in lines[2]


@pytest.mark.parametrize("arguments", [["--stories=0"], ["--length=0"], ["--weights=no.bin"]])
def test_mistakes(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        quality.main([*arguments, f"--out={tmp_path}"])
    assert caught.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()[-1]) < 300


def test_the_page_has_the_committed_figures():
    page = quality.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- few bits -->") == 1 and quality.filled(page) == page, "run make plots"
