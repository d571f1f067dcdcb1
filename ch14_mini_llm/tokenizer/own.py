"""A model's own tokenizer, from its weight file; and GPT-2's, with the same methods.

A weight file has it as JSON: ``tokenizer`` in the form of the `tokenizers` library, ``stop_tokens``, which end a text,
``chat_template``, the form of a conversation in Jinja, or null, and ``special_tokens``, which a template may name, such
as {"bos_token": "<s>"}. A template comes with a model that somebody made: it runs in Jinja's sandbox.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from operator import index

from ch14_mini_llm.tokenizer import bpe
from ch14_mini_llm.tokenizer.bpe import TokenizerError

FIELDS = {"tokenizer", "stop_tokens", "chat_template", "special_tokens"}
SPACE = "\u2581"  # a blank, in the tokens of SentencePiece


def packed(tokenizer: dict, stop_tokens: Sequence[int], special_tokens: dict, chat_template: str | None) -> bytes:
    """A tokenizer as a weight file has it, for `OwnTokenizer`; the arguments are its fields."""
    values = {"tokenizer": tokenizer, "stop_tokens": list(stop_tokens), "special_tokens": special_tokens}
    return json.dumps({**values, "chat_template": chat_template}).encode()


class GPT2Tokenizer:
    """GPT-2's byte-level BPE: `bpe`'s functions."""

    stop_tokens = (bpe.END_OF_TEXT_ID,)
    can_chat = takes_tools = False
    starts_with_space = False  # whether texts are given a blank in front, which is taken away again

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; raises `TokenizerError`."""
        return bpe.encode(text)

    @cached_property
    def plain(self):
        """The `tokenizers` object for which special tokens that are spelled out are text like any other."""
        copy = bpe.library().Tokenizer.from_str(self._library.to_str())
        copy.encode_special_tokens = True
        return copy

    @property
    def _library(self):
        return bpe.merger()

    def encode_plain(self, text: str, in_front: bool = True) -> list[int]:
        """`encode` for which a special token that is spelled out is text like any other. in_front: with what the model
        wants in front of a text."""
        bpe.require_utf8(text)
        return self.plain.encode(text, add_special_tokens=in_front).ids

    def special_tokens(self) -> list[str]:
        """The texts that `encode` takes for special tokens."""
        return [token.content for token in self._library.get_added_tokens_decoder().values()]

    def special_ids(self) -> list[int]:
        """The ids that stand for no text, such as the end token's."""
        return [number for number, token in self._library.get_added_tokens_decoder().items() if token.special]

    def all_bytes(self) -> list[bytes]:
        """The bytes of every id, in order."""
        return bpe.byte_table()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for; raises `TokenizerError` for one that is none."""
        return bpe.token_bytes(token)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.starts_with_space else text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; raises `TokenizerError`."""
        raise TokenizerError("this model has no form for a conversation; give --prompt without --chat")


class OwnTokenizer(GPT2Tokenizer):
    """The tokenizer in a weight file. data: its bytes. Raises `TokenizerError` for what is none."""

    def __init__(self, data: bytes) -> None:
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict) or fields.keys() != FIELDS:
                raise ValueError(f"it must have the fields {', '.join(sorted(FIELDS))}")
            self.stop_tokens = tuple(map(index, fields["stop_tokens"]))
            self._special = {str(name): str(token) for name, token in fields["special_tokens"].items()}
            self._bpe = bpe.library().Tokenizer.from_str(json.dumps(fields["tokenizer"]))
            self._by_bytes, self.starts_with_space = _form_of_tokens(fields["tokenizer"]["decoder"])
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"the weight file's tokenizer cannot be read: {str(error)[:100]}") from None
        self.template = fields["chat_template"]

    @property
    def can_chat(self) -> bool:
        """Whether it has a form for a conversation."""
        return self.template is not None

    @property
    def takes_tools(self) -> bool:
        """Whether that form tells a model of functions, and of the tag for its calls that `server.tools` reads."""
        return self.template is not None and "tools" in self.template and "<tool_call>" in self.template

    def all_bytes(self) -> list[bytes]:
        """The bytes of every id, in order."""
        return self._table

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what the model wants in front; raises `TokenizerError`.

        A special token that is spelled out in the text is one, as in transformers.
        """
        bpe.require_utf8(text)
        return self._bpe.encode(text).ids

    @property
    def _library(self):
        return self._bpe

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for; raises `TokenizerError` for one that is none."""
        return bpe.look_up(self._table, token, "the")

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None if there is none."""
        return self._bpe.token_to_id(token)

    @cached_property
    def _table(self) -> list[bytes]:
        """The bytes of every id; none for numbers that stand for nothing."""
        byte_of = bpe.byte_of_character()
        vocabulary = self._bpe.get_vocab(with_added_tokens=True)
        special = {token.content for token in self._bpe.get_added_tokens_decoder().values()}
        table = [b""] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            if token in special:
                table[number] = token.encode()
            elif self._by_bytes:
                known = all(character in byte_of for character in token)
                table[number] = bytes(byte_of[character] for character in token) if known else token.encode()
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                table[number] = bytes.fromhex(token[3:5])
            else:
                table[number] = token.replace(SPACE, " ").encode()
        return table

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; raises `TokenizerError`.

        messages: each {"role": "system", "user" or "assistant", "content": text}.
        """
        if self.template is None:
            return super().chat(messages)
        return self.encode_form(self.render(messages))

    def render(self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()) -> str:
        """The text of a conversation in the model's form, which it must have; raises `TokenizerError`. tools:
        functions, for a form that takes some."""
        try:
            given = {**self._special, "messages": list(messages), "tools": list(tools) or None, "documents": None}
            return self._form.render(given, add_generation_prompt=True)
        except Exception as error:  # whatever a template does
            raise TokenizerError(f"the model's form of a conversation fails: {str(error)[:100]}") from None

    def encode_form(self, text: str) -> list[int]:
        """Token ids of what `render` gives, which has all special tokens in it; raises `TokenizerError`."""
        bpe.require_utf8(text)
        return self._bpe.encode(text, add_special_tokens=False).ids

    @cached_property
    def _form(self):
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def fail(message):
            raise TemplateError(message)

        # What a template may use: as in transformers.
        options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        form = ImmutableSandboxedEnvironment(**options)
        form.globals.update(raise_exception=fail, strftime_now=lambda form: datetime.now().strftime(form))
        form.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
        return form.from_string(self.template)


class StreamDecoder:
    """Decodes a stream of ids piece by piece; the pieces, and `finish()` last, join up to ``tokenizer.decode``.

    continues: the stream goes on with a text, so that its first blank is part of it.
    """

    def __init__(self, tokenizer: GPT2Tokenizer | None = None, continues: bool = False) -> None:
        tokenizer = tokenizer or GPT2Tokenizer()
        self._tokenizer, self._utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = tokenizer.starts_with_space and not continues  # and nothing has come yet

    def push(self, token: int) -> str:
        """The characters that `token` completes; may be empty."""
        text = self._utf8.decode(self._tokenizer.token_bytes(token))
        if self._begins and text:
            self._begins = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """U+FFFD if the stream ended inside a character, else the empty string. Starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._begins = self._tokenizer.starts_with_space
        return rest


def tokenizer_of(config, tensors: Mapping[str, object]) -> GPT2Tokenizer:
    """The tokenizer of a model, of what `load_weights` gives."""
    if config.architecture == "gpt2":
        return GPT2Tokenizer()
    from ch14_mini_llm.model.llama_file import TOKENIZER

    return OwnTokenizer(bytes(tensors[TOKENIZER]))


def _form_of_tokens(decoder: dict | None) -> tuple[bool, bool]:
    """``(by_bytes, starts_with_space)`` of a tokenizer's decoder: whether a token is bytes, each written as a character
    (GPT-2, Llama 3), or else characters, as SentencePiece has them (Llama 2). Raises `ValueError` for others."""
    steps = (decoder or {}).get("decoders", [decoder])
    kinds = [step and step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        replaces = steps[0]["pattern"] == {"String": SPACE} and steps[0]["content"] == " "
        strips = [steps[3][field] for field in ("content", "start", "stop")] if kinds[3:] else [" ", 1, 0]
        if replaces and strips == [" ", 1, 0]:
            return False, bool(kinds[3:])
    raise ValueError(
        f"its decoder is {'a ' + decoder['type'] if decoder else None}; this project reads tokens of bytes (GPT-2, "
        "Llama 3) and of SentencePiece (Llama 2)"
    )
