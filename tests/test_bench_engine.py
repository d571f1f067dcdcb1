"""The benchmark of the engine: its peers are the same model, its figures fit together, and wrong tokens are noticed."""

import contextlib
import io
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_engines import random_model

import common
from benchmarks import batched_peers, engine, engine_plot, peers, step_profile
from benchmarks.ladders import device_folder
from benchmarks.torch_llama import TorchLlama, random_llama
from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.weights import save_weights
from common import BACKEND, bench

CONFIG, TENSORS = random_model(3, n_layer=1, n_head=2, d_model=16, d_ff=32, n_ctx=128, vocab_size=61)
PROMPTS = [np.random.default_rng(i).integers(0, 61, 7).tolist() for i in range(3)]
SIZES = {
    "decode": {"sequences": (1, 3), "prompt": 5, "new": 8, "idle_at": 3},
    "requests": {"requests": 4, "prompt": (2, 9), "new": 4, "mixed": (1, 6)},
    "sampling": {"sequences": (1,)},
    "prefix": {"requests": 3, "shared": 32, "own": 3, "new": 2},
    "gap": {"sequences": 2, "prompt": 80, "new": 2},
    "deterministic": {},
    "run": {"new": 6},
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """torch's threads and those of the CPU backend would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judge():
    return batched_peers.Judge(CONFIG, TENSORS, "cpu")


def run_program(folder, *arguments):
    """Run the program on the tiny model, level kv: (exit code, what it wrote, what it printed).

    In fixtures, not in tests: those are run again with each of their kernels left out, and this takes seconds.
    """
    save_weights(folder / "tiny.bin", CONFIG, TENSORS)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bench, "copy_bandwidth", partial(bench.copy_bandwidth, 1 << 22))
        patch.setitem(engine.SIZES, BACKEND, SIZES)
        patch.setattr(torch, "set_num_threads", lambda n: None)  # it would last
        with pytest.raises(SystemExit) as end:
            engine.main([f"--weights={folder / 'tiny.bin'}", f"--out={folder}", "--engine=kv", *arguments])
    return end.value.code, json.loads((folder / device_folder() / "engine.json").read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    asked = ",".join(name for name in SIZES if name != "sampling")  # whose kernels take longest to compile
    arguments = f"--only={asked}", "--peers=compiled,transformers", "--repeats=1"
    return run_program(tmp_path_factory.mktemp("measured"), *arguments)


@pytest.fixture(scope="module")
def with_wrong_tokens(tmp_path_factory):
    done = Scheduler.done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "done", lambda self, plan, tokens, scores: done(self, plan, [1] * len(tokens)))
        return run_program(tmp_path_factory.mktemp("wrong"), "--only=decode,gap,deterministic,prefix", "--peers=none")


@pytest.fixture(scope="module")
def with_bad_peers(tmp_path_factory):
    def run(self, prompts, new):
        if self.n == 1:
            raise ZeroDivisionError("no such batch")
        return 1.0, [[1] * new for _ in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_peers.StaticBatch, "run", run)
        arguments = "--only=decode", "--peers=tuned", "--sequences=1,2"
        return run_program(tmp_path_factory.mktemp("bad"), *arguments)


@pytest.fixture(scope="module")
def idle():
    """What `idle` says of graphs that take a millisecond a row: they are said to, by the level kv's shapes."""

    class Graphs(dict):
        def __init__(self, runner):
            super().__init__()
            self.runner = runner

        def setdefault(self, shape, _):
            again = lambda: self.runner._launches(shape)
            self[shape] = SimpleNamespace(seconds=lambda: shape.rows / 1000, replay=again)
            return self[shape]

        def __missing__(self, shape):  # on a GPU the level kv records none
            return self.setdefault(shape, None)

    class Fast(engine.Bench):
        level = property(lambda self: "fast" if self.ready else "kv", lambda self, level: None)
        ready = False

        def engine(self, **options):
            made = Engine(self.model, level="kv", prefix_cache=False, **options)
            made.runner._graphs = Graphs(made.runner)
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "copy_bandwidth", lambda: 10.0)
        b = Fast(CONFIG, TENSORS, "kv", SIZES, repeats=1)
    b.ready = True
    return engine.idle(b, 3)


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


@pytest.mark.parametrize("seconds", [{False: 1, True: 4}, {False: 4, True: 1}])
def test_the_faster_setting_counts(seconds, monkeypatch):
    def run(self, prompts, new):
        return seconds[self.tuned], [[0] * new for _ in prompts]

    monkeypatch.setattr(batched_peers.StaticBatch, "run", run)
    monkeypatch.setattr(batched_peers.StaticBatch, "__init__", lambda self, *_: setattr(self, "tuned", _[4]))
    monkeypatch.setattr(batched_peers.StaticBatch, "note", None)
    b = SimpleNamespace(config=CONFIG, tensors=TENSORS, peers=["tuned", "compiled"], device="cuda", repeats=2)
    b.progress, b.check = print, lambda prompts, tokens: 0.0
    assert list(batched_peers.static_row(b, PROMPTS, 5)["settings"]) == ["compiled"]
    monkeypatch.setattr(batched_peers, "TUNED_MOST", len(PROMPTS))
    row = batched_peers.static_row(b, PROMPTS, 5)
    assert row["tokens_s"] == [12, 12, 12] and row["setting"] == ("tuned" if seconds[False] == 4 else "compiled")
    assert sorted(values[0] for values in row["settings"].values()) == [3, 12]


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


def test_all_is_measured(measured):
    code, result, printed = measured
    assert code == 0
    assert {"device", "backend", "level", "model", "packages", "config", "load", "cores"} <= set(result)
    assert result["model"] == "tiny.bin" and result["repeats"] == 1
    assert all(result[name]["error"] is None for name in SIZES if name != "sampling")
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
    rng = np.random.default_rng(engine.SEED)
    prompts, news = rng.integers(2, 9 + 1, 4), rng.integers(1, 6 + 1, 4)
    assert found["rows"][1]["rows"] == prompts.sum() + (news - 1).sum()
    assert found["rows"][2]["rows"] == 4 * (prompts.max() + news.max() - 1)
    assert continuous[1] / static_[2] * 0.99 < found["over_static"][0] < continuous[2] / static_[1] * 1.01
    for row in result["deterministic"]["rows"]:
        usual = rates["engine", row["sequences"]]
        assert row["over_default"] == pytest.approx(row["tokens_s"][0] / usual, rel=0.01)
    with_cache, without = result["prefix"]["rows"]
    assert (with_cache["cached_tokens"], without["cached_tokens"]) == (32, 0)
    for key in "first_token_ms", "tokens_s":
        assert result["prefix"][f"{key}_ratio"] == pytest.approx(with_cache[key][0] / without[key][0], rel=0.01)
    assert result["run"]["over_decode"] == pytest.approx(result["run"]["tokens_s"][0] / rates["engine", 1], rel=0.01)
    assert result["run"]["first_token_ms"][0] > 0
    for said in ("decode", *names, "of the floor", "times as fast as static", "of the default", "to a first token"):
        assert said in printed
    assert "failed" not in printed


def test_the_steps_around_a_long_prompt(measured):
    found = measured[1]["gap"]
    ms, rows, kinds = (found["timeline"][key].split() for key in ("ms", "rows", "kinds"))
    steps = [(kind, int(n)) for kind, n in zip(kinds, rows) if kind != "none"]  # a GPU's last one only reads
    # the prompts of two; they decode; at half-time the long one comes, and makes two tokens itself
    assert [kind for kind, _ in steps] == ["prompt", *["decode"] * 3, "mixed", *["decode"] * 3]
    assert [n for _, n in steps] == [2 * 5, 2, 2, 2, 2 + 80, 3, 2, 2] and len(ms) == len(rows)
    assert found["worst_ms"][0] >= found["median_ms"][0] > 0
    assert found["ratio"][1] <= found["ratio"][0] <= found["ratio"][2]


def test_wrong_tokens_are_an_error(with_wrong_tokens):
    code, result, printed = with_wrong_tokens
    assert code == 1 and printed.count("failed: Wrong: wrong tokens") == 5
    for found in *result["decode"]["rows"], result["gap"], result["deterministic"], result["prefix"]:
        assert found["error"].startswith("Wrong: wrong tokens: a logit is ") and not {"rows", "tokens_s"} & set(found)


@pytest.fixture
def drawing(judge, monkeypatch):
    """A benchmark that "runs" without an engine: each time, the 20th most likely token behind each prompt."""
    monkeypatch.setattr(engine.Bench, "__init__", lambda self: None)
    monkeypatch.setattr(engine.Bench, "engine", lambda self, **_: None)
    b = engine.Bench()
    b.config, b.sizes, b.judge, b.repeats, b._rates, b.progress = CONFIG, SIZES, judge, 2, {}, print

    def timed(_, requests):
        runs = []
        for seconds in 1, 2:
            tokens = [[likely(judge, request.tokens, 20)] * 8 for request in requests]
            runs.append(SimpleNamespace(tokens=tokens, stamps=[[seconds * i for i in range(8)]] * len(tokens)))
            assert [request.sampling.seed for request in requests] == list(range(len(requests)))
        return runs

    b.timed = timed
    return b


def likely(judge, prompt, rank):
    """The token with so many likelier ones behind ``prompt``."""
    with torch.no_grad():
        hidden = judge.model(torch.tensor([prompt], device=judge.model.wte.weight.device), torch.arange(len(prompt)))
        return int(judge.model.head(hidden[0, -1]).argsort(descending=True)[rank])


def test_a_rate_of_draws_is_that_of_the_same_draws(drawing):
    assert drawing.rate(3, "top_p") == {"tokens_s": [2.25, 1.5, 3], "context": 5 + 4}
    timed = drawing.timed

    def other(*arguments):
        runs = timed(*arguments)
        runs[1].tokens[2][7] += 1
        return runs

    drawing.timed = other
    for _ in range(2):  # and the second time it is not forgotten
        with pytest.raises(engine.Wrong, match="3 sequences, top_k, are not the same again"):
            drawing.rate(3, "top_k")


def test_a_draw_is_among_the_most_likely(drawing):
    prompts = [request.tokens for request in drawing.requests(2)]
    tokens = [[likely(drawing.judge, prompt, 20)] for prompt in prompts]
    assert drawing.check(prompts, tokens, among=40) == 0
    with pytest.raises(engine.Wrong, match="wrong tokens"):
        drawing.check(prompts, tokens)


def test_sampling_is_compared_with_the_most_likely_token():
    rates = {(1, None): 100, (1, "top_k"): 90, (1, "top_p"): 50}
    b = SimpleNamespace(rate=lambda n, draw=None: {"tokens_s": [rates[n, draw]] * 3})
    found = [(row["name"], row["over_greedy"]) for row in engine.sampling(b, (1,))["rows"]]
    assert found == [("top_k", 0.9), ("top_p", 0.5)]


def test_a_peer_that_fails_costs_no_other_figure(with_bad_peers):
    code, result, printed = with_bad_peers
    ours, theirs = result["decode"]["rows"][:2], result["decode"]["rows"][2:]
    assert code == 1 and result["decode"]["error"] is None
    assert [row["sequences"] for row in ours] == [1, 2] and all(row["tokens_s"] and not row["error"] for row in ours)
    assert theirs[0]["error"] == "ZeroDivisionError: no such batch" and "wrong tokens" in theirs[1]["error"]
    assert not any("tokens_s" in row for row in theirs) and "failed: ZeroDivisionError" in printed


def test_the_device_is_idle_in_what_a_step_takes_longer_than_its_graph(idle):
    assert idle["graph_ms"] == 3 and idle["idle_share"] == pytest.approx(1 - 3 / idle["step_ms"], rel=0.01)


@pytest.mark.parametrize("arguments, words", [
    (["--repeats=0"], "--repeats=0"), (["--only=none"], "--only=: at"), (["--only=speed"], "'speed' is none of decode"),
    (["--peers=vllm"], "'vllm' is none of compiled"), (["--sequences=1,0"], "'1,0': whole numbers from 1 on"),
    (["--weights=none.bin"], "none.bin"),
    (["--shape=llama-2-7b", "--engine=fast", "--only=run"], "--shape brings its own weights"),
    (["--shape=llama-2-7b", "--engine=fast", "--peers=transformers"], "there are only compiled,tuned"),
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


# --- Llamas ----------------------------------------------------------------------------------------------------------

LLAMA = LlamaConfig(2, 4, 2, 16, 48, 104, 128, 101, 1e-5, 1e4, True)  # as in tests/ch14/test_llama.py


@pytest.fixture(scope="module")
def measured_llama():
    sizes = {"decode": {"sequences": (1, 2), "prompt": 5, "new": 8, "idle_at": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "copy_bandwidth", partial(bench.copy_bandwidth, 1 << 22))
        tensors = random_llama(LLAMA, "cuda" if BACKEND == "gpu" else "cpu", std=0.2)
        return engine.measure(LLAMA, tensors, "fast", sizes, ["decode"], repeats=1, peers=("compiled",))


def test_a_llama_is_compared_with_the_same_in_torch(measured_llama):
    assert engine.errors(measured_llama) == []
    rows = measured_llama["decode"]["rows"]
    assert [(row["name"], row["sequences"]) for row in rows] == [
        (name, n) for name in ("engine", batched_peers.StaticBatch.name) for n in (1, 2)
    ]
    assert all(row["worst_gap"] <= engine.GAP and 0 < row["share"] for row in rows)
    d, d_ff, q, kv = 48, 104, 4 * 16, 2 * 16
    layer = 2 * d + d * (q + 2 * kv) + q * d + 3 * d * d_ff
    assert measured_llama["weight_bytes"] == 2 * (101 * d + 2 * layer + d)


def test_torchs_llama_is_transformers():
    numbers = {name: tensor.numpy() for name, tensor in random_llama(LLAMA, "cpu", std=0.2).items()}
    expected = peers.TransformersLlama(LLAMA, numbers, device="cpu", dtype=torch.float32).logits(PROMPTS[0])
    model = TorchLlama.of(LLAMA, numbers, "cpu", torch.float32)
    ids = torch.tensor([PROMPTS[0]])
    found = model.head(model(ids, torch.arange(ids.shape[1])))[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_engines_figures_are_drawn(tmp_path):
    """With a peer that failed at one size, questions that were not asked, and a prompt in two steps."""
    (tmp_path / "h200").mkdir()
    (tmp_path / "chapter").mkdir()
    rows = [
        {"name": name, "sequences": n, "error": error, "tokens_s": [rate * n, 0, 0], "share": 0.5, "setting": "tuned"}
        for name, rate in (("engine", 3), ("torch.compile, static batch", 2))
        for n, error in ((1, None), (8, "out of memory" if rate == 2 else None))
    ]
    kinds = "decode decode decode mixed mixed decode none"
    timeline = {"ms": "1 1 1 4 3 1 1", "rows": "2 2 2 386 40 3 3", "kinds": kinds}
    result = {
        "device": "NVIDIA X1", "model": "a model", "level": "fast", "repeats": 3,
        "decode": {"prompt": 128, "new": 200, "rows": rows,
                   "idle": {"sequences": 32, "error": None, "idle_share": -0.01}},
        "deterministic": {"rows": [{"sequences": 8, "over_default": 0.91}]},
        "gap": {"prompt": 1000, "sequences": 16, "ratio": [2.5, 2, 3], "median_ms": [1, 1, 1], "timeline": timeline},
    }  # fmt: skip
    (tmp_path / "h200" / "engine.json").write_text(json.dumps(result))
    kernels = [("gemv_ln_qkv", 2, 30.0), ("paged_v4_parts", 2, 20.0), ("gemv_ln_logits", 1, 12.0), ("parts_norm", 1, 7)]
    kernels = [dict(zip(("name", "launches", "us"), one)) for one in kernels]
    profile = {"sequences": 2, "us": 69.0, "weights_us": 9.0, "cache_us": 3.0, "kernels": kernels}
    profile = {"device": "NVIDIA X1", "repeats": 5, "rows": [profile]}
    (tmp_path / "h200" / "step_profile.json").write_text(json.dumps(profile))
    tables = "<!-- engine decode -->\nold\n<!-- end -->\nbetween\n<!-- engine others -->\n<!-- end -->\n"
    tables += "<!-- engine profile -->\n<!-- end -->\n"
    page = f"before\n{tables}behind\n"
    (tmp_path / "chapter" / "graphs.md").write_text(page)
    paths = engine_plot.draw_all(tmp_path, tmp_path / "chapter")
    assert all(path.exists() for path in paths)
    text = paths[-1].read_text()
    assert text.startswith("before\n<!-- engine decode -->\n| sequences") and text.endswith("<!-- end -->\nbehind\n")
    assert "| 1 | 3 | 50 % | 2 | 1.50 | – |" in text and "| 8 | 24 | 50 % | – | – | 0.91 |" in text
    assert "the GPU is idle | 0.0 %" in text and "the worst gap over the median | 2.50 |" in text and "old" not in text
    assert "| 2 | 69 µs | 20 µs | 3 µs | 30 µs | 7 µs | 12 µs | 9 µs | 6 |" in text
    assert "386 rows" in paths[1].read_text()


def test_a_kernels_name():
    assert step_profile.kernel_name("a::b::gemv_ln[abi:v7][abi:cw51](Array<float, 1, C>, long long)") == "gemv_ln"
    assert step_profile.kernel_name("Memset (Device)") == "Memset (Device)"


@pytest.mark.skipif(common.BACKEND == "gpu", reason="there is a GPU, which is measured")
def test_a_step_is_profiled_on_a_gpu_only(capsys):
    with pytest.raises(SystemExit, match="no GPU here"):
        step_profile.main(["--sequences=1"])
    with pytest.raises(SystemExit):
        step_profile.main(["--repeats=0"])
    assert "--repeats=0: at least 1" in capsys.readouterr().err
