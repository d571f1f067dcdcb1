"""The benchmark of the server: it measures what it says, on a small load."""

import json

import pytest

from benchmarks import serving
from ch14_mini_llm.model.weights import DATA_DIR

TINY = DATA_DIR / "tiny-gpt2.bin"


def test_every_load_on_the_tiny_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("starlette")
    monkeypatch.setattr(serving, "RESTARTS", 1)
    sizes = "--clients=2", "--requests=2", "--new=5", "--turns=2", "--history=200"
    arguments = [f"--weights={TINY}", "--peers=none", "--dtype=float32", *sizes, f"--out={tmp_path}"]
    assert serving.main(arguments) == 0
    result = json.loads(next(tmp_path.rglob("serving.json")).read_text())
    for question, count in ("closed", 4), ("open", 4), ("overload", 12), ("chat", 4):
        for row in result[question]["rows"]:
            assert row["requests"] + row["refused"] == count and row["tokens_s"] > 0 and 0 <= row["goodput"] <= 1
            assert all(
                low <= high for key in ("first_ms", "gap_ms", "whole_ms") for low, high in zip(row[key], row[key][1:])
            )
    with_cache, without = result["chat"]["rows"]
    assert with_cache["cached"] > 0.3 and without["cached"] == 0
    first, second = with_cache["turns"]
    assert second["prompt_tokens"] > first["prompt_tokens"] and second["cached"] > 0.5
    assert [turn["cached"] for turn in without["turns"]] == [0, 0]
    assert all(turn["first_ms"] > 0 for turn in (first, second))
    assert result["closed"]["engine_tokens_s"] > 0 and result["closed"]["over_engine"] > 0
    files, anew = result["restart"]["rows"]
    assert files["cached"] > 180 and anew["cached"] < 20 and result["restart"]["ratio"] > 0
    assert "\n".join(serving.format_table(result)) in capsys.readouterr().out


@pytest.mark.parametrize("name", serving.TABLES)
def test_a_page_has_the_committed_figures(name):
    page = (serving.CHAPTER / f"{name}.md").read_text(encoding="utf-8")
    assert page.count("<!-- serving -->") == 1 and serving.filled(name, page) == page, "run make plots"


def test_percentiles():
    assert serving.percentiles([k / 1000 for k in range(100)]) == [50, 95, 99] and serving.percentiles([0.002]) == [
        2,
        2,
        2,
    ]


MISTAKES = [["--clients=0"], ["--weights=nothing.bin"], [f"--weights={TINY}", "--peers=llama.cpp"], ["--only=x"]]


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        serving.main(arguments)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and len(line) < 300
    return line


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(arguments, capsys):
    refused(arguments, capsys)


def test_a_peer_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setitem(serving.NEEDED, "transformers", ("pip install it", "json", "no_such_module"))
    line = refused([f"--weights={TINY}", "--peers=transformers"], capsys)
    assert "needs no_such_module: pip install it" in line


def test_transformers_serves_the_same_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from benchmarks import hf_folder, peers
    from ch14_mini_llm.model.weights import load_weights
    from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

    hf_folder.main([str(TINY), str(tmp_path / "hf"), "--dtype=float32"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the cat sat on the mat, 12 times"
    assert theirs(text)["input_ids"] == GPT2Tokenizer().encode(text)
    said = theirs.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    assert said == "user: the cat\nassistant:"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.tensor([GPT2Tokenizer().encode(text)])
    wanted = peers.TransformersEager(*load_weights(TINY), device="cpu", dtype=torch.float32).model(tokens).logits
    torch.testing.assert_close(model(tokens).logits, wanted)


def test_a_folder_for_transformers_needs_weights(tmp_path, capsys):
    pytest.importorskip("torch")
    from benchmarks import hf_folder

    with pytest.raises(SystemExit) as caught:
        hf_folder.main([str(tmp_path / "none.bin"), str(tmp_path / "hf")])
    assert caught.value.code == 2 and "none.bin" in capsys.readouterr().err
