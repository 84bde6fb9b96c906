"""GAE as a scan against the recursion, its limits, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from apportion import GAE, gae, to_tokens
from apportion.credit.advantages import Earnings, suffix_sums
from batches import mask_of_lengths, without_type_checks

unit = st.sampled_from([0.0, 0.3, 0.95, 0.99, 1.0])


@given(length=st.integers(0, 40), seed=st.integers(0, 999), gamma=unit, lam=unit)
def test_the_scan_equals_the_recursion(length: int, seed: int, gamma: float, lam: float) -> None:
    rewards, values = torch.randn(2, 1, length, generator=torch.Generator().manual_seed(seed))
    found = gae(rewards, values, torch.ones(1, length, dtype=torch.bool), gamma=gamma, lam=lam)
    wanted = reference.gae(rewards[0].tolist(), values[0].tolist(), [gamma] * length, [lam] * length)
    torch.testing.assert_close(torch.stack(found)[:, 0], torch.tensor(wanted).view(2, -1), atol=2e-5, rtol=1e-5)


@given(length=st.integers(0, 40), seed=st.integers(0, 999))
def test_the_scan_equals_the_recursion_where_steps_last_unequally(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 1, length, generator=generator)
    gamma, lam = torch.rand(2, 1, length, generator=generator)
    found = gae(rewards, values, torch.ones(1, length, dtype=torch.bool), gamma=gamma, lam=lam)
    wanted = reference.gae(*(x[0].tolist() for x in (rewards, values, gamma, lam)))
    torch.testing.assert_close(torch.stack(found)[:, 0], torch.tensor(wanted).view(2, -1), atol=2e-5, rtol=1e-5)


def test_a_scan_with_decay_1_sums_what_follows() -> None:
    x = torch.randint(0, 9, (3, 100)).float()
    assert torch.equal(suffix_sums(x, 1.0), x.flip(1).cumsum(1).flip(1))
    assert torch.equal(suffix_sums(x, torch.ones_like(x)), suffix_sums(x, 1.0))
    assert torch.equal(suffix_sums(x, 0.0), x)


def test_lam_1_gives_the_return_less_the_value() -> None:
    rewards, values = torch.randn(2, 4, 30)
    mask = mask_of_lengths(30, 12, 1, 0)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0))
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0))


def test_lam_0_gives_the_one_step_error() -> None:
    rewards, values = torch.randn(2, 1, 5)
    advantages, _ = gae(rewards, values, mask_of_lengths(5), gamma=0.9, lam=0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


@pytest.mark.parametrize("length", range(1, 13))
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_an_exact_critic_gives_zero_advantage(length: int, lam: float, gamma: float) -> None:
    rewards = torch.randn(1, length)
    exact = suffix_sums(rewards, gamma)
    mask = mask_of_lengths(length, width=14)
    pad = torch.nn.functional.pad
    padding = (0, 14 - length)
    advantages, returns = gae(pad(rewards, padding), pad(exact, padding), mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, torch.zeros(1, 14), atol=2e-6, rtol=0)
    torch.testing.assert_close(returns, pad(exact, padding), atol=2e-6, rtol=0)


def test_padding_is_not_read() -> None:
    rewards, values = torch.randn(2, 3, 6)
    mask = mask_of_lengths(6, 2, 0)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    dirty = gae(rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf), mask, gamma=0.9, lam=0.8)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_the_inputs_are_left_alone_and_no_gradient_flows() -> None:
    rewards, values = torch.randn(1, 4), torch.randn(1, 4, requires_grad=True)
    before = rewards.clone(), values.detach().clone()
    advantages, returns = gae(rewards, values, mask_of_lengths(4), gamma=1.0, lam=0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])


def test_lam_per_token_is_lam_to_the_length_of_the_action() -> None:
    """ma-rlhf.md section 1.5: e_k = len_k is the control for macro actions being more than a larger lambda."""
    rewards, values, ids = torch.randn(1, 6), torch.randn(1, 3), torch.tensor([[0, 0, 1, 1, 1, 2]])
    earned = Earnings(rewards=rewards, values=to_tokens(values, ids), ids=ids)
    found = GAE(gamma=0.9, lam=0.8, per="token")(earned)
    powers = [[base**m for m in (2, 3, 1)] for base in (0.9, 0.8)]
    r = rewards[0].tolist()
    sums = [r[0] + 0.9 * r[1], r[2] + 0.9 * r[3] + 0.81 * r[4], r[5]]
    wanted = torch.tensor(reference.gae(sums, values[0].tolist(), *powers))
    torch.testing.assert_close(torch.stack(found)[:, 0], wanted[:, ids[0]])


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("number", [-0.1, 1.5, float("nan")])
def test_a_weight_outside_the_unit_interval_is_refused(name: str, number: float) -> None:
    message = rf"{name} is {number}; choose a number in \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        GAE(gamma=number) if name == "gamma" else GAE(lam=number)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        gae(x, x, x.bool(), **({"gamma": 1.0, "lam": 1.0} | {name: number}))


def test_an_unknown_unit_of_time_is_refused() -> None:
    with (
        without_type_checks(),
        pytest.raises(ValueError, match="per is 'step'; choose 'action', 'token' or 'boundary'"),
    ):
        GAE(per="step")  # pyright: ignore


def test_shapes_that_differ_are_refused() -> None:
    x = torch.zeros(2, 3)
    with without_type_checks(), pytest.raises(ValueError, match=r"\(2, 3\), \(1, 3\) and \(2, 3\); give all \(B, N\)"):
        gae(x, x[:1], x.bool(), gamma=1.0, lam=1.0)
