"""The whole of assign_credit: the documents' oracle values, the slow reference, and what must not change anything."""

import random
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from apportion import (
    GAE,
    Attention,
    Credit,
    CreditConfig,
    ErrorLine,
    EveryToken,
    FixedNgram,
    Mixture,
    Perplexity,
    PolicyAttention,
    PrefixDifference,
    RandomizedNgram,
    Redistribution,
    Rollout,
    Scores,
    Shuffled,
    ShuffledBoundaries,
    Terminal,
    TerminationCondition,
    Uniform,
    WholeResponse,
    assign_credit,
    gae,
    token_level_rewards,
)
from apportion.batch import rows
from apportion.masked import masked_mean, masked_var
from batches import (
    assert_same,
    cut,
    difference,
    for_reference,
    mask_of,
    mask_of_lengths,
    padded,
    padded_scores,
    random_rollout,
    random_scores,
    reference_row,
    without_type_checks,
)

TERMINATIONS: tuple[TerminationCondition, ...] = (
    EveryToken(),
    FixedNgram(n=3),
    RandomizedNgram(lengths=(1, 2, 4), repeats=2),
    Perplexity(variant="token"),
    Perplexity(variant="segment"),
    WholeResponse(),
)
REDISTRIBUTIONS: tuple[Redistribution, ...] = (
    Terminal(),
    Uniform(beta=0.7),
    Attention(beta=0.8),
    PrefixDifference(),
    PrefixDifference(beta=0.6, from_prompt=False),
    PolicyAttention(legacy_shift=True),
    ErrorLine(beta=0.7),
    Mixture.of({Attention(beta=0.5): 0.25, PolicyAttention(): 0.25, PrefixDifference(): 0.5}),
)
ADVANTAGES = (GAE(), GAE(gamma=0.9, lam=0.8), GAE(gamma=0.97, lam=0.9, per="token"), GAE(lam=0.0, per="token"))

CONFIGS = [
    *(
        CreditConfig(termination=t, redistribution=r)
        for t in TERMINATIONS
        for r in (*REDISTRIBUTIONS, Shuffled(Uniform()))
    ),
    *(CreditConfig(advantage=a, redistribution=r) for a in ADVANTAGES for r in REDISTRIBUTIONS),
    CreditConfig(macro_value="unit"),
    CreditConfig(macro_value="position", macro_reward="mean", advantage=GAE(gamma=0.9, per="token")),
    CreditConfig.official(),
    CreditConfig.official(macro_value="position", termination=Perplexity(early=True)),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=difference)
any_config = st.sampled_from(CONFIGS)

masks = st.integers(1, 16).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4).map(
        lambda rows: torch.tensor(rows, dtype=torch.bool)
    )
)


def closing(*sizes: int):
    """A condition that closes actions of these sizes."""
    ends = torch.tensor(sizes).cumsum(0) - 1

    def condition(rollout: Rollout) -> Tensor:
        return torch.zeros_like(rollout.response_mask).index_fill(1, ends, True)

    return condition


# ma-rlhf.md O7: values .1 ... .8, rewards seven times -.01 and then .99 (score 1, kl_coef .01, one nat a token).
O7 = replace(
    random_rollout(mask_of_lengths(8)),
    values=torch.arange(1, 9)[None] / 10,
    old_logprobs=torch.zeros(1, 8),
    ref_logprobs=-torch.ones(1, 8),
)
ONE = Scores(scores=torch.ones(1))
SINGLE = [0.675677, 0.616502, 0.554213, 0.488645, 0.419626, 0.346975, 0.2705, 0.19]
SINGLE_RETURNS = [0.775677, 0.816502, 0.854213, 0.888645, 0.919626, 0.946975, 0.9705, 0.99]
O7_ROWS = [
    ((1,) * 8, {"macro_reward": "sum"}, SINGLE, SINGLE_RETURNS),
    ((1,) * 8, {"macro_reward": "mean"}, SINGLE, SINGLE_RETURNS),
    ((3, 3, 2), {}, [0.686575, 0.4385, 0.23], [0.886575, 0.9385, 0.98]),
    ((3, 3, 2), {"macro_value": "position"}, [0.652821, 0.40297, 0.213333], [0.889185, 0.939333, 0.98]),
    ((3, 3, 2), {"macro_value": "unit"}, [0.59395, 0.341, 0.18], [0.89395, 0.941, 0.98]),
    ((3, 3, 1, 1), {}, [0.675626, 0.426975, 0.2705, 0.19], [0.875626, 0.926975, 0.9705, 0.99]),
    ((3, 3, 1, 1), {"macro_reward": "mean"}, [0.714626, 0.446975, 0.2705, 0.19], [0.914626, 0.946975, 0.9705, 0.99]),
    ((8,), {}, [0.47], [0.92]),
]


def actions(x: Tensor, sizes: tuple[int, ...]) -> list[float]:
    """Read one number an action, and check that it is the same on all of its tokens."""
    parts = x[0].split(list(sizes))
    assert all((part == part[0]).all() for part in parts)
    return [float(part[0]) for part in parts]


@pytest.mark.parametrize(("sizes", "changes", "advantages", "returns"), O7_ROWS)
def test_o7_advantages_and_returns(sizes: tuple, changes: dict, advantages: list, returns: list) -> None:
    """ma-rlhf.md O7, every row of its table but the phantom's."""
    credit = assign_credit(O7, ONE, CreditConfig.paper(termination=closing(*sizes), kl_coef=0.01, **changes))
    assert credit.token_level_rewards[0].tolist() == pytest.approx([-0.01] * 7 + [0.99])
    assert actions(credit.advantages, sizes) == pytest.approx(advantages, abs=2e-6)
    assert actions(credit.returns, sizes) == pytest.approx(returns, abs=2e-6)


def test_o7_the_official_preset_at_n_3_has_its_row() -> None:
    """ma-rlhf.md O7, row `3,3,1,1 mean`."""
    credit = assign_credit(O7, ONE, CreditConfig.official(termination=FixedNgram(n=3), kl_coef=0.01))
    assert actions(credit.advantages, (3, 3, 1, 1)) == pytest.approx([0.714626, 0.446975, 0.2705, 0.19], abs=2e-6)


def test_o7_no_phantom_step_enters_gae() -> None:
    """ma-rlhf.md section 4 row 2: at n = 1 the official code has an empty step of value 0 before the last token."""
    rewards, values = [-0.01] * 7, [v / 10 for v in range(1, 8)]
    phantom = [0.639639, 0.578567, 0.514282, 0.446612, 0.375381, 0.300401, 0.221475, 0.9805, 0.19]
    nine = reference.gae([*rewards, 0.0, 0.99], [*values, 0.0, 0.8], [1.0] * 9, [0.95] * 9)
    assert nine[0] == pytest.approx(phantom, abs=2e-6)
    credit = assign_credit(O7, ONE, CreditConfig.official(termination=FixedNgram(n=1), kl_coef=0.01))
    assert credit.advantages[0].tolist() == pytest.approx(SINGLE, abs=2e-6)


def total_of(termination: TerminationCondition, config: CreditConfig) -> float:
    """Read the total of all macro rewards off the first return at lam = 1, with values of 0."""
    mask = mask_of_lengths(101)
    zeros = torch.zeros(1, 101)
    rollout = replace(random_rollout(mask), values=zeros, old_logprobs=zeros, ref_logprobs=zeros - 1)
    config = replace(config, termination=termination, kl_coef=0.01, advantage=GAE(lam=1.0))
    return float(assign_credit(rollout, Scores(scores=torch.zeros(1)), config).returns[0, 0])


@pytest.mark.parametrize("termination", [*TERMINATIONS, *(FixedNgram(n=n) for n in (1, 5, 10, 512))], ids=str)
@pytest.mark.parametrize("preset", [CreditConfig.paper(), CreditConfig(last_token_apart=True)])
def test_o2_macro_rewards_keep_the_total(termination: TerminationCondition, preset: CreditConfig) -> None:
    """ma-rlhf.md O2 and section 4 row 1: rewards averaged inside a segment make the KL penalty shrink with n."""
    assert total_of(termination, preset) == pytest.approx(-1.01, abs=1e-6)


@pytest.mark.parametrize(("n", "total"), [(1, -1.01), (5, -0.21), (10, -0.11), (512, -0.02)])
def test_o2_the_official_preset_shrinks_the_penalty(n: int, total: float) -> None:
    """ma-rlhf.md O2, the official mean: -1.01, -0.21, -0.11 and -0.02 for the same 101 tokens."""
    assert total_of(FixedNgram(n=n), CreditConfig.official()) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("termination", [FixedNgram(n=1), EveryToken()])
def test_o8_actions_of_one_token_are_token_ppo_exactly(termination: TerminationCondition) -> None:
    """ma-rlhf.md O8 and section 4 row 2: the same tensors, not only close."""
    rollout, scores = random_rollout(mask_of_lengths(40, 17, 1, 0)), random_scores(mask_of_lengths(40, 17, 1, 0))
    mask = rollout.response_mask
    placed = Terminal()(rollout, scores)
    rewards = token_level_rewards(placed, rollout.old_logprobs, rollout.ref_logprobs, mask, kl_coef=0.05)
    advantages, returns = gae(rewards, rollout.values, mask, gamma=1.0, lam=0.95)
    credit = assign_credit(rollout, scores, CreditConfig(termination=termination))
    assert torch.equal(credit.advantages, advantages)
    assert torch.equal(credit.returns, returns)


@pytest.mark.parametrize("termination", TERMINATIONS, ids=str)
def test_o9_the_first_return_is_that_of_every_segmentation(termination: TerminationCondition) -> None:
    """ma-rlhf.md O9: .92 in the setting of O7."""
    rollout = replace(O7, ref_logprobs=torch.tensor([[-1.0, -1, -1, -1, -1, -1, -1, -1]]))
    credit = assign_credit(rollout, ONE, CreditConfig(termination=termination, kl_coef=0.01, advantage=GAE(lam=1.0)))
    assert float(credit.returns[0, 0]) == pytest.approx(0.92, abs=1e-6)


@pytest.mark.parametrize("macro_value", ["equal", "unit", "position", "position_falling"])
def test_o10_constant_values_do_not_depend_on_the_pooling(macro_value) -> None:
    """ma-rlhf.md O10."""
    rollout = replace(O7, values=torch.full((1, 8), 0.3))
    pooled, equal = (assign_credit(rollout, ONE, CreditConfig(macro_value=m)) for m in (macro_value, "equal"))
    assert_same(pooled, equal, atol=1e-6)


@given(config=any_config, mask=masks, seed=st.integers(0, 999))
@settings(max_examples=150)
def test_o12_a_batch_equals_its_rows_alone(config: CreditConfig, mask: Tensor, seed: int) -> None:
    """ma-rlhf.md O12 and section 4 row 14: boundaries of row 0 and one scalar value served for all rows."""
    rollout, scores = random_rollout(mask, seed, grid=0.25), random_scores(mask, seed)
    together = assign_credit(rollout, scores, config)
    order = torch.arange(len(mask) - 1, -1, -1)
    assert_same(assign_credit(rows(rollout, order), rows(scores, order), config), rows(together, order))
    for b in range(len(mask)):
        one = slice(b, b + 1)
        assert_same(assign_credit(rows(rollout, one), rows(scores, one), config), rows(together, one))


@given(config=any_config, mask=masks, seed=st.integers(0, 999), left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=150)
def test_o12_padding_changes_nothing(config: CreditConfig, mask: Tensor, seed: int, left: int, right: int) -> None:
    """ma-rlhf.md O12. The padding holds NaN and stray tokens; it may lie on the left, on the right, and between."""
    rollout, scores = random_rollout(mask, seed, grid=0.25), random_scores(mask, seed)
    credit = assign_credit(
        padded(rollout, left=left, right=right, prompt_left=left), padded_scores(scores, left=left, right=right), config
    )
    assert_same(cut(credit, left, mask.shape[1]), assign_credit(rollout, scores, config))
    outside = ~torch.nn.functional.pad(mask, (left, right))
    assert (credit.macro_ids[outside] == -1).all()
    for name in ("token_level_scores", "token_level_rewards", "advantages", "returns"):
        assert (getattr(credit, name)[outside] == 0).all()


NAMES = {
    EveryToken: "every",
    WholeResponse: "whole",
    FixedNgram: "fixed",
    RandomizedNgram: "lengths",
    Perplexity: "perplexity",
}
PRODUCT = list(
    product(
        TERMINATIONS,
        REDISTRIBUTIONS,
        ADVANTAGES,
        ("equal", "unit", "position", "position_falling"),
        ("sum", "mean"),
        (0.0, 0.3),
        (None, 1.0),
        (False, True),
        (False, True),
    )
)


def reference_options(config: CreditConfig, dealt: list[int]) -> reference.Options:
    """Translate a configuration; `dealt` are the lengths that a random condition drew."""
    termination = (NAMES[type(config.termination)], *vars(config.termination).values())
    if isinstance(config.termination, Perplexity):
        termination = ("perplexity", config.termination.variant)
    if isinstance(config.termination, RandomizedNgram):
        termination = ("lengths", dealt)
    assert isinstance(config.advantage, GAE)
    return reference.Options(
        termination=termination,
        redistribution=for_reference(config.redistribution),
        macro_value=config.macro_value,
        macro_reward=config.macro_reward,
        gamma=config.advantage.gamma,
        lam=config.advantage.lam,
        per=config.advantage.per,
        kl_coef=config.kl_coef,
        score_clamp=config.score_clamp,
        last_token_apart=config.last_token_apart,
    )


@pytest.mark.parametrize("case", range(300))
def test_the_batched_code_equals_the_slow_loops(case: int) -> None:
    """300 draws of a batch and of one configuration out of the full product of options."""
    draw = random.Random(case)
    termination, redistribution, advantage, value, reward, kl_coef, clamp, apart, whiten = draw.choice(PRODUCT)
    config = CreditConfig(
        termination=termination,
        redistribution=redistribution,
        advantage=advantage,
        macro_value=value,
        macro_reward=reward,
        kl_coef=kl_coef,
        score_clamp=clamp,
        last_token_apart=apart,
        whiten_advantages=whiten,
    )
    density = draw.choice([0.5, 0.9, 1.0])
    width = draw.choice([1, 12, 24])
    mask = torch.tensor([[draw.random() < density and t < length for t in range(width)] for length in (1, 9, 24, 0)])
    rollout = random_rollout(mask, case, grid=draw.choice([None, 0.25]))
    scores = random_scores(mask, case)
    credit = assign_credit(rollout, scores, config)
    wanted = []
    for b in range(len(mask)):
        dealt = reference.sizes(credit.macro_ids[b][mask[b]].tolist())
        wanted.append(reference.assign_credit(reference_row(rollout, scores, b), reference_options(config, dealt)))
    advantages = [row.advantages for row in wanted]
    advantages = reference.whiten(advantages) if whiten else advantages
    for b, row in enumerate(wanted):
        assert credit.macro_ids[b][mask[b]].tolist() == row.macro_ids
        found = {f.name: getattr(credit, f.name)[b][mask[b]].tolist() for f in fields(credit)}
        for name in ("token_level_scores", "token_level_rewards", "returns"):
            assert found[name] == pytest.approx(getattr(row, name), abs=2e-5), name
        assert found["advantages"] == pytest.approx(advantages[b], abs=2e-4 if whiten else 2e-5)


@pytest.mark.parametrize("termination", TERMINATIONS, ids=str)
@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("length", range(1, 13))
def test_an_exact_critic_gives_zero_advantage(length: int, advantage: GAE, termination: TerminationCondition) -> None:
    """Every token's value is what its action and those after it still earn, so that any pooling would do."""
    rollout, scores = random_rollout(mask_of_lengths(length)), random_scores(mask_of_lengths(length))
    config = CreditConfig(termination=termination, advantage=advantage, macro_value="position")
    first = assign_credit(rollout, scores, config)
    options = reference_options(
        replace(config, advantage=replace(advantage, lam=1.0)), reference.sizes(first.macro_ids[0].tolist())
    )
    exact = torch.tensor([reference.assign_credit(reference_row(rollout, scores, 0), options).returns])
    credit = assign_credit(replace(rollout, values=exact), scores, config)
    torch.testing.assert_close(credit.advantages, torch.zeros(1, length), atol=5e-6, rtol=0)
    torch.testing.assert_close(credit.returns, exact, atol=5e-6, rtol=0)


def test_prefix_differences_change_no_advantage_at_lam_1() -> None:
    """abc.md section 4: a causal potential meets C5, so that with an exact critic and lam 1 it changes nothing."""
    mask = mask_of_lengths(12, 7)
    rollout, scores = random_rollout(mask), random_scores(mask)
    assert scores.prefix_scores is not None
    for advantage in GAE(lam=1.0), GAE(gamma=0.9, lam=1.0, per="token"):
        plain, shaped = (
            CreditConfig(termination=EveryToken(), redistribution=r, advantage=advantage)
            for r in (Terminal(), PrefixDifference())
        )
        shifted = replace(rollout, values=rollout.values - scores.prefix_scores[:, :-1])  # V' = V - Phi
        torch.testing.assert_close(
            assign_credit(shifted, scores, shaped).advantages,
            assign_credit(rollout, scores, plain).advantages,
            atol=1e-5,
            rtol=0,
        )


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens() -> None:
    mask = mask_of_lengths(30, 11, 1, 0)
    rollout, scores = random_rollout(mask), random_scores(mask)
    white, plain = (assign_credit(rollout, scores, CreditConfig(whiten_advantages=w)) for w in (True, False))
    assert masked_mean(white.advantages, mask).abs() < 1e-6
    assert (masked_var(white.advantages, mask) - 1).abs() < 1e-5
    assert (white.advantages[~mask] == 0).all()
    assert torch.equal(white.returns, plain.returns)


def test_whitening_asks_the_other_processes() -> None:
    mask = mask_of_lengths(30, 11, 8, 5)
    rollout, scores = random_rollout(mask), random_scores(mask)
    config = CreditConfig(whiten_advantages=True)
    calls: list[Tensor] = []
    assign_credit(rollout, scores, config, reduce=lambda x: calls.append(x) or x)
    assert calls
    calls.clear()
    assign_credit(rollout, scores, CreditConfig(), reduce=lambda x: calls.append(x) or x)
    assert not calls


@every_config
def test_rows_that_are_empty_or_of_one_token_give_numbers(config: CreditConfig) -> None:
    """abc.md section 10 row 18, ma-rlhf.md section 4 rows 7 and 11."""
    mask = mask_of([[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1]])
    rollout, scores = random_rollout(mask), random_scores(mask)
    scores = replace(scores, scores=scores.scores.clone().index_fill(0, torch.tensor([0]), torch.nan))
    credit = assign_credit(rollout, scores, config)
    for f in fields(credit):
        assert getattr(credit, f.name).isfinite().all(), f.name
    assert (credit.advantages[0] == 0).all()


@every_config
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_a_batch_without_tokens_or_rows_gives_one(config: CreditConfig, shape: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    credit = assign_credit(random_rollout(mask), random_scores(mask), config)
    assert all(getattr(credit, f.name).shape == shape for f in fields(credit))


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_float32_and_close(config: CreditConfig, dtype: torch.dtype) -> None:
    mask = mask_of_lengths(20, 9)
    rollout, scores = random_rollout(mask, grid=0.25), random_scores(mask)
    half = replace(
        rollout,
        old_logprobs=rollout.old_logprobs.to(dtype),
        ref_logprobs=rollout.ref_logprobs.to(dtype),
        values=rollout.values.to(dtype),
    )
    credit, wanted = assign_credit(half, scores, config), assign_credit(rollout, scores, config)
    for f in fields(credit):
        if f.name != "macro_ids":
            assert getattr(credit, f.name).dtype == torch.float32
            torch.testing.assert_close(getattr(credit, f.name), getattr(wanted, f.name), atol=0.02, rtol=0.02)


@every_config
def test_no_gradient_flows_and_nothing_is_written(config: CreditConfig) -> None:
    mask = mask_of([[1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0]])
    rollout, scores = random_rollout(mask), random_scores(mask)
    inputs = [x for x in (*vars(rollout).values(), *vars(scores).values()) if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    credit = assign_credit(rollout, scores, config)
    assert not any(getattr(credit, f.name).requires_grad for f in fields(credit))
    for x, was in zip(inputs, before, strict=True):
        assert torch.equal(x.nan_to_num(), was.nan_to_num())
    given = {x.data_ptr() for x in inputs}
    assert not any(getattr(credit, f.name).data_ptr() in given for f in fields(credit))


def test_the_score_clamp_is_a_setting() -> None:
    """ma-rlhf.md section 4 row 9: the official clamp at 2.5 makes scores of 3 and 4 the same."""
    rollout = random_rollout(mask_of_lengths(3, 3))
    scores = Scores(scores=torch.tensor([3.0, -4.0]))
    assert assign_credit(rollout, scores, CreditConfig.paper()).token_level_scores[:, 2].tolist() == [3.0, -4.0]
    assert assign_credit(rollout, scores, CreditConfig.official()).token_level_scores[:, 2].tolist() == [2.5, -2.5]


def test_the_clamp_comes_before_redistribution() -> None:
    """abc.md C4 and section 10 row 15: token scores are not clamped one by one, so the sum is the clamped score."""
    mask = mask_of_lengths(4, 2)
    rollout = random_rollout(mask)
    scores = replace(random_scores(mask), scores=torch.tensor([9.0, -9.0]))
    for redistribution in Uniform(), Attention(), PolicyAttention(), PrefixDifference(from_prompt=False):
        config = CreditConfig(redistribution=redistribution, score_clamp=2.0)
        credit: Credit = assign_credit(rollout, scores, config)
        torch.testing.assert_close(credit.token_level_scores.sum(1), torch.tensor([2.0, -2.0]))


def test_the_paper_preset_is_the_table() -> None:
    """ma-rlhf.md section 2, column `paper`."""
    assert CreditConfig.paper() == CreditConfig()
    assert CreditConfig.paper() == CreditConfig(
        termination=FixedNgram(n=5),
        redistribution=Terminal(),
        advantage=GAE(gamma=1.0, lam=0.95, per="action"),
        macro_value="equal",
        macro_reward="sum",
        kl_coef=0.05,
        score_clamp=None,
        last_token_apart=False,
        whiten_advantages=False,
    )
    assert CreditConfig.paper(macro_value="position").macro_value == "position"
    assert RandomizedNgram() == RandomizedNgram(lengths=(2, 3, 5, 10), repeats=3)


def test_the_official_preset_is_the_table() -> None:
    """ma-rlhf.md section 2, column `official`."""
    assert CreditConfig.official() == CreditConfig(
        termination=FixedNgram(n=5),
        redistribution=Terminal(),
        advantage=GAE(gamma=1.0, lam=0.95, per="action"),
        macro_value="equal",
        macro_reward="mean",
        kl_coef=0.05,
        score_clamp=2.5,
        last_token_apart=True,
        whiten_advantages=False,
    )
    assert CreditConfig.official(macro_value="position").macro_value == "position_falling"
    assert CreditConfig.official(macro_value="unit").macro_value == "unit"
    assert CreditConfig.official(kl_coef=0.1, score_clamp=None).kl_coef == 0.1


def test_the_official_preset_gives_conditions_their_official_defaults() -> None:
    """ma-rlhf.md section 2, rows `random lengths` and `perplexity boundary`; what was set otherwise stays."""
    official = {
        RandomizedNgram(): RandomizedNgram(lengths=(1, 2, 3, 5, 10)),
        RandomizedNgram(seed=3, repeats=2): RandomizedNgram(lengths=(1, 2, 3, 5, 10), seed=3, repeats=2),
        RandomizedNgram(lengths=(4,)): RandomizedNgram(lengths=(4,)),
        Perplexity(): Perplexity(early=True),
        Perplexity(variant="segment"): Perplexity(variant="segment"),
        FixedNgram(n=3): FixedNgram(n=3),
        ShuffledBoundaries(Perplexity(), seed=4): ShuffledBoundaries(Perplexity(early=True), seed=4),
    }
    for given_condition, wanted in official.items():
        assert CreditConfig.official(termination=given_condition).termination == wanted
        assert CreditConfig.paper(termination=given_condition).termination == given_condition
    assert replace(CreditConfig.official(), termination=Perplexity()).termination == Perplexity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_coef": -0.1}, "kl_coef is -0.1; choose a number of at least 0"),
        ({"kl_coef": float("nan")}, "kl_coef is nan; choose"),
        ({"kl_coef": float("inf")}, "kl_coef is inf; choose"),
        ({"score_clamp": 0.0}, "score_clamp is 0.0; choose a positive number, or None"),
        ({"score_clamp": float("nan")}, "score_clamp is nan; choose"),
        ({"macro_value": "last"}, "macro_value is 'last'; choose one of 'equal', 'unit', 'position'"),
        ({"macro_reward": "max"}, "macro_reward is 'max'; choose one of 'sum', 'mean'"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict, message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        CreditConfig(**changes)


def test_smoothed_values_are_the_means_over_their_actions_and_the_actions_stay_tokens() -> None:
    rollout = random_rollout(mask_of_lengths(7, 3, width=9), 5)
    scores, gae = random_scores(rollout.response_mask), GAE(per="token")
    config = CreditConfig(termination=EveryToken(), advantage=gae, value_smoothing=FixedNgram(n=3))
    values = torch.zeros_like(rollout.values)
    for b, (start, end) in ((0, (0, 3)), (0, (3, 6)), (0, (6, 7)), (1, (0, 3))):
        values[b, start:end] = rollout.values[b, start:end].mean()
    by_hand = assign_credit(replace(rollout, values=values), scores, replace(config, value_smoothing=None))
    found = assign_credit(rollout, scores, config)
    torch.testing.assert_close(found.advantages, by_hand.advantages)
    torch.testing.assert_close(found.returns, by_hand.returns)
    plain = assign_credit(rollout, scores, replace(config, value_smoothing=None))
    assert torch.equal(found.macro_ids, plain.macro_ids)
    assert (found.advantages - plain.advantages).abs().max() > 0.01
