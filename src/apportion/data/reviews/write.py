"""Everything that a run of the task `reviews` reads, in one folder."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from apportion.data.reviews import grammar
from apportion.data.reviews.grammar import Mood
from apportion.data.reviews.oracle import oracle
from apportion.data.reviews.tokenizer import word_tokenizer
from apportion.data.small_models import EOS, write_start

MOST_CLAUSE_WORDS = 12
"""Shorter texts may have no room for an opinion."""


@dataclass(frozen=True, kw_only=True)
class ReviewsData:
    """Say how much of the task to write; the same values give the same bytes.

    Attributes:
        seed: Seed of texts, labels and initial weights.
        sft: Reviews for supervised fine-tuning.
        pairs: Preference pairs to train the reward model on.
        pairs_test: Preference pairs held out.
        prompts: Prompts to train the policy on.
        prompts_eval: Prompts held out.
        shortest: Least number of words of a review after its prompt.
        longest: Words after which a review ends with the clause that it is in.
        pair_shortest: Least number of words of the texts in pairs; both of a pair have about the same, drawn evenly on
            a logarithmic scale up to `longest`. A reward model counts in short texts before it counts in long ones.
        cut: Share of the pairs whose texts stop at a word, without an end mark: a reward head that learned from them
            can be read at every token. The others are finished and end with the end token.
        temperature: Of the Bradley-Terry labels: the better text wins with probability
            sigmoid(difference / temperature).
    """

    seed: int = 0
    sft: int = 4096
    pairs: int = 16384
    pairs_test: int = 512
    prompts: int = 2048
    prompts_eval: int = 256
    shortest: int = 120
    longest: int = 160
    pair_shortest: int = 12
    cut: float = 0.75
    temperature: float = 0.5

    def __post_init__(self) -> None:
        for name in ("sft", "pairs", "pairs_test", "prompts", "prompts_eval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: every split needs at least one row")
        if not MOST_CLAUSE_WORDS <= min(self.shortest, self.pair_shortest) <= self.longest >= self.shortest:
            given = f"shortest {self.shortest}, pair_shortest {self.pair_shortest}, longest {self.longest}"
            raise ValueError(f"{given}: give {MOST_CLAUSE_WORDS} words or more, and longest the longest")
        if not 0 <= self.cut <= 1:
            raise ValueError(f"cut is {self.cut}, but a share lies in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, but must be above 0; near 0 the labels have no noise")

    def datasets(self) -> dict[str, Dataset]:
        """Draw every split; no prompt is in two of them, or in one of them twice.

        Returns:
            `sft` (prompt, completion), `pairs` and `pairs_test` (prompt, chosen, rejected), `prompts` and
            `prompts_eval` (prompt). Completions begin with the space that parts them from their prompt.
        """
        openings = self._openings()
        sizes = {name: getattr(self, name) for name in ("sft", "pairs", "pairs_test", "prompts", "prompts_eval")}
        return {name: Dataset.from_list(list(self._rows(name, size, openings))) for name, size in sizes.items()}

    def _openings(self) -> Iterator[str]:
        rng = random.Random(f"{self.seed} openings")
        seen: set[str] = set()
        while True:
            text = grammar.opening(rng)
            if text not in seen:
                seen.add(text)
                yield text

    def _rows(self, split: str, size: int, openings: Iterator[str]) -> Iterator[dict[str, str]]:
        rng = random.Random(f"{self.seed} {split}")
        for _ in range(size):
            prompt = next(openings)
            if split == "sft":
                yield {"prompt": prompt, "completion": self._review(rng)}
            elif split.startswith("pairs"):
                yield {"prompt": prompt, **self._pair(rng)}
            else:
                yield {"prompt": prompt}

    def _review(self, rng: random.Random) -> str:
        return " " + grammar.continuation(rng, words=rng.randint(self.shortest, self.longest), mood=Mood())

    def _pair(self, rng: random.Random) -> dict[str, str]:
        """Draw two texts of different true scores and a noisy label; ties are drawn again."""
        words = round(self.pair_shortest * (self.longest / self.pair_shortest) ** rng.random())
        is_cut = rng.random() < self.cut
        texts = [self._opinionated(rng, words, is_cut), self._opinionated(rng, words, is_cut)]
        first, second = oracle(None, texts)
        if first == second:
            return self._pair(rng)
        wins = rng.random() < 1 / (1 + math.exp((second - first) / self.temperature))
        chosen, rejected = texts if wins else reversed(texts)
        return {"chosen": chosen, "rejected": rejected}

    def _opinionated(self, rng: random.Random, words: int, is_cut: bool) -> str:
        """Write a review of any mood: a policy that learns to praise then stays within what the reward model knows."""
        mood = Mood(opinions=rng.uniform(0.2, 1), approval=rng.random())
        text = grammar.continuation(rng, words=words, mood=mood)
        return " " + (" ".join(text.split()[:words]) if is_cut else f"{text} {EOS}")


def write_reviews(folder: str | Path, config: ReviewsData | None = None) -> Path:
    """Write tokenizer, base model and data of the task to a folder.

        base/                                     tokenizer and a small Llama with random weights
        sft.jsonl                                 prompt, completion
        pairs.jsonl, pairs_test.jsonl             prompt, chosen, rejected
        prompts.jsonl, prompts_eval.jsonl         prompt

    Args:
        folder: Made where it is missing. Files of an earlier call are replaced.
        config: Sizes and seed.

    Returns:
        The folder.
    """
    config = config or ReviewsData()
    return write_start(folder, word_tokenizer(), config.datasets(), seed=config.seed)
