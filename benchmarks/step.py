"""Time a PPO update of apportion and of TRL 1.12, the last with a PPO trainer, side by side, and weigh their memory.

    python benchmarks/step.py [--write] [--blocks N] [--only NAME ...] [--trl-env FOLDER]

Each side runs in a process of its own, in one thread, with the same model, prompts, lengths and epochs (`workload.py`);
TRL in a virtual environment that this script makes on first use. Blocks of a few updates alternate between them, and
only one computes at a time. The first block of each warms up and is thrown away. With `--write` the report goes to
`benchmarks/results/step-DATE.md`.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from workload import Workload

HERE = Path(__file__).parent
ROOT = HERE.parent
METHODS = ("token PPO", "MA-PPO", "ABC", "PrefixDifference")
PHASES = ("generation", "forwards", "credit", "optimisation", "other")
PREAMBLE = """\
32 prompts of 32 tokens, 64 new tokens, a Llama of 8.39 M parameters (hidden 256, 6 layers, vocabulary 8192) in each of
the four roles, one epoch and responses of equal length unless the heading says otherwise. Medians: seconds of processor
time for each phase (`other` is in none) and for all, seconds on the clock, and MiB resident at the peak of an update
(libraries, weights and optimizer states included). `forwards` are those of reference, critic and reward model without
gradient. One process computes at a time, in one thread; where the machine has other work, processor time is the number
to compare. TRL's bf16 is what `accelerate launch --mixed_precision bf16` gives it: its passes with gradient run in
bf16, its generation and its passes without gradient in float32. Rows at once are what TRL's models are given, and those
of apportion's that only read; apportion gives its learners half as many (`PPOConfig.learning_tokens`). Methods that
take turns share a process, and so a peak."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What TRL is given, and how apportion is hoped to stand to it.

    Attributes:
        name: Row of the table.
        work: The workload.
        time: Largest ratio of time that meets the aim; None without one.
        memory: The same of peak memory.
    """

    name: str
    work: Workload
    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One comparison.

    Attributes:
        title: Heading of the report.
        work: What apportion is given.
        peers: What TRL is given, in a process each.
        methods: Credit settings that take turns.
        blocks: Turns of each side, after one to warm up.
        aim: Largest ratio of a method's time to token PPO's that meets the aim.
    """

    title: str
    work: Workload
    peers: tuple[Peer, ...]
    methods: tuple[str, ...] = METHODS[:1]
    blocks: int = 3
    aim: float = 1.03


attention_setting = partial(Setting, peers=(), methods=("token PPO", "ABC-D"), blocks=10, aim=1.05)
WHOLE, SMALL = Workload(), Workload(micro_rows=8)
SETTINGS = {
    "float32": Setting(
        title="float32, all rows at once",
        work=WHOLE,
        peers=(Peer(name="TRL", work=WHOLE, time=0.8, memory=0.6),),
        methods=METHODS,
        blocks=6,
    ),
    "bf16": Setting(
        title="bf16 autocast, all rows at once",
        work=replace(WHOLE, bf16=True),
        peers=(
            Peer(name="TRL, bf16", work=replace(WHOLE, bf16=True), time=0.55, memory=0.6),
            Peer(name="TRL, float32", work=WHOLE, time=0.55, memory=0.6),
        ),
    ),
    "micro": Setting(
        title="float32, micro-batches of 8 rows",
        work=SMALL,
        peers=(
            Peer(name="TRL, 8 rows", work=SMALL, time=0.8, memory=0.6),
            Peer(name="TRL, all rows", work=WHOLE, time=0.8, memory=0.6),
        ),
    ),
    "early": Setting(
        title="float32, responses end at random after 20 tokens on average, micro-batches of 8 rows or their tokens",
        work=replace(SMALL, mean_length=20),
        peers=(
            Peer(name="TRL, 8 rows", work=replace(SMALL, mean_length=20), time=0.8),
            Peer(name="TRL, all rows", work=replace(WHOLE, mean_length=20), time=0.8, memory=0.6),
        ),
    ),
    "policy attention": attention_setting(
        title="float32, the policy's attention, for an update in one micro-batch",
        work=replace(WHOLE, micro_rows=64),  # the policy is given half as many rows at once
    ),
    "policy attention, parts": attention_setting(
        title="float32, the policy's attention, for an update in two micro-batches",
        work=WHOLE,
    ),
    "policy attention, four parts": attention_setting(
        title="float32, the policy's attention, for an update in four micro-batches",
        work=replace(WHOLE, micro_rows=16),
    ),
    "policy attention, minibatches": attention_setting(
        title="float32, the policy's attention, for four minibatches",
        work=replace(WHOLE, mini_batches=4),
    ),
    "policy attention, lengths": attention_setting(
        title="float32, the policy's attention, responses of 20 tokens on average (geometric)",
        work=replace(WHOLE, mean_length=20),
    ),
    "policy attention, long": attention_setting(
        title="float32, the policy's attention, 8 responses of 480 tokens, in one micro-batch",
        work=replace(WHOLE, rows=8, micro_rows=16, new=480),
    ),
    "epochs": Setting(
        title="float32, four epochs, all rows at once",
        work=replace(WHOLE, epochs=4),
        peers=(Peer(name="TRL", work=replace(WHOLE, epochs=4), time=0.8, memory=0.6),),
        blocks=2,
    ),
}


class Worker:
    """One side: a process that computes only when told to."""

    def __init__(self, python: Path, script: str, *arguments: str) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        self.process = subprocess.Popen(
            [python, HERE / script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=os.environ | threads | quiet,
        )

    def run(self, updates: int) -> list[dict]:
        """Do some updates; return what was measured of each.

        Raises:
            RuntimeError: If the process has ended; with the end of what it wrote.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{updates}\n")
            self.process.stdin.flush()
        for text in self.process.stdout:
            if text.startswith("##"):
                return json.loads(text[2:])
        raise RuntimeError(f"a worker ended with {self.process.wait()}: {self.log.read_text()[-2000:]}")

    def close(self) -> None:
        """Let the process end."""
        self.process.communicate()
        self.log.unlink()


def environment(folder: Path) -> Path:
    """Make TRL's environment if it is not there; return its Python."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch first and alone, so that what it is built for does not depend on what the others ask for
        for requirements in (("torch==2.13.0",), ("trl==1.12.0", "transformers==5.23.0")):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.touch()
    return python


def measure(setting: Setting, trl: Path | None) -> list[list[dict]]:
    """Let all sides take turns; return the updates of apportion, then those of each peer."""
    ours = Worker(Path(sys.executable), "apportion_peer.py", setting.work.dump(), ",".join(setting.methods))
    theirs = [Worker(trl, "trl_peer.py", peer.work.dump()) for peer in setting.peers if trl is not None]
    turns = [(ours, max(2, len(setting.methods))), *((worker, 2) for worker in theirs)]
    done: list[list[dict]] = [[] for _ in turns]
    for block in range(setting.blocks + 1):
        for (worker, updates), kept in zip(turns, done, strict=True):
            measured = worker.run(updates)
            kept += measured if block else []  # the first block warms up
    for worker, _ in turns:
        worker.close()
    return done


def median(updates: list[dict], key: str) -> float:
    """The median of something measured; 0 where it never was."""
    return statistics.median(update.get(key, 0.0) for update in updates)


def row(name: str, updates: list[dict]) -> str:
    """Write one side's medians as a row of the table."""
    seconds = (f"{median(updates, key):.3f}" for key in (*PHASES, "cpu", "wall"))
    return "| " + " | ".join((name, *seconds, f"{median(updates, 'peak'):.0f}", str(len(updates)))) + " |"


def verdict(name: str, ratio: float, aim: float | None = None) -> str:
    """Say a ratio, and whether it meets its aim."""
    met = "" if aim is None else f" (aim: at most {aim}: {'met' if ratio <= aim else '**not met**'})"
    return f"- {name}: {ratio:.3f}{met}"


def compared(setting: Setting, trl: Path | None) -> Iterator[str]:
    """Measure one setting and report on it, line by line."""
    ours, *theirs = measure(setting, trl)
    by_method = {name: [update for update in ours if update["method"] == name] for name in setting.methods}
    token = by_method[setting.methods[0]]
    head = ("", *PHASES, "processor", "clock", "peak", "updates")
    yield from (f"## {setting.title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|")
    yield from (row(peer.name, updates) for peer, updates in zip(setting.peers, theirs, strict=True))
    yield from (row(name, updates) for name, updates in by_method.items())
    for peer, updates in zip(setting.peers, theirs, strict=True):
        yield from ("", f"{setting.methods[0]} over {peer.name}:", "")
        yield verdict("processor time", median(token, "cpu") / median(updates, "cpu"), peer.time)
        yield verdict("clock", median(token, "wall") / median(updates, "wall"))
        yield verdict("peak memory", median(token, "peak") / median(updates, "peak"), peer.memory)
    yield ""
    if len(by_method) > 1:
        yield from ("Over token PPO in the same turn, processor time, median of the turns:", "")
    for name in setting.methods[1:]:
        ratios = [one["cpu"] / other["cpu"] for one, other in zip(by_method[name], token, strict=True)]
        yield verdict(name, statistics.median(ratios), setting.aim)
        yield f"  - of it by phase: {by_phase(by_method[name], token)}"
    yield ""


def by_phase(updates: list[dict], token: list[dict]) -> str:
    """Say what each phase takes more, in percent of an update of token PPO: medians of the turns.

    A phase that does the same work for both shows how noisy the machine was.
    """
    whole, more = median(token, "cpu"), []
    for phase in PHASES:
        extra = [one.get(phase, 0.0) - other.get(phase, 0.0) for one, other in zip(updates, token, strict=True)]
        more.append(f"{phase} {100 * statistics.median(extra) / whole:+.1f} %")
    return ", ".join(more)


def circumstances(trl: Path | None) -> Iterator[str]:
    """State the command, the commit, the machine and the hour."""
    git = ("git", "-C", str(ROOT))
    commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--short", "src"], capture_output=True, text=True).stdout.strip()
    models = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in text]
    ours = ", ".join(f"{name}=={version(name)}" for name in ("torch", "transformers", "accelerate"))
    yield f"- command: `python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"
    yield f"- commit: {commit}{' with changes to src' if changed else ''}"
    yield f"- machine: {models[0].split(':')[1].strip()}, {os.cpu_count()} cores, one thread"
    yield f"- apportion: {ours}; Python {platform.python_version()}"
    if trl is not None:
        packages = [trl, "-m", "pip", "list", "--format", "freeze"]
        installed = subprocess.run(packages, capture_output=True, text=True).stdout.split()
        shown = ("torch", "transformers", "trl", "accelerate")
        yield f"- TRL: {', '.join(line for line in installed if line.split('==')[0] in shown)}"


def report(settings: list[Setting], trl: Path | None) -> Iterator[str]:
    """Measure, and write the report line by line."""
    begin, load = datetime.now(UTC), os.getloadavg()[0]
    yield from ("# A PPO update beside TRL 1.12's", "")
    yield from (PREAMBLE, "")
    yield from circumstances(trl)
    yield f"- date: {begin:%Y-%m-%d %H:%M} UTC; load average of the minute before the first number: {load:.1f}"
    yield ""
    for setting in settings:
        yield from compared(setting, trl)
    yield f"Ended {datetime.now(UTC):%H:%M} UTC; load average of the last 15 minutes: {os.getloadavg()[2]:.1f}."


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a PPO update beside TRL's.")
    parser.add_argument("--write", action="store_true", help="write the report to benchmarks/results")
    parser.add_argument("--blocks", type=int, help="turns of each side, after one to warm up, in every setting")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="settings to measure")
    parser.add_argument("--trl-env", type=Path, default=ROOT / ".cache" / "trl-1.12", help="TRL's environment")
    arguments = parser.parse_args()
    settings = [SETTINGS[name] for name in arguments.only]
    if arguments.blocks:
        settings = [replace(setting, blocks=arguments.blocks) for setting in settings]
    path = HERE / "results" / f"step-{datetime.now(UTC):%Y-%m-%d}.md"
    lines = []
    trl = environment(arguments.trl_env) if any(setting.peers for setting in settings) else None
    for text in report(settings, trl):
        print(text, flush=True)
        lines.append(text)
        if arguments.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
