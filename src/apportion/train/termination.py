"""What the termination conditions of a run ask of its trainer: texts, entropies, and processes that parse."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from apportion.batch import Rollout
from apportion.credit.assign import Condition, CreditConfig
from apportion.score.text import with_text

Watch = Callable[[str], AbstractContextManager[None]]


def innermost(condition: Condition) -> Condition:
    """Return the condition that others (`ShuffledBoundaries`) are wrapped around: it is the one that works ahead."""
    while (inner := getattr(condition, "inner", None)) is not None:
        condition = inner
    return condition


class RunCondition:
    """Give the termination condition, and that of `value_smoothing`, what they need; a context for their processes.

    A condition may have, besides `needs`, `open` and `close` for a run, and `prepare(rollout)`, which begins work that
    goes on while the reward is computed.

    Args:
        credit: Whose conditions.
        tokenizer: The policy's.
    """

    def __init__(self, credit: CreditConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        given = [condition for condition in (credit.termination, credit.value_smoothing) if condition is not None]
        self.conditions, self.tokenizer = [innermost(condition) for condition in given], tokenizer
        self.needs = frozenset().union(*(getattr(condition, "needs", frozenset()) for condition in given))

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
        for condition in self.conditions:
            if hasattr(condition, "prepare"):
                with watch("time/parse"):
                    condition(rollout)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a method that conditions need not have."""
        for condition in self.conditions:
            if (method := getattr(condition, name, None)) is not None:
                method(*arguments)
