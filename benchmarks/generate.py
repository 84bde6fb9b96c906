"""Time sampling beside Hugging Face's `generate`, and the capture of an attention row beside a plain reward pass.

    python benchmarks/generate.py [--write] [--repeats 7]

The model and the prompts are those of `workload.py`: 32 prompts of 32 tokens, responses of equal length. Sampling also
gathers the log-probability of each token, `generate` does not. What is compared takes turns in one process and one
thread; numbers are medians of processor time. With `--write` the report goes to `benchmarks/results/generate-DATE.md`.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from workload import VOCABULARY, Workload, policy, scorer, tokenizer

from apportion.batch import AttentionRequest, Needs, Prompts
from apportion.models import Policy
from apportion.rollout import Responses, sample
from apportion.sampling import Sampling
from apportion.score.reward_model import RewardModel

HERE = Path(__file__).parent
ROWS, PROMPT, LENGTHS = 32, 32, (64, 256)


def random_prompts() -> Prompts:
    """Draw prompts of equal length."""
    ids = torch.randint(2, VOCABULARY, (ROWS, PROMPT), generator=torch.Generator().manual_seed(2))
    return Prompts(prompt_ids=ids, prompt_mask=torch.ones_like(ids, dtype=torch.bool), texts=[], columns={})


def precision(bf16: bool) -> AbstractContextManager:
    """Enter autocast, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def samplers(new: int, bf16: bool) -> dict[str, Callable[[], object]]:
    """Prepare both ways to draw responses of a length."""
    model, prompts = policy(Workload()).eval(), random_prompts()
    host: Any = model  # LlamaForCausalLM.generate is not known to the type checker
    ours = Policy(model, (1,))
    uniforms = torch.rand(ROWS, new, generator=torch.Generator().manual_seed(3))
    options = {"do_sample": True, "max_new_tokens": new, "top_k": 0, "top_p": 1.0, "temperature": 1.0}

    def sampled() -> None:
        with precision(bf16):
            sample(ours, prompts, Sampling(max_new_tokens=new), uniforms, pad_id=0)

    def generated() -> None:
        with precision(bf16):
            host.generate(input_ids=prompts.prompt_ids, attention_mask=prompts.prompt_mask.long(), **options)

    return {"sample": sampled, "generate": generated}


def rewards(new: int) -> dict[str, Callable[[], object]]:
    """Prepare a reward pass without and with the attention row."""
    prompts, words = random_prompts(), tokenizer()
    ids = torch.randint(2, VOCABULARY, (ROWS, new), generator=torch.Generator().manual_seed(4))
    responses = Responses(
        response_ids=ids, response_mask=torch.ones_like(ids, dtype=torch.bool), logprobs=torch.zeros(ids.shape)
    )
    reward = RewardModel(scorer().requires_grad_(False), words, words)
    return {
        "score": lambda: reward(prompts, responses),
        "score and attention": lambda: reward(prompts, responses, Needs(attention=AttentionRequest())),
        "score and prefix scores": lambda: reward(prompts, responses, Needs(prefix_scores=True)),
    }


def medians(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Let the tasks take turns; the medians of each, in seconds of processor time."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            begin = time.process_time()
            task()
            if turn:  # the first warms up
                taken[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def circumstances() -> Iterator[str]:
    """State the command, the commit, the machine and the hour."""
    git = ("git", "-C", str(HERE))
    commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    models = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in text]
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {commit}"
    yield f"- machine: {models[0].split(':')[1].strip()}, {os.cpu_count()} cores, one thread"
    yield f"- torch {torch.__version__}, transformers {transformers.__version__}"
    yield f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load average of 15 minutes: {os.getloadavg()[2]:.1f}"
    yield ""


def report(repeats: int) -> Iterator[str]:
    """Measure, and write the report line by line."""
    yield from ("# Sampling beside `generate`, and what a reward model is asked besides its score", "")
    yield f"{ROWS} prompts of {PROMPT} tokens, Llama of 8.39 M parameters; medians of {repeats} turns, processor time."
    yield ""
    yield from circumstances()
    yield from (
        "| new tokens | precision | `sample`, tokens/s | `generate`, tokens/s | ratio of time |",
        "|---" * 5 + "|",
    )
    for new in LENGTHS:
        for bf16 in (False, True):
            times = medians(samplers(new, bf16), repeats)
            rates = " | ".join(f"{ROWS * new / times[name]:.0f}" for name in ("sample", "generate"))
            kind = "bf16 autocast" if bf16 else "float32"
            yield f"| {new} | {kind} | {rates} | {times['sample'] / times['generate']:.3f} |"
    yield from ("", "| new tokens | reward pass | seconds | ratio |", "|---" * 4 + "|")
    for new in LENGTHS:
        times = medians(rewards(new), repeats)
        for name, seconds in times.items():
            yield f"| {new} | {name} | {seconds:.3f} | {seconds / times['score']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sampling and reward passes.")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in report(arguments.repeats):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        path = HERE / "results" / f"generate-{datetime.now(UTC):%Y-%m-%d}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
