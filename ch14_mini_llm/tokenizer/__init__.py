"""Text to token ids and back, in GPT-2's byte-level BPE."""

from ch14_mini_llm.tokenizer.bpe import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    VOCAB_SIZE,
    TokenizerError,
    decode,
    encode,
    encode_batch,
    token_bytes,
    vocabulary_files,
)
from ch14_mini_llm.tokenizer.own import StreamDecoder

__all__ = [
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "VOCAB_SIZE",
    "StreamDecoder",
    "TokenizerError",
    "decode",
    "encode",
    "encode_batch",
    "token_bytes",
    "vocabulary_files",
]
