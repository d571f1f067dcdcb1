"""The time to the first token: measured in processes of their own, and an error is told."""

import json

import pytest

pytest.importorskip("torch")

from benchmarks import start_time
from benchmarks.ladders import device_folder


def test_import_is_part_of_the_time_to_the_first_token(tmp_path, capsys):
    start_time.main(
        ["--engines=kv", "--repeats=1", f"--out={tmp_path}", f"--weights={start_time.DATA_DIR}/tiny-gpt2.bin"]
    )
    result = json.loads((tmp_path / device_folder() / "start.json").read_text(encoding="utf-8"))
    (row,) = result["rows"]
    assert row["engine"] == "kv" and result["weights"] == "tiny-gpt2.bin" and result["repeats"] == 1
    assert 0.1 < row["import_s"][0] < row["first_token_s"][0]
    assert "kv      import" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--repeats=0"], "at least one of each"),
        (["--engines=none"], "at least one of each"),
        (["--engines=slow"], "'slow' is none of naive, kv, fast"),
        (["--weights=nothing.bin"], "no such file"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        start_time.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_program_that_fails_is_told(tmp_path, capsys):
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"no weights")
    with pytest.raises(SystemExit) as stop:
        start_time.main(["--engines=naive", f"--weights={broken}", f"--out={tmp_path}"])
    assert stop.value.code == 1 and "broken.bin" in capsys.readouterr().err
