"""Movie reviews with a sentiment label, as ABC's IMDb experiment uses them: write on from a few tokens, positively.

The files are the user's (`path`): rows of `text` and `label`, 1 for praise. Sources read whole reviews as text to
fine-tune on and as prompts, and single sentences as preference pairs.

Source:
    Chan et al., 2024 (https://arxiv.org/abs/2402.00782), section 5: prompts are the first 2 to 8 tokens of a review.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, takewhile

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from apportion.data.files import Source, load


@dataclass(frozen=True, kw_only=True)
class ImdbReviews(Source):
    """Passages of reviews, each with its first tokens as the prompt, in three parts that share no review or prompt.

    A passage is a run of sentences (lines) of a review that fits in `max_tokens`. It is cut into prompt and completion
    between two words, so that no token reaches over the cut.

    Attributes:
        path: File of reviews, columns `text` and `label`, one sentence a line.
        part: "sft" for the part to fine-tune on, "ppo" for the part whose prompts the policy is trained on.
        min_prompt_tokens: Least number of tokens of a prompt, without the beginning-of-text token.
        max_prompt_tokens: Most; each prompt draws its length between the two and keeps the whole words that fit.
        max_tokens: Most tokens of a prompt and its completion.
        eval_share: Share of the reviews that are held out, in (0, 1); the same in both parts.
        ppo_share: Share of the other reviews that are for "ppo", in (0, 1).
        seed: Decides which review goes where, and the lengths.
    """

    path: str = ""
    part: str = "sft"
    min_prompt_tokens: int = 2
    max_prompt_tokens: int = 8
    max_tokens: int = 96
    eval_share: float = 0.1
    ppo_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.part not in ("sft", "ppo"):
            raise ValueError(f"part is {self.part!r}; give 'sft' or 'ppo'")
        if not 1 <= self.min_prompt_tokens <= self.max_prompt_tokens < self.max_tokens:
            raise ValueError(
                f"prompts of {self.min_prompt_tokens} to {self.max_prompt_tokens} tokens in passages of "
                f"{self.max_tokens}: give 1 <= min_prompt_tokens <= max_prompt_tokens < max_tokens"
            )
        for name in ("eval_share", "ppo_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie in (0, 1)")

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
        """Cut the reviews into passages.

        Returns:
            `train` and `eval`, columns `prompt` and `completion`. No prompt is in `eval` twice, or in any two of: the
            `train` of "sft", the `train` of "ppo", and `eval`.

        Raises:
            FileNotFoundError, ValueError: See `load`.
        """
        texts = _distinct(load(_named(self.path), columns=["text"])["text"])
        random.Random(f"{self.seed} reviews").shuffle(texts)
        held, ppo = round(self.eval_share * len(texts)), round((1 - self.eval_share) * self.ppo_share * len(texts))
        parts = {"eval": texts[:held], "ppo": texts[held : held + ppo], "sft": texts[held + ppo :]}
        costs = _word_costs({word for review in texts for word in review.split()}, tokenizer)
        taken: set[str] = set()
        rows: dict[str, list[dict[str, str]]] = {}
        for name, reviews in parts.items():
            passages = [row for row in self._passages(reviews, costs, name) if row["prompt"] not in taken]
            rows[name] = list({row["prompt"]: row for row in passages}.values()) if name == "eval" else passages
            taken |= {row["prompt"] for row in passages}
        return DatasetDict({"train": Dataset.from_list(rows[self.part]), "eval": Dataset.from_list(rows["eval"])})

    def _passages(self, reviews: list[str], costs: Mapping[str, int], name: str) -> Iterator[dict[str, str]]:
        """Cut passages into prompt and completion; those whose first word is too long for a prompt are left out."""
        rng = random.Random(f"{self.seed} {name}")
        for words in chain.from_iterable(self._runs_of_lines(review, costs) for review in reviews):
            kept = _words_that_fit(words, rng.randint(self.min_prompt_tokens, self.max_prompt_tokens), costs)
            cost = sum(costs[word] for word in words[:kept])
            if self.min_prompt_tokens <= cost and kept < len(words):
                yield {"prompt": " ".join(words[:kept]), "completion": " " + " ".join(words[kept:])}

    def _runs_of_lines(self, review: str, costs: Mapping[str, int]) -> Iterator[list[str]]:
        """Join the words of lines while they fit; a line that does not fit alone ends with the last word that does."""
        passage: list[str] = []
        for line in filter(None, map(str.split, review.splitlines())):
            if _words_that_fit(passage + line, self.max_tokens, costs) == len(passage + line):
                passage += line
                continue
            if passage:
                yield passage
            passage = line[: _words_that_fit(line, self.max_tokens, costs)]
        if passage:
            yield passage


@dataclass(frozen=True, kw_only=True)
class ImdbPairs(Source):
    """Preference pairs without a prompt: a sentence of praise over a sentence of blame, each sentence used once.

    Attributes:
        path: File of sentences, columns `text` and `label`, 1 for praise.
        cut: Share of the pairs whose sentences both stop at a word drawn at random. A reward head that learned from
            them can be read where a response was cut off, and at every token.
        min_words: Least number of words of a sentence that was cut.
        eval_share: Share of the pairs that are held out, in (0, 1).
        seed: Decides who meets whom, which pairs are held out, and the cuts.
    """

    path: str = ""
    cut: float = 0.0
    min_words: int = 5
    eval_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.cut <= 1:
            raise ValueError(f"cut is {self.cut}, but a share lies in [0, 1]")
        if self.min_words < 1:
            raise ValueError(f"min_words is {self.min_words}; give at least 1")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}, but must lie in (0, 1)")

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
        """Pair the sentences.

        Returns:
            `train` and `eval`, columns `chosen` and `rejected`. No sentence is in both, or in one of them twice.

        Raises:
            FileNotFoundError, ValueError: See `load`.
            ValueError: If one of the two labels is missing.
        """
        del tokenizer  # sentences are cut between words
        rng = random.Random(f"{self.seed} pairs")
        rows = load(_named(self.path), columns=["text", "label"])
        labels = dict(zip(rows["text"], rows["label"], strict=True))
        praise = [text for text, label in labels.items() if label == 1]
        blame = [text for text, label in labels.items() if label == 0]
        if not praise or not blame:
            raise ValueError(f"{self.path} has labels {sorted(set(labels.values()))}; pairs need both 1 and 0")
        rng.shuffle(praise)
        rng.shuffle(blame)
        pairs = [self._pair(chosen, rejected, rng) for chosen, rejected in zip(praise, blame, strict=False)]
        held = max(1, round(self.eval_share * len(pairs)))
        return DatasetDict({"train": Dataset.from_list(pairs[held:]), "eval": Dataset.from_list(pairs[:held])})

    def _pair(self, chosen: str, rejected: str, rng: random.Random) -> dict[str, str]:
        if rng.random() < self.cut:
            shorter = min(len(chosen.split()), len(rejected.split()))
            words = rng.randint(min(self.min_words, shorter), shorter)
            chosen, rejected = (" ".join(text.split()[:words]) for text in (chosen, rejected))
        return {"chosen": chosen, "rejected": rejected}


def _named(path: str) -> str:
    if not path:
        raise ValueError("no data is named; give data.path: a file with the columns text and label")
    return path


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _word_costs(words: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Count the tokens that each word adds to a text; they add up, because tokens do not reach over a space."""
    words = sorted(words)
    alone = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    encoded = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    return {word: len(ids) - alone for word, ids in zip(words, encoded, strict=True)}


def _words_that_fit(words: list[str], limit: int, costs: Mapping[str, int]) -> int:
    """Count the first words that make at most `limit` tokens."""
    totals = accumulate(costs[word] for word in words)
    return sum(1 for _ in takewhile(lambda total: total <= limit, totals))
