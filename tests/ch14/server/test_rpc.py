"""Answers over gRPC: the same as over HTTP, under the same limits; and a client that has gone is noticed."""

import random
import re
import signal
import sys
import threading
import time

import pytest

grpc = pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from serving import TINY, Serving

from ch14_mini_llm import serve
from ch14_mini_llm.server import contract, fields
from ch14_mini_llm.server.contract import GenerateReply, GenerateRequest
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

METHOD = "/kbk.v1.Generator/Generate"
ASKED = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0.0, "max_tokens": 30}
LONG = ASKED | {"max_tokens": 480, "ignore_eos": True}
CODE = grpc.StatusCode


class Calls:
    """Calls of a server. key: of the API."""

    def __init__(self, served, key=None):
        address = re.search(r"gRPC ([^ ,]+),", "".join(served.said))[1]
        self.channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self.metadata = (("authorization", f"Bearer {key}"),) if key else ()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def raw(self, data, **options):
        """The replies to a message, as it is."""
        method = self.channel.unary_stream(METHOD, response_deserializer=GenerateReply.FromString)
        return method(data, **{"metadata": self.metadata, "timeout": 60} | options)

    def stream(self, asked, **options):
        """The replies to a request, as they come."""
        return self.raw(GenerateRequest(**asked).SerializeToString(), **options)

    def whole(self, **asked):
        """(the text, the ids, the last reply)."""
        replies = list(self.stream(ASKED | asked))
        assert replies[0].id.startswith("cmpl-") and not any(reply.id for reply in replies[1:])
        assert not any(reply.HasField("finish_reason") or reply.HasField("usage") for reply in replies[:-1])
        ids = [token for reply in replies for token in reply.token_ids]
        return "".join(reply.text for reply in replies), ids, replies[-1]

    def refused(self, asked, **options):
        """(the status, the message, the trailing metadata) of a request that is refused."""
        return refusal(self.stream(asked, **options))


def refusal(stream):
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return caught.value.code(), caught.value.details(), dict(caught.value.trailing_metadata())


@pytest.fixture(scope="module")
def served():
    with Serving("--grpc_port=0", "--deterministic") as server:
        yield server
        assert server.said[-1].startswith("ready"), "it has nothing to complain of"


@pytest.fixture(scope="module")
def calls(served):
    with Calls(served) as made:
        yield made


@pytest.fixture(scope="module")
def small():
    """One at a time, a queue of one, a key."""
    with Serving("--grpc_port=0", "--max_batch=1", "--max_queue=1", "--api_key=one") as server:
        yield server
        assert server.said[-1].startswith("ready")


def http_answer(served, asked):
    body = {name: value for name, value in (ASKED | asked).items() if name != "prompt_ids"}
    body |= {"prompt": asked["prompt_ids"]} if "prompt_ids" in asked else {}
    status, answer, _ = served.request("/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0], answer["usage"]


# --- the contract -----------------------------------------------------------------------------------------------------


def test_the_contract_is_what_protoc_reads(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    out = tmp_path / "set"
    assert not protoc.main(["", f"-I{contract.PROTO.parent}", f"--descriptor_set_out={out}", contract.PROTO.name])
    (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    for message in file.message_type:
        for part in (message, *message.nested_type):
            for field in part.field:
                field.ClearField("json_name")
    assert file == contract.FILE


def test_a_line_that_cannot_be_read_is_said():
    with pytest.raises(ValueError, match="cannot read 'oneof x {'"):
        contract.parsed("message A {\n  oneof x {\n  }\n}")


def test_every_field_is_one_of_completions():
    known = fields.TABLES[fields.COMPLETIONS]
    assert {field.name for field in GenerateRequest.DESCRIPTOR.fields} - {"prompt_ids"} <= set(known)


# --- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [
    {}, {"seed": 7, "temperature": 0.9, "top_p": 0.95}, {"seed": -1, "temperature": 1.3, "top_k": 40, "min_p": 0.01},
    {"max_tokens": 0}, {"max_tokens": 60, "stop": ["little", " named"]}, {"prompt": "", "max_tokens": 5},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {11: -100.0, 13: 2.5}},
    {"ignore_eos": True, "max_tokens": 200}, {"stop_token_ids": [257], "priority": 3},
], ids=lambda asked: "-".join(asked) or "greedy")  # fmt: skip
def test_the_text_is_that_of_http(served, calls, asked):
    expected, counts = http_answer(served, asked | ({"seed": 2**64 - 1} if asked.get("seed") == -1 else {}))
    text, ids, last = calls.whole(**asked)
    assert (text, last.finish_reason) == (expected["text"], expected["finish_reason"])
    assert last.usage.prompt_tokens == counts["prompt_tokens"]
    assert last.usage.completion_tokens == counts["completion_tokens"]
    if last.finish_reason == "length":
        assert len(ids) == last.usage.completion_tokens


def test_token_ids_for_a_prompt(served, calls):
    ids = GPT2Tokenizer().encode_plain(ASKED["prompt"]) * 10
    asked = {name: value for name, value in ASKED.items() if name != "prompt"} | {"prompt_ids": ids}
    for cached in (0, 32):  # whole blocks of 16
        replies = list(calls.stream(asked))
        assert replies[-1].usage.cached_tokens == cached and replies[-1].usage.prompt_tokens == 40
    assert "".join(reply.text for reply in replies) == http_answer(served, asked)[0]["text"]


def test_what_is_left_out_is_not_a_zero(served, calls):
    """Without a temperature it is 1, without max_tokens 16; a seed of 0 is a seed."""
    least = {"model": "tiny", "prompt": "Once", "seed": 0}
    texts = ["".join(reply.text for reply in calls.stream(least)) for _ in range(2)]
    _, answer, _ = served.request("/v1/completions", least)
    assert texts == [answer["choices"][0]["text"]] * 2 and answer["usage"]["completion_tokens"] == 16


def test_text_comes_as_it_is_made(calls):
    """More than one reply, and characters of several tokens whole; the ids are those of the text."""
    replies = list(calls.stream(ASKED | {"prompt": "名前は", "max_tokens": 60, "temperature": 2.0, "seed": 1}))
    text = "".join(reply.text for reply in replies)
    ids = [token for reply in replies for token in reply.token_ids]
    assert len(replies) > 5 and GPT2Tokenizer().decode(ids) == text


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"max_tokens": -1}, {"stop": [""]},
    {"stop_token_ids": [-1]}, {"logit_bias": {60000: 1.0}}, {"top_k": 60000}, {"presence_penalty": 3.0},
    {"prompt_ids": [1]}, {"max_tokens": 5000},
], ids=lambda wrong: "-".join(wrong))  # fmt: skip
def test_a_wrong_value_is_refused_and_named(calls, wrong):
    code, message, trailing = calls.refused(ASKED | wrong)
    name = "prompt" if wrong.get("max_tokens") == 5000 else next(iter(wrong))
    assert code == CODE.INVALID_ARGUMENT and next(iter(wrong)) in message and trailing["param"] == name
    assert trailing["code"] in ("invalid_value", "context_length_exceeded") and "\n" not in message


def test_refusals_have_a_status(calls):
    code, message, trailing = calls.refused(ASKED | {"model": "größer"})
    assert (code, trailing["code"]) == (CODE.NOT_FOUND, "model_not_found") and "größer" in message
    for missing in ("model", "prompt"):
        code, message, trailing = calls.refused({name: ASKED[name] for name in ASKED if name != missing})
        assert code == CODE.INVALID_ARGUMENT and trailing["param"] == missing
    assert calls.refused(ASKED | {"prompt": "a" * (9 << 20)})[0] == CODE.RESOURCE_EXHAUSTED


def test_what_is_no_request_is_refused(calls):
    code, message, trailing = refusal(calls.raw(b"\xff\xff\xff"))
    assert code == CODE.INVALID_ARGUMENT and trailing["code"] == "invalid_message"
    code, message, trailing = refusal(calls.raw(GenerateRequest(**ASKED).SerializeToString() + b"\xf8\x3f\x01"))
    assert code == CODE.INVALID_ARGUMENT and "number 1023" in message and trailing["code"] == "unknown_parameter"
    draw = random.Random(3)
    for _ in range(100):  # whatever comes, there is an answer
        data = bytearray(GenerateRequest(**ASKED).SerializeToString())
        data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            list(calls.raw(bytes(data), timeout=20))
        except grpc.RpcError as error:
            assert error.code() in (CODE.INVALID_ARGUMENT, CODE.NOT_FOUND)


def test_keys(small):
    for key, what in ((None, "there is no key"), ("two", "the key is wrong"), ("oneone", "the key is wrong")):
        with Calls(small, key) as made:
            code, message, trailing = made.refused(ASKED)
        assert (code, trailing["code"]) == (CODE.UNAUTHENTICATED, "invalid_api_key") and what in message
    with Calls(small, "one") as made:
        assert made.whole(max_tokens=2)[0]


def test_the_queue_is_that_of_http(small):
    """Two fill it: a third is told when to come back, whichever way it comes."""
    with Calls(small, "one") as made:
        first = made.stream(LONG)
        next(first)
        second = made.stream(LONG)
        end = time.monotonic() + 10
        while _load(small) < 2:
            assert time.monotonic() < end
        code, message, trailing = made.refused(ASKED)
        assert (code, trailing["code"], trailing["retry-after"]) == (CODE.RESOURCE_EXHAUSTED, "queue_full", "1")
        headers = {"Authorization": "Bearer one"}
        assert small.request("/v1/completions", ASKED, headers=headers)[0] == 429
        first.cancel()
        second.cancel()


def _load(served):
    _, text, _ = served.request("/metrics", headers={"Authorization": "Bearer one"})
    return sum(map(float, re.findall(r"^mini_llm_num_requests_(?:running|waiting) (\S+)$", text, re.MULTILINE)))


def test_who_waits_too_long_and_who_takes_too_long():
    with Serving("--grpc_port=0", "--max_batch=1", "--max_wait=0.1", "--timeout=0.3") as other, Calls(other) as made:
        first = made.stream(LONG)
        next(first)
        code, _, trailing = made.refused(ASKED)
        assert (code, trailing["code"], trailing["retry-after"]) == (CODE.UNAVAILABLE, "waited_too_long", "5")
        code, _, trailing = refusal(first)
        assert (code, trailing["code"]) == (CODE.DEADLINE_EXCEEDED, "timeout")
        other.settle(1)


# --- clients that go away ---------------------------------------------------------------------------------------------


def test_who_cancels_frees_all_within_a_second(served, calls):
    before = served.metrics()["request_aborted_total"]
    streams = [calls.stream(LONG | {"prompt": f"Number {number}"}) for number in range(6)]
    for stream in streams[:4]:  # two are cancelled before anything has come
        next(stream)
    assert served.metrics()["blocks_owned"] > 0
    for stream in streams:
        stream.cancel()
    found = served.settle(1)
    assert found["request_aborted_total"] > before + 3


def test_a_deadline_frees_all_within_a_second(served, calls):
    before = served.metrics()["request_aborted_total"]
    stream = calls.stream(LONG | {"prompt": "word " * 20, "max_tokens": 450}, timeout=0.3)
    assert next(stream).text
    assert refusal(stream)[0] == CODE.DEADLINE_EXCEEDED
    assert served.settle(1)["request_aborted_total"] == before + 1


def test_clients_that_go_at_any_time(served, calls):
    """Before, between and while replies are sent: each is an error for the client, and nothing for the server."""
    draw, codes = random.Random(5), set()

    def ask(number, seconds):
        stream = calls.stream(LONG | {"prompt": f"Number {number}", "max_tokens": 100}, timeout=seconds)
        if number % 2:
            threading.Timer(seconds / 2, stream.cancel).start()
        try:
            list(stream)
        except grpc.RpcError as error:
            codes.add(error.code())

    threads = [threading.Thread(target=ask, args=(number, draw.random() * 0.8)) for number in range(80)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert codes == {CODE.CANCELLED, CODE.DEADLINE_EXCEEDED}
    served.settle(1)


def test_an_answer_can_be_aborted_by_its_id(served, calls):
    stream = calls.stream(LONG)
    assert served.request("/abort", {"id": next(stream).id})[1]["aborted"]
    code, _, trailing = refusal(stream)
    assert (code, trailing["code"]) == (CODE.ABORTED, "aborted")
    served.settle(1)


def test_a_slow_reader_has_all_of_it(calls, served):
    stream, texts = calls.stream(LONG), []
    for reply in stream:
        texts.append(reply.text)
        if len(texts) < 4:
            time.sleep(0.2)
    assert "".join(texts) == http_answer(served, LONG)[0]["text"]


def test_the_counts_agree(served, calls):
    """What came in is what was accepted and what was rejected."""
    before = served.settle(1)
    for wrong in {"top_p": 0.0}, {"model": "other"}, {"max_tokens": 5000}:
        calls.refused(ASKED | wrong)
    calls.whole()
    found = served.settle(1)
    assert served.rejected(found) == served.rejected(before) + 3
    assert found["requests_accepted_total"] == before["requests_accepted_total"] + 1


# --- the beginning and the end ----------------------------------------------------------------------------------------


def test_sigterm_lets_a_stream_end():
    with Serving("--grpc_port=0", "--grace=20") as other, Calls(other) as made:
        stream = made.stream(LONG | {"max_tokens": 200})
        replies = [next(stream)]
        other.process.send_signal(signal.SIGTERM)
        other.line("ending: 1 answers")
        assert made.refused(ASKED)[0] in (CODE.UNAVAILABLE, CODE.CANCELLED)  # its connection may just end
        replies += stream
        assert replies[-1].finish_reason == "length" and other.process.wait(10) == 0
        assert "Traceback" not in "".join(other.said)


def test_a_stream_that_outlives_the_grace_is_cut_off():
    """The client has an error, not an end that it could take for one."""
    with Serving("--grpc_port=0", "--grace=0.1") as other, Calls(other) as made:
        stream = made.stream(LONG)
        next(stream)
        other.process.send_signal(signal.SIGTERM)
        code, _, _ = refusal(stream)
        assert code in (CODE.UNAVAILABLE, CODE.CANCELLED) and other.process.wait(10) == 0
        assert "Traceback" not in "".join(other.said)


def test_ports(served, capsys):
    taken = re.search(r"gRPC 127.0.0.1:(\d+),", "".join(served.said))[1]
    assert int(taken) != served.port
    for option, said in ((f"--grpc_port={taken}", f"port {taken}"), ("--grpc_port=65536", "--grpc_port is 65536"),
                         ("--grpc_port=x", "grpc_port")):  # fmt: skip
        assert serve.main([option, "--port=0", f"--weights={TINY}"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0] and lines[0].startswith("serve.py: error: "), lines


def test_without_grpc_the_fix_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grpc", None)
    assert serve.main(["--grpc_port=0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install -e '.[grpc]'" in lines[0] and "google" not in lines[0]
