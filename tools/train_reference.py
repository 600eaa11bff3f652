"""Train the small language model that the package ships, from nothing but the Python sources of this machine.

What: a Llama (grouped-query attention, rotary, SwiGLU, tied embeddings) of 5.2 M parameters with a byte-level BPE of
4,096 entries, trained to continue Python code.

Why: every claim of the project is to be measured on real, trained weights without a download. Random weights do not
have outlier channels, correlated inputs or a loss worth keeping.

Data: the interpreter's standard library (without its tests) and a few pinned dependencies. Files are split into
training
and held-out modules by the SHA-256 of their relative path, so a module is wholly on one side.

Optimiser: Muon (Jordan et al. 2024) for the matrices, AdamW for embeddings and norms; a trapezoidal learning rate.
`torch.optim.Muon` computes its Newton-Schulz iteration in bfloat16, which CPUs without bf16 instructions run about
forty
times slower than float32; hence the few lines of our own.

Reproducible: seed, file order and split are fixed; the corpus hash goes into the model card. A killed run resumes from
its last checkpoint with the same batches.

    python tools/train_reference.py --out build/reference --steps 2000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEPENDENCIES = (
    "accelerate", "compressed_tensors", "fsspec", "huggingface_hub", "jinja2", "networkx", "numpy", "pydantic",
    "rich", "typer",
)  # fmt: skip
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "testing", "lib2to3", "site-packages", "turtledemo", "_vendor"}
MAX_FILE_BYTES = 150_000  # larger files are generated tables
HELD_OUT_PERCENT = 4
WINDOW = 512
# Words with one leading blank, numbers of up to three digits, punctuation, and indentation kept whole.
SPLIT_PATTERN = r" ?[A-Za-z_]+|\d{1,3}| ?[^\sA-Za-z_\d]+|\n+[ \t]*|[ \t]+"


def source_files() -> Iterator[tuple[str, Path]]:
    """Yields (relative name, path) of every Python source, in a machine-independent order."""
    paths = sysconfig.get_paths()
    roots = [("python", Path(paths["stdlib"]))] + [(name, Path(paths["purelib"]) / name) for name in DEPENDENCIES]
    for name, root in roots:
        if not root.is_dir():
            sys.exit(f"error: {name} is not installed; install the pinned dependencies first (make install)")
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]) and 200 < path.stat().st_size <= MAX_FILE_BYTES:
                yield f"{name}/{relative.as_posix()}", path


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def read_corpus() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns (training, held-out) lists of (name, text)."""
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for name, path in source_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        sides[is_held_out(name)].append((name, text))
    return sides


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> np.ndarray:
    """Every text once, in a seeded order, an end-of-text token after each; uint16 [tokens]."""
    order = np.random.default_rng(seed).permutation(len(texts))
    pieces = []
    for start in range(0, len(order), 256):
        batch = [texts[i] for i in order[start : start + 256]]
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            pieces.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(pieces)


def window_batches(stream: np.ndarray, bos: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches int64 [batch_size, 512]; a window is BOS and 511 consecutive tokens, each epoch shifted anew."""
    generator = np.random.default_rng(seed)
    step = WINDOW - 1
    while True:
        offset = int(generator.integers(step))
        starts = generator.permutation(np.arange(offset, len(stream) - step, step))
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            rows = [np.concatenate([[bos], stream[s : s + step]]) for s in starts[first : first + batch_size]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024), in float32."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, with decoupled weight decay; for weights [out, in] only."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def build_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=640,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # each block starts as the identity
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up over 20 steps, stay, fall linearly to 2% over the last half."""
    return min(1.0, (step + 1) / 20, 0.02 + 0.98 * (steps - step) / (0.5 * steps))


def train(
    model: LlamaForCausalLM, batches: Iterator[torch.Tensor], steps: int, stop: int, checkpoint: Path, device: str
) -> list[float]:
    """Trains in float32 for `stop` batches of a schedule of `steps`; resumes from `checkpoint`; returns the loss
    (nats a token) of each step.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    base_rates = [0.02, 6e-3]
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        losses = state["losses"]
        for _ in losses:
            next(batches)
    started = time.monotonic()
    first = len(losses)
    for step in range(first, stop):
        for optimiser, rate in zip(optimisers, base_rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * learning_rate_factor(step, steps)
        batch = next(batches).to(device)
        logits = model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 0:
            pace = (time.monotonic() - started) / (step - first + 1)
            print(f"step {step} loss {np.mean(losses[-20:]):.4f} {pace:.2f} s/step, {pace * (stop - step) / 60:.0f} min left", flush=True)  # fmt: skip  # noqa: E501
        if (step + 1) % 50 == 0 or step + 1 == stop:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "losses": losses},
                temporary,
            )
            temporary.rename(checkpoint)
    return losses


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], stride: int) -> float:
    """Bits a byte over all texts in one stream, an end-of-text token after each, as a compressor would read them.

    Windows of BOS and 511 tokens, `stride` apart: each token is predicted once, with at least 511 - stride tokens
    before
    it. A stride of 511 is the plain non-overlapping protocol. The end-of-text tokens are paid for.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    stream = torch.tensor(ids)
    nats, done = 0.0, 0
    while done < len(stream):
        stop = min(len(stream), done + (WINDOW - 1 if done == 0 else stride))
        window = torch.cat([torch.tensor([tokenizer.bos_token_id]), stream[max(0, stop - WINDOW + 1) : stop]])
        logits = model(window[None]).logits[0, :-1].float()
        fresh = stop - done
        nats += torch.nn.functional.cross_entropy(logits[-fresh:], window[-fresh:], reduction="sum").item()
        done = stop
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


def sample_text(entries: list[tuple[str, str]], max_bytes: int) -> str:
    """Standard-library modules (PSF license) of up to 24 kB each, in order of the hash of their name."""
    chosen, size = [], 0
    for _, text in sorted(
        (e for e in entries if e[0].startswith("python/") and len(e[1]) < 24_000),
        key=lambda e: hashlib.sha256(e[0].encode()).digest()[4:],
    ):
        if size + len(text.encode()) <= max_bytes:
            chosen.append(text)
            size += len(text.encode())
    return "\n".join(chosen)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# fettle reference model

A Llama of {parameters:,} parameters that completes Python code; trained by `tools/train_reference.py` of the fettle
project so that its main job and its tests run on real, trained weights. It is not meant for anything else.

| what | value |
| --- | --- |
| architecture | Llama, hidden 256, 6 layers, 8 query and 4 key-value heads, MLP 640, tied embeddings, context 512,
bf16 |
| tokenizer | byte-level BPE, {vocab_size:,} entries, trained on the training modules |
| training data | {train_files:,} Python modules, {train_bytes:,} bytes: the standard library without its tests, and
{dependencies} |
| held-out data | {held_files:,} modules, {held_bytes:,} bytes, split by file; none was seen in training |
| corpus SHA-256 | `{corpus_sha256}` |
| steps, tokens | {steps:,} steps (of a schedule of {schedule:,}) of {batch_size} windows of 512, {tokens:,} tokens |
| optimiser | Muon for matrices, AdamW for the rest, seed {seed} |
| training loss, mean of the last 50 steps | {loss:.4f} nats a token |
| held-out, bits a byte (weights as shipped; windows of 512, 256 apart) | {bits:.4f} |
| held-out, bits a byte, windows that do not overlap | {plain_bits:.4f} |
| `xz -9e` on the same bytes, all modules in one stream | {xz_bits:.4f} |
| better than xz by | {gain:.1%} |

`{heldout_name}` and `{calibration_name}` are samples of the held-out and the training modules of Python's standard
library (Python Software Foundation License), shipped for evaluation and calibration.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stop", type=int, default=None, help="end after this step of the schedule of --steps")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    training, held_out = read_corpus()
    digest = hashlib.sha256()
    for name, text in training + held_out:
        digest.update(f"{name}\0{text}\0".encode())
    texts = [text for _, text in training]
    print(f"{len(training)} training files, {sum(map(len, texts)):,} characters; {len(held_out)} held-out", flush=True)
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(texts, vocab_size=4096)
        tokenizer.save_pretrained(args.out)
    stream = token_stream(tokenizer, texts, args.seed)
    print(f"{len(stream):,} tokens, {sum(len(t.encode()) for t in texts) / len(stream):.2f} bytes a token", flush=True)

    model = build_model(vocab_size=4096).to(args.device)
    batches = window_batches(stream, tokenizer.bos_token_id, args.batch_size, args.seed)
    stop = args.stop or args.steps
    losses = train(model, batches, args.steps, stop, args.out / "checkpoint.pt", args.device)
    model = model.to("cpu", torch.bfloat16)
    model.save_pretrained(args.out)
    (args.out / "heldout.txt").write_text(sample_text(held_out, 400_000), encoding="utf-8")
    (args.out / "calibration.txt").write_text(sample_text(training, 600_000), encoding="utf-8")

    held_texts = [text for _, text in held_out]
    held_bytes = "".join(held_texts).encode()
    model = model.float().eval()
    bits, plain_bits = (bits_per_byte(model, tokenizer, held_texts, stride) for stride in (256, WINDOW - 1))
    xz_bits = 8 * len(lzma.compress(held_bytes, preset=9 | lzma.PRESET_EXTREME)) / len(held_bytes)
    facts = {
        "parameters": model.num_parameters(), "vocab_size": len(tokenizer), "train_files": len(training),
        "train_bytes": sum(len(t.encode()) for t in texts), "dependencies": ", ".join(DEPENDENCIES),
        "held_files": len(held_out), "held_bytes": len(held_bytes), "corpus_sha256": digest.hexdigest(),
        "steps": stop, "schedule": args.steps, "batch_size": args.batch_size, "tokens": stop * args.batch_size * WINDOW,
        "seed": args.seed, "loss": float(np.mean(losses[-50:])), "bits": bits, "plain_bits": plain_bits, "xz_bits": xz_bits,  # noqa: E501
        "gain": 1 - bits / xz_bits, "heldout_name": "heldout.txt", "calibration_name": "calibration.txt",
    }  # fmt: skip
    (args.out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
