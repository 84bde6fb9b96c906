"""`mean_rises` on a CPU: blocks of tokens at once, each from a guess of what is open before it."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float

BLOCK = 16
"""Tokens that are segmented one after the other; as many before them say which action is open."""

TRIES = 2
"""How often blocks after a wrong guess are segmented anew, together."""

FEW = 2
"""Blocks after a wrong guess that are left in a row then and are mended one by one. With more, actions are long."""

Open = Float[np.ndarray, "2 N"]
"""Sum and number of tokens of the actions that are open in N places."""


def guessed_rises(surprise: Float[np.ndarray, "B T"]) -> tuple[Bool[np.ndarray, "B T"], Bool[np.ndarray, " B"]]:
    """Mark where actions begin when each ends before the token that exceeds its mean; see `mean_rises`.

    Where actions end is soon the same wherever one began to look. So all blocks of a batch are segmented together: each
    goes on with the action that its left neighbour leaves open if segmented as though it began a row. Which of these
    guesses were wrong shows in the end; after them blocks are segmented anew. Where in the end no guess is wrong, the
    answer is exact to the last bit: the sum of an action is that of its tokens in float64, in their order.

    Args:
        surprise: (B, T) float32. What is compared; finite.

    Returns:
        (B, T) bool, where the first token of a row begins an action, too; and (B,) bool, True on rows in which
        wrong guesses are left, and what stands there means nothing.
    """
    rows, width = surprise.shape
    if not surprise.size:
        return np.zeros(surprise.shape, dtype=bool), np.zeros(rows, dtype=bool)
    blocks = -(-width // BLOCK)
    filled = np.zeros((rows, blocks * BLOCK))
    filled[:, :width] = surprise
    tokens = np.ascontiguousarray(filled.reshape(-1, BLOCK).T)
    guess = _handed_on(_segment(tokens, _nothing(rows * blocks))[0], blocks)
    after, stays = _segment(tokens, guess)
    before = _handed_on(after, blocks)
    wrong = before[1] != guess[1]  # of as many tokens: the same ones, and the same sum
    lost = wrong.reshape(rows, blocks).mean(1) > 0.5
    worth = np.repeat(~lost, blocks)
    tries, again = TRIES, np.flatnonzero(wrong & worth)
    while tries and len(again):
        guess[:, again] = before[:, again]
        after[:, again], stays[:, again] = _segment(tokens[:, again], guess[:, again])
        before = _handed_on(after, blocks)
        tries, again = tries - 1, np.flatnonzero((before[1] != guess[1]) & worth)
    lost |= np.bincount(again // blocks, minlength=rows) > FEW
    begins = np.logical_not(stays.T, order="C").reshape(filled.shape)
    _mend(begins, filled, before, again[~lost[again // blocks]])
    return begins[:, :width], lost


def _nothing(number: int) -> Open:
    """What is open before a row: no token, and a sum that any token exceeds."""
    return np.repeat([[-1.0], [0.0]], number, axis=1)


def _handed_on(after: Open, blocks: int) -> Open:
    """What is open before each block, of what is open after each; `blocks` of them are a row."""
    before = np.roll(after, 1, axis=1)
    before[:, ::blocks] = _nothing(1)
    return before


def _segment(tokens: Float[np.ndarray, "K N"], before: Open) -> tuple[Open, Bool[np.ndarray, "K N"]]:
    """Segment N runs of K tokens; return what is open after them, and which tokens do not begin an action."""
    state, stays = before.copy(), np.empty(tokens.shape, dtype=bool)
    total, count = state
    product = np.empty_like(total)
    for token, stay in zip(tokens, stays, strict=True):
        np.multiply(token, count, out=product)
        np.less_equal(product, total, out=stay)
        np.multiply(state, stay, out=state)
        np.add(total, token, out=total)
        np.add(count, 1, out=count)
    return state, stays


def _mend(begins: Bool[np.ndarray, "B T"], tokens: Float[np.ndarray, "B T"], before: Open, wrong: Iterable) -> None:
    """Let what is open before blocks after wrong guesses go on to its end, block after block.

    There the next action begins by the guess, too: what exceeds the mean of an action exceeds that of its last tokens,
    of which the first is no higher than the one and no lower than the other. So it is in float64, of float32 tokens:
    means that rounding could take for each other are those of equal tokens, whose sums are exact. For the same reason
    what is not truly open, as a block before was mended, ends before what is.
    """
    for block in wrong:
        row, place = divmod(block * BLOCK, tokens.shape[1])
        left, (total, count) = tokens[row, place:], before[:, block]
        sums = np.add.accumulate(np.concatenate([[total], left]))
        exceeds = left * np.arange(count, count + len(left)) > sums[:-1]
        begins[row, place : place + (exceeds.argmax() if exceeds.any() else len(left))] = False
