"""One update: a first ratio of exactly 1, gradients of the whole batch, and steps that are taken or counted."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.batch import Credit, Rollout
from apportion.sampling import Sampling
from apportion.update.config import PPOConfig
from apportion.update.losses import Granularity, importance_ratio, policy_loss, value_loss
from batches import without_type_checks
from learners import Setting, setting, with_credit

RATIOS: tuple[Granularity, ...] = ("token", "macro", "macro_mean")
OFF = 1e9


def change(given: Setting, config: PPOConfig) -> list[Tensor]:
    """What an update does to every parameter."""
    before = given.parameters()
    given.update(config)
    return [after - first for after, first in zip(given.parameters(), before, strict=True)]


def texts(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=14), Sampling(max_new_tokens=14, top_k=5, top_p=0.8)])
def test_the_first_ratio_is_one_to_the_bit(precision: str, sampling: Sampling) -> None:
    # ma-rlhf.md section 4, row 13: only the old logits were cast to float32.
    found = setting(precision=precision, sampling=sampling).update(PPOConfig())
    assert found["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert found["policy/ratio_max"] == 1
    assert found["policy/clipfrac"] == found["policy/approx_kl"] == 0
    assert found["policy/sampler_gap"] < (1e-5 if precision == "no" else 0.2)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("budget", [1, 20, 60])
def test_micro_batches_of_any_budget_give_the_gradients_of_the_whole_batch(ratio: Granularity, budget: int) -> None:
    small, whole = (
        change(setting(sgd=True, lr=1.0), PPOConfig(ratio=ratio, micro_batch_tokens=tokens, max_grad_norm=OFF))
        for tokens in (budget, 100_000)
    )
    for x, y in zip(small, whole, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert max(float(x.abs().max()) for x in whole) > 1e-3


SHAPES = [PPOConfig(), PPOConfig(num_ppo_epochs=3), PPOConfig(num_mini_batches=2), PPOConfig(micro_batch_tokens=60)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("config", SHAPES, ids=["one pass", "epochs", "minibatches", "micro-batches"])
def test_the_critic_learns_the_same_from_its_reading_of_the_rollout_as_from_another(
    config: PPOConfig, precision: str
) -> None:
    budget = config.learning_tokens if config.num_mini_batches == 1 else None
    kept, again = (setting(sgd=True, lr=0.1, precision=precision, learning_budget=budget) for _ in range(2))
    again = replace(again, rollout=replace(again.rollout, values=again.rollout.values.detach()))
    assert kept.rollout.values.requires_grad == (config.num_mini_batches == 1)
    passes: list[list[int]] = [[], []]
    for given, seen in zip((kept, again), passes, strict=True):
        given.critic.module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
    for x, y in zip(change(kept, config), change(again, config), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
    assert len(passes[1]) - len(passes[0]) == int(config.num_mini_batches == 1)


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_update_steps_along_the_gradient_of_the_written_losses(ratio: Granularity) -> None:
    given = setting(sgd=True, lr=1.0)
    rollout, credit = given.rollout, given.credit
    policy, critic = given.policy.module, given.critic.module
    logprobs, values = policy(*texts(rollout), given.sampling), critic(*texts(rollout))
    old, mask = logprobs.detach(), rollout.response_mask
    loss = policy_loss(
        logprobs, old, credit.advantages, mask, cliprange=0.2, ratio=ratio, macro_ids=credit.macro_ids
    ) + 0.5 * value_loss(values, rollout.values, credit.returns, mask, cliprange_value=0.2)
    parameters = [*policy.parameters(), *critic.parameters()]
    wanted = torch.autograd.grad(loss, parameters)
    found = change(given, PPOConfig(ratio=ratio, vf_coef=0.5, max_grad_norm=OFF))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, -y, atol=1e-5, rtol=1e-4)


def test_padding_of_the_rollout_changes_nothing() -> None:
    given = setting(sgd=True, lr=1.0)

    def widen(batch: Any) -> Any:
        def wider(x: Tensor) -> Tensor:
            fill = math.nan if x.is_floating_point() else False if x.dtype == torch.bool else -1
            return torch.nn.functional.pad(x, (0, 3), value=fill)

        return {f.name: wider(x) for f in fields(batch) if (x := getattr(batch, f.name)) is not None}

    prompts = {
        "prompt_ids": torch.nn.functional.pad(given.rollout.prompt_ids, (4, 0), value=7),
        "prompt_mask": torch.nn.functional.pad(given.rollout.prompt_mask, (4, 0)),
    }
    rollout = widen(given.rollout) | prompts
    rollout["response_ids"] = rollout["response_ids"].clamp(min=0)
    padded = replace(given, rollout=Rollout(**rollout), credit=Credit(**widen(given.credit)))
    found = change(padded, PPOConfig())
    for x, y in zip(found, change(setting(sgd=True, lr=1.0), PPOConfig()), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (1, 4), (2, 3), (1, 12)])
def test_epochs_and_minibatches_take_their_product_of_steps_and_raise_what_earned(
    ratio: Granularity, epochs: int, minibatches: int
) -> None:
    given = setting(lr=1e-4)
    before = given.logprobs()
    found = given.update(PPOConfig(ratio=ratio, num_ppo_epochs=epochs, num_mini_batches=minibatches))
    assert found["update/optimizer_steps"] == epochs * minibatches
    assert found["update/skipped_steps"] == 0
    mask = given.rollout.response_mask
    gained = ((given.logprobs() - before) * given.credit.advantages)[mask].mean()
    assert gained > 0
    assert (found["policy/approx_kl"] > 0) is (epochs * minibatches > 1)


def test_each_epoch_deals_every_response_to_one_minibatch() -> None:
    # One row a step, plain gradient descent of tiny steps: the sum over rows is the step of the whole batch.
    rows = 12
    split = change(setting(sgd=True, lr=1e-4), PPOConfig(num_mini_batches=rows, cliprange=0.9, max_grad_norm=OFF))
    given = setting(sgd=True, lr=1e-4)
    lengths = given.rollout.lengths.float()
    # Row means against the mean over all tokens: weigh each row's advantages so that both are the same sum.
    weights = (lengths.sum() / lengths)[:, None] * given.rollout.response_mask
    scaled = with_credit(given, advantages=given.credit.advantages * weights)
    whole = change(scaled, PPOConfig(max_grad_norm=OFF))
    policy = len(list(given.policy.module.parameters()))
    for x, y in zip(split[:policy], whole[:policy], strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=0.1)


def test_minibatches_depend_on_the_generator_alone() -> None:
    config = PPOConfig(num_mini_batches=4)
    results = []
    for seed in (0, 0, 1):
        given = setting()
        given.update(config, seed)
        results.append(given.parameters())
    assert all(map(torch.equal, results[0], results[1]))
    assert not all(map(torch.equal, results[0], results[2]))


def test_several_epochs_measure_the_ratio_from_the_policy_that_sampled() -> None:
    given = setting(lr=1e-3)
    before = given.logprobs()
    given.update(PPOConfig())
    ratio, steps = importance_ratio(given.logprobs(), before, given.rollout.response_mask)
    again = setting(lr=1e-3)
    found = again.update(PPOConfig(num_ppo_epochs=2))
    # The mean of two steps: the first has ratio 1.
    wanted = (1 + float(ratio[steps].mean())) / 2
    assert found["policy/ratio_mean"] == pytest.approx(wanted, abs=1e-4)
    assert found["policy/ratio_max"] == pytest.approx(float(ratio[steps].max()), abs=1e-4)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("budget", [25, 100_000])
def test_metrics_equal_those_computed_by_hand(ratio: Granularity, budget: int) -> None:
    given = setting(sgd=True, lr=0.5)
    rollout, credit, mask = given.rollout, given.credit, given.rollout.response_mask
    old = given.logprobs()
    config = PPOConfig(ratio=ratio, num_ppo_epochs=2, micro_batch_tokens=budget, cliprange=0.05, max_grad_norm=OFF)
    means = []
    parallel = setting(sgd=True, lr=0.5)
    for _ in range(2):
        logprobs = parallel.logprobs()
        with torch.no_grad():
            values = parallel.critic.module(*texts(rollout))
        ratios, steps = importance_ratio(logprobs, old, mask, granularity=ratio, macro_ids=credit.macro_ids)
        ratios = ratios[steps]
        losses = policy_loss(
            logprobs, old, credit.advantages, mask, cliprange=0.05, ratio=ratio, macro_ids=credit.macro_ids
        )
        means.append(
            {
                "policy/loss": float(losses),
                "policy/ratio_mean": float(ratios.mean()),
                "policy/clipfrac": float(((ratios - 1).abs() > 0.05).float().mean()),
                "policy/approx_kl": float((ratios - 1 - ratios.log()).mean()),
                "value/loss": float(value_loss(values, rollout.values, credit.returns, mask, cliprange_value=0.2)),
                "value/clipfrac": float(((values - rollout.values).abs() > 0.2)[mask].float().mean()),
            }
        )
        parallel.update(PPOConfig(ratio=ratio, cliprange=0.05, max_grad_norm=OFF))
    found = given.update(config)
    for name in means[0]:
        wanted = (means[0][name] + means[1][name]) / 2
        assert found[name] == pytest.approx(wanted, abs=1e-4, rel=1e-3), name
    residual = (credit.returns - rollout.values)[mask].var()
    explained = 1 - float(residual / credit.returns[mask].var())
    assert found["value/explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_gradients_are_scaled_down_to_the_largest_norm_and_logged_before() -> None:
    free = setting(sgd=True, lr=1.0)
    plain = change(free, PPOConfig(max_grad_norm=OFF))
    size = len(list(free.policy.module.parameters()))
    norms = [float(torch.cat([x.flatten() for x in part]).norm()) for part in (plain[:size], plain[size:])]
    clipped_setting = setting(sgd=True, lr=1.0)
    before = clipped_setting.parameters()
    found = clipped_setting.update(PPOConfig(max_grad_norm=0.01))
    assert [found["policy/grad_norm"], found["value/grad_norm"]] == pytest.approx(norms, rel=1e-4)
    moved = [after - first for after, first in zip(clipped_setting.parameters(), before, strict=True)]
    for part in (moved[:size], moved[size:]):
        assert float(torch.cat([x.flatten() for x in part]).norm()) == pytest.approx(0.01, rel=1e-2)


def test_the_update_stops_when_the_policy_has_moved_far_enough() -> None:
    results, passes = [], []
    for target in (None, 1e-3):
        given, seen = setting(lr=3e-3), []
        given.policy.module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        results.append(given.update(PPOConfig(num_ppo_epochs=8, target_kl=target)))
        passes.append(len(seen))
    free, held = results
    assert free["update/optimizer_steps"] == passes[0] == 8
    assert 1 <= held["update/optimizer_steps"] == passes[1] - 1 < 7
    assert held["update/skipped_steps"] == 0
    assert held["policy/approx_kl"] < free["policy/approx_kl"]


@pytest.mark.parametrize("where", ["advantages", "returns"])
def test_a_step_that_is_not_finite_is_not_taken_and_is_counted(where: str) -> None:
    given = setting()
    given.update(PPOConfig())  # the optimizers hold moments now, which must not be spoiled either
    numbers = getattr(given.credit, where).clone()
    numbers[2, 0] = math.nan
    before = given.parameters()
    found = with_credit(given, **{where: numbers}).update(PPOConfig(num_ppo_epochs=2))
    assert (found["update/optimizer_steps"], found["update/skipped_steps"]) == (0, 2)
    assert all(map(torch.equal, given.parameters(), before))
    after = given.update(PPOConfig())
    assert after["update/optimizer_steps"] == 1
    assert all(bool(x.isfinite().all()) for x in given.parameters())


def test_one_minibatch_that_is_not_finite_does_not_spoil_the_others() -> None:
    given = setting()
    numbers = given.credit.advantages.clone()
    numbers[2, 0] = math.inf
    found = with_credit(given, advantages=numbers).update(PPOConfig(num_mini_batches=4))
    assert (found["update/optimizer_steps"], found["update/skipped_steps"]) == (3, 1)
    assert all(bool(x.isfinite().all()) for x in given.parameters())


def test_values_are_clipped_only_when_asked() -> None:
    given = setting(sgd=True, lr=1.0)
    far = with_credit(given, returns=given.credit.returns + 50)
    tight = far.update(PPOConfig(num_ppo_epochs=3, cliprange_value=1e-3))
    assert tight["value/clipfrac"] > 0.3
    free = with_credit(setting(sgd=True, lr=1.0), returns=given.credit.returns + 50)
    assert free.update(PPOConfig(num_ppo_epochs=3, cliprange_value=None))["value/clipfrac"] == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_bfloat16_autocast_improves_what_earned_and_keeps_float32_parameters(ratio: Granularity) -> None:
    given = setting(precision="bf16", lr=1e-3)
    before = given.logprobs()
    found = given.update(PPOConfig(ratio=ratio, num_ppo_epochs=2, num_mini_batches=2))
    gained = ((given.logprobs() - before) * given.credit.advantages)[given.rollout.response_mask].mean()
    assert gained > 0
    assert {x.dtype for x in given.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for value in found.values())


def test_an_update_writes_into_nothing_that_it_was_given() -> None:
    given = setting()
    everything = (*vars(given.rollout).values(), *vars(given.credit).values())
    tensors = [x for x in everything if isinstance(x, Tensor)]
    copies = [x.clone() for x in tensors]
    given.update(PPOConfig(num_ppo_epochs=2))
    assert all(map(torch.equal, tensors, copies))


def test_more_minibatches_than_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="num_mini_batches is 13, more than the 12 responses"):
        setting().update(PPOConfig(num_mini_batches=13))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ppo_epochs", 0),
        ("num_ppo_epochs", 1.5),
        ("num_mini_batches", True),
        ("cliprange", "a"),
        ("max_skipped_steps", 0.5),
        ("num_mini_batches", 0),
        ("micro_batch_tokens", 0),
        ("cliprange", 0.0),
        ("cliprange_value", -0.2),
        ("vf_coef", 0.0),
        ("vf_coef", math.inf),
        ("max_grad_norm", 0.0),
        ("target_kl", -1.0),
        ("max_skipped_steps", -1),
        ("ratio", "sentence"),
        ("cliprange", math.nan),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=f"{name} is {value!r}"):
        PPOConfig(**{name: value})


def test_the_presets_clip_the_ratio_of_the_paper_and_of_the_official_code() -> None:
    """ma-rlhf.md section 2, rows `ratio`, `rollouts, PPO epochs, minibatches` and `value loss`."""
    assert PPOConfig.paper() == PPOConfig(ratio="macro", num_ppo_epochs=1, num_mini_batches=1, cliprange_value=0.2)
    assert PPOConfig.official() == PPOConfig(ratio="token", num_ppo_epochs=1, num_mini_batches=1, cliprange_value=0.2)
    assert PPOConfig.paper(cliprange=0.1, ratio="macro_mean") == PPOConfig(cliprange=0.1, ratio="macro_mean")
