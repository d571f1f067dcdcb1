"""Programs by others that judge servers of OpenAI's API. `make judges` installs them, in their own environment."""

import json
import re
import subprocess

import pytest
from serving import ROOT, Serving

BIN = ROOT / ".judges" / "bin"
THERE = (BIN.parent / ".installed").exists()
pytestmark = pytest.mark.skipif(not THERE, reason="the outside judges are not there: make judges")
REFUSED = {"chat-image-input"}  # with 400: the models read texts only


@pytest.fixture(scope="module")
def server():
    with Serving("--max_queue=8") as served:
        yield served


def judge(tool, *arguments, folder, seconds=240):
    return subprocess.run(
        [BIN / tool, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=seconds,
    )  # fmt: skip


def test_llm_comply(server, tmp_path):
    arguments = "run", "-u", f"{server.url}/v1", "-k", "none", "-m", "tiny", "--format=openai-chat", "--json"
    for _ in range(3):  # at temperature 1 the tiny model calls a tool with arguments that never end, now and then
        found = json.loads(judge("llm-comply", *arguments, "--timeout=60", folder=tmp_path).stdout)
        failed = {one["id"]: one["errors"] for one in found["results"] if one["status"] == "failed"}
        if failed.keys() <= REFUSED:
            break
    assert failed.keys() == REFUSED and "400" in failed["chat-image-input"][0], failed
    assert found["summary"]["passed"] >= 7


def test_artemis(server, tmp_path):
    done = judge("artemisllmbench", "check-conformance", "-e", server.url, folder=tmp_path)
    assert done.returncode == 0 and "conformant" in done.stdout, done.stdout


def test_schemathesis(server, tmp_path):
    """Whatever the description allows, and much that it does not: no 5xx, and each answer as described.

    Left out: that data which the description allows is taken. It has no words for what depends on a model, such as the
    longest prompt.
    """
    done = judge(
        "schemathesis", "run", f"{server.url}/openapi.json", "--exclude-checks=positive_data_acceptance",
        "--max-examples=20", "--request-timeout=60", "--seed=1", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 500, done.stdout[-2000:]
    server.settle()


def test_clients_that_cut_their_connections(server, tmp_path):
    """What came in is what was accepted and rejected, and a second after the last of them no block is owned."""
    before = server.metrics()
    done = judge(
        "locust", "-f", str(ROOT / "tests" / "ch14" / "server" / "cutting_clients.py"), "--headless", "--users=30",
        "--spawn-rate=30", "--run-time=15s", "--stop-timeout=10", "--only-summary", f"--host={server.url}",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    found = server.settle(1)
    server.rejected(found)  # it looks whether the counts agree
    assert found["requests_accepted_total"] > before["requests_accepted_total"] + 20
    assert found["request_aborted_total"] > before["request_aborted_total"]
