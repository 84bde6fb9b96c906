"""Measure the memory of log-probabilities over a vocabulary of 262,144 tokens, beside a softmax over all logits.

    python benchmarks/logprobs.py [--write] [--vocabulary 262144]

Each measurement is a process of its own: a tiny Llama (hidden 64, one layer) computes the log-probabilities of 2 rows
of responses, with and without gradient, and the growth of the process's peak resident memory over what it held before
is read from the kernel (`VmHWM`). `policy` is `apportion.models.Policy`; `softmax` is `log_softmax(-1).gather(...)` of
all logits in float32. With `--write` the report goes to `benchmarks/results/logprobs-DATE.md`.
"""

import argparse
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.logprobs import CHUNK_ELEMENTS
from apportion.models import Policy
from apportion.sampling import Sampling

ROOT = Path(__file__).parent.parent
ROWS, PROMPT = 2, 8
TOKENS = (64, 256, 1024)
SOFTMAX_TOKENS = (64, 256)
"""Beyond them the softmax needs more memory than a small machine has."""


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def by_softmax(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Log-probabilities over all logits at once."""
    logits = model(ids).logits[:, PROMPT - 1 : -1].float()
    return logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None])[..., 0]


def by_policy(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Log-probabilities as training computes them."""
    prompt, response = ids[:, :PROMPT], ids[:, PROMPT:]
    ones = torch.ones_like(ids, dtype=torch.bool)
    return Policy(model, (2,))(prompt, ones[:, :PROMPT], response, ones[:, PROMPT:], Sampling())


def measure(kind: str, vocabulary: int, tokens: int, dtype: str, gradient: bool) -> tuple[float, float]:
    """Return the growth of the peak in MiB, and seconds; in a process that does nothing else."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if gradient else None  # held before, not counted
    compute = {"policy": by_policy, "softmax": by_softmax}[kind]
    with torch.set_grad_enabled(gradient):
        compute(model, torch.randint(3, vocabulary, (1, PROMPT + 2)))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before, begin = peak(), time.perf_counter()
        logprobs = compute(model, torch.randint(3, vocabulary, (ROWS, PROMPT + tokens)))
        if gradient:
            logprobs.sum().backward()
    return (peak() - before) / 2**20, time.perf_counter() - begin


def in_a_process(*arguments: object) -> tuple[float, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    growth, seconds = map(float, result.stdout.split()[-2:])
    return growth, seconds


def lines(vocabulary: int, dtype: str) -> Iterator[str]:
    """One line of the table for each length."""
    for tokens in TOKENS:
        cells = [str(tokens), f"{ROWS * tokens * vocabulary * 4 / 2**20:,.0f}"]
        for gradient in (False, True):
            for kind in ("policy", "softmax"):
                if kind == "softmax" and tokens not in SOFTMAX_TOKENS:
                    cells.append("-")
                    continue
                growth, seconds = in_a_process(kind, vocabulary, tokens, dtype, int(gradient))
                cells.append(f"{growth:,.0f} ({seconds:.1f} s)")
        yield f"| {' | '.join(cells)} |"


def report(vocabulary: int, command: str) -> Iterator[str]:
    """Write the report, line by line."""
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    yield f"# Memory of log-probabilities, vocabulary {vocabulary:,}"
    yield ""
    yield f"{ROWS} rows; growth of the peak resident memory in MiB (seconds in brackets), one process each. Chunks are"
    yield f"of {CHUNK_ELEMENTS:,} logits, {CHUNK_ELEMENTS * 4 // 2**20} MiB in float32. Parameters and their gradients"
    yield "are held before and not counted."
    yield ""
    yield f"- command: `{command}`"
    yield f"- commit: {commit.stdout.strip()}"
    yield f"- machine: {platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    yield f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    for dtype in ("float32", "bfloat16"):
        yield ""
        yield f"## Parameters in {dtype}"
        yield ""
        yield "| tokens | all logits in float32 | policy | softmax | policy, gradient | softmax, gradient |"
        yield "|---|---|---|---|---|---|"
        yield from lines(vocabulary, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of log-probabilities.")
    parser.add_argument("--write", action="store_true", help="write the report under benchmarks/results")
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, vocabulary, tokens, dtype, gradient = options.measure
        print(*measure(kind, int(vocabulary), int(tokens), dtype, gradient == "1"))
        return
    written = []
    for line in report(options.vocabulary, f"python benchmarks/logprobs.py {' '.join(sys.argv[1:])}".strip()):
        print(line, flush=True)
        written.append(line)
    if options.write:
        target = ROOT / "benchmarks" / "results" / f"logprobs-{datetime.now(UTC):%Y-%m-%d}.md"
        target.write_text("\n".join(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
