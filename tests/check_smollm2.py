"""The big check of a Llama, run by hand: SmolLM2-135M-Instruct against transformers on the same weights.

    make smollm2
    python tests/check_smollm2.py [--weights data/smollm2-135m.bin] [--new 32] [--dtype float32] [--long 6000]

Twenty prompts in the form of a conversation. For each: the logits after the prompt, compared with transformers' in
float32 on the unpacked weights; then greedy tokens, all requests at once in one engine, against the likeliest of
transformers' logits over the same text: equal, or the first difference at a gap under ``NEAR_TIE``. The ids of the
prompts are compared with those of transformers' tokenizer, made of the same JSON. Exit code 1 if anything disagrees.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402, F401  (before numba.cuda)
from benchmarks.peers import TransformersLlama  # noqa: E402
from ch14_mini_llm.engine.engine import Engine  # noqa: E402
from ch14_mini_llm.engine.request import Request, Sampling  # noqa: E402
from ch14_mini_llm.levels import make_engine  # noqa: E402
from ch14_mini_llm.model.llama_file import TOKENIZER  # noqa: E402
from ch14_mini_llm.model.weights import load_weights  # noqa: E402
from ch14_mini_llm.tokenizer.own import tokenizer_of  # noqa: E402

RELATIVE = {"float32": 1e-3, "float16": 2e-2}  # of the largest logit
NEAR_TIE = 1e-3  # of the largest logit: two logits this close may be ranked either way
PROMPTS = [
    "What is the capital of France?", "Name three primary colours.", "What is 2 + 2?", "Who wrote Hamlet?",
    "Explain gravity to a child.", "Write a haiku about the sea.", "List the planets.", "What does a CPU do?",
    "Translate 'good morning' into Spanish.", "How do I boil an egg?", "Why is the sky blue?", "Tell me a joke.",
    "What is the opposite of hot?", "Give me a synonym for happy.", "Finish: once upon a time", "What year is it?",
    "Write a Python function that adds two numbers.", "Who are you?", "Count from 1 to 10.",
    "Say \u00e7a va \U0001f600.",
]  # fmt: skip


def their_ids(tensors):
    """transformers' tokenizer of the same JSON, as a function of a message to ids."""
    import transformers
    from tokenizers import Tokenizer

    fields = json.loads(bytes(tensors[TOKENIZER]))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields["tokenizer"])), chat_template=fields["chat_template"],
        **fields["special_tokens"],
    )  # fmt: skip
    return lambda messages: theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def main():
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default=ROOT / "data" / "smollm2-135m.bin")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=RELATIVE)
    parser.add_argument("--long", type=int, default=0, help="one text of so many tokens as well, 500 to 8000")
    options = parser.parse_args()
    config, tensors = load_weights(options.weights)
    tokenizer, theirs = tokenizer_of(config, tensors), their_ids(tensors)
    logits = TransformersLlama(config, tensors, device="cpu", dtype=torch.float32).logits
    conversations = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [tokenizer.chat(messages) for messages in conversations]
    same_ids = [theirs(messages) == prompt for messages, prompt in zip(conversations, prompts)]
    single = make_engine("kv", config, tensors, 256, dtype=options.dtype)
    engine = Engine.of(config, tensors, "kv", dtype=options.dtype, num_blocks=200)
    results = engine.run([Request(prompt, options.new) for prompt in prompts])
    all_good, most = all(same_ids), 0.0
    for text, prompt, same, result in zip(PROMPTS, prompts, same_ids, results):
        wanted = logits([*prompt, *result.tokens])[len(prompt) - 1 :]
        single.prefill(prompt)
        found, largest = single.logits.copy_to_host(), np.abs(wanted).max()
        error = float(np.abs(found - wanted[0]).max() / largest)
        best = wanted[: options.new].argmax(1)
        differs = next((i for i, (a, b) in enumerate(zip(result.tokens, best)) if a != b), None)
        missed = 0.0 if differs is None else wanted[differs].max() - wanted[differs][result.tokens[differs]]
        gap = float(missed / largest)
        good = same and error <= RELATIVE[options.dtype] and gap <= NEAR_TIE and len(result.tokens) == options.new
        words = f"{options.new} equal" if differs is None else f"differ at {differs}, gap {gap:.1e}"
        print(f"{'ok ' if good else 'BAD'} {error:8.1e}  {words:<26} {text}", flush=True)
        all_good, most = all_good and good, max(most, error)
    print(f"ids of the prompts equal: {sum(same_ids)} of {len(PROMPTS)}; largest error of a logit: {most:.1e}")
    if options.long:
        all_good &= long_text(config, tensors, options, prompts[4], logits)
    return 0 if all_good else 1


def long_text(config, tensors, options, prompt, logits):
    """A text of so many tokens, drawn: their log-probabilities against transformers' over the whole text, and the time
    of a token at its beginning and at its end."""
    blocks = -(-(len(prompt) + options.long) // 16) + 1
    engine = Engine.of(config, tensors, "kv", dtype=options.dtype, num_blocks=blocks, max_batch=1)
    engine.submit(Request(prompt, options.long, Sampling(1.0, seed=1), logprobs=0))
    made, scores, times = [], [], []
    while not engine.idle:
        for output in engine.step():
            made += output.tokens
            scores += [score.logprob for score in output.logprobs]
            times += [time.perf_counter()] * len(output.tokens)
    wanted = logits([*prompt, *made])[len(prompt) - 1 : -1].astype(np.float64)
    wanted -= np.log(np.exp(wanted - wanted.max(1, keepdims=True)).sum(1, keepdims=True)) + wanted.max(1, keepdims=True)
    error = float(np.abs(wanted[np.arange(len(made)), made] - scores).max())
    first, last = ((times[a + 200] - times[a]) / 200 * 1e3 for a in (50, len(times) - 201))
    print(f"{len(made)} tokens: log-probabilities differ by {error:.1e} at most")
    print(f"a token took {first:.1f} ms at the beginning, {last:.1f} ms at the end")
    return len(made) == options.long and error <= 20 * RELATIVE[options.dtype]


if __name__ == "__main__":
    sys.exit(main())
