"""The API through OpenAI's own client: what it asks for is what it gets, bit for bit in any company."""

import json
import threading
import time

import numpy as np
import pytest

openai = pytest.importorskip("openai")
from serving import TINY, Serving

import common
from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, Sampling
from ch14_mini_llm.model.weights import load_weights
from ch14_mini_llm.server.prompts import derived
from ch14_mini_llm.start import best_level
from ch14_mini_llm.tokenizer import decode, encode

PROMPT = "Once upon a time"
GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 20}
SAID = [{"role": "system", "content": "A story."}, {"role": "user", "content": "Who was there?"}]


@pytest.fixture(scope="module")
def server():
    with Serving("--deterministic") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def ours():
    """The tokens of a request, from an engine of this process."""
    config, tensors = load_weights(TINY)
    engine = Engine.of(config, tensors, best_level(config, common.BACKEND), deterministic=True)
    return lambda *request, **options: engine.run([Request(*request, **options)])[0]


def joined(chunks):
    """{index: text} of a stream of either kind."""
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
    return texts


def test_greedy_text_is_the_engines(client, ours):
    answer = client.completions.create(**GREEDY)
    assert answer.choices[0].text == decode(ours(encode(PROMPT), 20).tokens)
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == 20 and answer.usage.total_tokens == 24
    assert answer.id.startswith("cmpl-") and answer.model == "tiny" and answer.system_fingerprint.startswith("kbk_")


def test_a_stream_joins_up_to_the_whole(server, client):
    for asked in (GREEDY, GREEDY | {"echo": True, "logprobs": 2}, GREEDY | {"stop": [" girl", "named"], "n": 2}):
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert joined(chunks) == {choice.index: choice.text for choice in whole.choices}
        assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert ends == [choice.finish_reason for choice in whole.choices]
        assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert server.events("/v1/completions", GREEDY | {"stream": True})[-1] == "[DONE]"


def test_chat(client, ours):
    prompt = encode("system: A story.\nuser: Who was there?\nassistant:")
    answer = client.chat.completions.create(model="tiny", messages=SAID, temperature=0, max_completion_tokens=12)
    message = answer.choices[0].message
    assert (
        message.role == "assistant" and message.content == decode(ours(prompt, 12).tokens) and message.refusal is None
    )
    assert answer.object == "chat.completion" and answer.usage.prompt_tokens == len(prompt)
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "story."}]},
        SAID[1],
    ]
    again = client.chat.completions.create(model="tiny", messages=parts, temperature=0, max_tokens=12)
    assert again.choices[0].message.content == message.content


def test_chat_as_a_stream(client):
    asked = {"model": "tiny", "messages": SAID, "temperature": 0, "max_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert joined(chunks) == {choice.index: choice.message.content for choice in whole.choices}
    first = {}
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            assert (choice.delta.role == "assistant") == (choice.index not in first)
            first.setdefault(choice.index, choice)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == [
        "length"
    ] * 2


def test_a_chat_without_a_limit_goes_on_to_the_contexts_end(client):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a " * 490}], temperature=0, logit_bias={50256: -100}
    )
    assert answer.choices[0].finish_reason in ("length", "stop") and answer.usage.total_tokens <= 512


def test_seeds(client, ours):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 7, "n": 3}
    answer = client.completions.create(**asked)
    texts = [choice.text for choice in answer.choices]
    assert texts == [decode(ours(encode(PROMPT), 8, Sampling(seed=derived(7, j))).tokens) for j in range(3)]
    assert len(set(texts)) == 3 and [choice.index for choice in answer.choices] == [0, 1, 2]
    assert joined(client.completions.create(**asked, stream=True)) == dict(enumerate(texts))
    unseeded = {client.completions.create(**asked | {"seed": None, "n": 1}).choices[0].text for _ in range(4)}
    assert len(unseeded) > 1


def test_the_same_in_any_company(client):
    """16 clients at once, seeded and greedy: each has what it has alone."""
    asked = [
        GREEDY | {"max_tokens": 5 + k, "temperature": 0.7 * (k % 2), "seed": k, "prompt": PROMPT[: 3 + k]}
        for k in range(16)
    ]
    alone = [client.completions.create(**one).choices[0].text for one in asked]
    together = [None] * len(asked)

    def ask(k):
        together[k] = client.completions.create(**asked[k]).choices[0].text

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_temperatures_next_to_zero_are_greedy(client):
    texts = {client.completions.create(**GREEDY | {"temperature": t}).choices[0].text for t in (0, 1e-12, 1e-3)}
    texts.add(client.completions.create(**GREEDY | {"temperature": 1}, extra_body={"min_p": 1}).choices[0].text)
    texts.add(client.completions.create(**GREEDY | {"temperature": 1}, extra_body={"top_k": 1}).choices[0].text)
    assert len(texts) == 1
    for k in (0, -1):
        client.completions.create(**GREEDY, extra_body={"top_k": k})


def test_logprobs_and_echo(client, ours):
    """An echo's log-probabilities are the model's; nothing else changes them, not a cache and not the new tokens."""
    expected = ours(encode(PROMPT), 0, prompt_logprobs=2)
    for _ in range(2):
        answer = client.completions.create(**GREEDY | {"max_tokens": 0}, echo=True, logprobs=2)
        found = answer.choices[0].logprobs
        assert answer.choices[0].text == PROMPT and answer.usage.completion_tokens == 0
        assert found.tokens == ["Once", " upon", " a", " time"] and found.text_offset == [0, 4, 9, 11]
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        np.testing.assert_array_equal(found.token_logprobs[1:], [one.logprob for one in expected.prompt_logprobs[1:]])
    more = client.completions.create(**GREEDY, echo=True, logprobs=0).choices[0]
    assert more.logprobs.token_logprobs[1:4] == found.token_logprobs[1:] and len(more.logprobs.tokens) == 24
    assert all(more.text[at:].startswith(token) for at, token in zip(more.logprobs.text_offset, more.logprobs.tokens))
    by_ids = client.completions.create(**GREEDY | {"prompt": encode(PROMPT)}, echo=True).choices[0]
    assert by_ids.text == more.text


def test_chat_logprobs(client):
    asked = {"model": "tiny", "messages": SAID, "temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    entries = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(entries) == 6 and all(len(one.top_logprobs) == 3 for one in entries)
    for one in entries:
        assert one.top_logprobs[0].token == one.token and one.top_logprobs[0].logprob == one.logprob <= 0
        assert bytes(one.bytes).decode() == one.token
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, stream=True)
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries
    assert (
        client.chat.completions.create(**asked | {"logprobs": False, "top_logprobs": None}).choices[0].logprobs is None
    )


def test_stops(client):
    text = client.completions.create(**GREEDY).choices[0].text
    words = text.split(" ")
    cut = text.index(words[5]) + 2  # in the middle of a word, across tokens
    stop = text[cut - 3 : cut + 4]
    for stops in (stop, [stop, "never seen"], ["never seen", stop, stop + "x"]):
        answer = client.completions.create(**GREEDY, stop=stops)
        assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 20
    assert client.completions.create(**GREEDY, stop=PROMPT).choices[0].text == text, (
        "a stop in the prompt does not count"
    )
    first = encode(text)[3]
    answer = client.completions.create(**GREEDY, extra_body={"stop_token_ids": [first]})
    assert answer.choices[0].finish_reason == "stop" and encode(answer.choices[0].text) == encode(text)[:3]


def test_the_end_token_is_the_models_alone(client, server):
    """Spelled out by a user it is text; made by the model it ends the answer, unless that is not wanted."""
    ids = server.request("/tokenize", {"prompt": "a<|endoftext|>b"})[1]["tokens"]
    assert 50256 not in ids and decode(ids) == "a<|endoftext|>b"
    forced = GREEDY | {"logit_bias": {"50256": 100}}
    answer = client.completions.create(**forced)
    assert answer.choices[0].text == "" and answer.choices[0].finish_reason == "stop"
    answer = client.completions.create(**forced, extra_body={"ignore_eos": True})
    assert answer.choices[0].text == "<|endoftext|>" * 20 and answer.choices[0].finish_reason == "length"


def test_a_limit_inside_a_character(client):
    family = encode("👩")
    bias = {str(family[0]): 100}
    answer = client.completions.create(**GREEDY | {"max_tokens": 1, "logit_bias": bias}, logprobs=0)
    assert answer.choices[0].text == "\ufffd" and answer.choices[0].logprobs.tokens[0].startswith("bytes:\\xf0")
    chunks = client.completions.create(**GREEDY | {"max_tokens": 1, "logit_bias": bias}, stream=True)
    assert joined(chunks) == {0: "\ufffd"}


def test_prompts(client, server):
    both = client.completions.create(**GREEDY | {"prompt": [PROMPT, "The dog"], "n": 2})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.usage.prompt_tokens == 6
    alone = client.completions.create(**GREEDY | {"prompt": "The dog"}).choices[0].text
    assert both.choices[2].text == both.choices[3].text == alone
    ids = client.completions.create(**GREEDY | {"prompt": [encode(PROMPT), encode("The dog")]})
    assert [choice.text for choice in ids.choices] == [both.choices[0].text, alone]
    empty = client.completions.create(**GREEDY | {"prompt": ""}).choices[0].text
    assert empty == client.completions.create(**GREEDY | {"prompt": [50256]}).choices[0].text
    assert [choice.text for choice in client.completions.create(**GREEDY | {"prompt": [""]}).choices] == [empty]
    for bad in ([], [[]], [50257], [-1], ["a", 5], {"a": 1}, 5):
        status, body, _ = server.request("/v1/completions", GREEDY | {"prompt": bad})
        assert status == 400 and body["error"]["param"] == "prompt", bad
    assert server.request("/v1/completions", {"model": "tiny"})[1]["error"]["param"] == "prompt"
    assert client.completions.create(**GREEDY | {"prompt": ""}).choices[0].text == empty


def test_cached_tokens(client):
    prompt = list(range(1000, 1040))
    used = [client.completions.create(**GREEDY | {"prompt": prompt, "max_tokens": 4}) for _ in range(2)]
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in used] == [0, 32]
    assert used[0].choices[0].text == used[1].choices[0].text


def test_a_prompt_that_is_too_long(client):
    for asked in ({"prompt": [5] * 512}, {"prompt": [5] * 600}, {"prompt": [5] * 500, "max_tokens": 13}):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(**GREEDY | {"max_tokens": None} | asked, stream=stream)
            assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
            assert "512" in caught.value.body["message"] and str(len(asked["prompt"])) in caught.value.body["message"]
    client.completions.create(**GREEDY | {"prompt": [5] * 511, "max_tokens": 1})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a " * 600}])
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_errors_arrive_as_the_clients_own(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(**GREEDY | {"model": "gpt-5"})
    assert caught.value.code == "model_not_found" and "'tiny'" in caught.value.body["message"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**GREEDY | {"logit_bias": {"50257": 1}})
    assert caught.value.param == "logit_bias" and "50257" in caught.value.body["message"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=SAID, functions=[{"name": "f", "parameters": {"type": "object"}}]
        )
    assert caught.value.param == "functions"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=image)
    assert caught.value.param == "messages[0].content[0]" and "image_url" in caught.value.body["message"]
    for path, method, status in (
        ("/v1/nothing", "GET", 404),
        ("/v1/completions", "GET", 405),
        ("/v1/models", "DELETE", 405),
    ):
        found, body, _ = server.request(path, method=method)
        assert found == status and set(body["error"]) == {"message", "type", "param", "code"}
    for raw in (
        b"",
        b"{",
        b"[1, 2]",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"\\ud800": 1}',
        b'{"model": "tiny", "prompt": "\\udc00"}',
        b"[" * 100_000,
        b'"x"',
        b"null",
    ):
        found, body, _ = server.request("/v1/completions", raw=raw)
        assert found == 400 and body["error"]["message"], raw[:10]
    assert server.request("/v1/completions", raw=b" " * (9 << 20))[0] == 413
    client.completions.create(**GREEDY)


def test_models_and_others(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/5")
    assert server.request("/health")[0] == 200 and server.request("/ready")[1]["n_ctx"] == 512
    assert server.request("/tokenize", {"prompt": PROMPT})[1] == {
        "tokens": encode(PROMPT),
        "count": 4,
        "max_model_len": 512,
    }
    assert server.request("/tokenize", {"messages": SAID})[1]["count"] > 8
    assert server.request("/detokenize", {"tokens": encode(PROMPT)})[1] == {"prompt": PROMPT}
    bad = {"/detokenize": [{"tokens": [99999]}, {}], "/tokenize": [{}, {"prompt": "a", "x": 1}], "/abort": [{"id": 5}]}
    for path, body in ((path, body) for path, bodies in bad.items() for body in bodies):
        assert server.request(path, body)[0] == 400
    assert "/v1/chat/completions" in server.request("/openapi.json")[1]["paths"]


def test_browsers_may_ask(server):
    asked = {
        "Origin": "http://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    status, _, headers = server.request("/v1/completions", method="OPTIONS", headers=asked)
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "*"
    status, _, headers = server.request("/v1/completions", {}, headers={"Origin": "http://a.example"})
    assert status == 400 and headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 300])
def test_clients_that_go_away(server, stream, after):
    """Before the first token, in mid-stream, and while a whole answer is waited for: one abort, and no block lost."""
    before = server.settle()
    if after and not stream:
        return  # nothing comes before the end
    server.cut_off(GREEDY | {"max_tokens": 480, "stream": stream, "n": 2}, after)
    while server.metrics()["request_aborted_total"] < before["request_aborted_total"] + 1:
        time.sleep(0.02)
    found = server.settle()
    assert found["request_aborted_total"] == before["request_aborted_total"] + 1
    assert found["blocks_free"] + found["blocks_cached"] == before["blocks_free"] + before["blocks_cached"]
    assert server.client().completions.create(**GREEDY).choices[0].text


def test_an_answer_can_be_aborted_by_its_id(client, server):
    stream = client.completions.create(**GREEDY | {"max_tokens": 480}, stream=True)
    first = next(stream)
    assert server.request("/abort", {"id": first.id})[1] == {"id": first.id, "aborted": True}
    with pytest.raises(openai.APIError, match="aborted"):
        list(stream)
    assert server.request("/abort", {"id": first.id})[1]["aborted"] is False
    server.settle()


def test_the_counts_add_up(server):
    for _ in range(2):
        asked = GREEDY | {"prompt": "A dog and a cat. " * 5, "max_tokens": 60, "ignore_eos": True}
        assert server.request("/v1/completions", asked)[0] == 200
    found = server.settle()
    rejected = sum(value for name, value in found.items() if name.startswith("admission_rejections"))
    assert found["requests_received_total"] == found["requests_accepted_total"] + rejected
    assert found["generation_tokens_total"] > 100 and found["prefix_cache_hits_total"] > 0


def test_a_reader_that_lags_gets_deltas_together(server, client):
    """The socket is full: tokens are made meanwhile, and leave in fewer pieces."""
    whole = client.completions.create(**GREEDY | {"max_tokens": 60, "n": 16})
    chunks = []
    for chunk in client.completions.create(**GREEDY | {"max_tokens": 60, "n": 16}, stream=True):
        chunks.append(chunk)
        if len(chunks) < 5:
            time.sleep(0.3)
    assert joined(chunks) == {choice.index: choice.text for choice in whole.choices}


def test_events_are_json_that_a_browser_reads(server):
    events = server.events("/v1/completions", GREEDY | {"stream": True})
    assert all(json.loads(one)["choices"] for one in events[:-1])
