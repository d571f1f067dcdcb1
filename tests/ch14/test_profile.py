"""`make profile`: the timeline, the largest kernel, NVIDIA's tools (played by scripts), and every mistake."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common
from ch14_mini_llm import profile, profiling, timeline
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.weights import save_weights, tensor_table
from ch14_mini_llm.timeline import Slice
from ch14_mini_llm.tokenizer.bpe import VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "ch14_mini_llm" / "profile.py"

# A profiler that runs the program and then tells times: kernel number i takes i microseconds, all in reverse order.
FAKE = """#!{python}
import json, subprocess, sys
words = sys.argv[1:]
if "{tool}" == "nsys" and words[0] == "stats":
    rows = json.load(open(words[-1]))
    print("Generating SQLite file\\n\\nStart (ns),Duration (ns),CorrId,GrdX,GrdY,GrdZ,Bytes (MB),Strm,Name")
    for i, one in reversed(list(enumerate(rows, 1))):
        name = f"cudapy::chapters::{{one['name']}}[abi:v1](Array<float, 1>)"
        print(f'{{i * 1000000}},{{i * 1000}},{{i}},1,1,1,,7,"{{name}}"')
    print("500,99999999,1,,,,0.001,7,[CUDA memcpy Host-to-Device]")
    sys.exit(0)
begin = next(i for i, word in enumerate(words) if word.endswith("profile.py")) - 1
code = subprocess.run(words[begin:]).returncode
if code:
    sys.exit(code)
rows = json.load(open(words[-1].removeprefix("--child=")))
if "{tool}" == "nsys":
    report = next(word for word in words if word.startswith("--output=")).removeprefix("--output=")
    json.dump(rows, open(report + ".nsys-rep", "w"))
else:
    report = next(word for word in words if word.startswith("--log-file=")).removeprefix("--log-file=")
    with open(report, "w") as file:
        file.write('==PROF== Connected\\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\\n')
        for i, one in enumerate(rows):
            file.write(f'"{{i}}","{{one["name"]}}","gpu__time_duration.sum","ns","{{(i + 1) * 1000:,}}"\\n')
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.bin"
    config = GPT2Config(n_layer=2, n_head=2, d_model=8, d_ff=32, n_ctx=64, vocab_size=VOCAB_SIZE)
    rng = np.random.default_rng(3)
    save_weights(path, config, {name: rng.standard_normal(shape) * 0.3 for name, shape, _ in tensor_table(config)})
    return path


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """A backend that says it is a GPU, and a PATH with the tools that the test asks for, and nothing else."""
    monkeypatch.setattr(profile, "pick_backend", lambda: ("gpu", "Test GPU", "a test"))
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(tool, text=FAKE):
        path = tmp_path / tool
        path.write_text(text.format(python=sys.executable, tool=tool) if text is FAKE else text)
        path.chmod(0o755)

    return install


def call(capsys, *arguments):
    code = profile.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- the timeline ----------------------------------------------------------------------------------------------------


def rows_of(out):
    """{kernel: (launches, ms)} of the printed table."""
    found = re.findall(r"^(\w+) +(?:\|.*\|)? +(\d+) +([\d.]+)", out, re.MULTILINE)
    return {name: (int(launches), float(ms)) for name, launches, ms in found}


def test_our_own_trace(weights, capsys):
    code, out, err = call(capsys, "--weights", weights, "--with=trace", "--tokens=1,2,3")
    assert code == 0, err
    assert "one forward pass of GPT-2 over 3 tokens" in out and "our own event trace" in out
    rows = rows_of(out)
    launches, total = rows.pop("all")
    assert launches == sum(n for n, _ in rows.values()) == 1 + 17 * 2 + 3
    assert sum(ms for _, ms in rows.values()) == pytest.approx(total, abs=0.001 * len(rows))
    assert {"embed": 1, "greedy_argmax": 1}.items() <= {name: n for name, (n, _) in rows.items()}.items()
    largest = max(rows, key=lambda name: rows[name][1])
    *_, verdict = out.strip().splitlines()
    match = re.fullmatch(r"The largest kernel is (\w+) of chapter (\d+), (chapters/\S+):(\d+): .*", verdict)
    assert rows[match[1]][1] == rows[largest][1]
    assert f"def {match[1]}(" in (ROOT / match[3]).read_text(encoding="utf-8").splitlines()[int(match[4]) - 1]
    assert f"chapters/ch{int(match[2]):02}_" in match[3]


def test_as_a_program(weights):
    """Started as a script from anywhere; a module of this name must not hide Python's own ``profile``."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), f"--weights={weights}", "--prompt=Hello", "--length=5", "--with=trace"],
        capture_output=True, text=True, cwd=Path.home(), env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "over 5 tokens" in done.stdout and "The largest kernel is " in done.stdout
    assert f"backend: {common.BACKEND}" in done.stderr
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'ch14_mini_llm')!r}); import profile, sys; profile.main(['--x'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "profile.py: error" in done.stderr


def test_the_numbers_of_the_table():
    at = "chapters/ch06_shared_tile/kernels.py:84"
    slices = [
        Slice("embed", "chapters/ch03_indexing/kernels.py:1", [1], [1], 1.0),
        Slice("matmul", at, [1], [1], 2.0),
        Slice("own", "elsewhere.py:9", [1], [1], 1.0),
        Slice("matmul", at, [1], [1], 4.0),
    ]
    groups = timeline.by_kernel(slices)
    assert [(first.name, spans, ms) for first, spans, ms in groups] == [
        ("embed", [(0.0, 1.0)], 1.0), ("matmul", [(1.0, 2.0), (4.0, 4.0)], 6.0), ("own", [(3.0, 1.0)], 1.0),
    ]  # fmt: skip
    text = timeline.format_profile(slices)
    assert text.endswith(f"The largest kernel is matmul of chapter 6, {at}: 2 launches, 6.000 of 8.000 ms (75.0 %).")
    eighth = timeline.WIDTH // 8
    assert f"|{' ' * eighth}{'█' * 2 * eighth}{' ' * eighth}{'█' * 4 * eighth}|" in text
    assert [timeline.chapter(one) for one in slices] == ["3", "6", "", "6"]


@pytest.mark.parametrize(
    "spans, total, expected",
    [
        ([(0, 1)], 1, "█" * 48),
        ([(0.5, 0.5)], 1, " " * 24 + "█" * 24),
        ([(0, 1 / 96)], 1, "▒" + " " * 47),  # half of the first column
        ([(0, 1e-9)], 1, "·" + " " * 47),  # never so short that it is not seen
        ([(i / 96, 1 / 192) for i in range(96)], 1, "▒" * 48),
        ([], 0, " " * 48),
        ([(0, 0.0)], 0, " " * 48),
    ],
)
def test_bar(spans, total, expected):
    assert timeline.bar(spans, total) == expected


@pytest.mark.parametrize("suffix, begin", [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_a_picture(weights, capsys, tmp_path, suffix, begin):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"timeline{suffix}"
    code, _, err = call(capsys, "--weights", weights, "--with=trace", "--save", path)
    assert code == 0 and f"written: {path}" in err
    data = path.read_bytes()
    assert data.startswith(begin)
    if suffix == ".svg":
        assert b"embed" in data and b"greedy_argmax" in data


# --- NVIDIA's tools --------------------------------------------------------------------------------------------------


def expected_ms(n_launches):
    return sum(range(1, n_launches + 1)) / 1000


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
@pytest.mark.parametrize("wish", ["auto", "named"])
def test_a_tool(weights, capsys, fake_gpu, tool, wish):
    """The times are the tool's, in the order of launch, whatever the order of its table; copies do not count."""
    fake_gpu(tool)
    code, out, err = call(capsys, "--weights", weights, f"--with={tool if wish == 'named' else wish}")
    assert code == 0, err
    rows = rows_of(out)
    launches, total = rows.pop("all")
    assert total == pytest.approx(expected_ms(launches)) and f"timed by {tool}" in out
    assert rows["embed"] == (1, 0.001)  # the first
    assert rows["greedy_argmax"] == (1, launches / 1000)  # the last


def test_auto_prefers_nsys(fake_gpu):
    assert profiling.pick_tool("auto", "gpu") == "trace"
    fake_gpu("ncu")
    assert profiling.pick_tool("auto", "gpu") == "ncu"
    fake_gpu("nsys")
    assert profiling.pick_tool("auto", "gpu") == "nsys"
    assert profiling.pick_tool("auto", "cpu") == "trace" == profiling.pick_tool("trace", "gpu")


BROKEN = {
    "fails": ("#!/bin/sh\necho 'starting' >&2\necho 'Error: ERR_NVGPUCTRPERM no permission' >&2\nexit 9\n", "code 9"),
    "is silent": ("#!/bin/sh\nexit 3\n", "it said nothing"),
    "gives no table": ("#!/bin/sh\nexit 0\n", "no table of kernels"),
    "has other columns": ("#!/bin/sh\necho 'Start (ns),GrdX,Name'\necho '5,1,embed'\n", "not as expected"),
    "runs nothing": ("#!/bin/sh\necho 'Start (ns),Duration (ns),GrdX,Name'\n", "wrote no launches"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_tool_that_does_not_work(weights, capsys, fake_gpu, how):
    text, needle = BROKEN[how]
    fake_gpu("nsys", text)
    code, out, err = call(capsys, "--weights", weights, "--with=nsys")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("profile.py: error: nsys") and needle in err and "Traceback" not in err


def test_auto_goes_on_with_our_own_trace(weights, capsys, fake_gpu):
    fake_gpu("nsys", BROKEN["fails"][0])
    code, out, err = call(capsys, "--weights", weights)
    assert code == 0 and "our own event trace" in out
    assert "ERR_NVGPUCTRPERM" in err and "instead" in err


def test_other_kernels_than_ours_are_not_taken_for_ours(weights, capsys, fake_gpu):
    fake_gpu("nsys", FAKE.format(python=sys.executable, tool="nsys").replace("one['name']", "'somebody'"))
    code, _, err = call(capsys, "--weights", weights, "--with=nsys")
    assert code == 2 and "in another order" in err


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_the_real_tool_agrees_with_our_trace_on_the_launches(weights, capsys, tool):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    code, out, err = call(capsys, "--weights", weights, f"--with={tool}")
    if "ERR_NVGPUCTRPERM" in err:
        pytest.skip("this user may not read the GPU's counters")
    assert code == 0, err
    assert rows_of(out)["all"][0] == 1 + 17 * 2 + 3


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (["--with=gprof"], ["--with=gprof", "auto, trace, nsys or ncu"]),
        (["--with="], ["--with=:"]),
        (["--length=0"], ["--length is 0"]),
        (["--length=many"], ["--length", "'many'"]),
        (["--length=100000"], ["100000", "prompt tokens"]),
        (["--length=" + "9" * 30], ["9" * 30, "1 to 63 prompt tokens"]),
        (["--save="], ["--save"]),
        (["--tokens=1,,2"], ["item 1 is ''"]),
        (["--tokens=1", "--prompt=a"], ["--tokens and --prompt"]),
        (["--weights="], ["--weights is empty"]),
        (["--weights=nowhere.bin"], ["nowhere.bin"]),
        (["--save=timeline.jpg"], ["timeline.jpg", ".svg or .png"]),
        (["--save=no/such/folder/a.svg"], ["there is no folder", "no/such/folder"]),
        (["--no_such_option"], ["--no_such_option"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: value[0] if str(value[0]).startswith("--") else None,
)
def test_a_mistake_is_one_line(weights, capsys, arguments, needles):
    if not any(a.startswith("--weights") for a in arguments):
        arguments = ["--weights", weights, *arguments]
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("profile.py: error: ") and err.count("\n") == 1, err
    for needle in needles:
        assert needle in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_picture_replaces_a_regular_file_only(weights, capsys, tmp_path):
    """What else has the name is kept, and said before anything is measured."""
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.svg").mkdir()
    os.mkfifo(tmp_path / "pipe.svg")
    (tmp_path / "device.svg").symlink_to(os.ttyname(os.openpty()[1]))
    (tmp_path / "weights.svg").symlink_to(weights)
    for name, said in (("folder.svg", "a folder"), ("pipe.svg", "a pipe"), ("device.svg", "a device"),
                       ("weights.svg", "is what is read")):  # fmt: skip
        code, out, err = call(capsys, "--weights", weights, "--save", tmp_path / name)
        assert (code, out) == (2, "") and err.startswith("profile.py: error: --save: ") and err.count("\n") == 1
        assert said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.svg", "folder.svg", "pipe.svg", "weights.svg"]


def test_a_tool_needs_a_gpu_and_to_be_there(weights, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for backend, needle in (("cpu", "the backend is cpu"), ("gpu", "nsys is not on PATH")):
        monkeypatch.setattr(profile, "pick_backend", lambda backend=backend: (backend, "Test", "a test"))
        code, _, err = call(capsys, "--weights", weights, "--with=nsys")
        assert code == 2 and needle in err and "--with=trace" in err


def test_a_picture_needs_matplotlib(weights, capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    code, _, err = call(capsys, "--weights", weights, "--save", tmp_path / "a.svg")
    assert code == 2 and "matplotlib" in err and "pip install" in err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        profile.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "--child" not in out
    for option in "tokens prompt length weights with save".split():
        assert f"--{option}" in out


def test_what_a_tool_starts_writes_its_launches(weights, capsys, tmp_path):
    code, out, _ = call(capsys, "--weights", weights, f"--child={tmp_path / 'launches.json'}")
    assert (code, out) == (0, "")
    launches = json.loads((tmp_path / "launches.json").read_text())
    assert launches[0]["name"] == "embed" and len(launches) == 1 + 17 * 2 + 3
