"""Sessions: they stand at their last whole turn, whatever happens to clients, the engine, the server and the files."""

import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

openai = pytest.importorskip("openai")
from serving import TINY, Serving

from ch14_mini_llm.cache.store import BlockStore
from ch14_mini_llm.server.outbox import EVENT, Outbox
from ch14_mini_llm.server.sessions import Session, Sessions

STORY = "Once upon a time there was a little dog who liked to play in the big green garden with his friends. One day"
ASKED = {"model": "tiny", "temperature": 0, "max_tokens": 20, "ignore_eos": True}


def serving(folder, *more):
    return Serving(f"--kv_dir={folder}", "--max_batch=4", *more)


def turn(served, name, prompt, **fields):
    """A turn's whole answer; the text goes on with the prompt."""
    status, answer = served.request("/v1/completions", {**ASKED, "prompt": prompt, "session_id": name, **fields})[:2]
    assert status == 200, answer
    return answer


def two_turns(served, k):
    """A session with two turns; returns the prompt of its third."""
    text = f"{STORY}, number {k},"
    for _ in range(2):
        text += turn(served, f"s{k}", text)["choices"][0]["text"] + " And then"
    return text


def sessions(served):
    return {one["id"]: one for one in served.request("/v1/sessions")[1]["data"]}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("kv")) as one:
        yield one


def engine_of(served):
    """The process of a server's engine."""
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    (found,) = [pid for pid, command in commands.items() if b"spawn_main" in command]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_kill_9_in_the_third_turn_and_a_new_server(tmp_path):
    """Four sessions with two turns each; the third is lost, and made again, first by a new engine, then anew."""
    with serving(tmp_path / "other") as undisturbed:
        prompts = [two_turns(undisturbed, k) for k in range(4)]
        wanted = [turn(undisturbed, f"s{k}", prompt)["choices"][0]["text"] for k, prompt in enumerate(prompts)]
    with serving(tmp_path / "kv") as served:
        assert [two_turns(served, k) for k in range(4)] == prompts
        before = sessions(served)
        assert {one["turns"] for one in before.values()} == {2} and all(one["saved"] >= 48 for one in before.values())
        broken, began = [], threading.Barrier(5)

        def third(k):
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
            body = {**ASKED, "prompt": prompts[k], "session_id": f"s{k}", "max_tokens": 300, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.readline()
            began.wait()
            broken.append(response.read())

        threads = [threading.Thread(target=third, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        began.wait()
        os.kill(engine_of(served), signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert all(b"engine_error" in text and b"[DONE]" not in text for text in broken)
        end = time.monotonic() + 60
        while served.request("/ready")[0] != 200 and time.monotonic() < end:
            time.sleep(0.1)
        assert sessions(served) == before  # nothing of the third turn
        again = turn(served, "s0", prompts[0])
        assert again["choices"][0]["text"] == wanted[0]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
    with serving(tmp_path / "kv") as served:
        assert {name: one["turns"] for name, one in sessions(served).items()} == {"s0": 3, "s1": 2, "s2": 2, "s3": 2}
        for k in range(1, 4):
            again = turn(served, f"s{k}", prompts[k])
            assert again["choices"][0]["text"] == wanted[k]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
        assert sessions(served)["s3"]["turns"] == 3


def test_a_turn_that_was_cut_does_not_count(served):
    first = turn(served, "cut", STORY)
    before = sessions(served)["cut"]
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    body = {**ASKED, "prompt": STORY + " again", "session_id": "cut", "max_tokens": 400, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    event = json.loads(connection.getresponse().readline()[6:])
    busy = served.request("/v1/completions", {**ASKED, "prompt": STORY, "session_id": "cut"})
    assert busy[0] == 409 and busy[1]["error"]["code"] == "session_busy" and busy[2]["Retry-After"]
    assert served.request("/v1/sessions/cut", method="DELETE")[0] == 409
    assert served.request("/abort", {"id": event["id"]})[1]["aborted"]
    connection.close()
    end = time.monotonic() + 20
    body |= {"max_tokens": 0, "stream": False}
    while (again := served.request("/v1/completions", body))[0] == 409 and time.monotonic() < end:
        time.sleep(0.05)
    assert again[0] == 200 and sessions(served)["cut"]["turns"] == 2  # the turn of no tokens was whole
    assert before["turns"] == 1 and before["tokens"] == first["usage"]["total_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_a_whole_turn(served, stream):
    name, client = f"stop{stream}", served.client()
    free = client.completions.create(model="tiny", temperature=0, max_tokens=20, prompt=STORY).choices[0].text
    stop = free.split()[3]
    answer = client.completions.create(
        model="tiny", temperature=0, max_tokens=20, prompt=STORY, stop=[stop], stream=stream,
        extra_body={"session_id": name},
    )  # fmt: skip
    if stream:
        list(answer)
    kept = served.request(f"/v1/sessions/{name}")[1]
    assert kept["turns"] == 1 and kept["text"].startswith(STORY + free[: free.index(stop)])


def test_a_conversation_goes_on(served):
    said = [{"role": "user", "content": "Tell me a story about a dog and a cat, and what they did in the garden."}]
    fields = dict(model="tiny", max_tokens=30, temperature=0, extra_body={"session_id": "talk"})
    first = served.client().chat.completions.create(messages=said, **fields)
    said.append({"role": "assistant", "content": first.choices[0].message.content})
    said.append({"role": "user", "content": "And then?"})
    second = served.client().chat.completions.create(messages=said, **fields)
    assert second.usage.prompt_tokens_details.cached_tokens >= 16 and sessions(served)["talk"]["turns"] == 2


def test_listed_read_saved_and_deleted(served):
    turn(served, "one", "The red bird flew over the house and the river and the tree and the old road, and it")
    kept = served.request("/v1/sessions/one")[1]
    assert len(kept["tokens"]) == sessions(served)["one"]["tokens"] and kept["text"].startswith("The red bird")
    assert kept["saved"] % 16 == 0 and 16 <= kept["saved"] < len(kept["tokens"]) + 1
    status, copy, _ = served.request("/v1/sessions/two", {"from": "one"})
    assert status == 200 and copy["turns"] == 1
    assert served.request("/v1/sessions/two", {"from": "one"})[1]["error"]["code"] == "session_exists"
    files = lambda: served.request("/metrics")
    assert served.request("/v1/sessions/one", method="DELETE")[1] == {
        "id": "one", "object": "session.deleted", "deleted": True
    }  # fmt: skip
    assert served.request("/v1/sessions/one")[0] == 404 and "one" not in sessions(served)
    assert served.request("/v1/sessions/two")[1]["tokens"] == kept["tokens"] and files()[0] == 200


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "x" * 65, "ä", "a b", 7, ["a"]])
def test_names_that_are_none(served, name):
    status, answer, _ = served.request("/v1/completions", {**ASKED, "prompt": "x", "session_id": name})
    assert status == 400 and answer["error"]["param"] == "session_id"


def test_what_is_refused(served):
    several = {**ASKED, "prompt": ["a", "b"], "session_id": "x"}, {**ASKED, "prompt": "a", "n": 2, "session_id": "x"}
    for body in several:
        status, answer, _ = served.request("/v1/completions", body)
        assert status == 400 and answer["error"]["param"] == "session_id"
    assert "x" not in sessions(served)
    for path, body, wanted in [
        ("/v1/sessions/new", {"from": "nobody"}, 404), ("/v1/sessions/new", {}, 400), ("/v1/sessions/new", [], 400),
        ("/v1/sessions/new", {"from": 3}, 400), ("/v1/sessions/.x", {"from": "a"}, 400),
    ]:  # fmt: skip
        assert served.request(path, body)[0] == wanted
    assert served.request("/v1/sessions/nobody", method="DELETE")[0] == 404


def test_a_server_without_a_folder_says_so():
    with Serving("--max_batch=2") as served:
        for path, body in ("/v1/completions", {**ASKED, "prompt": "x", "session_id": "a"}), ("/v1/sessions", None):
            status, answer, _ = served.request(path, body)
            assert status == 400 and "--kv_dir" in answer["error"]["message"]


# --- files -----------------------------------------------------------------------------------------------------------


def kept_in(folder):
    shape = 1, 2, 1, 4, 2
    memory = lambda n: np.zeros((n, *shape), np.float32)
    return Sessions(BlockStore("m", shape, "float32", folder, memory=memory))


def test_records(tmp_path):
    kept = kept_in(tmp_path)
    assert kept.all() == [] and kept.read("a") is None
    assert kept.turn("a", [1, 2, 3], 0) and kept.turn("a", [1, 2, 3, 4, 5], 4) and kept.turn("b", [9], 0)
    found = kept_in(tmp_path).read("a")
    assert (found.tokens, found.turns, found.saved) == ([1, 2, 3, 4, 5], 2, 4)
    assert {one.id for one in kept.all()} == {"a", "b"}
    assert (kept.folder / "a.json").stat().st_mode & 0o077 == 0 or kept.folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [
    lambda text: text[:-5], lambda text: "", lambda text: "[]", lambda text: text.replace("[1, 2", "[1, 3"),
    lambda text: text.replace('"version": 1', '"version": 2'), lambda text: text.replace('"a"', '"b"'),
    lambda text: text.replace('"turns": 1', '"turns": 2'), lambda text: text.replace('"id"', '"name"'),
    lambda text: text.replace("[1, 2, 3]", '["1", 2, 3]'), lambda text: text.replace("[1, 2, 3]", "[1, 2, 1e400]"),
    lambda text: "[" * 100_000,
])  # fmt: skip
def test_a_damaged_record_is_none(tmp_path, damage):
    kept = kept_in(tmp_path)
    kept.turn("a", [1, 2, 3], 0)
    path = kept.folder / "a.json"
    path.write_text(damage(path.read_text()))
    assert kept.read("a") is None and kept.all() == []
    assert kept.turn("a", [7], 0) and kept.read("a").tokens == [7]


def test_a_delete_leaves_what_others_share(tmp_path):
    kept = kept_in(tmp_path)
    shared, texts = list(range(4)), {}
    for name in "ab":
        tokens = texts[name] = shared + [ord(name)] * 4
        blocks = [(text, 0) for text in kept.store.texts(tokens, 4)]
        assert kept.store.save(blocks, lambda blocks, slots: None) == 2
        kept.turn(name, tokens, 8)
    kept.delete(kept.read("a"), 4)
    left = {path.stem for path in kept.store.files.folder.glob("*/*.kv")}
    assert left == {name.hex() for name in kept.store.names(texts["b"], 4)} and [one.id for one in kept.all()] == ["b"]


def test_a_folder_that_takes_no_record(tmp_path, monkeypatch):
    kept = kept_in(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert not kept.write(Session("a", [1], 1, 0, 1, 1)) and kept.all() == []


# --- tokens that leave together --------------------------------------------------------------------------------------


def test_tokens_join_but_first_ones_and_ends_do_not_wait(monkeypatch):
    from ch14_mini_llm.engine.plan import Output

    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    box = Outbox()
    box.add(1, Output(0, (5,)))
    clock[0] = 1.0
    assert box.take(2) == [(1, Output(0, (5,)))]
    for token in (6, 7):
        box.add(1, Output(0, (token,), logprobs=(token / 10,)))
        box.add(2, Output(4, (token + 10,)))
    assert box.take(1000) == [(2, Output(4, (16, 17)))]  # its first ones
    box.add(2, Output(4, (18,)))
    assert box.take(1000) == []
    box.add(2, Output(4, (), "length", cached_tokens=3))
    assert box.take(1000) == [(2, Output(4, (18,), "length", None, (), None, 3))]
    box.add(1, Output(0, prompt_logprobs=(None,)))
    box.add(1, Output(0, (8,), logprobs=(0.8,)))
    assert box.take(1000) == []
    clock[0] = 1.0 + 1001 * EVENT
    assert box.take(1000) == [
        (1, Output(0, (6, 7), logprobs=(0.6, 0.7))), (1, Output(0, prompt_logprobs=(None,))),
        (1, Output(0, (8,), logprobs=(0.8,))),
    ]  # fmt: skip
    box.add(3, Output(9, (1,)))
    assert box.take(10**9, now=True) == [(3, Output(9, (1,)))] and box.take(0) == []


assert TINY.exists()
