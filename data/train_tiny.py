"""Train a small GPT-2 with the real GPT-2 vocabulary on a text file, and write it in this project's layout.

    python data/train_tiny.py stories.txt.gz --out data/tiny-gpt2.bin --minutes 7

The text is plain UTF-8, gzipped or not; a line `<|endoftext|>` separates documents. The last 2 % of the documents are
held out: the model never learns from them, and the weights kept are those with the lowest loss on them. Ctrl-C stops
early and still writes the file. Needs PyTorch; the defaults suit one data-centre GPU and a few million tokens, and the
file stays under 16 MB, most of it the 50257 token embeddings.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ch14_mini_llm.cli import Parser, integer, number, run_program
from ch14_mini_llm.engine.request import MAX_SEED, RequestError
from ch14_mini_llm.files import FileError, check_output, open_input, write_text
from ch14_mini_llm.model.config import LAYER_NORM_EPS, GPT2Config
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.weights import save_weights
from ch14_mini_llm.tokenizer import bpe

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    print("train_tiny: error: training needs PyTorch: pip install torch", file=sys.stderr)
    sys.exit(2)

HELD_OUT = 0.02
PROMPTS = ("Hello, there is", "Once upon a time, there was a little", "Dear", "To make a cup of tea,")


@dataclass(frozen=True)
class Settings:
    """How to train. `minutes` is wall time; the schedule ends with it where it comes before `steps`."""

    n_layer: int = 7
    n_head: int = 4
    d_model: int = 128
    n_ctx: int = 512
    steps: int = 8000
    minutes: float = 60.0
    batch: int = 64
    micro_batch: int = 0
    lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.1
    eval_every: int = 250
    seed: int = 1
    device: str = "auto"
    compile: bool = False

    def model_config(self) -> GPT2Config:
        """The sizes that go into the weight file. Raises `WeightsError` for impossible ones."""
        return GPT2Config(
            self.n_layer, self.n_head, self.d_model, 4 * self.d_model, self.n_ctx, vocab_size=bpe.VOCAB_SIZE
        )


class CorpusError(ValueError):
    """A text file or a setting that cannot be trained with; the message says what to do."""


# ---- the model: GPT-2 in PyTorch, parameters named as in the weight file -------------------------------------------


class Conv1D(nn.Module):
    """y = x @ weight + bias with weight (in, out): a linear layer, stored as GPT-2 stores it."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Causal multi-head attention: (batch, tokens, d_model) -> the same shape."""

    def __init__(self, config: GPT2Config, dropout: float) -> None:
        super().__init__()
        d = config.d_model
        self.n_head, self.dropout = config.n_head, dropout
        self.c_attn = Conv1D(d, 3 * d, d**-0.5)
        self.c_proj = Conv1D(d, d, (2 * config.n_layer * d) ** -0.5)

    def forward(self, x):
        batch, tokens, d = x.shape
        q, k, v = (
            part.view(batch, tokens, self.n_head, d // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(d, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.c_proj(heads.transpose(1, 2).reshape(batch, tokens, d))


class MLP(nn.Module):
    """d_model -> d_ff -> d_model with the tanh form of GELU between."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        d, d_ff = config.d_model, config.d_ff
        self.c_fc = Conv1D(d, d_ff, d**-0.5)
        self.c_proj = Conv1D(d_ff, d, (2 * config.n_layer * d_ff) ** -0.5)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(layer norm(x)), then x + MLP(layer norm(x)): norms come first in GPT-2."""

    def __init__(self, config: GPT2Config, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.attn = Attention(config, dropout)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """GPT-2 with learned positions and the output head tied to the token embedding."""

    def __init__(self, config: GPT2Config, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.5 * config.d_model**-0.5)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)

    def hidden(self, ids):
        """(batch, tokens) ids -> (batch, tokens, d_model), after the last layer norm."""
        x = self.drop(self.wte(ids) + self.wpe.weight[: ids.shape[1]])
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, ids, targets=None):
        """Logits (batch, tokens, vocab_size), or with `targets` (batch, tokens) the mean cross-entropy in nats."""
        logits = self.hidden(ids) @ self.wte.weight.T
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


# ---- the text ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Token ids of the two parts of a text (each document followed by 50256), and where training documents start."""

    train: np.ndarray
    held_out: np.ndarray
    starts: np.ndarray
    sha256: str


def read_documents(path: Path) -> tuple[list[str], str]:
    """The documents of a text file (gzipped if it ends in .gz) and the SHA-256 of the unpacked bytes."""
    try:
        with open_input(path) as file:
            data = file.read()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, FileError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); give a UTF-8 text file, or one packed by gzip") from None
    lines = text.replace("\r\n", "\n")
    documents = [part.strip("\n") for part in f"\n{lines}\n".split(f"\n{bpe.END_OF_TEXT}\n")]
    documents = [document for document in documents if document.strip()]
    return documents, hashlib.sha256(data).hexdigest()


def read_corpus(path: Path, n_ctx: int) -> Corpus:
    """Read, tokenise and split a text file. With fewer than 50 documents the last 2 % of the tokens are held out."""
    documents, digest = read_documents(path)
    encoded = []
    for first in range(0, len(documents), 4096):
        encoded += bpe.encode_batch(documents[first : first + 4096])
    lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
    stream = np.array([token for ids in encoded for token in (*ids, bpe.END_OF_TEXT_ID)], dtype=np.int32)
    n_held_out = round(HELD_OUT * len(documents))
    held_out = int(lengths[-n_held_out:].sum()) if n_held_out else math.ceil(HELD_OUT * len(stream))
    cut = len(stream) - held_out
    if cut <= n_ctx + 1 or len(stream) - cut < 2:
        raise CorpusError(
            f"{path}: {len(stream)} tokens are too few for --n_ctx {n_ctx}; give more text or a smaller n_ctx"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Corpus(stream[:cut], stream[cut:], starts[starts < cut - n_ctx], digest)


def sample_rows(corpus: Corpus, rows: int, n_ctx: int, rng: np.random.Generator) -> np.ndarray:
    """Start positions of `rows` training windows of n_ctx + 1 tokens.

    Every second window begins where a document begins, as a prompt does; the others begin anywhere, so that a prompt
    may also start in mid-text.
    """
    anywhere = rng.integers(0, len(corpus.train) - n_ctx, size=rows)
    documents = rng.choice(corpus.starts, size=rows)
    return np.where(np.arange(rows) % 2, anywhere, documents)


@torch.no_grad()
def held_out_loss(model: GPT2, tokens, autocast, rows: int = 8) -> float:
    """Mean cross-entropy in nats a token over held-out ids (1-D tensor), in windows of n_ctx without overlap."""
    n_ctx = model.config.n_ctx
    n_windows = math.ceil((len(tokens) - 1) / n_ctx)
    inputs = F.pad(tokens[:-1], (0, n_windows * n_ctx - len(tokens) + 1)).view(n_windows, n_ctx)
    targets = F.pad(tokens[1:], (0, n_windows * n_ctx - len(tokens) + 1), value=-1).view(n_windows, n_ctx)
    was_training = model.training
    model.eval()
    total = 0.0
    for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
        with autocast():
            loss = model(x, y)
        total += loss.item() * int((y >= 0).sum())
    model.train(was_training)
    return total / (len(tokens) - 1)


# ---- training ------------------------------------------------------------------------------------------------------


def learning_rate(settings: Settings, step: int, seconds: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak, reached when the steps or the minutes run out."""
    warmup = min(settings.warmup, max(1, settings.steps // 10))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = max((step - warmup) / max(1, settings.steps - warmup), seconds / (60 * settings.minutes))
    return settings.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model: GPT2, settings: Settings, device):
    """AdamW; weight decay pulls on matrices and embeddings only, not on biases, layer norms and positions."""
    decayed = {name for name, p in model.named_parameters() if p.ndim == 2 and name != "wpe.weight"}
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if name in decayed],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def choose_micro_batch(settings: Settings, device) -> int:
    """Rows worked on at once: the largest divisor of the batch whose logits fit the memory (fp32 and its copies)."""
    if settings.micro_batch:
        return settings.micro_batch
    memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 3 << 30
    fitting = max(1, memory // (16 * settings.n_ctx * bpe.VOCAB_SIZE))
    return max(rows for rows in range(1, settings.batch + 1) if settings.batch % rows == 0 and rows <= fitting)


def train(corpus: Corpus, settings: Settings, on_row=None) -> tuple[GPT2, dict]:
    """Train a model and round it to fp16. Returns (model in eval mode on the CPU, summary of the run).

    `on_row(row)` is called with every log row: step, train_loss (mean since the row before), val_loss, lr, seconds,
    tokens. The model returned is the one with the lowest held-out loss seen; Ctrl-C ends the training early.
    """
    from tqdm import tqdm

    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    )
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

    model = GPT2(settings.model_config(), settings.dropout).to(device)
    step_model = torch.compile(model) if settings.compile else model
    optimizer = make_optimizer(model, settings, device)
    rows = choose_micro_batch(settings, device)
    stream = torch.from_numpy(corpus.train).to(device)
    held_out = torch.from_numpy(corpus.held_out).long().to(device)
    window = torch.arange(settings.n_ctx + 1, device=device)

    best = {"val_loss": math.inf, "step": 0, "state": None}
    started, step, interrupted, losses = time.perf_counter(), 0, False, []

    def log_row() -> None:
        val_loss = held_out_loss(model, held_out, autocast)
        row = {
            "step": step,
            "train_loss": round(torch.stack(losses).mean().item(), 4) if losses else None,
            "val_loss": round(val_loss, 4),
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - started, 1),
            "tokens": step * settings.batch * settings.n_ctx,
        }
        losses.clear()
        if val_loss < best["val_loss"] or best["state"] is None:
            state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            best.update(val_loss=val_loss, step=step, state=state)
        bar.set_postfix(train=row["train_loss"], held_out=row["val_loss"])
        if on_row is not None:
            on_row(row)

    bar = tqdm(total=settings.steps, unit="step", desc=f"training on {device}")
    try:
        model.train()
        while step < settings.steps and (seconds := time.perf_counter() - started) < 60 * settings.minutes:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, seconds)
            starts = torch.from_numpy(sample_rows(corpus, settings.batch, settings.n_ctx, rng)).to(device)
            batch = stream[starts[:, None] + window].long()
            loss_sum = 0.0
            for part in batch.split(rows):
                with autocast():
                    loss = step_model(part[:, :-1], part[:, 1:]) * (len(part) / settings.batch)
                loss.backward()
                loss_sum = loss_sum + loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss_sum)
            step += 1
            bar.update()
            if step % settings.eval_every == 0:
                log_row()
            elif step % 20 == 0:
                loss_sum.item()  # waits for the device, so that the clock tells the truth
    except KeyboardInterrupt:
        interrupted = True
    if losses or best["state"] is None:
        log_row()
    bar.close()

    final = GPT2(settings.model_config()).eval()
    final.load_state_dict({name: tensor.half().float() for name, tensor in best["state"].items()})
    final_loss = held_out_loss(final.to(device), held_out, lambda: torch.autocast(device.type, enabled=False))
    summary = {
        "final": True,
        "held_out_loss": round(final_loss, 4),
        "held_out_perplexity": round(math.exp(min(final_loss, 700)), 2),
        "held_out_tokens": len(corpus.held_out) - 1,
        "best_step": best["step"],
        "steps": step,
        "interrupted": interrupted,
        "seconds": round(time.perf_counter() - started, 1),
        "train_tokens": len(corpus.train),
        "tokens_seen": step * settings.batch * settings.n_ctx,
        "parameters": settings.model_config().n_parameters,
        "corpus_sha256": corpus.sha256,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "settings": asdict(settings),
    }
    return final.cpu(), summary


@torch.no_grad()
def sample_text(model: GPT2, prompt: str, max_new: int, temperature: float, top_k: int = 40, seed: int = 1) -> str:
    """`prompt` and up to `max_new` tokens after it, until 50256; temperature 0 takes the likeliest token each time."""
    generator = torch.Generator().manual_seed(seed)
    ids = bpe.encode(prompt)
    for _ in range(min(max_new, model.config.n_ctx - len(ids))):
        hidden = model.hidden(torch.tensor([ids]))[0, -1]
        values, candidates = (model.wte.weight @ hidden).topk(top_k)
        pick = (
            0 if temperature == 0 else int(torch.multinomial((values / temperature).softmax(0), 1, generator=generator))
        )
        token = int(candidates[pick])
        if token == bpe.END_OF_TEXT_ID:
            break
        ids.append(token)
    return bpe.decode(ids)


# ---- the command line ----------------------------------------------------------------------------------------------


def write_log(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines; the file is replaced as a whole, so that it is never half a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows), "--log")


def keep_weights(out: Path, config: GPT2Config, state: dict[str, np.ndarray]) -> tuple[Path, str, str | None]:
    """Write the weights to `out`, or if that fails to the system's folder for temporary files: they took long to make.

    Returns (where they are, SHA-256, why they are not in `out` or None).
    """
    try:
        return out, save_weights(out, config, state), None
    except (OSError, FileError) as error:
        reason = f"{out} cannot be written any more ({error})"
        other = Path(tempfile.gettempdir(), f"{out.stem}-{os.getpid()}.bin")
        return other, save_weights(other, config, state), f"{reason}; the weights are in {other}"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The options; every number and every path is checked here. Raises `RequestError` or `FileError` for a bad one."""
    parser = Parser(
        prog="train_tiny.py",
        description="Train a small GPT-2 (vocabulary 50257) on a text file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("text", type=Path, metavar="TEXT_FILE[.gz]", help="UTF-8; a line <|endoftext|> parts documents")
    parser.add_argument("--out", type=Path, default=Path("data/tiny-gpt2.bin"), help="weight file to write")
    parser.add_argument("--log", type=Path, help="JSON-lines log (default: the weight file's name with .log.jsonl)")
    helps = {
        "n_layer": "transformer blocks",
        "n_head": "attention heads a block",
        "d_model": "width; the MLP is four times as wide",
        "n_ctx": "longest context in tokens",
        "steps": "optimizer steps at most",
        "minutes": "wall time of the training at most; the learning rate falls in time for it",
        "batch": "rows of n_ctx tokens a step",
        "micro_batch": "rows worked on at once; 0 chooses by memory; must divide the batch",
        "lr": "highest learning rate",
        "warmup": "steps until the highest learning rate (at most a tenth of all)",
        "weight_decay": "AdamW's decay of matrices",
        "dropout": "share of activations dropped while training",
        "eval_every": "steps between two measurements of the held-out loss",
        "seed": "of initial weights, batches and dropout",
        "device": "auto, cpu, cuda, cuda:1, ...",
    }
    defaults = Settings()
    for name, text in helps.items():
        value = getattr(defaults, name)
        kind = {int: integer, float: number}.get(type(value), str)
        parser.add_argument(f"--{name}", type=kind, default=value, help=text)
    parser.add_argument("--compile", action="store_true", help="use torch.compile (worth it on a GPU)")
    options = parser.parse_args(argv)
    settings = Settings(**{name: getattr(options, name) for name in asdict(defaults)})
    for name in ("steps", "batch", "eval_every", "minutes", "lr"):
        if not getattr(settings, name) > 0:
            raise RequestError(f"--{name} is {getattr(settings, name)}; it must be above 0")
    for name in ("warmup", "weight_decay", "micro_batch", "seed"):
        if not getattr(settings, name) >= 0:
            raise RequestError(f"--{name} is {getattr(settings, name)}; it must not be negative")
    for name, most in (("steps", 10**12), ("batch", 10**6), ("seed", MAX_SEED), ("lr", 1e6), ("weight_decay", 1e6)):
        if getattr(settings, name) > most:
            raise RequestError(f"--{name} is {getattr(settings, name)}; it can be at most {most}")
    if not 0 <= settings.dropout < 1:
        raise RequestError(f"--dropout is {settings.dropout}; it must be from 0 up to, not including, 1")
    if settings.micro_batch and settings.batch % settings.micro_batch:
        raise RequestError(f"--micro_batch is {settings.micro_batch}; it must divide --batch {settings.batch}")
    try:
        config = settings.model_config()
        if settings.device != "auto":
            torch.zeros(1, device=settings.device).item()
    except WeightsError as error:
        raise RequestError(error) from None
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise RequestError(f"--device {settings.device} cannot be used ({reason}); try --device auto") from None
    check_output(options.out, "--out", [options.text], config.file_bytes)
    options.log = options.log or options.out.with_suffix(".log.jsonl")
    check_output(options.log, "--log", [options.text])
    if os.path.realpath(options.out) == os.path.realpath(options.log):
        raise RequestError(f"--log: {options.log} is where the weights go; choose another name")
    return options, settings


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (0, or 2 after a one-line error)."""
    mistakes = (CorpusError, bpe.TokenizerError, WeightsError, FileError)
    return run_program("train_tiny", lambda: run(*parse_arguments(argv)), mistakes, "stopped; nothing was written")


def run(options: argparse.Namespace, settings: Settings) -> None:
    """Read, train, write: the program without its error handling."""
    started = time.perf_counter()
    corpus = read_corpus(options.text, settings.n_ctx)
    config = settings.model_config()
    print(
        f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held out, read in "
        f"{time.perf_counter() - started:.1f} s; {config.n_parameters:,} parameters in {config.file_bytes:,} bytes",
        flush=True,  # an output that cannot be written is found out before the training
    )
    rows: list[dict] = []
    problems: list[str] = []

    def log(rows: list[dict]) -> None:
        """A log that cannot be written any more is no reason to lose the training."""
        try:
            write_log(options.log, rows)
        except (OSError, FileError) as error:
            if not problems:
                problems.append(f"{options.log} cannot be written any more ({error})")
                print(f"train_tiny: {problems[0]}; the training goes on", file=sys.stderr)

    def on_row(row: dict) -> None:
        rows.append(row)
        log(rows)

    try:
        model, summary = train(corpus, settings, on_row)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise CorpusError("there is not enough memory; choose a smaller --batch, --micro_batch or model") from None
    state = {name: tensor.half().numpy() for name, tensor in model.state_dict().items()}
    out, summary["weights_sha256"], problem = keep_weights(options.out, config, state)
    if problem:
        problems.append(problem)
    summary["samples"] = []
    try:
        for prompt in PROMPTS:
            for temperature in (0.0, 0.8):
                text = sample_text(model, prompt, 80, temperature)
                summary["samples"].append({"temperature": temperature, "text": text})
    except KeyboardInterrupt:
        pass  # of the samples; the weights are written
    log([*rows, summary])
    for sample in summary["samples"]:
        print(f"--- temperature {sample['temperature']:g}\n{sample['text']}")
    print(
        f"{out}: held-out loss {summary['held_out_loss']} nats a token (perplexity "
        f"{summary['held_out_perplexity']}) after {summary['best_step']} of {summary['steps']} steps and "
        f"{summary['seconds']} s, SHA-256 {summary['weights_sha256']}"
    )
    if problems:
        raise CorpusError("; ".join(problems))


if __name__ == "__main__":
    sys.exit(main())
