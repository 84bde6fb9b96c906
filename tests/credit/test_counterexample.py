"""abc.md section 5: retrospective credit makes PPO prefer the worse of two actions; a causal potential does not.

Two response tokens. The first is fixed, the second is the choice a: R(0) = 1.2 and R(1) = 1.0, and the reward model's
attention on the first token is .9 after a = 0, .1 after a = 1. So G(a) = R(a) (1 - beta c(a)) is what the choice earns.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apportion import (
    GAE,
    Attention,
    CreditConfig,
    EveryToken,
    Mixture,
    PolicyAttention,
    PrefixDifference,
    Redistribution,
    Scores,
    Terminal,
    assign_credit,
    policy_loss,
)
from batches import mask_of_lengths, random_rollout

ROLLOUT = replace(
    random_rollout(mask_of_lengths(2, 2)),  # row a holds choice a: at p = .5 the batch is the exact expectation
    old_logprobs=torch.tensor([[0.0, 0.5], [0.0, 0.5]]).log().clamp(min=-100),
    ref_logprobs=torch.zeros(2, 2),
    values=torch.zeros(2, 2),
)
PHI = 0.37  # what the causal potential thinks of the prefix, the same for both choices
SCORES = Scores(
    scores=torch.tensor([1.2, 1.0]),
    attention=torch.tensor([[0.9, 0.1], [0.1, 0.9]]),
    policy_attention=torch.tensor([[0.45, 0.05], [0.08, 0.72]]),
    prefix_scores=torch.tensor([[0.0, PHI, 7.0], [0.0, PHI, 8.0]]),
)
PROVIDERS = [Attention, PolicyAttention, lambda beta: Mixture.of({Attention(1.0): beta, Terminal(): 1 - beta})]
every_provider = pytest.mark.parametrize("provider", PROVIDERS, ids=["ABC", "ABC-D", "mixture"])
TABLE = [
    (0.0, 1.2, 1.0, 0.05),
    (0.2, 0.984, 0.980, 0.001),
    (10 / 49, 0.97959, 0.97959, 0.0),
    (0.4, 0.768, 0.960, -0.048),
    (0.8, 0.336, 0.920, -0.146),
    (1.0, 0.120, 0.900, -0.195),
]


def config_of(redistribution: Redistribution, *, whiten: bool = False) -> CreditConfig:
    return CreditConfig(
        termination=EveryToken(),
        redistribution=redistribution,
        advantage=GAE(gamma=1.0, lam=1.0),
        kl_coef=0.0,
        whiten_advantages=whiten,
    )


def gradient(redistribution: Redistribution, *, values: Tensor | None = None, whiten: bool = False) -> float:
    """The exact gradient of the objective by logit 0 at p = .5, through assign_credit and policy_loss."""
    rollout = ROLLOUT if values is None else replace(ROLLOUT, values=values)
    credit = assign_credit(rollout, SCORES, config_of(redistribution, whiten=whiten))
    logits = torch.zeros(2, requires_grad=True)
    chosen = logits.log_softmax(0)
    logprobs = torch.stack([torch.zeros(2), chosen], 1)
    old = logprobs.detach()
    # Four tokens in the mean; the expectation is over two choices.
    loss = policy_loss(logprobs, old, credit.advantages, rollout.response_mask, cliprange=0.2)
    (-2 * loss).backward()
    assert logits.grad is not None
    return float(logits.grad[0])


@every_provider
@pytest.mark.parametrize(("beta", "g0", "g1", "wanted"), TABLE)
def test_the_table_of_gradients(provider, beta: float, g0: float, g1: float, wanted: float) -> None:
    credit = assign_credit(ROLLOUT, SCORES, config_of(provider(beta=beta)))
    assert credit.returns[:, 1].tolist() == pytest.approx([g0, g1], abs=1e-5)
    assert gradient(provider(beta=beta)) == pytest.approx(wanted, abs=1e-6)


@every_provider
@pytest.mark.parametrize(("beta", "wanted"), [(row[0], row[3]) for row in TABLE if row[3]])
def test_gradient_ascent_ends_where_the_table_says(provider, beta: float, wanted: float) -> None:
    credit = assign_credit(ROLLOUT, SCORES, config_of(provider(beta=beta)))
    earned, logits = credit.returns[:, 1], torch.zeros(2)
    for _ in range(200):
        p = logits.softmax(0)
        logits = logits + 50 * p * (earned - (p * earned).sum())  # the exact policy gradient
    assert int(logits.argmax()) == (0 if wanted > 0 else 1)
    assert float((logits.softmax(0) * SCORES.scores).sum()) == pytest.approx(1.2 if wanted > 0 else 1.0, abs=0.01)


@pytest.mark.parametrize(("beta", "g0", "g1", "wanted"), [row for row in TABLE if row[3]])
@every_provider
def test_neither_a_baseline_nor_whitening_changes_the_sign(
    provider, beta: float, g0: float, g1: float, wanted: float
) -> None:
    baseline = torch.tensor([[1.1, (g0 + g1) / 2], [1.1, (g0 + g1) / 2]])
    assert gradient(provider(beta=beta), values=baseline) == pytest.approx(wanted, abs=1e-6)
    assert gradient(provider(beta=beta), whiten=True) * wanted > 0
    assert gradient(provider(beta=beta), values=baseline, whiten=True) * wanted > 0


@pytest.mark.parametrize("beta", [row[0] for row in TABLE])
@every_provider
def test_full_returns_are_those_of_the_scores(provider, beta: float) -> None:
    credit = assign_credit(ROLLOUT, SCORES, config_of(provider(beta=beta)))
    assert credit.returns[:, 0].tolist() == pytest.approx([1.2, 1.0], abs=1e-6)


@pytest.mark.parametrize("beta", [row[0] for row in TABLE])
@pytest.mark.parametrize("from_prompt", [True, False])
def test_a_causal_potential_prefers_the_better_action(beta: float, from_prompt: bool) -> None:
    redistribution = PrefixDifference(beta=beta, from_prompt=from_prompt)
    credit = assign_credit(ROLLOUT, SCORES, config_of(redistribution))
    assert float(credit.returns[0, 1] - credit.returns[1, 1]) == pytest.approx(0.2, abs=1e-6)
    assert credit.returns[:, 1].tolist() == pytest.approx([1.2 - beta * PHI, 1.0 - beta * PHI], abs=1e-6)
    assert gradient(redistribution) == pytest.approx(gradient(Terminal()), abs=1e-6)


def test_the_preference_flips_where_the_condition_says() -> None:
    """R(0) (1 - beta c(0)) < R(1) (1 - beta c(1)) while R(0) > R(1): at beta = 10/49."""
    assert gradient(Attention(beta=10 / 49 - 1e-3)) > 0 > gradient(Attention(beta=10 / 49 + 1e-3))
