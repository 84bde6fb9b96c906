"""Which redistributions are causal: abc.md sections 4 and 5, and the table of docs/method.md.

All responses of three tokens out of {0, 1}, each as likely as any other: the batch is the exact expectation, and the
mean over the rows that share a prefix is the exact value of that prefix.
"""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apportion import (
    GAE,
    Attention,
    CreditConfig,
    ErrorLine,
    EveryToken,
    Mixture,
    PolicyAttention,
    PrefixDifference,
    Redistribution,
    Scores,
    Shuffled,
    Terminal,
    Uniform,
    assign_credit,
)
from apportion.credit.assign import REDISTRIBUTIONS
from batches import mask_of_lengths, random_rollout, random_scores

TOKENS = torch.tensor(list(product((0, 1), repeat=3)))
ROLLOUT = replace(
    random_rollout(mask_of_lengths(*[3] * 8), 1),
    prompt_ids=torch.zeros(8, 4, dtype=torch.long),
    prompt_mask=torch.ones(8, 4, dtype=torch.bool),
    response_ids=TOKENS,
)
CASES = [
    Terminal(),
    Uniform(),
    Attention(),
    Attention(row="mean", heads=(0,)),
    PolicyAttention(),
    PolicyAttention(mode="last"),
    PolicyAttention(legacy_shift=True),
    PrefixDifference(),
    PrefixDifference(beta=0.4, from_prompt=False),
    ErrorLine(),
    ErrorLine(beta=0.5),
    Shuffled(Mixture.of({Attention(): 0.5, Terminal(): 0.5})),
    Shuffled(PrefixDifference()),
    Mixture.of({Terminal(): 0.5, PrefixDifference(): 0.5}),
    Mixture.of({Attention(): 0.5, PrefixDifference(): 0.5}),
]
every_case = pytest.mark.parametrize("redistribution", CASES, ids=str)


def prefix_mean(x: Tensor) -> Tensor:
    """(8, 3). The mean of x[:, t] over the rows whose tokens before t are the same."""
    means = torch.zeros(x.shape)
    for t in range(3):
        same = (TOKENS[:, None, :t] == TOKENS[None, :, :t]).all(2).float()
        means[:, t] = (same @ x[:, t]) / same.sum(1)
    return means


def prefix_scores() -> Tensor:
    """(8, 4). Some opinion of each prefix, the same in all rows that begin with it."""
    opinions = random_scores(mask_of_lengths(3)).prefix_scores
    assert opinions is not None
    opinions = opinions.expand(8, -1).clone()
    for t in range(3):
        opinions[:, t + 1] += (TOKENS[:, : t + 1] * torch.tensor([1.0, -0.7, 2.1])[: t + 1]).sum(1)
    return opinions


SCORES = replace(random_scores(mask_of_lengths(*[3] * 8)), prefix_scores=prefix_scores())


def advantages(redistribution: Redistribution, lam: float) -> Tensor:
    """(8, 3). By GAE with a critic that is exact for what this redistribution pays."""
    paid = redistribution(ROLLOUT, SCORES).flip(1).cumsum(1).flip(1)
    config = CreditConfig(termination=EveryToken(), redistribution=redistribution, advantage=GAE(lam=lam), kl_coef=0.0)
    return assign_credit(replace(ROLLOUT, values=prefix_mean(paid)), SCORES, config).advantages


@every_case
def test_with_an_exact_critic_and_lam_1_exactly_the_causal_ones_change_nothing(redistribution: Redistribution) -> None:
    """abc.md section 4, C5."""
    gap = (advantages(redistribution, 1.0) - advantages(Terminal(), 1.0)).abs().max()
    assert bool(gap < 1e-5) is redistribution.causal, gap


@every_case
def test_exactly_the_causal_ones_pay_a_function_of_the_prefix(redistribution: Redistribution) -> None:
    """What has been paid before a choice is the same in all responses that have been the same so far."""
    paid = torch.nn.functional.pad(redistribution(ROLLOUT, SCORES).cumsum(1)[:, :-1], (1, 0))
    known = torch.stack([paid[:, 0], paid[:, 1], paid[:, 2]], 1)
    assert torch.allclose(prefix_mean(known), known, atol=1e-5) is redistribution.causal


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_below_lam_1_a_causal_one_with_an_exact_critic_keeps_what_is_expected_of_a_choice(lam: float) -> None:
    """It changes the spread of the advantages, not their mean over what follows: their order in every state is kept."""
    means = []
    for redistribution in (Terminal(), PrefixDifference()):
        given = advantages(redistribution, lam)
        after = torch.zeros(8, 3)
        for t in range(3):
            same = (TOKENS[:, None, : t + 1] == TOKENS[None, :, : t + 1]).all(2).float()
            after[:, t] = (same @ given[:, t]) / same.sum(1)
        means.append(after)
    torch.testing.assert_close(means[0], means[1], atol=1e-5, rtol=0)


def test_every_class_is_in_a_case() -> None:
    assert {type(case) for case in CASES} == set(REDISTRIBUTIONS)


@pytest.mark.parametrize("kind", REDISTRIBUTIONS)
def test_every_class_says_what_it_is(kind: type[Redistribution]) -> None:
    said = kind.__doc__ or ""
    answers = {case.causal for case in CASES if type(case) is kind}
    assert ("Causal" in said) is (True in answers)
    assert ("etrospective" in said) is (False in answers)


def test_the_table_of_the_document_says_the_same() -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    text = text[text.index("## 1. Redistribution") : text.index("### Attention: whose")]
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \|.*?\| (yes|no|if all parts are) \|", text, re.MULTILINE)
    told = dict(rows)
    assert told.keys() == {kind.__name__ for kind in REDISTRIBUTIONS}
    assert told.pop("Mixture") == "if all parts are"
    for case in CASES:
        if not isinstance(case, Mixture):
            assert told[type(case).__name__] == ("yes" if case.causal else "no")


def test_scores_of_another_kind_leave_a_causal_one_causal() -> None:
    """Constant scores, as a reward of nothing: all advantages are 0 under an exact critic."""
    flat = Scores(scores=torch.zeros(8), prefix_scores=prefix_scores())
    paid = PrefixDifference()(ROLLOUT, flat).flip(1).cumsum(1).flip(1)
    config = CreditConfig(
        termination=EveryToken(), redistribution=PrefixDifference(), advantage=GAE(lam=1.0), kl_coef=0.0
    )
    credit = assign_credit(replace(ROLLOUT, values=prefix_mean(paid)), flat, config)
    torch.testing.assert_close(credit.advantages, torch.zeros(8, 3), atol=1e-5, rtol=0)
