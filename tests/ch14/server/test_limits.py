"""A server that has too much to do, is told to end, or whose engine dies: every client has an answer."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

openai = pytest.importorskip("openai")
import httpx
from serving import TINY, Serving

from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.model.weights import load_weights
from ch14_mini_llm.server.app import application
from ch14_mini_llm.server.remote import RemoteEngine
from ch14_mini_llm.server.settings import Settings
from ch14_mini_llm.server.tokens import Server
from ch14_mini_llm.server.worker import Worker
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

ASKED = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 30}
NO_END = {"logit_bias": {"50256": -100}}


@pytest.fixture(scope="module")
def small():
    """Four at a time, a queue of four, 20 blocks, a key."""
    options = ("--max_batch=4", "--max_queue=4", "--num_blocks=20", "--api_key=one", "--api_key=two", "--timeout=20")
    with Serving(*options, "--deterministic") as served:
        yield served


def test_keys(small):
    for key in ("three", "", "oneone"):
        with pytest.raises(openai.AuthenticationError) as caught:
            small.client(key or "none").completions.create(**ASKED)
        assert caught.value.code == "invalid_api_key"
    for key in ("one", "two"):
        assert small.client(key).completions.create(**ASKED).choices[0].text
    assert small.request("/v1/completions", method="OPTIONS", headers={
        "Origin": "http://a.example", "Access-Control-Request-Method": "POST"})[0] == 200  # fmt: skip
    assert small.request("/health")[0] == small.request("/ready")[0] == 200
    assert small.request("/metrics")[0] == small.request("/v1/models")[0] == 401


def test_a_queue_of_four_and_fifty_clients(small):
    """Each is answered, 200 or 429 with Retry-After, and the counts agree."""
    answers = []

    def ask(k):
        body = ASKED | NO_END | {"prompt": f"Number {k} said", "stream": k % 2 == 0, "max_tokens": 70}
        answers.append(small.request("/v1/completions", body, headers={"Authorization": "Bearer one"}))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = [status for status, _, _ in answers]
    assert len(answers) == 50 and set(statuses) == {200, 429} and statuses.count(200) >= 8
    assert all(int(headers["Retry-After"]) >= 1 for status, _, headers in answers if status == 429)
    assert all(body["error"]["code"] == "queue_full" for status, body, _ in answers if status == 429)


def test_more_than_the_pool_has(small):
    """What never fits is refused; what is left open is shortened to what there is, and the answer says so."""
    client = small.client("one")
    for tokens, new in ((321, 1), (300, 100), (320, 1)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**ASKED | {"prompt": [5] * tokens, "max_tokens": new})
        assert "room for 320" in caught.value.body["message"] and caught.value.param == "prompt"
    answer = client.completions.create(**ASKED | {"prompt": [5] * 315, "max_tokens": None} | NO_END)
    assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "length"
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a " * 200}], "temperature": 0} | NO_END
    raw = client.chat.completions.with_raw_response.create(**chat)
    usage, most = raw.parse().usage, int(raw.headers["x-max-tokens"].split(",")[0])
    assert usage.completion_tokens == most and usage.total_tokens <= 320 and most >= 50
    assert client.completions.create(**ASKED).choices[0].text
    with pytest.raises(openai.BadRequestError, match="9 choices"):
        client.completions.create(**ASKED, n=9)


def test_who_waits_too_long_has_503():
    with Serving("--max_batch=1", "--max_wait=0.5", "--num_blocks=64") as served:
        first = threading.Thread(target=served.client().completions.create, kwargs=ASKED | {"max_tokens": 490} | NO_END)
        first.start()
        while served.metrics()["num_requests_running"] == 0:
            time.sleep(0.01)
        status, body, headers = served.request("/v1/completions", ASKED)
        assert status == 503 and body["error"]["code"] == "waited_too_long" and int(headers["Retry-After"]) > 0
        first.join()
        assert served.request("/v1/completions", ASKED)[0] == 200


def test_neighbours_are_preempted_and_end_as_alone(small):
    client, texts = small.client("one"), {}
    asked = [ASKED | {"prompt": [7 * k + 5] * 60, "max_tokens": 60, "logit_bias": {"50256": -100}} for k in range(4)]
    alone = [client.completions.create(**one).choices[0].text for one in asked]

    def ask(k):
        texts[k] = client.completions.create(**asked[k]).choices[0].text

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[k] for k in range(4)] == alone


class InThisProcess(RemoteEngine):
    """An engine of the test's, in a thread instead of a process."""

    def __init__(self, engine):
        super().__init__()
        self.engine = engine

    def start(self):
        self._loop, (self._pipe, theirs) = asyncio.get_running_loop(), multiprocessing.Pipe()
        threading.Thread(target=Worker(theirs, self.engine).run, daemon=True).start()
        threading.Thread(target=self._listen, args=(self._pipe,), daemon=True).start()
        sizes = {"num_blocks": self.engine.pool.n_blocks, "block_size": 16, "max_batch": 32}
        self.state, self.facts = "ready", {"n_ctx": 512, "vocab_size": 50257, **sizes}


def test_logits_that_are_no_numbers_end_one_request():
    """A row of wpe is NaN: who gets there has an error, in valid JSON, its neighbour has not, and a count rises."""
    config, tensors = load_weights(TINY)
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    tensors["wpe.weight"][50] = np.nan

    async def ask():
        remote = InThisProcess(Engine.of(config, tensors, num_blocks=64))
        remote.start()
        app = application(Server(Settings("tiny"), GPT2Tokenizer(), remote))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            post = lambda **more: client.post("/v1/completions", json=ASKED | more, timeout=60)
            bad, good = await asyncio.gather(post(prompt=[5] * 40, logit_bias={"50256": -100}), post(prompt=[5] * 8))
            streamed = await post(prompt=[5] * 40, stream=True, logit_bias={"50256": -100})
            metrics = (await client.get("/metrics")).text
        remote._send("stop", None)
        return bad, good, streamed.text, metrics

    bad, good, streamed, metrics = asyncio.run(ask())
    assert good.status_code == 200 and len(good.json()["choices"][0]["text"]) > 20
    assert bad.status_code == 500 and "NaN" in bad.json()["error"]["message"]
    last = streamed.strip().splitlines()[-1].removeprefix("data: ")
    assert "NaN" in json.loads(last)["error"]["message"] and "[DONE]" not in streamed
    assert (
        "mini_llm_corrupted_requests_total 2.0" in metrics
        and 'request_failed_total{code="engine_error"} 2.0' in metrics
    )


def test_sigterm_lets_answers_end_and_the_code_is_zero():
    with Serving("--grace=20") as served:
        stream = served.client().completions.create(
            **ASKED | {"max_tokens": 200, "logit_bias": {"50256": -100}}, stream=True
        )
        next(stream)
        served.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert served.process.wait(20) == 0
        assert "ending: 1 answers" in "".join(served.said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded(number):
    with Serving(wait=False) as served:
        served.line("weights")
        time.sleep(0.3)
        served.process.send_signal(number)
        assert served.process.wait(20) == 0
        assert "Traceback" not in "".join(served.said)


def test_a_second_signal_ends_at_once():
    with Serving("--grace=100") as served:
        stream = served.client().completions.create(
            **ASKED | {"max_tokens": 500, "logit_bias": {"50256": -100}}, stream=True
        )
        next(stream)
        served.process.send_signal(signal.SIGINT)
        served.line("ending")
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(5) == 0


def test_an_engine_that_is_killed_is_started_again():
    with Serving() as served:
        stream = served.client().completions.create(
            **ASKED | {"max_tokens": 500, "logit_bias": {"50256": -100}}, stream=True
        )
        next(stream)
        os.kill(_child_of(served.process.pid), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="has ended"):
            list(stream)
        status, body, headers = served.request("/v1/completions", ASKED)
        assert status == 503 and headers["Retry-After"] and body["error"]["code"] == "not_ready"
        assert served.request("/health")[0] == 200 and served.request("/ready")[0] == 503
        end = time.monotonic() + 100
        while served.request("/ready")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert served.client().completions.create(**ASKED).choices[0].text


def _child_of(parent):
    """The process id of the engine: the child that is not Python's own tracker of resources."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with (
                contextlib.suppress(FileNotFoundError, ProcessLookupError),  # one that has just ended
                open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline") as line,
            ):  # fmt: skip
                if int(stat.read().rpartition(")")[2].split()[1]) == parent and "spawn_main" in line.read():
                    return int(name)
    raise AssertionError("the engine has no process")


def test_a_server_that_ends_leaves_no_engine():
    """Even if it is killed."""
    with Serving() as served:
        child = _child_of(served.process.pid)
        served.process.kill()
        served.process.wait()
        end = time.monotonic() + 10
        while _lives(child):
            assert time.monotonic() < end
            time.sleep(0.05)


def _lives(process):
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("options, said", [
    (["--port=99999"], "--port is 99999"), (["--port=x"], "not an integer"), (["--max_queue=-1"], "max_queue is -1"),
    (["--timeout=0"], "timeout is 0"), (["--weights=nothing.bin"], "nothing.bin"),
    (["--host=no.such.host.invalid"], "listen"),
    (["--api_key="], "api_key"), (["--grace=nan"], "grace is nan"), (["--what"], "--what"),
])  # fmt: skip
def test_mistakes_are_one_line(options, said):
    with Serving(wait=False) as served:
        served.process.kill()
    with Serving(*options, wait=False) as served:
        assert served.process.wait(30) == 2
        time.sleep(0.1)
        assert len(served.said) == 1 and said in served.said[0] and served.said[0].startswith("serve.py: error: ")


def test_an_engine_that_cannot_be_had(tmp_path):
    with Serving("--block_size=5", wait=False) as served:
        assert served.process.wait(60) == 1
        time.sleep(0.1)
        assert "block_size" in served.said[-1]


def test_a_port_that_is_taken(small):
    with Serving(f"--port={small.port}", wait=False) as served:
        assert served.process.wait(30) == 2
