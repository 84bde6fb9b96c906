"""Time termination conditions: alone, and reading programs by `CodeParse` within a step of PPO.

    python benchmarks/parse.py --data FOLDER [--steps 6] [--write]

FOLDER holds `humaneval/HumanEval.jsonl.gz`, `gpt2_tokenizer/tokenizer.json` and `stories260k/`, a language model.
First each condition on 64 rows of 512 tokens, in processor time of one thread; then 64 programs of HumanEval, cut at
512 tokens; then the share of `time/parse` in a step of PPO on 32 responses of 128 tokens, of a model of 260,000
parameters, beside which parsing weighs as much as it ever can: by tree-sitter, and by a small Stanza. With `--write`
the report goes to `benchmarks/results/parse-DATE.md`.
"""

import argparse
import gzip
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from operator import attrgetter
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from apportion import (
    CodeParse,
    ConstituencyParse,
    CreditConfig,
    Delimiter,
    Entropy,
    EveryToken,
    FixedNgram,
    LowProbability,
    Perplexity,
    PPOArguments,
    PPOTrainer,
    RandomizedNgram,
    ResponseTexts,
    Rollout,
    Sampling,
    ShuffledBoundaries,
    TerminationCondition,
    WholeResponse,
    with_text,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from small_stanza import write_stanza  # noqa: E402

ROWS, TOKENS, TURNS = 64, 512, 40
SEARCHED = r"\b(?:Step|Case) \d+:"
CONDITIONS = (
    EveryToken(),
    FixedNgram(),
    RandomizedNgram(),
    Perplexity(),
    Perplexity(variant="segment"),
    Entropy(),
    LowProbability(),
    Delimiter(r"\n"),
    Delimiter(r"\. "),
    Delimiter(r"[.!?](?=\s)"),
    Delimiter(r"\s"),
    Delimiter(r"\w+"),
    Delimiter(r"[.!?]+\s"),
    Delimiter(r"\n\n"),
    Delimiter(r"\n\n|[.!?]\s"),
    Delimiter(r"(?<=[.!?])\s+|\n+"),
    Delimiter(r"Step \d+:|[.!?] "),
    Delimiter(r"[.!?]['\")]*\s"),
    Delimiter(SEARCHED),
    ShuffledBoundaries(FixedNgram()),
    ShuffledBoundaries(Perplexity()),
    WholeResponse(),
)


def times_of(function: Callable[..., object], repeats: int, given: Callable[[], tuple] = tuple) -> list[float]:
    """Processor times, in milliseconds, without that of making what the function is given."""
    times = []
    for _ in range(repeats):
        arguments = given()
        begin = time.process_time()
        function(*arguments)
        times.append(1000 * (time.process_time() - begin))
    return times


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median processor time."""
    return statistics.median(times_of(function, repeats))


def rollout_of(ids: torch.Tensor, mask: torch.Tensor) -> Rollout:
    numbers = -3 * torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    return Rollout(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.zeros_like(mask[:, :1]),
        response_ids=ids,
        response_mask=mask,
        old_logprobs=numbers,
        ref_logprobs=numbers,
        values=numbers,
        entropies=-numbers,
    )


def text_of(mask: torch.Tensor) -> ResponseTexts:
    """Sentences of four characters a token, as far as each row has tokens."""
    sentence = "The quick brown fox, jumped over the lazy dog and so on"
    text = f"{sentence}. {sentence}! {sentence}.\n" * 20
    places = 4 * torch.arange(mask.shape[1])
    spans = torch.stack([places, places + 4], 1) * mask[..., None]
    return ResponseTexts(texts=tuple(text[:length] for length in spans.amax((1, 2)).tolist()), spans=spans)


def search(texts: tuple[str, ...]) -> None:
    """Find every match, and do nothing with it."""
    finditer = re.compile(SEARCHED).finditer
    for text in texts:
        for _ in finditer(text):
            pass


def alone() -> Iterator[str]:
    yield from ("", f"## {ROWS} rows of {TOKENS} tokens, milliseconds of processor time", "")
    yield f"Median of {TURNS} turns of ten, and in parentheses the least of all: what it takes where no neighbour has"
    yield "the caches. All conditions take turns, so that they share the good and the bad times of the machine."
    yield ""
    yield "| condition | whole rows | with holes, as tools leave them | of unequal lengths, padded |"
    yield "|---|---|---|---|"
    whole = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    holes = whole.clone()
    holes[:, 100:140] = False
    lengths = torch.linspace(1, TOKENS, ROWS).long()[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    padded = torch.arange(TOKENS) < lengths[:, None]
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long)
    texts = {mask: text_of(mask) for mask in (whole, holes, padded)}
    rollouts = [replace(rollout_of(ids, mask), text=text) for mask, text in texts.items()]
    # Each time a copy, for a rollout keeps what is worked out once.
    tasks: dict = {(c, i): (c, lambda r=r: (replace(r),)) for c in CONDITIONS for i, r in enumerate(rollouts)}
    tasks |= {("begins", 0): (attrgetter("begins"), lambda: (replace(texts[whole]),))}
    tasks |= {("re", 0): (search, lambda: (texts[whole].texts,))}
    times: dict = {name: [] for name in tasks}
    for _, (name, (function, given)) in product(range(TURNS), tasks.items()):
        times[name] += times_of(function, 10, given)
    cells = {name: f"{statistics.median(taken):.2f} ({min(taken):.2f})" for name, taken in times.items()}
    for condition in CONDITIONS:
        name = str(condition).replace("|", r"\|")
        yield f"| `{name}` | {' | '.join(cells[condition, i] for i in range(len(rollouts)))} |"
    yield ""
    yield "`Delimiter` reads where tokens begin in their texts (`ResponseTexts.begins`), which is worked out once a"
    yield f"text and not counted above: {cells['begins', 0]}. Of its time for the expression `{SEARCHED}`, with whole"
    yield f"rows, Python's `re` needs this to find all matches: {cells['re', 0]}."


def programs(data: Path) -> Iterator[str]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(data / "gpt2_tokenizer" / "tokenizer.json"))
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines)][:ROWS]
    encoded = [ids[:TOKENS] for ids in tokenizer(rows)["input_ids"]]
    mask = torch.arange(max(map(len, encoded))) < torch.tensor([*map(len, encoded)])[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([number for row in encoded for number in row])
    rollout = rollout_of(ids, mask)
    read = with_text(rollout, tokenizer)
    CodeParse()(read)  # loads the grammar
    tokens = float(rollout.lengths.float().mean())
    yield from ("", f"## {ROWS} programs of {tokens:.0f} tokens on average, milliseconds, median of 5", "")
    yield from ("| work | ms |", "|---|---|")
    yield f"| `with_text` | {milliseconds(lambda: with_text(rollout, tokenizer), 5):.0f} |"
    yield f"| `CodeParse()`, nothing remembered | {milliseconds(lambda: CodeParse()(read), 5):.0f} |"


def in_a_step(data: Path, steps: int, name: str, condition: TerminationCondition) -> Iterator[str]:
    prompts = Dataset.from_dict({"prompt": ["Once upon a time", "The dog", "def add(x, y):", "A girl"] * 8})
    with tempfile.TemporaryDirectory() as folder:
        args = PPOArguments(
            output_dir=f"{folder}/run",
            num_steps=steps,
            batch_size=32,
            eval_steps=0,
            save_steps=0,
            credit=CreditConfig(termination=condition),
            sampling=Sampling(max_new_tokens=128, min_new_tokens=128),
        )
        model = str(data / "stories260k")

        def length(completions: list[str], **_: object) -> list[float]:
            return [float(len(text)) for text in completions]

        PPOTrainer(args, model=model, reward_model=length, train_dataset=prompts).train()
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = []
    for line in lines[1:]:
        times = {name: value for name, value in line.items() if name.startswith("time/")}
        shares.append(times["time/parse"] / sum(times.values()))
    yield from ("", f"## A step of PPO, 32 responses of 128 tokens, {name}, {steps} updates", "")
    yield f"`time/parse` is {100 * statistics.median(shares):.1f} % of a step (median of all but the first)."


def report(data: Path, steps: int) -> Iterator[str]:
    """Measure, and write the report line by line."""
    git = ("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    about = Path("/proc/cpuinfo").read_text()
    model = next(line.split(":")[1].strip() for line in about.splitlines() if "model name" in line)
    vectors = "with" if "avx512f" in about else "without"
    yield from ("# Termination conditions, one thread", "")
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {subprocess.run(git, capture_output=True, text=True).stdout.strip()}"
    yield f"- machine: {model} {vectors} AVX-512, {os.cpu_count()} cores; torch {torch.__version__}"
    yield f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load average of the minute before: {os.getloadavg()[0]:.1f}"
    yield from alone()
    yield from programs(data)
    yield from in_a_step(data, steps, "`CodeParse()`", CodeParse())
    with tempfile.TemporaryDirectory() as folder:
        stanza = write_stanza(Path(folder))
        name = "`ConstituencyParse()` by a small Stanza"
        yield from in_a_step(data, steps, name, ConstituencyParse(backend=stanza))
        yield "Its models are those of the tests, trained on three sentences: Stanza's own for English, which a machine"
        yield "without a network cannot get, are larger. Two processes parse while the reward is computed."


def main() -> None:
    parser = argparse.ArgumentParser(description="Time termination conditions.")
    parser.add_argument("--data", type=Path, required=True, help="folder of HumanEval, a tokenizer and a model")
    parser.add_argument("--steps", type=int, default=6, help="updates of the run")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.zeros(4 * 2**20)  # as in benchmarks/credit.py: keep freed memory at hand
    lines = []
    for line in report(arguments.data, arguments.steps):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / f"parse-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
