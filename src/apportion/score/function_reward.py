"""Rewards that are functions of text: TRL's convention, and what such a function may offer besides numbers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from apportion.batch import NOTHING, Needs, Prompts, Scores
from apportion.checks import call_error
from apportion.rollout import Responses
from apportion.score.reward_model import checked, decode, name_of
from apportion.score.text import response_texts

RewardFunction = Callable[..., Sequence[float]]
"""`(prompts, completions, **columns) -> list[float]`, TRL's convention; columns are those of the data set."""

Characters = tuple[int, int]
"""A part of a completion: its first character, and the one behind its last."""


class ScoringFunction(ABC):
    """A reward function with settings, which recipes choose by name; a user's own is chosen by its dotted path."""

    @abstractmethod
    def __call__(self, prompts: list, completions: list[str], **columns: Any) -> list[float]:
        """Score completions.

        Args:
            prompts: As the data set holds them.
            completions: Text, without special tokens.
            **columns: Those of the data set.

        Returns:
            One number a completion.
        """

    def open(self) -> None:  # noqa: B027 # most have nothing to refuse
        """Refuse what is missing, before any work."""

    def errors(self, prompts: list, completions: list[str], **columns: Any) -> list[Characters | None] | None:
        """Say where in each completion an error was reported; None for a function that reports none."""
        del prompts, completions, columns

    def details(self, prompts: list, completions: list[str], **columns: Any) -> list[dict[str, Any]] | None:
        """Say more of each completion, as JSON can hold it, for samples and evaluation; None for nothing more."""
        del prompts, completions, columns


class FunctionReward:
    """A reward function over texts.

    Attributes:
        function: Called as `function(prompts, completions, **columns)`; one number a response. A `ScoringFunction` is
            asked for more.
        name: What its author calls it.
        tokenizer: The policy's; it decodes the completions, without special tokens.

    Raises:
        ValueError: If it is no function, cannot tell what is needed, or cannot be called with the columns that it is
            given.
    """

    def __init__(
        self,
        function: RewardFunction,
        tokenizer: PreTrainedTokenizerBase,
        columns: Iterable[str] | None = None,
        needs: Needs = NOTHING,
    ) -> None:
        if not callable(function):
            raise ValueError(f"the reward is {function!r}; give a model, a path to one, or one function (not a list)")
        self.function, self.name = function, name_of(function)
        self.tokenizer = tokenizer
        self.check(needs)
        if columns is not None:
            _check_call(function, list(columns))
        if isinstance(function, ScoringFunction):
            function.open()

    def __call__(self, prompts: Prompts, responses: Responses, needs: Needs = NOTHING) -> Scores:
        """Score B responses.

        Raises:
            ValueError: If more than the function can tell is wanted, or it returns another count or a number that is
                not finite.
        """
        self.check(needs)
        texts, name = decode(self.tokenizer, prompts, responses), self.name
        answer: Any = self.function(prompts=prompts.texts, completions=texts, **prompts.columns)
        if not isinstance(answer, Iterable):
            raise ValueError(f"{name} returned {answer!r}; return a list of a number for each of the completions")
        answer = list(answer)
        if len(answer) != len(texts):
            raise ValueError(f"{name} returned {len(answer)} scores for {len(texts)} responses")
        scores = torch.tensor([_number(score, row, name) for row, score in enumerate(answer)])
        return Scores(
            scores=checked(scores, name).to(responses.response_ids.device),
            error_tokens=self._error_tokens(prompts, responses, texts) if needs.error_tokens else None,
        )

    def check(self, needs: Needs) -> None:
        """Refuse what a function cannot tell, before it runs.

        Raises:
            ValueError: With what is needed.
        """
        if needs.attention or needs.prefix_scores:
            wanted = " and ".join(name for name in needs.names if name != "error_tokens")
            raise ValueError(
                f"the redistribution needs {wanted} of a reward model; {self.name} is a function, give a reward model"
            )
        if needs.error_tokens and not _reports_errors(self.function):
            raise ValueError(
                f"the redistribution needs the lines of errors, which {self.name} does not report; give a reward that "
                "does, such as ProgramTests, or a ScoringFunction with `errors` of your own"
            )

    def details(self, prompts: Prompts, texts: list[str]) -> list[dict[str, Any]]:
        """Say more of each response, where the function can: the other entries of its row in samples.

        Args:
            prompts: B prompts.
            texts: What `decode` makes of their responses.

        Returns:
            B mappings; empty ones of a function that has no more to say.
        """
        more = None
        if isinstance(self.function, ScoringFunction):
            more = self.function.details(prompts=prompts.texts, completions=texts, **prompts.columns)
        return [{} for _ in texts] if more is None else more

    def _error_tokens(self, prompts: Prompts, responses: Responses, texts: list[str]) -> Bool[Tensor, "B T"]:
        """Mark the tokens that an error was reported at."""
        assert isinstance(self.function, ScoringFunction)  # checked; for the type checker
        found = self.function.errors(prompts=prompts.texts, completions=texts, **prompts.columns)
        mask = responses.response_mask
        said = response_texts(self.tokenizer, prompts.prompt_ids, prompts.prompt_mask, responses.response_ids, mask)
        # Where the tokenizer tidies up what it decodes, characters are not those of the tokens: nothing is marked.
        usable = [
            (0, 0) if error is None or text != same else error
            for error, text, same in zip(found or [None] * len(texts), texts, said.texts, strict=True)
        ]
        first, last = torch.tensor(usable, device=mask.device).view(-1, 2, 1).unbind(1)
        return mask & (said.spans[..., 0] < last) & (said.spans[..., 1] > first)


def _reports_errors(function: object) -> bool:
    """Tell whether a function has an `errors` of its own."""
    return isinstance(function, ScoringFunction) and type(function).errors is not ScoringFunction.errors


def _number(score: Any, row: int, source: str) -> float:
    """Read one score, which may be a tensor of one element."""
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} returned {score!r} for response {row}; return a number for each") from error


def _check_call(function: RewardFunction, columns: list[str]) -> None:
    """Refuse a function that the columns of the data do not fit, before anything is sampled for it."""
    if error := call_error(function, prompts=None, completions=None, **dict.fromkeys(columns)):
        given = ", ".join(("prompts", "completions", *columns))
        raise ValueError(f"{name_of(function)} is called with {given}: {error}; add the column, or take **_") from error
