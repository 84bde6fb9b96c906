"""The true reward of the task `reviews`: it reads any text, well formed or not."""

from collections.abc import Sequence
from itertools import repeat

from apportion.data.reviews import grammar

_POSITIVE, _NEGATIVE = frozenset(grammar.POSITIVE), frozenset(grammar.NEGATIVE)
_CLAUSE_ENDS = frozenset((*grammar.PUNCTUATION, *grammar.CONNECTIVE))


def oracle(prompts: Sequence[str] | None, completions: Sequence[str], **columns: object) -> list[float]:
    """Add up the opinions of each completion; a negation turns the opinions that follow it in its own clause.

    A clause ends at a punctuation mark or a connective, two negations cancel, and an unknown word counts nothing. The
    prompt gives no score, but a negation in its last clause reaches into the completion.

    Args:
        prompts: The text before each completion, or None for none.
        completions: The texts to score. Words are what white space separates.
        **columns: Further columns of the data, which TRL's convention for rewards passes; not read.

    Returns:
        One score a completion: opinions counted +1 and -1, unbounded, exact.

    Raises:
        ValueError: If there are not as many prompts as completions.
    """
    del columns
    if prompts is not None and len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts for {len(completions)} completions: pass one prompt a completion, or None"
        )
    return [_score(prompt, text) for prompt, text in zip(prompts or repeat(""), completions, strict=False)]


def _score(prompt: str, completion: str) -> float:
    _, sign = _read(prompt, 1.0)
    return _read(completion, sign)[0]


def _read(text: str, sign: float) -> tuple[float, float]:
    """Return the sum of the opinions of a text that starts under `sign`, and the sign after it."""
    total = 0.0
    for word in text.split():
        if word in _CLAUSE_ENDS:
            sign = 1.0
        elif word in grammar.NEGATION:
            sign = -sign
        else:
            total += sign * ((word in _POSITIVE) - (word in _NEGATIVE))
    return total, sign
