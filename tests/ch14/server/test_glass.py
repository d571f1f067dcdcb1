"""The engine behind glass: what is shown adds up, and the engine can be stopped and stepped."""

import json
import threading
import time
import urllib.request

import pytest

pytest.importorskip("starlette")
from serving import PACE, Serving

ASKED = {
    "model": "tiny",
    "prompt": "Once upon a time",
    "temperature": 0,
    "max_tokens": 60,
    "logit_bias": {"50256": -100},
}


@pytest.fixture(scope="module")
def server():
    with Serving("--num_blocks=100", "--max_batch=8") as served:
        yield served


@pytest.fixture(autouse=True)
def go_on(server):
    """Whatever a test does, the next one finds an engine that runs."""
    yield
    server.request("/engine/resume", {})
    server.request("/engine/pace", {"n": PACE})


class Watching:
    """A watcher; ``view``: what there is to be seen now, of all that has come."""

    def __init__(self, server):
        self.view, self.count = {}, 0
        self._answer = urllib.request.urlopen(server.url + "/engine/events", timeout=60)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        try:
            for line in self._answer:
                if line.startswith(b"data: "):
                    self.view = self.view | json.loads(line[6:])
                    self.count += 1
        except (OSError, ValueError, AttributeError):
            pass  # closed

    def until(self, test, seconds=20):
        end = time.monotonic() + seconds
        while not (self.view and test(self.view)):
            assert time.monotonic() < end, self.view
            time.sleep(0.01)
        return self.view

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._answer.close()


def add_up(view):
    """Every block is free, cached or owned; who is in a row runs."""
    owned = {block for one in view["running"] for block in one["blocks"]}
    assert view["free"] + view["cached"] + len(owned) == view["n_blocks"] == 100
    known = [block for block, _ in view["known"]]
    assert len(known) == len(set(known)) and len(set(known) - owned) == view["cached"]
    assert {row[0] for row in view["rows"]} <= {one["id"] for one in view["running"]}
    assert all(parent == 0 or parent in known for _, parent in view["known"])


def test_a_request_is_seen_and_the_blocks_add_up(server):
    with Watching(server) as watching:
        thread = threading.Thread(target=server.request, args=("/v1/completions", ASKED | {"n": 3}))
        before = server.metrics()["requests_accepted_total"]
        server.request("/engine/pause", {})
        thread.start()
        while server.metrics()["requests_accepted_total"] == before:
            time.sleep(0.01)
        begin, seen = watching.until(lambda view: view["paused"])["step"], []
        for count in range(1, 56):  # of 60
            server.request("/engine/steps", {"n": 1})
            seen.append(watching.until(lambda view, end=begin + count: view["step"] == end))
            add_up(seen[-1])
        kinds = {row[3] for view in seen for row in view["rows"]}
        assert kinds == {0, 1} and max(len(view["running"]) for view in seen) == 3
        server.request("/engine/resume", {})
        thread.join(20)
        view = watching.until(lambda view: not view["running"] and not view["paused"])
        add_up(view)
        assert view["cached"] > 0 and view["rows"] == []


def test_a_stopped_engine_takes_steps_one_by_one(server):
    with Watching(server) as watching:
        stream = server.client().completions.create(**ASKED, stream=True)
        next(stream)
        server.request("/engine/pause", {})
        view = watching.until(lambda view: view["paused"])
        time.sleep(0.3)
        assert watching.view["step"] == view["step"], "it goes on"
        for n in (1, 3):
            begin = watching.view["step"]
            assert server.request("/engine/steps", {"n": n})[1] == {"done": "steps"}
            watching.until(lambda view, end=begin + n: view["step"] == end)
            time.sleep(0.2)
            assert watching.view["step"] == begin + n
        assert server.request("/engine/resume", {})[0] == 200
        assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_stopped_engine_lets_clients_go(server):
    server.request("/engine/pause", {})
    before = server.metrics()["request_aborted_total"]
    server.cut_off(ASKED | {"stream": True}, 0)
    while server.metrics()["request_aborted_total"] == before:
        time.sleep(0.02)
    server.request("/engine/resume", {})
    server.settle()


def test_it_goes_slowly_if_it_is_asked_to(server):
    """So many steps a second; a client that goes is heard all the same."""
    server.request("/v1/completions", ASKED)
    with Watching(server) as watching:
        assert server.request("/engine/pace", {"n": 20})[1] == {"done": "pace"}
        begin = time.monotonic()
        answer = server.request("/v1/completions", ASKED | {"max_tokens": 11})[1]
        assert answer["usage"]["completion_tokens"] == 11 and 0.45 < time.monotonic() - begin < 3
        assert watching.until(lambda view: view["pace"] == 20)
        server.request("/engine/pace", {"n": 1})
        stream = server.client().completions.create(**ASKED, stream=True)
        next(stream)
        stream.close()
        server.settle(2.5)  # the next step frees its blocks
        server.request("/engine/pace", {"n": 0})
        assert watching.until(lambda view: view["pace"] == 0)


def test_what_cannot_be_asked(server):
    for path, body in ("/engine/pace", {"n": -1}), ("/engine/pace", {"n": 0.5}), ("/engine/pace", {"per": 1}):
        assert server.request(path, body)[0] == 400
    for path, body in ("/engine/steps", {"n": 0}), ("/engine/steps", {"n": "1"}), ("/engine/pause", {"n": 1}):
        assert server.request(path, body)[0] == 400
    for name in ("ch99_nothing", "..%2F..%2Fetc", "ch02_launch%2F..%2Fch03_indexing"):
        assert server.request(f"/lesson/{name}")[0] == 404
    for name, chapter, count in server.request("/ready")[1]["kernels"]:
        status, text, _ = server.request(f"/lesson/{chapter}")
        assert status == 200 and text.startswith("# ") and count > 0 and name.isidentifier()
    status, text, headers = server.request("/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and "glass" in text
