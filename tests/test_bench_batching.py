"""The benchmark of batches: what it counts, that it compares tokens, and what it draws."""

import json

import pytest
from test_engines import random_model

from benchmarks import batching, batching_plot
from ch14_mini_llm.engine.static import StaticScheduler
from ch14_mini_llm.model.upload import panels_model


@pytest.fixture(scope="module")
def model():
    return panels_model(*random_model(3, n_layer=1, n_head=2, d_model=16, d_ff=32, n_ctx=256, vocab_size=61))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(batching, "BLOCK_SIZES", (16, 256))
    monkeypatch.setattr(batching, "AT_ONCE", (1, 2))
    monkeypatch.setattr(batching, "NEW", (2, 9))
    monkeypatch.setattr(batching, "LENGTH", (5, 4))


def test_the_mix_is_the_same_each_time_and_within_its_limits():
    requests = batching.mix(200, 61)
    assert requests == batching.mix(200, 61) != batching.mix(200, 61, seed=1)
    assert {len(request.tokens) for request in requests} <= set(range(4, 65))
    assert {request.max_new for request in requests} <= set(range(4, 129))


def test_what_blocks_cost_is_counted():
    requests = batching.mix(200, 61)
    small, middle, large = (batching.occupancy(requests, size) for size in (4, 64, 256))
    assert small["unused_share"] < middle["unused_share"] < large["unused_share"]
    assert small["held"] > middle["held"] > large["held"] and large["blocks"] == 32 and large["preemptions"] == 0
    assert 31 < large["held"] <= 32  # a block each


@pytest.mark.parametrize("size, found", [(4, 100), (8, 96), (32, 96), (64, 64), (128, 0), (256, 0)])
def test_a_prefix_is_shared_in_whole_blocks(size, found):
    assert batching.prefix_hits(size, 61) == found


def test_all_is_measured_and_drawn(model, short, tmp_path):
    names = []
    result = batching.measure(model, "kv", "small", batching.mix(5, 61), 3, 1, names.append)
    assert len(names) == batching.rounds(1) and json.loads(json.dumps(result))
    continuous, static = result["static"]["rows"]
    assert continuous["padding_rows"] == 0 < static["padding_rows"]
    assert continuous["rows"] == static["rows"] - static["padding_rows"]
    assert [row["sequences"] for row in result["sequences"]["rows"]] == [1, 2]
    assert all(row["host_us"][0] > 0 for row in result["sequences"]["rows"])
    assert "times as fast" in batching.format_table(result)
    text = "a\n<!-- batching blocks -->\nold\n<!-- end -->\nb\n"
    table = batching_plot.filled(text, [result])
    assert "| 256 |" in table and "old" not in table and batching_plot.filled(table, [result]) == table
    pytest.importorskip("matplotlib")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "batching.json").write_text(json.dumps(result))
    paths = batching_plot.draw_all(tmp_path, tmp_path)
    assert len(paths) == 3 and all(path.stat().st_size > 1000 for path in paths)


def test_other_tokens_in_a_static_batch_are_an_error(model, short, monkeypatch):
    done = StaticScheduler.done
    monkeypatch.setattr(StaticScheduler, "done", lambda self, plan, tokens, scores: done(self, plan, [1] * len(tokens)))
    with pytest.raises(batching.Different):
        batching.compare(model, "kv", batching.mix(3, 61), 2, 1, print)


@pytest.mark.parametrize("arguments, words", [
    (["--repeats=0"], "--repeats=0: at least 1"), (["--weights=none.bin"], "none.bin"),
    (["--weights=x", "--random"], "both given"), (["--plot", "--out=nowhere"], "nowhere has no batching.json"),
])  # fmt: skip
def test_bad_arguments_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        batching.main(arguments)
    assert end.value.code == 2 and words in capsys.readouterr().err
