"""Every estimator through the whole of assign_credit: the slow loops, rows and groups alone, padding, and limits."""

import random
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from apportion import (
    GAE,
    GRPO,
    RLOO,
    AdvantageEstimator,
    Attention,
    CodeParse,
    ConstituencyParse,
    CreditConfig,
    Delimiter,
    DrGRPO,
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
    Redistribution,
    ReinforcePlusPlus,
    Rollout,
    Scores,
    Shuffled,
    ShuffledBoundaries,
    Terminal,
    Uniform,
    WholeResponse,
    assign_credit,
    token_weights,
)
from apportion.batch import rows
from apportion.credit.assign import ESTIMATORS
from batches import (
    assert_same,
    cut,
    difference,
    mask_of,
    mask_of_lengths,
    padded,
    padded_scores,
    random_rollout,
    random_scores,
    reference_row,
    without_type_checks,
)
from parsers import pairs
from texts import with_pieces

TERMINATIONS = (EveryToken(), FixedNgram(n=3), Perplexity(), WholeResponse())
REDISTRIBUTIONS = (Terminal(), Uniform(beta=0.7), Attention(beta=0.8), PrefixDifference(beta=0.6))
# Of these tests/reference.py has no loops, or has them in tests of their own.
FURTHER_TERMINATIONS = (
    *(RandomizedNgram(), Perplexity("segment"), LowProbability(), Entropy(1.5), ShuffledBoundaries(Perplexity())),
    *(Delimiter(r"\n|\. "), CodeParse(cutoff=3), ConstituencyParse(cutoff=2, workers=0, backend=pairs)),
)
MIXED = Mixture.of({Attention(): 0.7, Uniform(): 0.3})
FURTHER_REDISTRIBUTIONS = (PolicyAttention(beta=0.8), MIXED, Shuffled(Attention()), ErrorLine(beta=0.8))
BY_GROUP = ReinforcePlusPlus(group_size=2)
GROUPS: tuple[AdvantageEstimator, ...] = (
    RLOO(2),
    RLOO(4),
    GRPO(2),
    GRPO(4),
    DrGRPO(4),
    ReinforcePlusPlus(group_size=2),
)
KEEPING: tuple[AdvantageEstimator, ...] = (
    ReinforcePlusPlus(),
    ReinforcePlusPlus(gamma=0.9),
    ReinforcePlusPlus(gamma=0.9, per="token"),
    GAE(lam=0.8, per="boundary"),
    GAE(gamma=0.9, lam=0.5, per="boundary"),
)
SHORT = {RLOO: "rloo", GRPO: "grpo", DrGRPO: "drgrpo", ReinforcePlusPlus: "mean"}


def configs(terminations: Any = TERMINATIONS, redistributions: Any = REDISTRIBUTIONS, **changes: Any) -> list:
    """All estimators with all that each of them can be combined with."""
    found = []
    for estimator, termination, redistribution in product((*GROUPS, *KEEPING), terminations, redistributions):
        if not (estimator.sums_rewards and isinstance(redistribution, PrefixDifference)):
            chosen: dict[str, Any] = {
                "termination": termination,
                "redistribution": redistribution,
                "advantage": estimator,
            }
            found.append(CreditConfig(**chosen | changes))
    return found


CONFIGS = configs()
EVERY_TERMINATION, EVERY_REDISTRIBUTION = TERMINATIONS + FURTHER_TERMINATIONS, REDISTRIBUTIONS + FURTHER_REDISTRIBUTIONS
EVERY_CONFIG = configs(EVERY_TERMINATION, EVERY_REDISTRIBUTION)
EVERY_CONFIG += [
    CreditConfig(termination=termination, advantage=GAE(gamma=0.9, lam=0.8), macro_value=pooling)
    for termination, pooling in product(EVERY_TERMINATION, ("unit", "position", "position_falling"))
]
WITHOUT_WHITENING = [config for config in EVERY_CONFIG if not config.advantage.whitens]
any_config = st.sampled_from(EVERY_CONFIG)
# Rows of four, so that they are whole groups of any size above.
masks = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=4, max_size=8).map(
        lambda drawn: torch.tensor(drawn[: len(drawn) // 4 * 4], dtype=torch.bool)
    )
)


def slow(rollout: Rollout, scores: Scores, config: CreditConfig) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of the valid tokens of each row, by the loops of tests/reference.py."""
    estimator, g = config.advantage, config.advantage.responses_per_prompt
    kinds = {EveryToken: "every", FixedNgram: "fixed", Perplexity: "perplexity", WholeResponse: "whole"}
    names = {Terminal: "terminal", Uniform: "uniform", Attention: "attention", PrefixDifference: "prefix"}
    termination = (kinds[type(config.termination)], *vars(config.termination).values())[:2]
    options = reference.Options(
        termination=termination,
        redistribution=(names[type(config.redistribution)], *vars(config.redistribution).values()),
        gamma=getattr(estimator, "gamma", 1.0),
        per="action" if getattr(estimator, "per", "action") == "action" else "token",
        kl_coef=config.kl_coef,
    )
    every = [reference_row(rollout, scores, b) for b in range(len(scores.scores))]
    paid = [reference.assign_credit(row, options) for row in every]
    if isinstance(estimator, GAE):
        both = [
            reference.boundary_gae(
                p.token_level_rewards, row.values, p.macro_ids, gamma=estimator.gamma, lam=estimator.lam
            )
            for p, row in zip(paid, every, strict=True)
        ]
        return [a for a, _ in both], [r for _, r in both]
    if not estimator.sums_rewards:
        assert isinstance(estimator, ReinforcePlusPlus)
        togo = [
            reference.reward_to_go(p.token_level_rewards, p.macro_ids, estimator.gamma, per=estimator.per) for p in paid
        ]
        return reference.whiten(togo), togo
    totals = [sum(p.token_level_rewards) if p.macro_ids else None for p in paid]
    compared = reference.group_advantages(SHORT[type(estimator)], totals, g)
    advantages = [[a] * len(p.macro_ids) for a, p in zip(compared, paid, strict=True)]
    advantages = reference.whiten(advantages) if estimator.whitens else advantages
    weighed = []
    for row, p, gains in zip(every, paid, advantages, strict=True):
        shares = reference.normalised(row.attention) if isinstance(config.redistribution, Attention) else [1.0] * 99
        shares = [0.0] * 99 if isinstance(config.redistribution, Terminal) else shares[: len(gains)]
        assert isinstance(config.redistribution, Redistribution)
        weights = reference.token_weights(shares[: len(gains)], config.redistribution.weight, p.macro_ids)
        weighed.append([w * a for w, a in zip(weights, gains, strict=True)])
    return weighed, [[total or 0.0] * len(p.macro_ids) for total, p in zip(totals, paid, strict=True)]


@pytest.mark.parametrize("case", range(240))
def test_the_batched_code_equals_the_slow_loops(case: int) -> None:
    """240 draws of a batch and of one configuration out of the product of choices."""
    draw = random.Random(case)
    config = replace(draw.choice(CONFIGS), kl_coef=draw.choice([0.0, 0.3]))
    density, width = draw.choice([0.6, 1.0]), draw.choice([1, 7, 20])
    lengths = [0, 1, 3, 9, 12, 20, 20, 5]
    mask = torch.tensor([[draw.random() < density and t < n for t in range(width)] for n in lengths])
    rollout, scores = random_rollout(mask, case, grid=draw.choice([None, 0.25])), random_scores(mask, case)
    if draw.random() < 0.2:
        scores = replace(scores, scores=torch.zeros(8))
    credit = assign_credit(rollout, scores, config)
    wanted = slow(rollout, scores, config)
    for name, numbers in zip(("advantages", "returns"), wanted, strict=True):
        found = getattr(credit, name)
        assert (found[~mask] == 0).all()
        for b in range(8):
            assert found[b][mask[b]].tolist() == pytest.approx(numbers[b], abs=5e-4, rel=1e-3), (name, b, config)


@given(config=st.sampled_from(WITHOUT_WHITENING), mask=masks, seed=st.integers(0, 999))
@settings(max_examples=300)
def test_a_batch_equals_its_groups_alone(config: CreditConfig, mask: Tensor, seed: int) -> None:
    """But for whitening, which asks the whole batch."""
    g = config.advantage.responses_per_prompt
    rollout, scores = with_pieces(random_rollout(mask, seed, grid=0.25), seed), random_scores(mask, seed)
    together = assign_credit(rollout, scores, config)
    for first in range(0, len(mask), g):
        group = slice(first, first + g)
        alone = assign_credit(rows(rollout, group), rows(scores, group), config)
        assert_same(alone, rows(together, group), atol=2e-5)
    # Nor does the order inside of groups, or of the groups, matter.
    order = torch.arange(len(mask)).flip(0)
    assert_same(assign_credit(rows(rollout, order), rows(scores, order), config), rows(together, order), atol=2e-5)


@given(config=any_config, mask=masks, seed=st.integers(0, 999), left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=300)
def test_padding_changes_nothing(config: CreditConfig, mask: Tensor, seed: int, left: int, right: int) -> None:
    rollout, scores = with_pieces(random_rollout(mask, seed, grid=0.25), seed), random_scores(mask, seed)
    credit = assign_credit(
        padded(rollout, left=left, right=right, prompt_left=left), padded_scores(scores, left=left, right=right), config
    )
    assert_same(cut(credit, left, mask.shape[1]), assign_credit(rollout, scores, config), atol=2e-4)


@given(
    config=any_config,
    mask=masks,
    seed=st.integers(0, 999),
    score=st.sampled_from([0.0, 0.7, -3.0]),
    kl_coef=st.sampled_from([0.0, 0.05]),
)
@settings(max_examples=300)
def test_constant_scores_and_rows_of_few_tokens_give_numbers(
    config: CreditConfig, mask: Tensor, seed: int, score: float, kl_coef: float
) -> None:
    """Without a penalty groups of equal scores have advantage 0, to the bit; empty rows, scored NaN, always."""
    mask = torch.cat([mask, mask_of([[0], [0], [1], [1]]).expand(4, mask.shape[1])])
    mask[-1, 1:] = False
    rollout, scores = with_pieces(random_rollout(mask, seed), seed), random_scores(mask, seed)
    scores = replace(scores, scores=torch.where(mask.any(1), score, torch.nan))
    credit = assign_credit(rollout, scores, replace(config, kl_coef=kl_coef))
    for f in fields(credit):
        assert getattr(credit, f.name).isfinite().all(), f.name
    assert (credit.advantages[~mask] == 0).all()
    if config.advantage.sums_rewards and kl_coef == 0:
        assert (credit.advantages == 0).all()


@pytest.mark.parametrize("score", [0.7, -1.0, 5.0, 50.0])
@pytest.mark.parametrize(
    "config",
    [
        CreditConfig(advantage=ReinforcePlusPlus(), termination=WholeResponse(), redistribution=Attention(), kl_coef=0),
        CreditConfig(advantage=ReinforcePlusPlus(), kl_coef=0),
    ],
    ids=difference,
)
def test_where_every_response_earned_the_same_nothing_is_learned_from_rounding(
    config: CreditConfig, score: float
) -> None:
    mask = mask_of_lengths(*[512] * 64)
    scores = replace(random_scores(mask), scores=torch.full((64,), score))
    assert torch.equal(assign_credit(random_rollout(mask), scores, config).advantages, torch.zeros(64, 512))


@pytest.mark.parametrize("config", CONFIGS[::3], ids=difference)
@pytest.mark.parametrize("shape", [(4, 0), (0, 3), (0, 0)])
def test_a_batch_without_tokens_or_rows_gives_one(config: CreditConfig, shape: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    credit = assign_credit(random_rollout(mask), random_scores(mask), config)
    assert all(getattr(credit, f.name).shape == shape for f in fields(credit))


@pytest.mark.parametrize("estimator", [RLOO(2), GRPO(2), DrGRPO(2), ReinforcePlusPlus(), BY_GROUP])
def test_without_a_critic_values_are_not_read(estimator: AdvantageEstimator) -> None:
    mask = mask_of_lengths(5, 3, 8, 1)
    rollout, scores = random_rollout(mask), random_scores(mask)
    config = CreditConfig(advantage=estimator)
    spoilt = replace(rollout, values=torch.full_like(rollout.values, torch.nan))
    assert not estimator.needs_critic
    assert torch.equal(
        assign_credit(spoilt, scores, config).advantages, assign_credit(rollout, scores, config).advantages
    )


def test_every_estimator_is_known_by_a_short_name() -> None:
    assert {type(estimator) for estimator in (*GROUPS, *KEEPING)} == set(ESTIMATORS)


# Boundary lambda: SAE, related.md section 3 and rule 6.


def test_lambda_acts_at_boundaries_by_hand() -> None:
    """Actions of two and one tokens, lam .5: A_2 = 1 - .3; A_1 = (.3 - .2) + .5 A_2; A_0 = (.2 - .1) + A_1."""
    mask = mask_of_lengths(3)
    rollout = replace(random_rollout(mask), values=torch.tensor([[0.1, 0.2, 0.3]]))
    config = CreditConfig(termination=FixedNgram(n=2), advantage=GAE(lam=0.5, per="boundary"), kl_coef=0.0)
    credit = assign_credit(rollout, Scores(scores=torch.ones(1)), config)
    assert credit.advantages[0].tolist() == pytest.approx([0.55, 0.45, 0.7])
    assert credit.returns[0].tolist() == pytest.approx([0.65, 0.65, 1.0])


@pytest.mark.parametrize("termination", TERMINATIONS, ids=str)
def test_at_lam_1_it_telescopes_to_the_return_less_the_value(termination: Any) -> None:
    mask = mask_of([[1] * 12, [1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]])
    rollout, scores = random_rollout(mask), random_scores(mask)
    credit = assign_credit(
        rollout, scores, CreditConfig(termination=termination, advantage=GAE(lam=1.0, per="boundary"))
    )
    togo = credit.token_level_rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(credit.advantages, torch.where(mask, togo - rollout.values, 0), atol=1e-5, rtol=1e-5)


def test_boundaries_of_every_token_and_of_none_are_gae_over_tokens_and_monte_carlo() -> None:
    mask = mask_of_lengths(20, 7, 1, 0)
    rollout, scores = random_rollout(mask), random_scores(mask)
    found, wanted = (
        assign_credit(rollout, scores, CreditConfig(termination=EveryToken(), advantage=GAE(0.9, 0.8, per=per)))
        for per in ("boundary", "action")
    )
    assert_same(found, wanted)
    whole, free = (
        assign_credit(rollout, scores, CreditConfig(termination=t, advantage=GAE(0.9, lam, per="boundary")))
        for t, lam in ((WholeResponse(), 0.3), (EveryToken(), 1.0))
    )
    torch.testing.assert_close(whole.advantages, free.advantages, atol=1e-5, rtol=1e-5)


def test_advantages_differ_inside_an_action_and_pooling_is_refused() -> None:
    assert GAE(per="boundary").varies_inside_actions
    assert not GAE().varies_inside_actions
    with pytest.raises(ValueError, match="macro_value is 'unit', which GAE here does not read; leave it out"):
        CreditConfig(advantage=GAE(per="boundary"), macro_value="unit")


# REINFORCE++.


def test_reward_to_go_is_whitened_over_the_tokens_of_all_processes() -> None:
    mask = mask_of_lengths(30, 11, 8, 5)
    rollout, scores = random_rollout(mask), random_scores(mask)
    calls: list[Tensor] = []
    credit = assign_credit(
        rollout, scores, CreditConfig(advantage=ReinforcePlusPlus()), reduce=lambda x: calls.append(x) or x
    )
    assert calls
    assert float(credit.advantages[mask].mean()) == pytest.approx(0, abs=1e-5)
    assert float(credit.advantages[mask].var()) == pytest.approx(1, abs=1e-4)


def test_reward_to_go_keeps_what_a_redistribution_pays_to_each_token() -> None:
    """Without a penalty: R (1 - the part of the attention before the token's action)."""
    mask = mask_of_lengths(6)
    rollout = random_rollout(mask)
    scores = Scores(scores=torch.tensor([2.0]), attention=torch.tensor([[1.0, 2, 3, 4, 5, 5]]))
    config = CreditConfig(
        termination=FixedNgram(n=2), redistribution=Attention(beta=1.0), advantage=ReinforcePlusPlus(), kl_coef=0.0
    )
    found = assign_credit(rollout, scores, config).returns[0].tolist()
    assert found == pytest.approx([2.0, 2.0, 1.7, 1.7, 1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, r"gamma is 1.5; choose a number in \[0, 1\]"),
        ({"gamma": "x"}, r"gamma is 'x'; choose a number in \[0, 1\]"),
        ({"gamma": 0.9, "group_size": 4}, "gamma is 0.9 with group_size 4, which discounts nothing; use 1"),
        ({"per": "token", "group_size": 4}, "per is 'token' with group_size 4, which has no discount; leave it out"),
        ({"group_size": 0}, "group_size is 0; give a whole number of at least 1"),
        ({"per": "boundary"}, "per is 'boundary'; choose 'action' or 'token'"),
    ],
)
def test_reinforce_refuses_what_has_no_meaning(changes: dict[str, Any], message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        ReinforcePlusPlus(**changes)


# Token weights: related.md section 4, rules 1 and 5.


def weights_of(redistribution: Redistribution, termination: Any = TERMINATIONS[0], score: float = 1.0) -> Tensor:
    mask = mask_of_lengths(4, 2, 0)
    rollout = random_rollout(mask)
    attention = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0]]).masked_fill(~mask, torch.nan)
    scores = Scores(scores=torch.full((3,), score), attention=attention)
    ids = assign_credit(rollout, scores, CreditConfig(termination=termination)).macro_ids
    return token_weights(redistribution, rollout, scores, ids)


@pytest.mark.parametrize("score", [1.0, 0.0, -2.0])
def test_weights_by_hand_do_not_depend_on_the_score(score: float) -> None:
    """Attention .1 to .4 over four tokens: 4 alpha, mixed with 1; the second row has none, and weighs all alike."""
    found = weights_of(Attention(beta=0.5), score=score)
    wanted = [[0.7, 0.9, 1.1, 1.3], [1, 1, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_weights_are_constant_inside_an_action() -> None:
    found = weights_of(Attention(beta=1.0), FixedNgram(n=3))
    torch.testing.assert_close(found[0], torch.tensor([0.8, 0.8, 0.8, 1.6]))
    assert (weights_of(Attention(beta=1.0), WholeResponse())[0] == 1).all()


@pytest.mark.parametrize("redistribution", [Terminal(), Uniform(), Uniform(beta=0.3), Attention(beta=0.0)])
def test_what_redistributes_nothing_or_evenly_weighs_all_tokens_alike(redistribution: Redistribution) -> None:
    torch.testing.assert_close(weights_of(redistribution), mask_of_lengths(4, 2, 0).float())


class Signed(Redistribution):
    """Shares of both signs."""

    def shares(self, rollout: Rollout, scores: Scores) -> Tensor:
        signs = torch.tensor([[-5.0, 1, 0, 3]]).expand(rollout.response_mask.shape)
        return torch.where(rollout.response_mask, signs * scores.scores[:, None], 0)


def test_a_share_below_0_weighs_nothing() -> None:
    torch.testing.assert_close(weights_of(Signed())[0], torch.tensor([0.0, 1, 0, 3]))


@given(
    redistribution=st.sampled_from([Attention(beta=0.8), Shuffled(Attention()), Uniform(0.4), Terminal()]),
    termination=st.sampled_from(TERMINATIONS),
    mask=masks,
    seed=st.integers(0, 999),
)
def test_weights_have_mean_1_over_every_row(redistribution: Redistribution, termination: Any, mask: Tensor, seed: int):
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    ids = assign_credit(rollout, scores, CreditConfig(termination=termination)).macro_ids
    found = token_weights(redistribution, rollout, scores, ids)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), mask.sum(1).float(), atol=1e-4, rtol=1e-4)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("estimator", [RLOO(2), GRPO(2), DrGRPO(2), BY_GROUP])
def test_a_redistribution_weighs_the_advantage_after_it_was_normalised(estimator: AdvantageEstimator) -> None:
    mask = mask_of_lengths(9, 4, 7, 7)
    rollout, scores = random_rollout(mask), random_scores(mask)
    plain, weighed = (
        assign_credit(rollout, scores, CreditConfig(termination=FixedNgram(n=2), advantage=estimator, redistribution=r))
        for r in (Terminal(), Attention(beta=0.8))
    )
    weights = token_weights(Attention(beta=0.8), rollout, scores, plain.macro_ids)
    torch.testing.assert_close(weighed.advantages, plain.advantages * weights, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(weighed.advantages, plain.advantages)


def test_a_mixture_weighs_as_the_mean_of_its_parts_and_a_callable_by_all_that_it_pays() -> None:
    rollout = random_rollout(mask_of_lengths(7, 3, width=9), 5)
    scores = random_scores(rollout.response_mask)
    ids = assign_credit(rollout, scores, CreditConfig(termination=FixedNgram(n=2))).macro_ids

    def first(rollout: Rollout, scores: Scores, **_: Any) -> Tensor:
        columns = torch.arange(rollout.response_mask.shape[1])
        return scores.scores[:, None] * (columns == 0)

    parts = {Attention(beta=0.5): 0.25, first: 0.75}
    found = token_weights(Mixture.of(parts), rollout, scores, ids)
    wanted = sum(weight * token_weights(part, rollout, scores, ids) for part, weight in parts.items())
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(token_weights(first, rollout, scores, ids)[0, :3], torch.tensor([3.5, 3.5, 0.0]))
    torch.testing.assert_close(found.sum(1), rollout.lengths.float())
