"""A weight file of ours as a folder that transformers loads: its model, its tokenizer, a plain form for conversations.

    python benchmarks/hf_folder.py data/tiny-gpt2.bin FOLDER [--dtype float16]

For the benchmarks, where transformers serves the same weights (``transformers serve FOLDER``).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, F401  (before numba.cuda)

# isort: split
import torch  # noqa: E402

from benchmarks.peers import TransformersEager, TransformersLlama  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import load_weights  # noqa: E402
from ch14_mini_llm.tokenizer.own import tokenizer_of  # noqa: E402

TEMPLATE = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}\n{% endfor %}assistant:"
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def write_hf_folder(path, folder, dtype="float16"):
    """Write ``folder`` for the weight file ``path``. dtype: of the weights there. Raises `WeightsError`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    config, tensors = load_weights(path)
    tokenizer = tokenizer_of(config, tensors)
    kind = TransformersLlama if config.architecture == "llama" else TransformersEager
    kind(config, tensors, device="cpu", dtype=DTYPES[dtype]).model.save_pretrained(folder)
    library = Tokenizer.from_str(tokenizer.plain.to_str())
    end = (tokenizer.special_tokens() or ["<|endoftext|>"])[0]
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token=end, chat_template=TEMPLATE)
    theirs.save_pretrained(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/hf_folder.py", description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="a weight file")
    parser.add_argument("folder", type=Path, help="is made, and written to")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the weights there (float16)")
    options = parser.parse_args(argv)
    try:
        write_hf_folder(options.weights, options.folder, options.dtype)
    except (WeightsError, OSError) as error:
        parser.error(str(error))
    print(f"written: {options.folder}")


if __name__ == "__main__":
    main()
