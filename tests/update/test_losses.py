"""The losses of PPO: by hand, against the slow loops, at the limits, and with padding that holds NaN."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from apportion import CreditConfig, FixedNgram, assign_credit, importance_ratio, macro_ids, policy_loss, value_loss
from apportion.update.losses import Granularity
from batches import mask_of, mask_of_lengths, random_rollout, random_scores, valid, without_type_checks

GRANULARITIES: tuple[Granularity, ...] = ("token", "macro", "macro_mean")
every_ratio = pytest.mark.parametrize("ratio", GRANULARITIES)

masks = st.integers(0, 10).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4).map(
        lambda rows: torch.tensor(rows, dtype=torch.bool).view(len(rows), width)
    )
)


def ids_of(mask: Tensor, n: int = 3) -> Tensor:
    return macro_ids(FixedNgram(n=n)(random_rollout(mask)), mask)


def drawn(mask: Tensor, seed: int, scale: float = 1.0) -> Tensor:
    """Draw numbers for the valid entries; NaN elsewhere."""
    x = scale * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    return x.masked_fill(~mask, torch.nan)


def constant_inside_actions(x: Tensor, ids: Tensor) -> Tensor:
    return torch.where(ids >= 0, x.nan_to_num().gather(1, ids.clamp(min=0)), torch.nan)


def test_ratios_by_hand() -> None:
    """Log ratios .1, .3, -.2 in actions of two tokens and one; a fourth token is padding."""
    logprobs, old = torch.tensor([[-0.9, -0.7, -1.2, torch.nan]]), torch.tensor([[-1.0, -1.0, -1.0, 5.0]])
    mask, ids = mask_of([[1, 1, 1, 0]]), torch.tensor([[0, 0, 1, -1]])
    wanted = {"token": [0.1, 0.3, -0.2, 0.0], "macro": [0.4, -0.2, 0, 0], "macro_mean": [0.2, -0.2, 0, 0]}
    for ratio in GRANULARITIES:
        ratios, steps = importance_ratio(logprobs, old, mask, granularity=ratio, macro_ids=ids)
        torch.testing.assert_close(ratios, torch.tensor([wanted[ratio]]).exp())
        assert steps.tolist() == [[True, True, ratio == "token", False]]


def test_clipping_by_hand() -> None:
    """max(-A r, -A clip(r)) at cliprange .2: A = 1: r = 1.5 pays 1.2; r = .5 pays .5. A = -1: 1.5 and .8."""
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
    loss = policy_loss(ratios.log(), torch.zeros(1, 5), advantages, mask_of([[1] * 5]), cliprange=0.2)
    assert float(loss) == pytest.approx((-1.2 - 0.5 + 1.5 + 0.8 - 2.2) / 5)


def test_the_value_loss_by_hand() -> None:
    """Targets 1, old values 0, clip .2: V = .5 stays at .2 and pays .64; V = -.1 pays 1.21; V = 1.5 pays .64."""
    values = torch.tensor([[0.5, -0.1, 1.5, torch.nan]])
    old, returns = torch.zeros(1, 4), torch.ones(1, 4)
    mask = mask_of([[1, 1, 1, 0]])
    assert float(value_loss(values, old, returns, mask, cliprange_value=0.2)) == pytest.approx(2.49 / 6)
    unclipped = value_loss(values, old, returns, mask, cliprange_value=None)
    assert float(unclipped) == pytest.approx((0.25 + 1.21 + 0.25) / 6)


@every_ratio
@given(mask=masks, seed=st.integers(0, 9999), cliprange=st.sampled_from([0.05, 0.2, 0.9]))
def test_the_policy_loss_equals_the_slow_loops(ratio: Granularity, mask: Tensor, seed: int, cliprange: float) -> None:
    ids = ids_of(mask)
    logprobs, old = drawn(mask, seed, 0.3), drawn(mask, seed + 1, 0.3)
    advantages = constant_inside_actions(drawn(mask, seed + 2), ids)
    new_rows, old_rows, advantage_rows = (
        [valid(x, mask, b) for b in range(len(mask))] for x in (logprobs, old, advantages)
    )
    segments = [ids[b][mask[b]].tolist() for b in range(len(mask))]
    wanted = reference.policy_loss(new_rows, old_rows, advantage_rows, segments, cliprange=cliprange, ratio=ratio)
    found = policy_loss(logprobs, old, advantages, mask, cliprange=cliprange, ratio=ratio, macro_ids=ids)
    assert float(found) == pytest.approx(wanted, abs=1e-5)


@given(mask=masks, seed=st.integers(0, 9999), cliprange=st.sampled_from([0.05, 0.2, 2.0]))
def test_the_value_loss_equals_the_slow_loops(mask: Tensor, seed: int, cliprange: float) -> None:
    values, old, returns = (drawn(mask, seed + i) for i in range(3))
    rows = ([valid(x, mask, b) for b in range(len(mask))] for x in (values, old, returns))
    wanted = reference.value_loss(*rows, cliprange_value=cliprange)
    assert float(value_loss(values, old, returns, mask, cliprange_value=cliprange)) == pytest.approx(wanted, abs=1e-5)


@every_ratio
@given(mask=masks, seed=st.integers(0, 999))
def test_padding_speaks_neither_in_the_loss_nor_in_the_gradient(ratio: Granularity, mask: Tensor, seed: int) -> None:
    """The padding of every input is NaN; its gradient is 0 to the bit, or it would reach the model as 0 * NaN."""
    ids = ids_of(mask)
    logprobs, old, advantages, returns = (drawn(mask, seed + i) for i in range(4))
    logprobs.requires_grad_()
    policy_loss(logprobs, old, advantages, mask, cliprange=0.2, ratio=ratio, macro_ids=ids).backward()
    values = drawn(mask, seed).requires_grad_()
    value_loss(values, old, returns, mask, cliprange_value=0.2).backward()
    for x in (logprobs, values):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_ratio
def test_the_ratio_is_exactly_1_where_nothing_has_moved(ratio: Granularity, dtype: torch.dtype) -> None:
    """ma-rlhf.md section 4 row 13: one of the two sides was cast, and the first ratio was not 1."""
    mask = mask_of_lengths(9, 4, 0)
    logprobs = drawn(mask, 0, 3.0).to(dtype)
    ratios, steps = importance_ratio(logprobs, logprobs.clone(), mask, granularity=ratio, macro_ids=ids_of(mask))
    assert (ratios == 1).all()
    assert ratios.dtype == torch.float32
    assert steps.any()


def gradient(ratio: Granularity, rollout, credit) -> Tensor:
    """The gradient of the sum over steps, not of their mean."""
    logprobs = rollout.old_logprobs.clone().requires_grad_()
    one = torch.ones(())
    keywords = {"cliprange": 0.2, "ratio": ratio, "macro_ids": credit.macro_ids, "denominator": one}
    policy_loss(logprobs, rollout.old_logprobs, credit.advantages, rollout.response_mask, **keywords).backward()
    assert logprobs.grad is not None
    return logprobs.grad


def test_o11_both_ratios_have_the_same_gradient_where_nothing_has_moved() -> None:
    """ma-rlhf.md O11, not normalised."""
    mask = mask_of_lengths(23, 8, 1)
    rollout = random_rollout(mask)
    credit = assign_credit(rollout, random_scores(mask), CreditConfig(termination=FixedNgram(n=5)))
    of_tokens = gradient("token", rollout, credit)
    torch.testing.assert_close(gradient("macro", rollout, credit), of_tokens)
    torch.testing.assert_close(of_tokens, -credit.advantages)  # -sum_k A_k sum_{t in k} grad logprobs_t


@every_ratio
def test_actions_of_one_token_make_all_ratios_the_same(ratio: Granularity) -> None:
    mask = mask_of_lengths(9, 4)
    logprobs, old, advantages = (drawn(mask, i) for i in range(3))
    losses = (
        policy_loss(logprobs, old, advantages, mask, cliprange=0.2, ratio=kind, macro_ids=ids_of(mask, n=1))
        for kind in (ratio, "token")
    )
    assert torch.equal(*losses)


def test_the_mean_is_over_tokens_or_over_actions() -> None:
    """ma-rlhf.md section 2, policy loss normaliser: a row of 6 tokens in 2 actions, ratios 1, advantages 1 and 4."""
    mask = mask_of_lengths(6)
    ids = torch.tensor([[0, 0, 0, 0, 0, 1]])
    advantages = torch.tensor([[1.0, 1, 1, 1, 1, 4]])
    zeros = torch.zeros(1, 6)
    losses = [policy_loss(zeros, zeros, advantages, mask, cliprange=0.2, ratio=r, macro_ids=ids) for r in GRANULARITIES]
    assert [float(loss) for loss in losses] == pytest.approx([-9 / 6, -5 / 2, -5 / 2])


@every_ratio
def test_parts_of_a_batch_add_up_to_the_whole(ratio: Granularity) -> None:
    """ma-rlhf.md section 4 row 14: the official losses raised a shape error at B = 2."""
    mask = mask_of_lengths(9, 4, 7, 2)
    ids = ids_of(mask)
    logprobs, old, advantages, returns = (drawn(mask, i) for i in range(4))
    steps = importance_ratio(logprobs, old, mask, granularity=ratio, macro_ids=ids)[1].sum().float()

    def policy(part: slice, **more) -> Tensor:
        inputs = (x[part] for x in (logprobs, old, advantages, mask))
        return policy_loss(*inputs, cliprange=0.2, ratio=ratio, macro_ids=ids[part], **more)

    def value(part: slice, **more) -> Tensor:
        return value_loss(*(x[part] for x in (logprobs, old, returns, mask)), cliprange_value=0.2, **more)

    halves = slice(0, 1), slice(1, 4)
    torch.testing.assert_close(sum(policy(h, denominator=steps) for h in halves), policy(slice(None)))
    torch.testing.assert_close(sum(value(h, denominator=mask.sum().float()) for h in halves), value(slice(None)))


@every_ratio
def test_nothing_valid_costs_nothing(ratio: Granularity) -> None:
    for shape in (2, 3), (2, 0), (0, 3):
        mask = torch.zeros(shape, dtype=torch.bool)
        x = torch.full(shape, torch.nan)
        assert policy_loss(x, x, x, mask, cliprange=0.2, ratio=ratio, macro_ids=mask.long() - 1) == 0
        assert value_loss(x, x, x, mask, cliprange_value=0.2) == 0


@every_ratio
@pytest.mark.parametrize("distance", [-math.inf, -200.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_policy_far_from_its_sampler_gives_finite_losses_and_gradients(
    ratio: Granularity, distance: float, advantage: float
) -> None:
    mask = mask_of_lengths(3)
    logprobs = torch.full((1, 3), distance, requires_grad=True)
    advantages = torch.full((1, 3), advantage)
    loss = policy_loss(
        logprobs, torch.zeros(1, 3), advantages, mask, cliprange=0.2, ratio=ratio, macro_ids=ids_of(mask)
    )
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


@every_ratio
def test_half_precision_is_computed_in_float32(ratio: Granularity) -> None:
    mask = mask_of_lengths(9, 4)
    first, second, third = (drawn(mask, i, 0.3) for i in range(3))
    keywords = {"cliprange": 0.2, "ratio": ratio, "macro_ids": ids_of(mask)}
    half = policy_loss(first.bfloat16(), second.bfloat16(), third.bfloat16(), mask, **keywords)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(policy_loss(first, second, third, mask, **keywords)), abs=0.02)
    half = value_loss(first.bfloat16(), second.bfloat16(), third.bfloat16(), mask, cliprange_value=0.2)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(value_loss(first, second, third, mask, cliprange_value=0.2)), abs=0.02)


def test_the_mean_ratio_over_a_response_is_that_of_gspo() -> None:
    mask = mask_of_lengths(4)
    logprobs, old = drawn(mask, 0), drawn(mask, 1)
    ratios, _ = importance_ratio(logprobs, old, mask, granularity="macro_mean", macro_ids=torch.zeros(1, 4).long())
    assert float(ratios[0, 0]) == pytest.approx(math.exp(float((logprobs - old).mean())), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": "sequence"}, "ratio is 'sequence'; choose 'token', 'macro' or 'macro_mean'"),
        ({"ratio": "macro"}, "ratio 'macro' needs macro_ids, which is None; pass Credit.macro_ids"),
        ({"ratio": "macro_mean"}, "ratio 'macro_mean' needs macro_ids, which is None; pass Credit.macro_ids"),
    ],
)
def test_a_ratio_without_a_meaning_is_refused(arguments: dict, message: str) -> None:
    x = torch.zeros(1, 2)
    with without_type_checks(), pytest.raises(ValueError, match=message):
        policy_loss(x, x, x, x == 0, cliprange=0.2, **arguments)


@pytest.mark.parametrize("ratio", ["token", "macro", "macro_mean"])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_log_ratio_is_itself_up_to_20_nats_and_held_there_beyond(ratio: Granularity, sign: float) -> None:
    """docs/differences.md: the loss of a token that the policy has given up, or taken to, stays finite."""
    mask, ids = mask_of_lengths(1, 1, 1), torch.zeros(3, 1, dtype=torch.long)
    new = sign * torch.tensor([[19.5], [20.5], [300.0]])
    ratios, _ = importance_ratio(new, torch.zeros(3, 1), mask, granularity=ratio, macro_ids=ids)
    wanted = torch.tensor([19.5, 20.0, 20.0]) * sign
    torch.testing.assert_close(ratios[:, 0].log(), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [0.0, -0.2, math.nan])
def test_a_clip_range_that_holds_nothing_is_refused(number: float) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"cliprange is {number}; choose a positive number"):
        policy_loss(x, x, x, x == 0, cliprange=number)
    with pytest.raises(ValueError, match=f"cliprange_value is {number}; choose a positive number"):
        value_loss(x, x, x, x == 0, cliprange_value=number)
