"""Chapter 14: a conversation, with a model that has learned nothing and a tokenizer that the test makes."""

import io
import json
import os
import signal

import pytest
from test_llama import random_llama
from test_own_tokenizer import data, library  # noqa: F401  (a fixture)

import common
from ch14_mini_llm import run as run_module
from ch14_mini_llm.chat import Chat
from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request, RequestError
from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.llama_file import save_llama
from ch14_mini_llm.tokenizer.own import OwnTokenizer

N_CTX = 256


@pytest.fixture(scope="module")
def model(library, tmp_path_factory):  # noqa: F811
    """(config, tensors, tokenizer, the file with all of them)."""
    config = LlamaConfig(1, 2, 1, 16, 32, 64, N_CTX, library.get_vocab_size(), 1e-5, 1e4, True)
    tensors, path = random_llama(config), tmp_path_factory.mktemp("chat") / "llama.bin"
    save_llama(path, config, tensors, data(library))
    return config, tensors, OwnTokenizer(data(library)), path


@pytest.fixture
def engine(model):
    config, tensors, _, _ = model
    return Engine.of(config, tensors, "kv", max_batch=1, num_blocks=N_CTX // 16 + 1)


def test_each_turn_has_all_that_was_said_and_reads_only_what_is_new(model, engine):
    tokenizer, chat = model[2], Chat(engine, model[2], max_new=9)
    said = []
    for text in ("hello", "and the cat?", "12"):
        said.append({"role": "user", "content": text})
        prompt = tokenizer.chat(said)
        answer = "".join(chat.say(text))
        (wanted,) = Engine.of(*model[:2], "kv", num_blocks=40).run([Request(prompt, 9, None, tokenizer.stop_tokens)])
        assert answer == tokenizer.decode(wanted.tokens)
        said.append({"role": "assistant", "content": answer})
        assert chat.messages == said and chat.reason in ("stop", "length")
    assert engine.stats()["prefix_cache_hits"] > 0
    engine.check()


def test_an_answer_may_be_left_at_any_point(model, engine):
    chat = Chat(engine, model[2], max_new=30)
    whole = "".join(chat.say("hello"))
    for pieces in (0, 1, 7):
        chat.messages = []
        answer = chat.say("hello")
        got = [next(answer) for _ in range(pieces)]
        answer.close()
        assert engine.idle and not engine.alive and whole.startswith("".join(got))
        if pieces:
            assert chat.messages[-1]["content"] == "".join(got) and chat.reason == "interrupted"
    engine.check()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
@pytest.mark.parametrize("step", [1, 2, 6])
def test_ctrl_c_ends_an_answer_and_the_next_is_right(model, engine, monkeypatch, step):
    chat = Chat(engine, model[2], max_new=30)
    whole = "".join(chat.say("hello"))
    chat.messages, launch, launched = [], engine.runner.launch, []

    def interrupted(plan):
        launched.append(plan)
        if len(launched) == step:
            signal.raise_signal(signal.SIGINT)
        return launch(plan)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.runner, "launch", interrupted)
        for _ in chat.say("hello"):
            pass
    assert len(launched) == step and engine.idle and chat.reason == "interrupted"
    chat.messages = []
    assert "".join(chat.say("hello")) == whole
    engine.check()


def test_a_conversation_that_outgrows_the_context(model, engine):
    chat = Chat(engine, model[2], max_new=1000)
    with pytest.raises(RequestError, match=r"the conversation has \d+ tokens and the context \(n_ctx\) is 256"):
        for _ in range(100):
            before = list(chat.messages)
            for _ in chat.say("hello world, the cat sat on the mat"):
                pass
    assert chat.messages == before and engine.idle


def talk(monkeypatch, capsys, text, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = run_module.main(list(options))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_program(model, monkeypatch, capsys):
    options = ["--weights", str(model[3]), "--chat", "--max_new=5"]
    code, out, err = talk(monkeypatch, capsys, "hello\nthe hat\n\nnot this\n", *options)
    assert code == 0 and out.count("\n") >= 2 and "an empty line ends the conversation" in err
    code, out, err = talk(monkeypatch, capsys, "", *options)
    assert (code, out) == (0, "")
    code, out, _ = talk(monkeypatch, capsys, "", *options, "--prompt=hello", "--json")
    found = json.loads(out)
    tokenizer = model[2]
    assert code == 0 and found["prompt_tokens"] == tokenizer.chat([{"role": "user", "content": "hello"}])
    assert found["answer"] == tokenizer.decode(found["tokens"][len(found["prompt_tokens"]) :])
    assert found["engine"] == ("fast" if common.BACKEND == "gpu" else "kv") and found["text"].endswith(found["answer"])


@pytest.mark.parametrize(
    "options, named",
    [
        (["--chat", "--tokens=1,2"], "--chat and --tokens are both given"),
        (["--chat", "--json"], "give --prompt as well"), (["--chat", "--engine=naive"], "levels kv and fast"),
        (["--engine=fast", "--dtype=float32"], "engine fast"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(model, monkeypatch, capsys, options, named):
    code, out, err = talk(monkeypatch, capsys, "", "--weights", str(model[3]), *options)
    assert (code, out) == (2, "") and named in err.splitlines()[-1]


def test_a_model_without_a_form_says_so(monkeypatch, capsys):
    code, out, err = talk(monkeypatch, capsys, "hello\n", "--chat")
    assert code == 2 and "this model has no form for a conversation" in err.splitlines()[-1] and not out
