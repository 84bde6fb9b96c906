"""Time the credit stage: segmentation, pooling, GAE and both losses, beside the same equations as loops over tokens.

    python benchmarks/credit.py [--write] [--rows 64] [--repeats 50]

Everything is timed in one thread, forward only, on rows of full length; a number is the median of the repeats, taken in
turns so that a busy moment of the machine falls on all of them. Beside the time on the clock stands the processor time
of the thread, which leaves out the turns of other programs. With `--write` the report goes to
`benchmarks/results/credit-DATE.md`. The loops are those of `tests/reference.py`.
"""

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from apportion import (
    GAE,
    Attention,
    Credit,
    CreditConfig,
    EveryToken,
    FixedNgram,
    Perplexity,
    PrefixDifference,
    RandomizedNgram,
    Rollout,
    Scores,
    Shuffled,
    Uniform,
    WholeResponse,
    assign_credit,
    policy_loss,
    value_loss,
)
from apportion.update.losses import Granularity

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402 - beside the tests that hold the code against it

LENGTHS, SIZES = (128, 256, 512, 1024, 2048), (1, 2, 5, 10, 50, 512)
LIMIT = 3.0  # milliseconds, at 64 rows of 512 tokens and n = 5

Task = Callable[[], object]


def batch(rows: int, tokens: int) -> tuple[Rollout, Scores, Tensor, Tensor]:
    """Draw a rollout, its scores, and what the current policy and critic say."""
    generator = torch.Generator().manual_seed(0)
    old, ref, new = -3 * torch.rand(3, rows, tokens, generator=generator)
    old_values, values = torch.randn(2, rows, tokens, generator=generator)
    ids = torch.randint(0, 1000, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    rollout = Rollout(
        prompt_ids=ids[:, :8],
        prompt_mask=mask[:, :8],
        response_ids=ids,
        response_mask=mask,
        old_logprobs=old,
        ref_logprobs=ref,
        values=old_values,
    )
    scores = Scores(
        scores=torch.randn(rows, generator=generator),
        attention=torch.rand(rows, tokens, generator=generator),
        prefix_scores=torch.randn(rows, tokens + 1, generator=generator),
    )
    return rollout, scores, new, values


def stage(rows: int, tokens: int, config: CreditConfig, ratio: Granularity = "token") -> Task:
    """Prepare the batched credit stage."""
    rollout, scores, new, values = batch(rows, tokens)
    mask = rollout.response_mask

    def run() -> tuple[Credit, Tensor, Tensor]:
        credit = assign_credit(rollout, scores, config)
        old, advantages = rollout.old_logprobs, credit.advantages
        of_policy = policy_loss(new, old, advantages, mask, cliprange=0.2, ratio=ratio, macro_ids=credit.macro_ids)
        of_value = value_loss(values, rollout.values, credit.returns, mask, cliprange_value=0.2)
        return credit, of_policy, of_value

    return run


def loops(rows: int, tokens: int, n: int) -> Task:
    """Prepare the same work as loops over rows and tokens."""
    rollout, scores, new, values = batch(rows, tokens)
    old, ref, old_values = (x.tolist() for x in (rollout.old_logprobs, rollout.ref_logprobs, rollout.values))
    numbers, new_rows, value_rows = scores.scores.tolist(), new.tolist(), values.tolist()
    options = reference.Options(termination=("fixed", n), redistribution=("terminal",))

    def run() -> tuple[float, float]:
        credits = [
            reference.assign_credit(
                reference.Row(
                    old_logprobs=old[b],
                    ref_logprobs=ref[b],
                    values=old_values[b],
                    score=numbers[b],
                    attention=[],
                    prefix_scores=[],
                    policy_attention=[],
                    error_tokens=[],
                ),
                options,
            )
            for b in range(rows)
        ]
        advantages, ids = [c.advantages for c in credits], [c.macro_ids for c in credits]
        of_policy = reference.policy_loss(new_rows, old, advantages, ids, cliprange=0.2, ratio="token")
        returns = [c.returns for c in credits]
        return of_policy, reference.value_loss(value_rows, old_values, returns, cliprange_value=0.2)

    return run


def medians(tasks: dict[str, Task], repeats: int) -> dict[str, tuple[float, float]]:
    """Time the tasks in turns; the medians of each in milliseconds, of the clock and of the processor."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for turn in range(repeats + 2):
        for name, task in tasks.items():
            clock, processor = time.perf_counter(), time.thread_time()
            task()
            if turn >= 2:  # the first two warm up
                taken[name].append((time.perf_counter() - clock, time.thread_time() - processor))
    return {name: (median(c for c, _ in pairs), median(p for _, p in pairs)) for name, pairs in taken.items()}


def median(seconds: Iterable[float]) -> float:
    """The median, in milliseconds."""
    return 1000 * statistics.median(seconds)


def configurations() -> dict[str, CreditConfig]:
    """One configuration for each choice, the others left at their defaults."""
    choices = (
        CreditConfig(termination=EveryToken()),
        CreditConfig(termination=RandomizedNgram()),
        CreditConfig(termination=Perplexity(variant="token")),
        CreditConfig(termination=Perplexity(variant="segment")),
        CreditConfig(termination=WholeResponse()),
        CreditConfig(redistribution=Uniform()),
        CreditConfig(redistribution=Attention()),
        CreditConfig(redistribution=PrefixDifference()),
        CreditConfig(redistribution=Shuffled(inner=Attention())),
        CreditConfig(macro_value="position"),
        CreditConfig(advantage=GAE(gamma=0.99, per="token")),
        CreditConfig(whiten_advantages=True),
        CreditConfig.official(),
    )
    return {describe(config): config for config in choices}


def describe(config: CreditConfig) -> str:
    """Name a configuration by what is not the default."""
    return " ".join(f"{k}={v}" for k, v in vars(config).items() if v != getattr(CreditConfig(), k))


def table(head: tuple[str, ...], lines: Iterator[tuple]) -> Iterator[str]:
    """Write a table in markdown."""
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    yield from (
        "| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in line) + " |" for line in lines
    )
    yield ""


def circumstances() -> Iterator[str]:
    """State the command, the commit, the machine and the hour."""
    git = ("git", "-C", str(ROOT))
    commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    paths = ("src/apportion/credit", "src/apportion/update/losses.py", "src/apportion/masked.py", "tests/reference.py")
    changed = subprocess.run([*git, "status", "--short", *paths], capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].split(":")[1].strip() if models else platform.processor()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {commit}{' with changes to the code measured' if changed else ''}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    yield f"- machine: {model}, {os.cpu_count()} cores, one thread; {versions}"
    yield f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load average (1, 5, 15 minutes) at the end: {load}"
    yield ""


def report(rows: int, repeats: int) -> Iterator[str]:
    """Measure, and write the report line by line."""
    five = CreditConfig(termination=FixedNgram(n=5))
    by_length = medians({str(t): stage(rows, t, five) for t in LENGTHS}, repeats)
    by_size = medians({str(n): stage(rows, 512, CreditConfig(termination=FixedNgram(n=n))) for n in SIZES}, repeats)
    slow_by_length = medians({str(t): loops(rows, t, 5) for t in LENGTHS}, 3)
    slow_by_size = medians({str(n): loops(rows, 512, n) for n in SIZES}, 3)
    ratios: tuple[Granularity, ...] = ("token", "macro", "macro_mean")
    choices = medians(
        {name: stage(rows, 512, config) for name, config in configurations().items()}
        | {f"ratio={ratio}": stage(rows, 512, five, ratio) for ratio in ratios},
        repeats,
    )
    found, busy = by_length["512"]
    verdict = "met" if found < LIMIT else "NOT met"
    yield "# The credit stage: segmentation, pooling, GAE, both losses"
    yield ""
    yield f"{rows} rows of 512 tokens, actions of 5: **{found:.2f} ms** ({busy:.2f} ms of processor time); the limit of"
    yield f"{LIMIT:.0f} ms is {verdict}. The loops over tokens take {slow_by_length['512'][1]:.0f} ms of it."
    yield "Medians in milliseconds. Where the clock shows more than the processor, other programs had the core."
    yield ""
    yield from circumstances()
    yield "## Against the length of responses, actions of 5 tokens"
    yield ""
    lines = ((t, *by_length[t], 1000 * by_length[t][1] / int(t), slow_by_length[t][1]) for t in by_length)
    yield from table(("tokens", "clock", "processor", "processor per 1000 columns", "loops, processor"), lines)
    yield "## Against the size of actions, 512 tokens"
    yield ""
    lines = ((n, -(-512 // int(n)), *by_size[n], slow_by_size[n][1]) for n in by_size)
    yield from table(("tokens an action", "actions a response", "clock", "processor", "loops, processor"), lines)
    yield "## Other choices, 512 tokens, all else as above"
    yield ""
    yield from table(("choice", "clock", "processor"), ((name, *times) for name, times in choices.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the credit stage.")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    parser.add_argument("--rows", type=int, default=64, help="responses in the batch")
    parser.add_argument("--repeats", type=int, default=50, help="repeats of each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # A process that has run a model has freed large blocks, after which the C library keeps memory at hand; in a fresh
    # one it returns every freed tensor, and page faults are most of what is timed.
    torch.zeros(4 * 2**20)
    lines = []
    for line in report(arguments.rows, arguments.repeats):
        print(line)
        lines.append(line)
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / f"credit-{datetime.now(UTC):%Y-%m-%d}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines).rstrip() + "\n")
        print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
