"""A trainer with groups of responses, and without a critic: it learns, resumes, and has nothing of one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from apportion import (
    GAE,
    GRPO,
    RLOO,
    AdvantageEstimator,
    Attention,
    CreditConfig,
    DrGRPO,
    EveryToken,
    PPOArguments,
    PPOConfig,
    ReinforcePlusPlus,
    Sampling,
    WholeResponse,
)
from apportion.data.prompts import indices_of
from apportion.train import ppo as loop
from apportion.train.run import latest_checkpoint
from families import classifier
from trainers import HELD_OUT, PROMPTS, count_w7, data, learned, left_behind, metrics, run, trainer

CREDIT = CreditConfig(kl_coef=0.05)
BY_GROUP = ReinforcePlusPlus(group_size=4)
WITHOUT: tuple[AdvantageEstimator, ...] = (RLOO(4), GRPO(4), DrGRPO(4), ReinforcePlusPlus(), BY_GROUP)
GSPO = PPOConfig(ratio="macro_mean", cliprange=3e-4, cliprange_high=4e-4, num_ppo_epochs=2)
GMPO = PPOConfig(ratio="macro_mean", clip="token", cliprange=0.4, num_ppo_epochs=2)


def scored(**more: Any) -> dict[str, Any]:
    return {"reward_model": classifier("llama"), "eval_dataset": data(HELD_OUT)} | more


@pytest.mark.parametrize("estimator", [*WITHOUT, GAE(lam=0.9, per="boundary")], ids=str)
def test_the_score_rises_under_every_estimator(estimator: AdvantageEstimator, tmp_path: Path) -> None:
    credit = replace(CREDIT, advantage=estimator)
    run(tmp_path, num_steps=40, batch_size=16, sampling=Sampling(max_new_tokens=12), credit=credit)
    scores = [record["score/mean"] for record in metrics(tmp_path)]
    assert sum(scores[:4]) / 4 < 1
    assert sum(scores[-4:]) / 4 > 4


METHODS = {
    "gspo": (replace(CREDIT, advantage=GRPO(4), termination=WholeResponse()), GSPO),
    "gmpo": (replace(CREDIT, advantage=GRPO(4), termination=WholeResponse()), GMPO),
    "dr grpo": (replace(CREDIT, advantage=DrGRPO(4)), PPOConfig(loss_aggregation="constant")),
    "weighed": (
        replace(CREDIT, advantage=RLOO(4), redistribution=Attention(), termination=EveryToken()),
        PPOConfig(loss_aggregation="sequence_mean"),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_score_rises_under_methods_that_users_know(method: str, tmp_path: Path) -> None:
    credit, ppo = METHODS[method]
    roles = scored() if isinstance(credit.redistribution, Attention) else {}
    settings = {"num_steps": 40, "batch_size": 16, "sampling": Sampling(max_new_tokens=12), "scale_scores": bool(roles)}
    run(tmp_path, roles=roles, credit=credit, ppo=ppo, **settings)
    lines = metrics(tmp_path)
    scores = [record["score/mean"] for record in lines]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + (lines[0]["score/std"] / 2 if roles else 3)


@pytest.mark.parametrize("estimator", WITHOUT, ids=str)
def test_nothing_of_a_critic_is_loaded_trained_saved_or_logged(
    estimator: AdvantageEstimator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "critic_model", None)  # not to be called
    made = run(tmp_path, roles=scored(), credit=replace(CREDIT, advantage=estimator), zero_value_head=True)
    assert made.critic is None
    assert made.state.learners.keys() == made.state.schedules.keys() == {"policy"}
    for line in metrics(tmp_path):
        assert not [name for name in line if name.startswith("value/") or name == "credit/value_mean"]
        assert ("score/flat_groups" in line) is (estimator.responses_per_prompt > 1)
    saved = latest_checkpoint(tmp_path)
    assert saved is not None
    assert not list(saved.path.glob("critic*"))


def test_flat_groups_are_those_of_equal_scores(tmp_path: Path) -> None:
    """The first two of four prompts score alike whatever is said."""

    def stars(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0 if prompt in seen else float(i) for i, prompt in enumerate(prompts)] if completions else []

    seen = [PROMPTS[i] for i in indices_of(0, 8, 0, len(PROMPTS), 2)[:4]]
    settings: dict[str, Any] = {"credit": replace(CREDIT, advantage=DrGRPO(2), kl_coef=0.0), "num_steps": 1}
    run(tmp_path, roles={"reward_model": stars}, **settings)
    assert metrics(tmp_path)[0]["score/flat_groups"] == 0.5


def test_every_prompt_is_answered_by_a_group_of_different_responses(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    answers: list[list[str]] = []

    def stars(prompts: list[str], completions: list[str]) -> list[float]:
        asked.append(prompts)
        answers.append(completions)
        return count_w7(completions)

    run(tmp_path, roles={"reward_model": stars}, credit=replace(CREDIT, advantage=RLOO(4)), num_steps=5)
    assert all(len(prompts) == 8 for prompts in asked)
    groups = [prompts[first : first + 4] for prompts in asked for first in (0, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    # Two prompts an update: five updates see the five prompts twice each.
    assert sorted(group[0] for group in groups) == sorted(PROMPTS * 2)
    assert all(len(set(texts[first : first + 4])) > 1 for texts in answers for first in (0, 4))
    assert [line["samples"] for line in metrics(tmp_path)] == [8, 16, 24, 32, 40]


def test_one_response_a_prompt_draws_what_it_always_did() -> None:
    assert indices_of(3, 8, 0, 5, 1) == indices_of(3, 8, 0, 5)
    assert indices_of(3, 8, 0, 5, 4) == [i for i in indices_of(3, 2, 0, 5) for _ in range(4)]


class StopAfter(TrainerCallback):
    """Stop the run after an update."""

    def on_step_end(self, *given: Any, **_: Any) -> None:
        given[2].should_training_stop = given[1].global_step == 2


@pytest.mark.parametrize("estimator", [GRPO(4), ReinforcePlusPlus(gamma=0.9)], ids=str)
def test_a_run_without_a_critic_goes_on_to_the_bit(estimator: AdvantageEstimator, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "credit": replace(CREDIT, advantage=estimator),
        "num_steps": 5,
        "eval_steps": 2,
        "scale_scores": True,
        "ppo": PPOConfig(num_ppo_epochs=2, num_mini_batches=3),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }
    run(tmp_path / "stopped", roles=scored(callbacks=[StopAfter()]), **settings)
    assert len(metrics(tmp_path / "stopped")) == 3
    resumed = run(tmp_path / "stopped", roles=scored(), resume=True, **settings)
    whole = run(tmp_path / "whole", roles=scored(), **settings)
    assert all(map(torch.equal, learned(resumed), learned(whole)))
    names = ("metrics", "samples", "learned")
    found, wanted = (left_behind(tmp_path / name, made) for name, made in (("stopped", resumed), ("whole", whole)))
    assert [found[name] for name in names] == [wanted[name] for name in names]


def test_minibatches_need_not_hold_whole_groups(tmp_path: Path) -> None:
    """What a response is compared with is known before the batch is dealt to three minibatches of 2 or 3 rows."""
    made = run(tmp_path, credit=replace(CREDIT, advantage=GRPO(4)), ppo=PPOConfig(num_mini_batches=3))
    assert [line["update/optimizer_steps"] for line in metrics(tmp_path)] == [3.0] * 3
    assert made.counters["skipped_in_a_row"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 30, "credit": CreditConfig(advantage=GRPO(8))},
            r"batch_size is 30 responses, not a multiple of the 8 that GRPO compares \(group_size\); change one",
        ),
        (
            {"credit": CreditConfig(advantage=GAE(per="boundary")), "ppo": PPOConfig(ratio="macro")},
            "ppo.ratio is 'macro', but the advantages of GAE differ inside a macro action; choose 'token'",
        ),
    ],
)
def test_settings_that_do_not_fit_the_estimator_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOArguments(**changes)


def test_a_critic_that_nobody_asks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="value_model is given, but RLOO has no critic; leave it out"):
        trainer(tmp_path, roles={"value_model": classifier("llama")}, credit=replace(CREDIT, advantage=RLOO(4)))
