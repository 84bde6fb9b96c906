"""Check the package on a CUDA machine against the CPU, and measure there what is slow or large.

    python benchmarks/gpu.py [--write] [--only checks update] [--quick]

Models have random weights. The large one has the shape of Llama 3.2 1B (hidden 2048, 16 layers, 32 heads over 8
key-value heads) and a vocabulary of 32,768. What is compared takes turns in one process; numbers are medians of seconds
on the clock with the device waited for, and of the peak of allocated device memory. With `--write` the report goes to
`benchmarks/results/gpu-DATE.md`. `--quick` runs everything on tiny models, to see that it runs. Where the history of
the checkout does not say which commit is measured, `--commit` does.
"""

import argparse
import gc
import importlib.util
import itertools
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from apportion_peer import METHODS
from gpu_checks import claims
from gpu_workload import LARGE, TINY, Enough, Watch, batch, policy, scorer, trainer_of, turn_of
from torch import Tensor, nn
from workload import EOS, PAD, tokenizer

from apportion import CreditConfig, Perplexity, Sampling, assign_credit, policy_loss, value_loss
from apportion.batch import AttentionRequest, Prompts
from apportion.logprobs import token_logprobs
from apportion.models import Policy, inputs
from apportion.rollout import sample
from apportion.score.reward_model import RewardModel

ROOT = Path(__file__).parent.parent
Task = Callable[[], object]
Line = tuple[object, ...]


def cost(task: Task) -> tuple[float, float]:
    """Measure one call: seconds, and the MiB that it allocated at its peak over what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, begin = torch.cuda.memory_allocated(), time.perf_counter()
    task()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, (torch.cuda.max_memory_allocated() - held) / 2**20


def medians(tasks: dict[str, Task], repeats: int) -> dict[str, tuple[float, float]]:
    """Let the tasks take turns, the first to warm up; medians of seconds and MiB.

    Every other turn is in reverse, for the clock of a hot device depends on what it did before.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name in list(tasks)[:: -1 if turn % 2 else 1]:
            measured = cost(tasks[name])
            if turn:
                taken[name].append(measured)
    return {
        name: (statistics.median(s for s, _ in pairs), statistics.median(m for _, m in pairs))
        for name, pairs in taken.items()
    }


def table(*head: str, lines: Iterable[Line]) -> Iterator[str]:
    """Write a table in markdown."""
    yield from (f"| {' | '.join(head)} |", "|---" * len(head) + "|")
    yield from (f"| {' | '.join(map(str, line))} |" for line in lines)
    yield ""


def checks(_: bool) -> Iterator[str]:
    """Compare CUDA with the CPU."""
    yield from ("## What holds on CUDA", "")
    lines = ((claim, f"{x:.2g}", f"{limit:.2g}", "yes" if x <= limit else "**NO**") for claim, x, limit in claims())
    yield from table("claim", "found", "at most", "holds", lines=lines)


def credit(quick: bool) -> Iterator[str]:
    """Time the credit stage."""
    sizes = ((4, 16), (8, 32)) if quick else ((64, 512), (256, 4096))
    choices = METHODS | {"Perplexity, segment": CreditConfig(termination=Perplexity(variant="segment"))}
    found = {size: medians({name: stage(size, c) for name, c in choices.items()}, 3 if quick else 30) for size in sizes}
    yield from ("## The credit stage: segmentation, pooling, GAE, both losses", "", "Milliseconds.", "")
    lines = ((name, *(f"{1000 * found[size][name][0]:.2f}" for size in sizes)) for name in choices)
    yield from table("credit", *(f"{rows} rows of up to {tokens} tokens" for rows, tokens in sizes), lines=lines)


def stage(size: tuple[int, int], config: CreditConfig) -> Task:
    """Prepare the credit stage."""
    rollout, scores = batch(*size, "cuda")
    new, values, mask = rollout.ref_logprobs, rollout.values + 0.1, rollout.response_mask

    def run() -> None:
        given = assign_credit(rollout, scores, config)
        policy_loss(new, rollout.old_logprobs, given.advantages, mask, cliprange=0.2, macro_ids=given.macro_ids)
        value_loss(values, rollout.values, given.returns, mask, cliprange_value=0.2)

    return run


def logprobs(quick: bool) -> Iterator[str]:
    """Measure log-probabilities over a large vocabulary beside a softmax over all logits."""
    vocabulary, tokens, width = (4096, 64, 32) if quick else (262_144, 4096, 2048)
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    head = nn.Linear(width, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    head.weight.grad = torch.zeros_like(head.weight)  # held before, not counted
    chosen = torch.randint(vocabulary, (tokens,), device="cuda")
    places = torch.zeros_like(chosen)

    def ours() -> Tensor:
        return token_logprobs(hidden, chosen, places, head, Sampling(), eos_ids=(EOS,), vocab_size=vocabulary)

    def softmax() -> Tensor:
        return head(hidden).float().log_softmax(-1).gather(1, chosen[:, None])

    found = {}
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            tasks = {f.__name__: learning(f) if gradient else f for f in (ours, softmax)}
            found[gradient] = medians(tasks, 2 if quick else 7)
    yield from ("## Log-probabilities of a large vocabulary", "")
    yield f"{tokens} tokens, hidden {width}, vocabulary {vocabulary:,}, bfloat16; the head's gradient is held before."
    yield ""
    named = itertools.product((("`token_logprobs`", "ours"), ("`log_softmax` of all logits", "softmax")), (False, True))
    cells = ((label, "yes" if g else "no", *found[g][name]) for (label, name), g in named)
    lines = ((label, g, f"{1000 * seconds:.1f}", f"{mib:,.0f}") for label, g, seconds, mib in cells)
    yield from table("how", "gradient", "ms", "peak, MiB", lines=lines)


def learning(compute: Callable[[], Tensor]) -> Task:
    """Follow a computation by its backward pass."""
    return lambda: compute().sum().backward()


@torch.no_grad()
def attention(quick: bool) -> Iterator[str]:
    """Measure what the attention row costs a reward pass."""
    rows, width = (2, 32) if quick else (16, 1024)
    model = scorer(TINY if quick else LARGE, torch.bfloat16)
    reward = RewardModel(model, tokenizer(), tokenizer())
    ids = torch.randint(2, 8192, (rows, width), device="cuda")
    whole = torch.ones_like(ids, dtype=torch.bool)
    padded = torch.arange(width, device="cuda") >= torch.arange(rows, device="cuda")[:, None] * (width // (2 * rows))
    yield from ("## The attention row beside a reward pass", "")
    yield f"{rows} rows of {width} tokens, bfloat16, Llama of {size_of(model)} parameters under sdpa."
    yield "`eager` is the same pass with `output_attentions=True`, of which one row is kept."
    yield ""
    lines = []
    for padding, mask in (("none", whole), ("left", padded)):
        tasks = reward_passes(reward, ids, mask)
        eager = {"eager": tasks.pop("eager")}
        found = medians(tasks, 2 if quick else 20) | medians(eager, 2 if quick else 6)
        alone = found["score"]
        lines += [
            (padding, name, f"{1000 * s:.1f}", f"{s / alone[0]:.3f}", f"{m:,.0f}", f"{m / alone[1]:.2f}")
            for name, (s, m) in found.items()
        ]
    yield from table("padding", "pass", "ms", "ratio", "peak over weights, MiB", "ratio", lines=lines)


def reward_passes(reward: RewardModel, ids: Tensor, mask: Tensor) -> dict[str, Task]:
    """Prepare a reward pass without the row, with it, and with eager maps."""
    model: Any = reward.model

    def eager() -> Tensor:
        model.set_attn_implementation("eager")
        maps = model.model(**inputs(model.model, ids, mask), use_cache=False, output_attentions=True).attentions[-1]
        model.set_attn_implementation("sdpa")
        return maps[:, :, -1].float().mean(1)

    return {
        "score": lambda: reward.read(ids, mask, None, mask),
        "score and attention row": lambda: reward.read(ids, mask, AttentionRequest(), mask),
        "eager": eager,
    }


def size_of(model: nn.Module) -> str:
    """Say how many parameters a model has."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} G"


def precision(autocast: bool) -> AbstractContextManager:
    """Enter autocast, or nothing."""
    return torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext()


def generation(quick: bool) -> Iterator[str]:
    """Measure sampling beside `generate`."""
    rows, prompt, lengths = (4, 8, (8, 16)) if quick else (32, 128, (128, 512))
    ids = torch.randint(2, 8192, (rows, prompt), device="cuda")
    given = Prompts(prompt_ids=ids, prompt_mask=torch.ones_like(ids, dtype=torch.bool), texts=[], columns={})
    lines = []
    for autocast in (False, True):
        model = policy(TINY if quick else LARGE, torch.float32 if autocast else torch.bfloat16)
        kind = "float32 under bf16 autocast" if autocast else "bfloat16"
        for new in lengths[: 1 if autocast else 2]:
            kernels = {name: launched(task) for name, task in samplers(model, given, 8, autocast).items()}
            for name, (seconds, mib) in medians(samplers(model, given, new, autocast), 1 if quick else 3).items():
                count, busy = kernels[name]
                cells = f"{rows * new / seconds:,.0f}", f"{1000 * seconds / new:.2f}", f"{busy:.2f}", f"{count:.0f}"
                lines.append((kind, new, f"`{name}`", *cells, f"{mib:,.0f}"))
        del model
        free()
    yield from ("## Sampling beside `generate`", "")
    yield f"{rows} prompts of {prompt} tokens, the large Llama; nothing ends early. `sample` also gives logprobs."
    yield "Device time and kernels a step are from a profile of 8 tokens, prompt included."
    yield ""
    head = ("weights", "new tokens", "how", "tokens/s", "ms a step", "device ms a step", "kernels a step", "peak, MiB")
    yield from table(*head, lines=lines)


def samplers(model: Any, given: Prompts, new: int, autocast: bool) -> dict[str, Task]:
    """Prepare both ways to draw responses of a length."""
    ours, sampling = Policy(model, (EOS,)), Sampling(max_new_tokens=new)
    uniforms = torch.rand(len(given.prompt_ids), new, generator=torch.Generator().manual_seed(3))
    options = {"do_sample": True, "max_new_tokens": new, "top_k": 0, "top_p": 1.0, "pad_token_id": PAD}

    def sampled() -> None:
        with precision(autocast):
            sample(ours, given, sampling, uniforms, pad_id=PAD)

    def generated() -> None:
        with precision(autocast):
            model.generate(input_ids=given.prompt_ids, attention_mask=given.prompt_mask.long(), **options)

    return {"sample": sampled, "generate": generated}


def launched(task: Task, steps: int = 8) -> tuple[float, float]:
    """Profile a task: kernels and milliseconds of the device a step."""
    task()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        task()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.device_type.name == "CUDA"]
    milliseconds = sum(event.self_device_time_total for event in kernels) / 1000
    return sum(event.count for event in kernels) / steps, milliseconds / steps


def updates(quick: bool) -> Iterator[str]:
    """Measure PPO updates of every method, split by phase."""
    size, turns = ((4, 8, 16), 1) if quick else ((64, 128, 256), 6)
    watch = Watch(turns=len(METHODS) * (turns + 1), end=True)
    trainer = trainer_of(TINY if quick else LARGE, size, True, watch)
    watch.attach(trainer)
    with suppress(Enough):
        trainer.train()
    taken = {name: [log for at, log in enumerate(watch.logs) if turn_of(at) == name][1:] for name in METHODS}
    yield from ("## A PPO update", "")
    gap = max(log["policy/sampler_gap"] for logs in taken.values() for log in logs)
    budget, parameters = trainer.args.ppo.micro_batch_tokens, size_of(trainer.policy.module)
    yield f"{size[0]} prompts of {size[1]} tokens, {size[2]} new ones each, one epoch, bf16 autocast, micro-batches of"
    yield f"{budget:,} tokens. Models of {parameters} parameters in the four roles: policy and critic in float32 with"
    yield f"AdamW, reference and reward model in bfloat16. Seconds, medians of {turns} updates of each method, in"
    yield "turns, after one to warm up; ratios are to token PPO in the same turn. Peaks are of all that is allocated,"
    yield f"models included. Largest difference between log-probabilities of sampling and of training: {gap:.2g} nats."
    yield ""
    phases = ("generate", "score", "credit", "update")
    lines = []
    for name, logs in taken.items():
        seconds = [f"{statistics.median(log[f'time/{p}'] for log in logs):.4g}" for p in phases]
        whole = statistics.median(total(log, phases) for log in logs)
        ratios = [against(logs, taken["token PPO"], part) for part in (phases, phases[1:])]
        lines.append((name, *seconds, f"{whole:.3f}", *ratios))
    yield from table("method", *phases, "all, s", "ratio", "ratio without generation", lines=lines)
    lines = ((name, *(f"{max(log[f'peak/{p}'] for log in logs):.2f}" for p in phases)) for name, logs in taken.items())
    yield from table("peak, GiB", *phases, lines=lines)


def total(log: dict[str, float], phases: Iterable[str]) -> float:
    """Seconds of some phases."""
    return sum(log[f"time/{phase}"] for phase in phases)


def against(ours: list[dict[str, float]], theirs: list[dict[str, float]], phases: tuple[str, ...]) -> str:
    """Median over the turns of the ratio of time."""
    ratios = (total(a, phases) / total(b, phases) for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.3f}"


def free() -> None:
    """Give back what the last section held."""
    gc.collect()
    torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[bool], Iterator[str]]] = {
    "checks": checks,
    "credit": credit,
    "logprobs": logprobs,
    "attention": attention,
    "generation": generation,
    "update": updates,
}


def report(options: argparse.Namespace) -> Iterator[str]:
    """Check and measure, and write the report line by line."""
    git = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    flash = "" if importlib.util.find_spec("flash_attn") else "not "
    yield from ("# On a GPU", "")
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {options.commit or git.stdout.strip() or 'unknown'}"
    yield f"- machine: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; Python {platform.python_version()}"
    yield f"- torch {torch.__version__}, transformers {transformers.__version__}; flash_attn {flash}there"
    yield f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    yield ""
    for name in options.only or SECTIONS:
        yield from SECTIONS[name](options.quick)
        free()


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the package on CUDA, and measure it there.")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections only")
    parser.add_argument("--quick", action="store_true", help="tiny models and sizes, to see that it runs")
    parser.add_argument("--commit", help="the commit, where the history of the checkout does not say")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu.py needs a CUDA device, and torch sees none here; run it on a machine with one"
        )
    torch.set_float32_matmul_precision("highest")  # no TF32
    lines = []
    for line in report(options):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        path = ROOT / "benchmarks" / "results" / f"gpu-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
