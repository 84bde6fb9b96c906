"""The core never waits for the device and never loops over rows or tokens: counted by the operations it dispatches.

ma-rlhf.md section 4 row 16: the official code reads a number per token and loops over segments.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apportion import (
    GAE,
    Attention,
    CreditConfig,
    Entropy,
    ErrorLine,
    EveryToken,
    FixedNgram,
    LowProbability,
    Mixture,
    Perplexity,
    PolicyAttention,
    PrefixDifference,
    RandomizedNgram,
    Rollout,
    Scores,
    Shuffled,
    ShuffledBoundaries,
    Terminal,
    Uniform,
    WholeResponse,
    assign_credit,
    policy_loss,
    value_loss,
)
from batches import difference

TERMINATIONS = (
    EveryToken(),
    FixedNgram(),
    RandomizedNgram(),
    Perplexity(),
    Perplexity(variant="segment"),
    Entropy(),
    LowProbability(),
    WholeResponse(),
    *(ShuffledBoundaries(FixedNgram()), ShuffledBoundaries(Perplexity())),
)
REDISTRIBUTIONS = (
    *(Terminal(), Uniform(), Attention(), PrefixDifference(), Shuffled(Attention()), ErrorLine()),
    *(PolicyAttention(legacy_shift=True), Mixture.of({Attention(): 0.5, Uniform(): 0.5})),
)
CONFIGS = [
    *(CreditConfig(termination=termination) for termination in TERMINATIONS),
    *(CreditConfig(redistribution=r, advantage=GAE(gamma=gamma)) for r in REDISTRIBUTIONS for gamma in (1.0, 0.9)),
    *(CreditConfig(macro_value=pooling) for pooling in ("unit", "position", "position_falling")),
    CreditConfig(macro_reward="mean", advantage=GAE(gamma=0.9, per="token"), whiten_advantages=True),
    CreditConfig.official(),
]
# They read a number on the host, have a shape that depends on the data, or copy a number from the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "lift_fresh", "bincount")


class Counting(TorchDispatchMode):
    """Count operations, and refuse those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in WAITING or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            raise AssertionError(f"{func} waits for the device")
        if name == "_to_copy" and (kwargs or {}).get("device", args[0].device) != args[0].device:
            raise AssertionError(f"{func} copies between devices")
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(config: CreditConfig, rows: int, tokens: int) -> int:
    """Run the whole credit stage, forward and backward, and count what is dispatched.

    On the meta device, where there are no data at all: what runs there can have read none. On a CPU, which need not be
    waited for, `Packing` reads once whether there are holes.
    """
    device = "meta"

    def numbers(width: int = tokens) -> Tensor:
        return torch.zeros(rows, width, device=device)

    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    rollout = Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=ids,
        response_mask=mask,
        old_logprobs=numbers(),
        ref_logprobs=numbers(),
        values=numbers(),
        entropies=numbers(),
    )
    weights = {"attention": numbers(), "policy_attention": numbers()}
    scores = Scores(scores=numbers()[:, 0], **weights, prefix_scores=numbers(tokens + 1), error_tokens=mask)
    logprobs, values = numbers().requires_grad_(), numbers().requires_grad_()
    with Counting() as counting:
        credit = assign_credit(rollout, scores, config)
        for ratio in ("token", "macro", "macro_mean"):
            keywords = {"cliprange": 0.2, "ratio": ratio, "macro_ids": credit.macro_ids}
            policy_loss(logprobs, rollout.old_logprobs, credit.advantages, mask, **keywords).backward()
        value_loss(values, rollout.values, credit.returns, mask, cliprange_value=0.2).backward()
    return counting.count


every_config = pytest.mark.parametrize("config", CONFIGS, ids=difference)


@every_config
def test_nothing_waits_for_the_device(config: CreditConfig) -> None:
    assert operations(config, 3, 20) > 0


@every_config
def test_the_number_of_operations_does_not_depend_on_the_rows(config: CreditConfig) -> None:
    assert operations(config, 2, 33) == operations(config, 50, 33)


@every_config
def test_the_number_of_operations_grows_with_the_logarithm_of_the_length(config: CreditConfig) -> None:
    short, long = operations(config, 2, 16), operations(config, 2, 1024)
    assert long - short <= 30 * 6  # six doublings; a round of the widest scan is some 25 operations


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
)
def test_what_waits_is_noticed(wait) -> None:
    with pytest.raises(AssertionError), Counting():
        wait(torch.ones(2))
