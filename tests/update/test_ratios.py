"""Pooling, clipping and aggregation of the policy loss: PPO, GSPO, GMPO as their papers write them, and all between."""

import random
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from apportion import EveryToken, FixedNgram, WholeResponse, macro_ids, policy_loss
from apportion.credit.macro_actions import MacroActions
from apportion.update.aggregation import Aggregation, normaliser
from apportion.update.losses import Clip, Granularity
from batches import mask_of, mask_of_lengths, random_rollout, valid, without_type_checks

GRANULARITIES, CLIPS, AGGREGATIONS = get_args(Granularity), get_args(Clip), get_args(Aggregation)


class Case:
    """Random log-probabilities of responses of unequal lengths; NaN where nothing may be read."""

    def __init__(self, seed: int, *, spread: float = 0.3, holes: bool = False) -> None:
        self.draw = random.Random(seed)
        lengths = [self.draw.randint(1, 12) for _ in range(self.draw.randint(1, 5))]
        self.mask = mask_of_lengths(*lengths, width=13)
        if holes:
            self.mask &= torch.rand(self.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
        generator = torch.Generator().manual_seed(seed)
        self.old, moved, self.gains = torch.randn(3, *self.mask.shape, generator=generator)
        self.new = self.old + spread * moved
        self.responses = torch.randn(len(lengths), generator=generator)

    def ids(self, n: int) -> Tensor:
        """Macro actions of n tokens."""
        return macro_ids(FixedNgram(n=n)(random_rollout(self.mask)), self.mask)

    def rows(self, x: Tensor) -> list[list[float]]:
        """The valid entries of each row."""
        return [valid(x, self.mask, row) for row in range(len(self.mask))]

    def found(self, gains: Tensor, **options: Any) -> tuple[float, list[list[float]]]:
        """The loss and its gradient in the log-probabilities."""
        outside = ~self.mask
        logprobs = self.new.masked_fill(outside, torch.nan).requires_grad_()
        old, gains = self.old.masked_fill(outside, torch.nan), gains.masked_fill(outside, torch.nan)
        loss = policy_loss(logprobs, old, gains, self.mask, **options)
        loss.backward()
        assert logprobs.grad is not None
        assert (logprobs.grad[outside] == 0).all()
        return float(loss.detach()), self.rows(logprobs.grad)


def assert_equal(found: tuple[float, list[list[float]]], wanted: tuple[float, list[list[float]]]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=2e-5, rel=1e-4)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5, rel=1e-4)


@pytest.mark.parametrize("seed", range(240))
def test_the_loss_and_its_gradient_equal_the_slow_loops(seed: int) -> None:
    """240 draws out of the full product of ratio, clip, range, aggregation and length of actions."""
    case = Case(seed, holes=seed % 3 == 0)
    draw = case.draw
    ratio, clip, aggregation = draw.choice(GRANULARITIES), draw.choice(CLIPS), draw.choice(AGGREGATIONS)
    low, high = draw.choice([0.05, 0.2, 0.5]), draw.choice([0.1, 0.28, 2.0])
    ids = case.ids(draw.choice([1, 3, 20]))
    gains = torch.where(ids >= 0, case.gains.gather(1, ids.clamp(min=0)), 0)
    gains = gains * draw.choice([0.0, 1.0, 1.0, 1.0])
    found = case.found(
        gains,
        cliprange=low,
        cliprange_high=high,
        clip=clip,
        ratio=ratio,
        macro_ids=ids,
        aggregation=aggregation,
        longest=17,
    )
    wanted = reference.policy_loss_and_gradient(
        case.rows(case.new),
        case.rows(case.old),
        case.rows(gains),
        [ids[row][case.mask[row]].tolist() for row in range(len(ids))],
        ratio=ratio,
        clip=clip,
        low=low,
        high=high,
        aggregation=aggregation,
        longest=17,
    )
    assert_equal(found, wanted)


@pytest.mark.parametrize("seed", range(40))
def test_the_mean_ratio_of_the_whole_response_is_gspo(seed: int) -> None:
    case = Case(seed, spread=0.05)
    ids = macro_ids(WholeResponse()(random_rollout(case.mask)), case.mask)
    gains = case.responses[:, None].expand(case.mask.shape)
    low, high = (3e-4, 4e-4) if seed % 2 else (0.02, 0.03)
    found = case.found(gains, cliprange=low, cliprange_high=high, ratio="macro_mean", macro_ids=ids)
    wanted = reference.gspo(case.rows(case.new), case.rows(case.old), case.responses.tolist(), low=low, high=high)
    assert_equal(found, wanted)
    by_sequence = case.found(
        gains, cliprange=low, cliprange_high=high, ratio="macro_mean", macro_ids=ids, aggregation="sequence_mean"
    )
    assert_equal(by_sequence, wanted)


@pytest.mark.parametrize("seed", range(40))
def test_the_mean_ratio_of_every_token_is_ppo(seed: int) -> None:
    case = Case(seed, holes=seed % 2 == 0)
    ids = macro_ids(EveryToken()(random_rollout(case.mask)), case.mask)
    found = case.found(case.gains, cliprange=0.2, ratio="macro_mean", macro_ids=ids)
    if not case.mask.any():
        assert found[0] == 0
        return
    assert_equal(found, reference.ppo(*map(case.rows, (case.new, case.old, case.gains)), epsilon=0.2))


@pytest.mark.parametrize("seed", range(40))
def test_the_mean_of_tokens_clipped_before_pooling_is_gmpo(seed: int) -> None:
    case = Case(seed, spread=0.5)
    ids = macro_ids(WholeResponse()(random_rollout(case.mask)), case.mask)
    gains = case.responses[:, None].expand(case.mask.shape)
    found = case.found(gains, cliprange=0.4, clip="token", ratio="macro_mean", macro_ids=ids)
    wanted = reference.gmpo(case.rows(case.new), case.rows(case.old), case.responses.tolist(), low=0.4, high=0.4)
    assert_equal(found, wanted)


@pytest.mark.parametrize("seed", range(10))
def test_a_tokens_clipped_log_ratio_is_its_clipped_ratio(seed: int) -> None:
    """min(x, log 1.28) for a gain, max(x, log .8) for a loss: PPO's pessimistic side, in nats."""
    case = Case(seed)
    nats = {"cliprange": float(-torch.tensor(0.8).log()), "cliprange_high": float(torch.tensor(1.28).log())}
    found = case.found(case.gains, clip="token", **nats)
    assert_equal(found, case.found(case.gains, cliprange=0.2, cliprange_high=0.28))


@given(st.integers(0, 10_000))
def test_before_the_first_step_a_ratio_says_how_much_each_token_is_pushed(seed: int) -> None:
    case = Case(seed, spread=0.0)
    ids = case.ids(3)
    actions = MacroActions(ids)
    gains = actions.to_tokens(actions.mean(case.gains))
    size, length = (x.float() for x in (actions.to_tokens(actions.lengths), case.mask.sum(1, keepdim=True)))
    tokens, responses = case.mask.sum(), len(case.mask)
    weights = {
        "token_mean": (torch.ones_like(size), tokens),
        "action_mean": (1 / size.clamp(min=1), actions.lengths.bool().sum()),
        "sequence_mean": (1 / length.expand_as(size), responses),
    }
    for (aggregation, (weight, total)), ratio in product(weights.items(), GRANULARITIES):
        _, found = case.found(gains, cliprange=0.2, ratio=ratio, macro_ids=ids, aggregation=aggregation)
        wanted = case.rows(-gains * weight / total * (size if ratio == "macro" else 1))
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-5)


def test_the_range_is_asymmetric_by_hand() -> None:
    """Ratio 1.5 pays 1 + high with A = 1; ratio .5 with A = -1 pays 1 - low."""
    ratios, gains = torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0, -1.0]])
    loss = policy_loss(ratios.log(), torch.zeros(1, 2), gains, mask_of([[1, 1]]), cliprange=0.1, cliprange_high=0.3)
    assert float(loss) == pytest.approx((-1.3 + 0.9) / 2)


# Two responses: four tokens in actions of three and one, with advantages 1, 1, 1, 4; and one token with advantage 10.
MASK = mask_of_lengths(4, 1)
IDS = torch.tensor([[0, 0, 0, 1], [0, -1, -1, -1]])
GAINS = torch.tensor([[1.0, 1, 1, 4], [10, 0, 0, 0]])
BY_HAND = {
    "token_mean": (3 * 1 + 4 + 10) / 5,
    "action_mean": (1 + 4 + 10) / 3,
    "sequence_mean": (7 / 4 + 10) / 2,
    "constant": (7 + 10) / (2 * 6),
}


@pytest.mark.parametrize("ratio", GRANULARITIES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_by_hand_are_those_of_every_ratio(aggregation: Aggregation, ratio: Granularity) -> None:
    zeros = torch.zeros(2, 4)
    options: dict[str, Any] = {"ratio": ratio, "macro_ids": IDS, "aggregation": aggregation, "longest": 6}
    loss = policy_loss(zeros, zeros, GAINS, MASK, cliprange=0.2, **options)
    assert float(loss) == pytest.approx(-BY_HAND[aggregation])


@pytest.mark.parametrize(("ratio", "name"), [("token", "token_mean"), ("macro", "action_mean")])
def test_the_default_is_the_mean_over_the_steps_of_the_ratio(ratio: Granularity, name: Aggregation) -> None:
    zeros = torch.zeros(2, 4)
    losses = (
        policy_loss(zeros, zeros, GAINS, MASK, cliprange=0.2, ratio=ratio, macro_ids=IDS, aggregation=a)
        for a in (None, name)
    )
    assert torch.equal(*losses)


def test_the_constant_is_the_width_of_the_batch_unless_one_is_given() -> None:
    zeros = torch.zeros(2, 4)
    loss = policy_loss(zeros, zeros, GAINS, MASK, cliprange=0.2, aggregation="constant")
    assert float(loss) == pytest.approx(-17 / 8)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    cut=st.integers(0, 6),
    n=st.integers(1, 5),
    aggregation=st.sampled_from(AGGREGATIONS),
    ratio=st.sampled_from(GRANULARITIES),
    clip=st.sampled_from(CLIPS),
    seed=st.integers(0, 99),
)
def test_parts_of_a_batch_add_up_to_the_whole(
    lengths: list[int], cut: int, n: int, aggregation: Aggregation, ratio: Granularity, clip: Clip, seed: int
) -> None:
    mask = mask_of_lengths(*lengths, width=9)
    ids = macro_ids(FixedNgram(n=n)(random_rollout(mask)), mask)
    new, old, gains = torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(seed))
    whole = normaliser(aggregation, mask, ids, longest=9)

    def loss(part: slice, **more: Any) -> Tensor:
        inputs = (x[part] for x in (new, old, gains, mask))
        options: dict[str, Any] = {"ratio": ratio, "clip": clip, "aggregation": aggregation, "macro_ids": ids[part]}
        return policy_loss(*inputs, cliprange=0.2, longest=9, **options | more)

    parts = [loss(part, denominator=whole) for part in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(sum(parts), loss(slice(None)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", CLIPS)
def test_nothing_valid_costs_nothing(clip: Clip, aggregation: Aggregation) -> None:
    for shape in (2, 3), (2, 0), (0, 3):
        mask = torch.zeros(shape, dtype=torch.bool)
        x = torch.full(shape, torch.nan)
        for ratio in GRANULARITIES:
            options: dict[str, Any] = {"ratio": ratio, "clip": clip, "aggregation": aggregation}
            assert policy_loss(x, x, x, mask, cliprange=0.2, macro_ids=mask.long() - 1, **options) == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"clip": "ratio"}, "clip is 'ratio'; choose 'pooled' or 'token'"),
    ({"cliprange_high": 0.0}, "cliprange_high is 0.0; choose"),
    ({"aggregation": "mean"}, "loss_aggregation is 'mean'; choose one of 'token_mean', 'action_mean'"),
    (
        {"aggregation": "action_mean"},
        "loss_aggregation 'action_mean' needs macro_ids, which is None; pass",
    ),
    ({"clip": "token", "ratio": "macro"}, "ratio 'macro' needs macro_ids, which is None; pass Credit.macro_ids"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2)
    with without_type_checks(), pytest.raises(ValueError, match=message):
        policy_loss(x, x, x, x == 0, **given_options(options))


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    return {"cliprange": 0.2} | options
