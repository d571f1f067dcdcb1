"""Chapter 14: a file of requests in, a line of JSON out for each, whatever is in the file."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.offline import parse

DEFAULTS = {"max_new": 5}


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "ch14_mini_llm" / "run.py"), *map(str, arguments)], capture_output=True, text=True
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_result_a_line_in_order_and_bad_lines_alone(tmp_path):
    requests = [
        {"prompt": "Once upon a time", "max_new": 20}, {"tokens": [15496, 11, 612, 318], "id": "a"},
        {"tokens": [70000]}, {"prompt": "Once upon a time", "max_new": 20}, {"prompt": "The", "seed": 3, "top_k": 40},
    ]  # fmt: skip
    lines = [json.dumps(request) for request in requests]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:3], "", "{", *lines[3:]]) + "\n")
    code, results, errors = run("--batch", tmp_path / "in.jsonl", "--max_new", 6)
    assert code == 1 and [result["line"] for result in results] == [1, 2, 3, 4, 5, 6]
    assert [result["finish_reason"] for result in results] == ["length", "length", "error", "error", "length", "length"]
    assert "token id 70000" in results[2]["error"] and "not JSON" in results[3]["error"] and results[1]["id"] == "a"
    assert "2 of 6 requests have an error" in errors and "Traceback" not in errors
    assert results[0]["tokens"] == results[4]["tokens"] and len(results[1]["tokens"]) == 6
    for result, arguments in (
        (results[1], ["--tokens=15496,11,612,318"]), (results[5], ["--prompt=The", "--seed=3", "--top_k=40"])
    ):  # fmt: skip
        _, (one,), _ = run(*arguments, "--max_new=6", "--engine=kv", "--json")
        assert one["tokens"][len(one["prompt_tokens"]) :] == result["tokens"]


def test_exit_code_0_where_all_is_well(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello"}\n')
    code, (result,), _ = run("--batch", tmp_path / "in.jsonl", "--max_new=2")
    assert code == 0 and result["error"] is None and result["text"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--batch", "none.jsonl"], "there is no file"), (["--batch", "."], "cannot be read"),
        (["--batch", "empty"], "has no requests"), (["--batch", "empty", "--prompt=x"], "--batch and --prompt"),
        (["--batch", "empty", "--engine=naive"], "levels kv and fast"),
        (["--batch", "empty", "--trace"], "--batch and --trace"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(tmp_path, arguments, said):
    (tmp_path / "empty").write_text("\n \n")
    command = [sys.executable, str(ROOT / "ch14_mini_llm" / "run.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize(
    "line, said",
    [
        ("[]", "not an object"), ("1e999", "not an object"), ("{}", "one of"),
        ('{"prompt": ""}', "at least one character"),
        ('{"prompt": "a", "tokens": [1]}', "one of the fields"), ('{"prompt": 5}', "must be a text"),
        ('{"tokens": 5}', "list of ids"), ('{"tokens": [1], "colour": 1}', "'colour' is unknown"),
        ('{"tokens": [1], "max_new": "5"}', "max_new is '5'"), ('{"tokens": [1], "max_new": true}', "max_new is True"),
        ('{"tokens": [1], "max_new": 1.5}', "max_new is 1.5"),
        ('{"tokens": [1], "temperature": "hot"}', "temperature is 'hot'"),
        ('{"tokens": [1], "temperature": NaN}', "temperature is nan"), ('{"tokens": [1], "top_p": 0}', "top_p is 0"),
        ('{"tokens": [1], "temperature": -1}', "temperature is -1"), ('{"tokens": [1], "seed": -1}', "seed is -1"),
        ('{"tokens": [1], "logit_bias": {"x": 1}}', "key 'x'"), ('{"tokens": [1], "min_p": 1.5}', "min_p is 1.5"),
        ('{"tokens": [1], "stop_tokens": 3}', "stop_tokens must be"), ("[" * 100_000, "not JSON"), ("\x00", "not JSON"),
    ],
)  # fmt: skip
def test_lines_that_are_no_request(line, said):
    with pytest.raises(RequestError, match=said):
        parse(line.encode(), DEFAULTS, 50257)


def test_a_line_overrides_the_command_line():
    _, request = parse(b'{"tokens": [1], "max_new": 9, "priority": 2}', {"max_new": 5, "temperature": 0.5}, 50257)
    assert request.max_new == 9 and request.sampling.temperature == 0.5 and request.priority == 2
    assert request.stop_tokens == [50256]
    _, request = parse(b'{"tokens": [1], "ignore_eos": true, "temperature": null}', DEFAULTS, 50257)
    assert request.stop_tokens == [] and request.sampling is None
    assert parse(b'{"tokens": [1]}', DEFAULTS, 100)[1].stop_tokens == []  # a vocabulary without it


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, results, errors = run("--batch", tmp_path / "pipe")
    assert code == 2 and not results and "a pipe" in errors
