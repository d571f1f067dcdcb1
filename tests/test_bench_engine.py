"""The benchmark of the engine: its peers are the same model, its figures fit together, and wrong tokens are noticed."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_engines import random_model

from benchmarks import batched_peers, engine, peers
from benchmarks.ladders import device_folder
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.model.weights import save_weights
from common import BACKEND, bench

CONFIG, TENSORS = random_model(3, n_layer=1, n_head=2, d_model=16, d_ff=32, n_ctx=128, vocab_size=61)
PROMPTS = [np.random.default_rng(i).integers(0, 61, 7).tolist() for i in range(3)]
SIZES = {
    "decode": {"sequences": (1, 3), "prompt": 5, "new": 8, "idle_at": 3},
    "requests": {"requests": 4, "prompt": (2, 9), "new": 4, "mixed": (1, 6)},
    "sampling": {"sequences": (1, 2)},
    "prefix": {"requests": 3, "shared": 32, "own": 3, "new": 2},
    "gap": {"sequences": 2, "prompt": 80, "new": 2},
    "deterministic": {},
    "run": {"new": 6},
}


@pytest.fixture(autouse=True)
def one_torch_thread():
    """torch's threads and those of the CPU backend would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judge():
    return batched_peers.Judge(CONFIG, TENSORS, "cpu")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A function that runs the program on a tiny model: (exit code, what it wrote, what it printed)."""
    monkeypatch.setattr(bench, "copy_bandwidth", partial(bench.copy_bandwidth, 1 << 22))
    monkeypatch.setitem(engine.SIZES, BACKEND, SIZES)
    save_weights(tmp_path / "tiny.bin", CONFIG, TENSORS)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            engine.main([f"--weights={tmp_path / 'tiny.bin'}", f"--out={tmp_path}", "--engine=kv", *arguments])
        path = tmp_path / device_folder() / "engine.json"
        return end.value.code, path.exists() and json.loads(path.read_text(encoding="utf-8")), capsys.readouterr()

    return run


def static(n=3, length=30, **options):
    return batched_peers.StaticBatch(CONFIG, TENSORS, n, length, device="cpu", dtype=torch.float32, **options)


# --- the peers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """What transformers' GPT-2 makes of each prompt by itself, 20 tokens."""
    peer = peers.TransformersEager(CONFIG, TENSORS, device="cpu", dtype=torch.float32)
    return [peer.generate(prompt, 20) for prompt in PROMPTS]


def test_a_static_batch_makes_the_tokens_of_each_alone(alone):
    batch = static(tuned=True)
    assert batch.length == 64 and batch.note == "not compiled: there is no GPU"
    assert batch.run(PROMPTS, 20)[1] == alone
    seconds, tokens = batch.run(PROMPTS[::-1], 12)  # it finds the keys and values of the first run
    assert tokens == [row[:12] for row in alone[::-1]] and seconds > 0
    assert static(n=1).run(PROMPTS[:1], 1)[1] == [alone[0][:1]]


@pytest.mark.parametrize("prompts, new", [(PROMPTS[:2], 5), ([*PROMPTS[:2], [1]], 5), (PROMPTS, 58)])
def test_a_static_batch_refuses_what_it_has_no_room_for(prompts, new):
    with pytest.raises(ValueError, match="3 prompts of one length, and 64 tokens"):
        static().run(prompts, new)


def test_the_step_is_one_graph_and_compiled_once(alone):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    batch = static()
    # as on a GPU, but for the last stage of the compiler, which would take most of a minute
    batch._step = torch.compile(batched_peers.decode_batch, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        assert batch.run(PROMPTS, 20)[1] == alone
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_transformers_engine_makes_the_tokens_of_each_alone(alone):
    peer = batched_peers.PagedTransformers(CONFIG, TENSORS, device="cpu", dtype=torch.float32)
    news = 20, 4, 11
    runs = peer.runs(list(zip(PROMPTS, news)), times=2)
    assert len(runs) == 2
    for seconds, tokens, stamps in runs:
        assert tokens == [row[:new] for row, new in zip(alone, news)]
        assert [len(times) for times in stamps] == list(news) and all(times == sorted(times) for times in stamps)
        assert 0 < stamps[0][-1] - stamps[0][0] < seconds


def test_a_request_that_fails_in_transformers_engine_is_an_error(monkeypatch):
    peer = batched_peers.PagedTransformers(CONFIG, TENSORS, device="cpu", dtype=torch.float32)
    monkeypatch.setattr(peer.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(RuntimeError, match="transformers: "):
        peer.runs([(PROMPTS[0], 3)])


@pytest.mark.parametrize("fastest", ["compiled", "tuned"])
def test_the_faster_setting_counts(fastest, monkeypatch):
    made = []

    def run(self, prompts, new):
        made.append(self.tuned)
        return (1 if self.tuned == (fastest == "tuned") else 4), [[0] * new for _ in prompts]

    monkeypatch.setattr(batched_peers.StaticBatch, "run", run)
    monkeypatch.setattr(batched_peers, "StaticBatch", partial(batched_peers.StaticBatch, dtype=torch.float32))
    batched_peers.StaticBatch.name = "static"
    b = SimpleNamespace(config=CONFIG, tensors=TENSORS, peers=["compiled", "tuned"], device=torch.device("cpu"), repeats=2,
                        progress=print, check=lambda prompts, tokens: 0.0)  # fmt: skip
    row = batched_peers.static_row(b, PROMPTS, 5)
    assert made == [False] * 3 and row["tokens_s"][0] == (12 if fastest == "compiled" else 3)  # no GPU: one of them


# --- tokens and their times ------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_time_in_which_all_decode():
    late = [5.0, 6.0, 7.0, 8.0]  # begins when the other has three tokens; then a token each a second
    rate, made = batched_peers.steady([[1.0, 2.0, 5.0, 6.0, 7.0], late])
    assert rate == pytest.approx(2) and made == pytest.approx((3.5 + 1.5) / 2)
    assert batched_peers.steady([[0.0, 0.5, 1.0]])[0] == pytest.approx(2)
    with pytest.raises(RuntimeError, match="no step in which all sequences decode"):
        batched_peers.steady([[1.0, 2.0, 3.0], [3.0, 4.0]])


def test_the_judge_finds_a_wrong_token(judge, alone):
    prompt, tokens = PROMPTS[0], alone[0]
    assert judge.gap(prompt, tokens) < 1e-5
    wrong = [*tokens[:13], (tokens[13] + 1) % 61, *tokens[14:]]
    expected = peers.logit_gaps(CONFIG, TENSORS, prompt, wrong, "cpu").max()
    assert judge.gap(prompt, wrong) == pytest.approx(expected, rel=1e-4) and expected > engine.GAP
    assert judge.gap(prompt, wrong, among=61) == 0 < judge.gap(prompt, wrong, among=2)


# --- the program -----------------------------------------------------------------------------------------------------


def test_all_is_measured(command):
    code, result, printed = command("--repeats=2")
    assert code == 0, printed.err
    assert {"device", "backend", "level", "model", "packages", "config", "load", "cores"} <= set(result)
    assert result["model"] == "tiny.bin" and result["repeats"] == 2
    assert all(result[name]["error"] is None for name in SIZES)
    rows = result["decode"]["rows"]
    names = ["engine", "torch.compile, static batch", "transformers, continuous batching"]
    assert [(row["name"], row["sequences"]) for row in rows] == [(name, n) for name in names for n in (1, 3)]
    rates = {(row["name"], row["sequences"]): row["tokens_s"][0] for row in rows}
    for row in rows:
        median, low, high = row["tokens_s"]
        assert row["error"] is None and 0 < low <= median <= high and row["worst_gap"] <= engine.GAP
        cached = row["sequences"] * row["context"] * 2 * 16 * 2
        floor = (result["weight_bytes"] + cached) / (result["copy_gb_s"] * 1e9)
        assert row["share"] == pytest.approx(floor * median / row["sequences"], rel=0.01)
    assert rows[0]["context"] == 5 + 4 and result["decode"]["idle"] is None  # its 7 steps see 6 … 12 keys
    found = result["requests"]
    alike, continuous, static_, _ = (row["tokens_s"] for row in found["rows"])
    assert [row["name"] for row in found["rows"]] == ["alike", "continuous", "static", names[2]]
    assert found["over_decode"] > 0 and found["over_static"][1] <= found["over_static"][0] <= found["over_static"][2]
    assert continuous[1] / static_[2] * 0.99 < found["over_static"][0] < continuous[2] / static_[1] * 1.01
    for row in result["sampling"]["rows"][::2]:
        assert row["over_greedy"] == pytest.approx(row["tokens_s"][0] / rates["engine", 1], rel=0.01)
    for row in result["deterministic"]["rows"]:
        usual = rates["engine", row["sequences"]]
        assert row["over_default"] == pytest.approx(row["tokens_s"][0] / usual, rel=0.01)
    with_cache, without = result["prefix"]["rows"]
    assert (with_cache["cached_tokens"], without["cached_tokens"]) == (32, 0)
    for key in "first_token_ms", "tokens_s":
        assert result["prefix"][f"{key}_ratio"] == pytest.approx(with_cache[key][0] / without[key][0], rel=0.01)
    assert result["run"]["over_decode"] == pytest.approx(result["run"]["tokens_s"][0] / rates["engine", 1], rel=0.01)
    assert result["run"]["first_token_ms"][0] > 0
    for said in (*SIZES, *names, "of the floor", "of greedy", "times as fast as static", "of the default"):
        assert said in printed.out
    assert "failed" not in printed.out


def test_the_steps_around_a_long_prompt(command):
    code, result, printed = command("--only=gap", "--repeats=2")
    assert code == 0, printed.err
    found = result["gap"]
    ms, rows, kinds = (found["timeline"][key].split() for key in ("ms", "rows", "kinds"))
    # two prompts of 5; they decode; 2 + 64 rows of the long prompt at half-time, then the rest of it
    assert kinds == ["prompt", *["decode"] * 3, "mixed", "mixed", *["decode"] * 2]
    assert list(map(int, rows)) == [10, 2, 2, 2, 128 if False else int(rows[4]), 82 - int(rows[4]) + 2, 3, 3]
    assert len(ms) == len(rows) and max(map(float, ms)) > 0
    assert found["worst_ms"][0] >= found["median_ms"][0] > 0
    assert found["ratio"][1] <= found["ratio"][0] <= found["ratio"][2]


def test_wrong_tokens_are_an_error(command, monkeypatch):
    done = Scheduler.done
    monkeypatch.setattr(Scheduler, "done", lambda self, plan, tokens, scores: done(self, plan, [1] * len(tokens)))
    code, result, printed = command("--only=decode,run", "--peers=none", "--repeats=1")
    assert code == 1 and "rows" not in result["decode"]
    assert "wrong tokens" in result["decode"]["error"] and "wrong tokens" in printed.out


def test_draws_that_are_not_the_same_again_are_an_error(command, monkeypatch):
    timed = engine.Bench.timed

    def differs(self, *arguments):
        runs = timed(self, *arguments)
        runs[-1].tokens[0][-1] += 1
        return runs

    monkeypatch.setattr(engine.Bench, "timed", differs)
    code, result, _ = command("--only=sampling", "--repeats=2")
    assert code == 1 and "not the same again" in result["sampling"]["error"]


def test_a_peer_that_fails_costs_no_other_figure(command, monkeypatch):
    def run(self, prompts, new):
        if self.n == 1:
            raise ZeroDivisionError("no such batch")
        return 1.0, [[1] * new for _ in prompts]

    monkeypatch.setattr(batched_peers.StaticBatch, "run", run)
    code, result, printed = command("--only=decode", "--peers=compiled", "--repeats=1")
    ours, others = result["decode"]["rows"][:2], result["decode"]["rows"][2:]
    assert code == 1 and result["decode"]["error"] is None and all(row["tokens_s"] for row in ours)
    assert others[0]["error"] == "ZeroDivisionError: no such batch" and "wrong tokens" in others[1]["error"]
    assert "tokens_s" not in others[0] and "tokens_s" not in others[1]
    assert "failed: ZeroDivisionError" in printed.out


def test_the_graph_of_a_step_is_timed():
    """The level ``fast`` replays its steps on the CPU as well, where nothing is idle but the host's part."""
    sizes = SIZES | {"decode": SIZES["decode"] | {"prompt": 3, "new": 6}}
    b = engine.Bench(CONFIG, TENSORS, "fast", sizes, repeats=1)
    found = engine.idle(b, 3)
    assert found["sequences"] == 3 and found["graph_ms"] > 0
    assert found["share"] == pytest.approx(1 - found["graph_ms"] / found["step_ms"], abs=0.01)


def test_other_numbers_of_sequences(command):
    code, result, printed = command("--only=decode", "--sequences=2", "--peers=none", "--repeats=1")
    assert code == 0, printed.err
    assert [row["sequences"] for row in result["decode"]["rows"]] == [2] == result["decode"]["sequences"]


@pytest.mark.parametrize("arguments, words", [
    (["--repeats=0"], "--repeats=0"), (["--only=none"], "--only= "), (["--only=speed"], "'speed' is none of decode"),
    (["--peers=vllm"], "'vllm' is none of compiled"), (["--sequences=1,0"], "'1,0': whole numbers from 1 on"),
    (["--weights=none.bin"], "none.bin"),
])  # fmt: skip
def test_bad_arguments_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        engine.main([f"--out={tmp_path}", *arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_out_is_checked_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "measure", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as end:
        engine.main([f"--out={tmp_path / 'file'}"])
    assert end.value.code == 2 and "error: --out: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
