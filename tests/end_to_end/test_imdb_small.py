"""The recipe `imdb-small` by its commands, on real text, in short: benchmarks/imdb_small.py runs it whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apportion.cli import main
from apportion.data.files import load
from apportion.train.run import read_records

METHODS: dict[str, tuple[str, ...]] = {
    "ppo": ("--credit.termination", "EveryToken"),
    "ma-ppo": ("--credit.termination", "FixedNgram", "--credit.termination.n", "5"),
    "abc": (
        *("--credit.termination", "EveryToken"),
        *("--credit.redistribution", "Attention", "--credit.redistribution.beta", "0.8"),
    ),
}
SHORT_SFT = ("--max_steps", "40", "--per_device_train_batch_size", "16")
# Short beginnings of sentences, so that many pairs take little time.
SHORT_REWARD = (
    *("--data.cut", "1", "--data.min_words", "8", "--max_length", "48"),
    *("--max_steps", "150", "--per_device_train_batch_size", "24", "--learning_rate", "2e-3"),
)
SHORT_PPO = ("--num_steps", "8", "--eval_steps", "8", "--learning_rate", "1e-3", "--credit.kl_coef", "0.02")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the commands left behind."""

    folder: Path
    reviews: Path

    def evaluations(self, method: str) -> list[dict[str, Any]]:
        return [record for record in read_records(self.folder / method / "metrics.jsonl") if "eval/score" in record]

    def numbers(self, stage: str) -> Mapping[str, float]:
        return json.loads((self.folder / stage / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A policy and a reward model from stories260k, and one short run of each method."""
    folder, data = tmp_path_factory.mktemp("imdb-small"), shared / "data"
    reviews = every(data / "movie_reviews" / "movie_reviews.jsonl.gz", 13, folder / "reviews.jsonl")
    sentences = data / "rt_polarity" / "rt_polarity.jsonl.gz"
    stories = ("--model", data / "stories260k")
    run("sft", *stories, "--data.path", reviews, *SHORT_SFT, "--output_dir", folder / "sft")
    run("reward", *stories, "--data.path", sentences, *SHORT_REWARD, "--output_dir", folder / "reward")
    start = ("--model", folder / "sft", "--reward_model", folder / "reward", "--data.path", reviews)
    for name, choice in METHODS.items():
        run("ppo", *start, *SHORT_PPO, *choice, "--output_dir", folder / name)
    return Trained(folder=folder, reviews=reviews)


def every(path: Path, step: int, to: Path) -> Path:
    """Write every so many rows of a file to another, so that both labels are in it."""
    rows = load(path)
    rows.select(range(0, len(rows), step)).to_json(to)
    return to


def run(command: str, *settings: object) -> None:
    assert main([command, "--config", "imdb-small", *map(str, settings)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_reward_on_held_out_prompts_rises_and_is_paid_for_with_divergence(trained: Trained, method: str) -> None:
    first, last = trained.evaluations(method)
    assert last["eval/score"] > first["eval/score"] + 0.2
    assert first["eval/kl_sequence"] == pytest.approx(0, abs=1e-4)
    assert last["eval/kl_sequence"] > 0.1


@pytest.mark.slow
def test_every_method_starts_from_the_same_policy_on_the_same_prompts(trained: Trained) -> None:
    starts = [trained.evaluations(method)[0] for method in METHODS]
    assert starts[0] == starts[1] == starts[2]


@pytest.mark.slow
def test_the_reward_model_tells_held_out_praise_from_blame_better_than_chance(trained: Trained) -> None:
    assert trained.numbers("reward")["eval_accuracy"] > 0.55


@pytest.mark.slow
def test_generate_reports_reward_divergence_and_a_length_within_the_limits(trained: Trained) -> None:
    output = trained.folder / "answers.jsonl"
    policy = ("--model", trained.folder / "abc" / "model", "--ref_model", trained.folder / "sft")
    reward = ("--reward_model", trained.folder / "reward", "--data.path", trained.reviews)
    run("generate", *policy, *reward, "--num_prompts", "8", "--output", output)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8
    assert all(row.keys() == {"prompt", "response", "length", "kl", "score"} for row in rows)
    assert all(24 <= row["length"] <= 64 for row in rows)


@pytest.mark.slow
def test_compare_reports_the_runs_side_by_side(trained: Trained) -> None:
    runs = [str(trained.folder / method) for method in METHODS]
    assert main(["compare", *runs, "--output", str(trained.folder / "report")]) == 0
    report = (trained.folder / "report" / "report.md").read_text(encoding="utf-8")
    assert all(f"| {method} |" in report for method in METHODS)
