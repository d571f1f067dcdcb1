"""Benchmarks find out that their results cannot be written before they measure, not after."""

import importlib
import os
import sys

import pytest

from common import BACKEND

MODULES = {
    "gpt2": ["--levels=naive", "--peers=none"], "start_time": ["--engines=naive"], "ladders": ["03"],
    "sanitizer_cost": [], "bench_cpu": [], "memory_model": ["predict"], "batching": [],
}  # fmt: skip
if BACKEND == "gpu":
    del MODULES["bench_cpu"]  # it brings the CPU backend, which would teach Numba a second float16 in this process


@pytest.mark.parametrize("name", MODULES)
def test_out_is_checked_before_the_work(name, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    for work in ("cases", "chosen") if name == "memory_model" else ("measure", "interleaved", "cost", "compile_times"):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it was measured"), raising=False)
    if name == "ladders":
        monkeypatch.setattr(module.bench, "measure", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    file_wanted = name in ("bench_cpu", "sanitizer_cost", "memory_model")
    odd = {"file/x.json": "cannot be made"}
    odd |= {"folder": "a folder", "pipe": "a pipe"} if file_wanted else {"file": "cannot be made"}
    for out, said in odd.items():
        arguments = [*MODULES[name], f"--out={tmp_path / out}"]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            module.main(*([] if name == "bench_cpu" else [arguments]))
        assert end.value.code == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert "error: --out: " in error and said in error
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]
