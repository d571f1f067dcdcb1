"""The benchmark of the capstone beside transformers and torch.compile: the peers are the same model, and it adds up."""

import json
from functools import partial

import common

# isort: split
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import gpt2, gpt2_plot, peers, random_gpt2
from benchmarks.ladders import device_folder
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.weights import save_weights, tensor_table
from ch14_mini_llm.naive.gpt2 import GPT2
from common import bench

TINY = GPT2Config(n_layer=2, n_head=2, d_model=32, d_ff=128, n_ctx=64, vocab_size=199)
PROMPT = [7, 190, 3, 3, 58]


def tiny_tensors(seed=0):
    """Random weights for `TINY`, fp16, in which nothing is 0 or 1: whatever is dropped shows."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape, _ in tensor_table(TINY):
        values = 0.25 * rng.standard_normal(shape)
        tensors[name] = (values + (name.endswith("weight") and len(shape) == 1)).astype(np.float16)
    return tensors


TENSORS = tiny_tensors()


@pytest.fixture(autouse=True)
def one_torch_thread():
    """torch's threads and those of the CPU backend would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ours():
    """Greedy tokens of the naive model, up to the end of its context."""
    return list(generate(GPT2(TINY, TENSORS), PROMPT, TINY.n_ctx - len(PROMPT)))


def make_peer(name, **options):
    return peers.PEERS[name](TINY, TENSORS, device="cpu", dtype=torch.float32, **options)


# --- the peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_makes_the_tokens_of_our_model(name, ours):
    assert len(set(ours)) > 10  # not one token over and over
    peer = make_peer(name)
    assert peer.generate(PROMPT, len(ours)) == ours
    assert peer.generate(PROMPT + ours[:20], 5) == ours[20:25], "a second prompt finds the cache of the first"
    assert peer.generate(PROMPT, 1) == ours[:1] == [peer.prefill(PROMPT)]
    assert peer.decode(ours[0], 6) == ours[1:7]
    assert peer.decode(ours[6], 3) == ours[7:10]
    assert peer.name


@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_has_room_for_what_was_reserved(name, ours):
    peer = make_peer(name, max_length=16)
    assert peer.generate(PROMPT, 12) == ours[:12]  # the last token is not run
    with pytest.raises(ValueError, match="there is room for 16"):
        peer.generate(PROMPT, 13)
    peer.reserve(TINY.n_ctx)
    assert peer.prefill(PROMPT + ours[:-1]) == ours[-1]
    with pytest.raises(ValueError, match="65 tokens; this model takes 1 to 64"):
        peer.prefill([1] * 65)
    with pytest.raises(ValueError, match="0 tokens"):
        peer.prefill([])


def test_decoding_step_is_one_graph_and_compiled_once(ours):
    from torch._dynamo.utils import counters

    peer = make_peer("compiled")
    assert peer.note == "not compiled: there is no GPU"
    torch.compiler.reset()
    counters.clear()
    # as on a GPU, but for the last stage of the compiler, which would take most of a minute
    peer._step = torch.compile(peers.decode_one_token, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        assert peer.generate(PROMPT, 12) == ours[:12]
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_logit_gaps_find_a_wrong_token(ours):
    tokens = ours[:20]
    gaps = peers.logit_gaps(TINY, TENSORS, PROMPT, tokens, "cpu")
    assert gaps.shape == (20,) and np.abs(gaps).max() < 1e-5
    tokens[13] = (tokens[13] + 1) % TINY.vocab_size
    gaps = peers.logit_gaps(TINY, TENSORS, PROMPT, tokens, "cpu")
    assert gaps[13] > 0.01 and np.abs(gaps[:13]).max() < 1e-5


def test_random_weights_are_those_of_an_untrained_gpt2():
    tensors = random_gpt2.random_weights(TINY)
    assert {name: value.shape for name, value in tensors.items()} == {n: shape for n, shape, _ in tensor_table(TINY)}
    assert all(value.dtype == np.float16 for value in tensors.values())
    assert abs(tensors["wte.weight"].astype(np.float32).std() - 0.02) < 0.001
    assert (tensors["ln_f.weight"] == 1).all() and (tensors["h.1.ln_2.weight"] == 1).all()
    assert (tensors["ln_f.bias"] == 0).all() and (tensors["h.0.attn.c_attn.bias"] == 0).all()
    again = random_gpt2.random_weights(TINY)
    assert all(np.array_equal(value, again[name]) for name, value in tensors.items())


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command on a tiny model: (exit code, what it wrote, what it printed)."""
    monkeypatch.setattr(bench, "copy_bandwidth", partial(bench.copy_bandwidth, 1 << 24))
    save_weights(tmp_path / "tiny.bin", TINY, TENSORS)

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            gpt2.main([f"--weights={tmp_path / 'tiny.bin'}", f"--out={tmp_path}", "--prompt=5", *arguments])
        path = tmp_path / device_folder() / "gpt2.json"
        return end.value.code, path.exists() and json.loads(path.read_text(encoding="utf-8")), capsys.readouterr()

    return command


def test_benchmark_end_to_end(run):
    code, result, printed = run("--tokens=8", "--levels=naive,kv")
    assert code == 0, printed.err
    assert {"device", "backend", "config", "weights"} <= set(result)
    assert {"numpy", "torch", "transformers"} <= set(result["packages"])
    assert result["weights"] == "tiny.bin" and result["prompt_tokens"] == 5 and result["new_tokens"] == 8
    assert result["weight_bytes"] == 2 * (TINY.n_parameters - 64 * 32)
    assert result["ceiling_tokens_s"] == pytest.approx(result["copy_gb_s"] * 1e9 / result["weight_bytes"], rel=1e-3)
    assert result["reference"] == "naive"
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["naive", "kv", *(peer.name for peer in peers.PEERS.values())]
    for name, row in rows.items():
        assert row["kind"] == ("level" if name in gpt2.LEVELS else "peer")
        assert row["error"] is None and row["new_tokens"] == 8
        assert row["repeats"] == (3 if name == "naive" else 5)
        median, low, high = row["tokens_s"]
        assert 0 < low <= median <= high
        assert row["share"] == pytest.approx(median / result["ceiling_tokens_s"], rel=2e-3)
        (prefill,) = row["prefill"]
        assert prefill["size"] == prefill["tokens"] == 64 and prefill["repeats"] == (3 if name == "naive" else 10)
        assert 0 < prefill["ms"][1] <= prefill["ms"][0] <= prefill["ms"][2]
        assert len(row["tokens"].split()) == 8 and row["check"]["compared"] == 8
        if common.BACKEND == "cpu":  # in float16, near ties may be broken either way
            assert row["check"]["first_difference"] is None
        assert row["check"]["worst_gap"] < (1e-5 if common.BACKEND == "cpu" else 0.05)
        assert name in printed.out
    assert printed.out.count("all 8 equal") == 1 + len(peers.PEERS) or common.BACKEND == "gpu"
    assert "the reference" in printed.out and "prompt of 64" in printed.out


def test_naive_model_makes_fewer_tokens(run):
    code, result, printed = run("--tokens=40", "--levels=naive", "--peers=none", "--skip-prefill")
    (row,) = result["rows"]
    assert code == 0 and result["new_tokens"] == 40 and row["new_tokens"] == 32 and row["prefill"] == []
    assert len(row["tokens"].split()) == 32 and "32 at most" in row["note"]
    assert "naive, 32 new" in printed.out and "prompt of 64" not in printed.out


def test_model_that_fails_is_told_and_the_others_are_measured(run, monkeypatch):
    class Broken(peers.CompiledDecode):
        def _decode(self, token, n):
            raise RuntimeError("no compiler\nand more lines")

    class Wrong(GPT2):
        def forward(self, tokens, choose=None):
            return (super().forward(tokens, choose) + (len(tokens) == 8)) % TINY.vocab_size

    monkeypatch.setitem(peers.PEERS, "compiled", Broken)
    made = gpt2.make_level
    monkeypatch.setattr(gpt2, "make_level", lambda *a: Wrong(*a[1:]) if a[0] == "fast" else made(*a))
    code, result, printed = run("--tokens=8", "--levels=naive,fast", "--peers=compiled,static", "--skip-prefill")
    rows = {row["name"]: row for row in result["rows"]}
    broken = rows.pop(peers.CompiledDecode.name)
    assert code == 1 and broken["error"] == "RuntimeError: no compiler" and "tokens_s" not in broken
    assert "RuntimeError: no compiler" in printed.out
    assert len(rows) == 3 and all(row["error"] is None and row["tokens_s"] for row in rows.values())
    check = rows["fast"]["check"]
    assert check["first_difference"] == 3 and check["worst_gap"] > 0.01 and "3 of 8 equal" in printed.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tokens=60"], "64 together"),
        (["--tokens=1"], "at least"),
        (["--levels=naive,slow"], "'slow' is none of naive, kv, fast"),
        (["--peers=jax"], "'jax' is none of"),
        (["--weights=nothing.bin"], "no such weight file"),
    ],
)
def test_bad_arguments_are_refused(run, arguments, words):
    code, result, printed = run(*arguments)
    assert code == 2 and words in printed.err and not result


def test_prompt_of_the_whole_context_is_cut_where_a_model_cannot_take_it():
    class Short:
        def reserve(self, length):
            pass

        def prefill(self, tokens):
            if len(tokens) > 63:
                raise ValueError("too long")
            return 0

    size, times = gpt2._prefill(Short(), 64, TINY, 3)
    assert size == 63 and len(times) == 3


def test_bytes_of_a_token_of_gpt2():
    assert gpt2.weight_bytes(gpt2.GPT2_124M) == 2 * (124_439_808 - 1024 * 768)
    assert gpt2.prefill_sizes(gpt2.GPT2_124M) == [128, 512, 1024]


# --- the plots -------------------------------------------------------------------------------------------------------


def made_up(device, backend="gpu"):
    """What `gpt2.measure` might have given: one level failed, another could not take the longest prompt."""
    rows = []
    for i, name in enumerate(["naive", "kv", "fast", *(peer.name for peer in peers.PEERS.values())]):
        prefill = [{"size": n, "tokens": n - (n == 1024), "ms": [n / (i + 1)] * 3, "repeats": 10} for n in (128, 1024)]
        row = {"name": name, "kind": "level" if i < 3 else "peer", "error": None, "note": None, "prefill": prefill}
        rows.append({**row, "new_tokens": 256 if i else 32, "tokens_s": [50.0 * 3**i] * 3, "share": 0.1})
    rows[1] = {"name": "kv", "kind": "level", "error": "RuntimeError: no", "note": None, "new_tokens": 256}
    return {
        "device": device, "backend": backend, "prompt_tokens": 16, "new_tokens": 256, "ceiling_tokens_s": 12000.0,
        "copy_gb_s": 3000.0, "weight_bytes": 2.5e8, "n_parameters": 124e6, "reference": "naive", "rows": rows,
    }  # fmt: skip


def test_plots_show_every_model_that_was_measured(tmp_path, capsys):
    for folder, result in {"cpu": made_up("a CPU", "cpu"), "h100": made_up("NVIDIA H100"), "b": made_up("B")}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gpt2.json").write_text(json.dumps(result), encoding="utf-8")
    assert [result["device"] for result in gpt2_plot.measured(tmp_path)] == ["B", "NVIDIA H100"]
    for out in ("one", "two"):
        gpt2_plot.main([f"--results={tmp_path}", f"--out={tmp_path / out}"])
        assert capsys.readouterr().out.split() == [str(tmp_path / out / name) for name in ("decode.svg", "prefill.svg")]
    for name in ("decode.svg", "prefill.svg"):
        text = (tmp_path / "one" / name).read_text(encoding="utf-8")
        assert text == (tmp_path / "two" / name).read_text(encoding="utf-8"), "the same figures, another file"
        assert all(word in text for word in ("H100", "naive", "fast", "transformers, eager", "torch.compile"))
        assert "a CPU" not in text and ">kv<" not in text
    assert "at a copy's speed, 12000" in (tmp_path / "one" / "decode.svg").read_text(encoding="utf-8")


def test_plot_without_figures_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        gpt2_plot.main([f"--results={tmp_path}"])
    assert end.value.code == 2 and "run benchmarks/gpt2.py first" in capsys.readouterr().err


def test_table_of_made_up_figures_names_the_error():
    result = made_up("NVIDIA H100")
    for row in result["rows"]:
        if not row["error"]:
            row["check"] = {"compared": 32, "first_difference": None, "worst_gap": 0.0, "worst_gap_at": 0}
    table = gpt2.format_table(result)
    assert "kv: RuntimeError: no" in table and "the ceiling is 12000 tokens/s" in table and "prompt of 1024" in table
