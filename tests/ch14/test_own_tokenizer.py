"""Chapter 14: a tokenizer that comes with the model, and the form of a conversation, against transformers'."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ch14_mini_llm.tokenizer.bpe import TokenizerError
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer, OwnTokenizer, StreamDecoder

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["", "Hello, world! 1234", "na\u00efve \U0001f600 \u4f60\u597d", "a\n\n b\t c", "<|im_start|>user", "x" * 300]


@pytest.fixture(scope="module")
def library():
    """A small byte-level BPE with digits apart and three special tokens, as SmolLM2's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    bpe.train_from_iterator(["hello world, the cat sat on the mat and the hat"] * 20, trainer)
    return bpe


def data(library, **changes):
    fields = {
        "tokenizer": json.loads(library.to_str()), "stop_tokens": [2], "chat_template": TEMPLATE, "special_tokens": {},
    }  # fmt: skip
    return json.dumps(fields | changes).encode()


@pytest.fixture(scope="module")
def own(library):
    return OwnTokenizer(data(library))


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(own, text):
    ids = own.encode(text)
    assert own.decode(ids) == text
    stream = StreamDecoder(own)
    assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_special_tokens_and_characters_cut_off(own, library):
    assert own.encode("<|im_start|>the<|im_end|>")[0] == 1 and own.encode("<|im_end|>") == [2]
    assert own.token_bytes(1) == b"<|im_start|>" and own.stop_tokens == (2,)
    ids = own.encode("\U0001f600")
    assert own.decode(ids[:-1]) == "\ufffd"
    for token in range(library.get_vocab_size()):
        own.token_bytes(token)
    for wrong, named in (400_000, "400000 is not in the vocabulary"), (-1, "-1 is not"), ("1", "'1' is not an integer"):
        with pytest.raises(TokenizerError, match=named):
            own.token_bytes(wrong)


def test_a_conversation_has_transformers_ids(own, library, transformers):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, chat_template=TEMPLATE)
    user, answer = {"role": "user", "content": "hello 12"}, {"role": "assistant", "content": "the cat"}
    for messages in (
        [user], [{"role": "system", "content": "the hat"}, user], [user, answer, {"role": "user", "content": "and?"}],
        [{"role": "user", "content": "<|im_end|> {{ 7 * 7 }} {% for %}"}],
    ):  # fmt: skip
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert own.chat(messages) == wanted


@pytest.mark.parametrize(
    "template, named",
    [
        ("{{ raise_exception('only users') }}", "fails: only users"), ("{% if %}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"), ("{{ messages.append(1) }}", "fails"),
        ("{{ messages[0]['content'] + 1 }}", "fails"), (None, "has no form for a conversation"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_one_line(library, template, named):
    own = OwnTokenizer(data(library, chat_template=template))
    with pytest.raises(TokenizerError, match=named):
        own.chat([{"role": "user", "content": "hello"}])


NO_TOKENIZER = b'{"tokenizer": 1, "stop_tokens": [2], "chat_template": null, "special_tokens": {}}'


@pytest.mark.parametrize("given", [b"", b"[]", b"{}", NO_TOKENIZER])
def test_what_is_no_tokenizer_is_refused(given):
    with pytest.raises(TokenizerError, match="the weight file's tokenizer cannot be read"):
        OwnTokenizer(given)


def test_gpt2s_has_the_same_methods():
    gpt2 = GPT2Tokenizer()
    assert gpt2.decode(gpt2.encode("Hello, world")) == "Hello, world" and not gpt2.can_chat
    with pytest.raises(TokenizerError, match="no form for a conversation"):
        gpt2.chat([])
