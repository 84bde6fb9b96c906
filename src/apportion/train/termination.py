"""What the termination condition of a run asks of its trainer: texts, entropies, and processes that parse."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from apportion.batch import Rollout
from apportion.credit.assign import Condition
from apportion.score.text import with_text

Watch = Callable[[str], AbstractContextManager[None]]


def innermost(condition: Condition) -> Condition:
    """Return the condition that others (`ShuffledBoundaries`) are wrapped around: it is the one that works ahead."""
    while (inner := getattr(condition, "inner", None)) is not None:
        condition = inner
    return condition


class RunCondition:
    """Give a termination condition what it needs; a context in which its processes live.

    A condition may have, besides `needs`, `open` and `close` for a run, and `prepare(rollout)`, which begins work that
    goes on while the reward is computed.

    Args:
        condition: Any.
        tokenizer: The policy's.
    """

    def __init__(self, condition: Condition, tokenizer: PreTrainedTokenizerBase) -> None:
        self.condition, self.tokenizer = innermost(condition), tokenizer
        self.needs: frozenset[str] = getattr(condition, "needs", frozenset())

    def __enter__(self) -> Self:
        """Load what the condition works with, so that what is missing is told first."""
        self._call("open")
        return self

    def __exit__(self, *_: object) -> None:
        """End its processes."""
        self._call("close")

    def prepared(self, rollout: Rollout, watch: Watch) -> Rollout:
        """Add the text where it is needed, and let the condition begin.

        Args:
            rollout: Sampled responses.
            watch: Times this as `time/parse`, for a condition that reads text.

        Returns:
            The rollout with what the condition needs.
        """
        if "text" in self.needs:
            with watch("time/parse"):
                rollout = with_text(rollout, self.tokenizer)
                self._call("prepare", rollout)
        else:
            self._call("prepare", rollout)
        return rollout

    def settle(self, rollout: Rollout, watch: Watch) -> None:
        """Wait for what `prepared` began; credit then finds it done.

        Args:
            rollout: What `prepared` returned.
            watch: Times this as `time/parse`.
        """
        if hasattr(self.condition, "prepare"):
            with watch("time/parse"):
                self.condition(rollout)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a method that conditions need not have."""
        if (method := getattr(self.condition, name, None)) is not None:
            method(*arguments)
