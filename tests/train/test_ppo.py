"""A trainer learns, says what it did, and heeds every option that it has."""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainerCallback

from apportion import (
    GAE,
    Attention,
    CreditConfig,
    EveryToken,
    FixedNgram,
    Mixture,
    PolicyAttention,
    PPOArguments,
    PPOConfig,
    PrefixDifference,
    Sampling,
    Terminal,
    Uniform,
)
from apportion.batch import Prompts
from apportion.data.prompts import indices_of
from apportion.models import Policy
from apportion.rollout import Responses
from apportion.score.reward_model import decode
from apportion.streams import generator
from apportion.train.ppo import Diverged, PPOTrainer
from apportion.train.run import checkpoints, latest_checkpoint
from families import EOS, causal, classifier
from trainers import HELD_OUT, PROMPTS, count_w7, data, learned, left_behind, metrics, run, trainer, words

CREDIT = CreditConfig(kl_coef=0.05)
SAMPLING = Sampling(max_new_tokens=8)
PPO = PPOConfig()
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


def scored() -> dict[str, Any]:
    """A run whose scores come from a reward model, from which the critic starts."""
    return {"reward_model": classifier("llama"), "eval_dataset": data(HELD_OUT)}


def sampled(made: PPOTrainer, step: int) -> tuple[Prompts, Responses]:
    """The prompts and responses of an update."""
    prompts = made.prompts.batch(range(4))
    return prompts, made.respond(prompts, generator(made.args.seed, "sample", step), first=0, total=8)


@pytest.mark.parametrize("method", [CREDIT, replace(CREDIT, termination=EveryToken(), redistribution=Uniform())])
def test_the_reward_rises(method: CreditConfig, tmp_path: Path) -> None:
    run(tmp_path, num_steps=40, batch_size=16, sampling=Sampling(max_new_tokens=12), credit=method)
    scores = [record["score/mean"] for record in metrics(tmp_path)]
    assert sum(scores[:4]) / 4 < 1
    assert sum(scores[-4:]) / 4 > 4


REDISTRIBUTIONS = (
    *(Terminal(), Attention(), PrefixDifference(), PolicyAttention(), PolicyAttention(mode="last", legacy_shift=True)),
    Mixture.of({Attention(row="mean", heads=(1, 2), layer=0): 0.3, PolicyAttention(): 0.3, PrefixDifference(): 0.4}),
)


@pytest.mark.parametrize("credit", [replace(CREDIT, redistribution=r) for r in REDISTRIBUTIONS])
def test_the_score_of_a_reward_model_rises_under_every_redistribution(credit: CreditConfig, tmp_path: Path) -> None:
    """abc.md section 10 row 17: providers were accepted that then got nothing to spread by."""
    settings = {"num_steps": 40, "batch_size": 16, "sampling": Sampling(max_new_tokens=12), "scale_scores": True}
    run(tmp_path, roles=scored(), credit=credit, **settings)
    scores = [record["score/mean"] for record in metrics(tmp_path)]
    spread = metrics(tmp_path)[0]["score/std"]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + spread / 2


# For each option: how the run is set up besides, and another value of it.
OPTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "seed": ({}, 1),
    "num_steps": ({}, 4),
    "batch_size": ({}, 6),
    "credit": ({}, replace(CREDIT, kl_coef=0.5)),
    "sampling": ({}, Sampling(max_new_tokens=6)),
    "ppo": ({}, PPOConfig(num_ppo_epochs=2)),
    "learning_rate": ({}, 1e-3),
    "critic_learning_rate": ({}, 1e-3),
    "lr_scheduler_type": ({}, "cosine"),
    "warmup_steps": ({"lr_scheduler_type": "linear"}, 2),
    "warmup_ratio": ({"lr_scheduler_type": "linear"}, 0.5),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.5),
    "weight_decay": ({}, 0.1),
    "scale_scores": ({}, True),
    "missing_eos_penalty": ({}, 1.0),
    "zero_value_head": ({}, True),
    "max_prompt_length": ({}, 2),
    "eval_steps": ({}, 2),
    "num_logged_samples": ({"eval_steps": 1}, 1),
    "save_steps": ({"save_total_limit": 5}, 1),
    "save_total_limit": ({"save_steps": 1}, 1),
    "bf16": ({}, True),
    "log_with": ({}, "tensorboard"),
}
# Tests of their own: what these change is not what a run computes.
APART = {"output_dir", "resume", "strict", "eval_batch_size", "gradient_checkpointing"}
PPO_OPTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "num_ppo_epochs": ({}, 2),
    "num_mini_batches": ({}, 2),
    "ratio": ({"num_ppo_epochs": 2}, "macro"),
    "clip": ({"num_ppo_epochs": 4, "ratio": "macro", "cliprange": 0.01}, "token"),
    "cliprange": ({"num_ppo_epochs": 4}, 0.01),
    "cliprange_high": ({"num_ppo_epochs": 4}, 0.01),
    "loss_aggregation": ({}, "sequence_mean"),
    "cliprange_value": ({"num_ppo_epochs": 4}, 0.001),
    "vf_coef": ({}, 0.1),
    "max_grad_norm": ({}, 0.01),
    "target_kl": ({"num_ppo_epochs": 4}, 1e-5),
}
PPO_APART = {"micro_batch_tokens", "max_skipped_steps"}
CREDIT_OPTIONS: dict[str, Any] = {
    "termination": EveryToken(),
    "redistribution": Uniform(),
    "advantage": GAE(lam=0.5),
    "macro_value": "unit",
    "macro_reward": "mean",
    "kl_coef": 0.5,
    "score_clamp": 0.01,
    "last_token_apart": True,
    "value_smoothing": FixedNgram(n=4),
    "whiten_advantages": True,
}
SAMPLING_OPTIONS: dict[str, Any] = {
    "max_new_tokens": 5,
    "min_new_tokens": 8,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.3,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run with the settings of the tests leaves behind."""
    return of_run(tmp_path_factory.mktemp("plain"))


def of_run(folder: Path, **changes: Any) -> dict[str, Any]:
    return left_behind(folder, run(folder, roles=scored(), **changes))


def test_every_option_is_in_a_table() -> None:
    assert {f.name for f in fields(PPOArguments)} == OPTIONS.keys() | APART
    assert {f.name for f in fields(PPOConfig)} == PPO_OPTIONS.keys() | PPO_APART
    assert {f.name for f in fields(CreditConfig)} == CREDIT_OPTIONS.keys()
    assert {f.name for f in fields(Sampling)} == SAMPLING_OPTIONS.keys()


def test_the_same_settings_leave_the_same_behind(plain: dict[str, Any], tmp_path: Path) -> None:
    assert of_run(tmp_path) == plain


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_an_effect(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    besides, value = OPTIONS[name]
    before = of_run(tmp_path / "before", **besides) if besides else plain
    assert of_run(tmp_path / "after", **besides | {name: value}) != before


@pytest.mark.parametrize("name", PPO_OPTIONS)
def test_every_option_of_the_update_has_an_effect(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    besides, value = PPO_OPTIONS[name]
    before = of_run(tmp_path / "before", ppo=PPOConfig(**besides)) if besides else plain
    assert of_run(tmp_path / "after", ppo=PPOConfig(**besides | {name: value})) != before


@pytest.mark.parametrize("name", CREDIT_OPTIONS)
def test_every_option_of_credit_has_an_effect(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    assert of_run(tmp_path, credit=replace(CREDIT, **{name: CREDIT_OPTIONS[name]})) != plain


@pytest.mark.parametrize("name", SAMPLING_OPTIONS)
def test_every_option_of_sampling_has_an_effect(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    assert of_run(tmp_path, sampling=replace(SAMPLING, **{name: SAMPLING_OPTIONS[name]})) != plain


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"ppo": PPOConfig(micro_batch_tokens=24)}])
def test_options_that_save_memory_change_no_number(changes: dict[str, Any], tmp_path: Path) -> None:
    wanted = run(tmp_path / "plain", roles=scored(), eval_steps=3)
    found = run(tmp_path / "small", roles=scored(), eval_steps=3, **changes)
    for x, y in zip(learned(found), learned(wanted), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)  # Adam divides small differences by small gradients
    for x, y in zip(metrics(tmp_path / "small"), metrics(tmp_path / "plain"), strict=True):
        assert x == pytest.approx(y, abs=2e-3, rel=2e-3)


def test_gradient_checkpointing_keeps_fewer_activations(tmp_path: Path) -> None:
    def kept(**changes: Any) -> int:
        made, sizes = trainer(tmp_path, **changes), []

        def keep(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        prompts, responses = sampled(made, 0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            made.policy.module(
                prompts.prompt_ids, prompts.prompt_mask, responses.response_ids, responses.response_mask, SAMPLING
            )
        return sum(sizes)

    assert kept(gradient_checkpointing=True) < kept() / 2


def test_evaluation_in_smaller_batches_says_the_same(tmp_path: Path) -> None:
    sizes: list[int] = []

    def stars(completions: list[str], **_: Any) -> list[float]:
        sizes.append(len(completions))
        return count_w7(completions)

    roles = {"eval_dataset": data(HELD_OUT), "reward_model": stars}
    records = []
    for size in (None, 2, 1):
        folder = tmp_path / str(size)
        sizes.clear()
        run(folder, roles=roles, eval_steps=3, eval_batch_size=size)
        assert [given for given in sizes if given != 8] == {None: [3, 3], 2: [2, 1, 2, 1], 1: [1] * 6}[size]
        records.append([{k: v for k, v in r.items() if k.startswith("eval/")} for r in metrics(folder)])
    for other in records[1:]:
        for x, y in zip(other, records[0], strict=True):
            assert x == pytest.approx(y, abs=1e-4)


def test_long_prompts_are_refused_when_strict(tmp_path: Path) -> None:
    assert len(trainer(tmp_path, max_prompt_length=2).prompts) == 3
    with pytest.raises(ValueError, match="2 of 5 prompts are longer than max_prompt_length"):
        trainer(tmp_path, max_prompt_length=2, strict=True)


def test_two_seeds_give_different_first_rollouts_and_one_seed_the_same(tmp_path: Path) -> None:
    # abc.md section 10, row 9: the trainer reseeded itself, so that all "seeds" sampled alike.
    first, again, other = (sampled(trainer(tmp_path, seed=seed), 0)[1].response_ids for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert first.tolist() != other.tolist()


class StopAfter(TrainerCallback):
    """Stop after so many updates."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, *given: Any, **_: Any) -> None:
        _, state, control = given
        control.should_training_stop = state.global_step >= self.steps


def test_a_reward_that_draws_repeats_with_the_seed_and_through_a_resume(tmp_path: Path) -> None:
    """It may be a program, or a model with dropout of its own."""

    def drawn(completions: list[str], **_: Any) -> list[float]:
        # Not Python's own numbers too: the type checks of the tests draw from those.
        return [float(np.random.rand()) + float(torch.rand(())) for _ in completions]

    def ran(name: str, seed: int, stop: int | None = None) -> str:
        np.random.seed(len(name))
        torch.manual_seed(len(name))
        for steps in filter(None, (stop, 3)):
            roles = {"reward_model": drawn, "callbacks": [StopAfter(steps)]}
            trainer(tmp_path / name, roles=roles, seed=seed, save_steps=1, resume=stop is not None).train()
        return repr(metrics(tmp_path / name))

    once = ran("once", 3)
    assert ran("again", 3) == once
    assert ran("other", 4) != once
    assert ran("resumed", 3, stop=2) == once


def test_two_updates_draw_from_different_numbers(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert sampled(made, 0)[1].response_ids.tolist() != sampled(made, 1)[1].response_ids.tolist()


@pytest.mark.parametrize(("ppo", "passes"), [(PPOConfig(), 1), (PPOConfig(micro_batch_tokens=40), 7)])
def test_the_critic_reads_the_last_rows_that_fit_once(ppo: PPOConfig, passes: int, tmp_path: Path) -> None:
    made = trainer(tmp_path, num_steps=1, batch_size=4, sampling=Sampling(max_new_tokens=12), ppo=ppo)
    seen: list[int] = []
    made.state.learners["critic"].module.register_forward_hook(lambda *_: seen.append(1))
    made.train()
    assert len(seen) == passes


@pytest.mark.parametrize(
    ("ppo", "passes"),
    [
        (PPOConfig(), 1),
        (PPOConfig(num_ppo_epochs=2), 2),
        (PPOConfig(num_mini_batches=2), 3),
        (PPOConfig(micro_batch_tokens=40), 4),  # twenty for the policy, which reads the rows one by one
    ],
)
def test_the_policys_attention_takes_no_pass_beside_that_of_sampling(
    ppo: PPOConfig, passes: int, tmp_path: Path
) -> None:
    """abc.md section 2: ABC-D from a pass that PPO makes anyway; its last tokens alone are fed besides."""
    seen: list[list[int]] = []
    fed: list[list[int]] = []
    for name, redistribution in (("plain", Uniform()), ("policy", PolicyAttention())):
        credit = replace(CREDIT, redistribution=redistribution)
        settings: dict[str, Any] = {"num_steps": 1, "batch_size": 4, "sampling": Sampling(max_new_tokens=12)}
        made = trainer(tmp_path / name, ppo=ppo, credit=credit, **settings)
        seen.append([])
        fed.append([])
        policy: Any = made.policy.module
        policy.register_forward_hook(lambda *_, calls=seen[-1]: calls.append(1))
        policy.model.register_forward_hook(lambda *_, calls=fed[-1]: calls.append(1))
        made.train()
    assert [len(calls) for calls in seen] == [passes, passes]
    assert len(fed[1]) - len(fed[0]) == 1


@pytest.mark.parametrize("changes", [{"ppo": PPOConfig(micro_batch_tokens=60)}, {"gradient_checkpointing": True}])
def test_how_the_update_is_made_changes_no_number_under_the_policys_attention(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    for name, more in (("one", {}), ("two", changes)):
        credit = replace(CREDIT, redistribution=PolicyAttention(), termination=EveryToken())
        settings = {"sampling": SAMPLING, "learning_rate": 1e-4, "critic_learning_rate": 1e-4}
        run(tmp_path / name, credit=credit, **settings | more)
    for pair in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for record in pair:
            record.pop("value/explained_variance", None)  # a ratio of small numbers, which rounding moves further
        assert pair[1] == pytest.approx(pair[0], abs=2e-4, rel=2e-4)


def test_logged_divergence_length_and_score_are_the_masked_means_that_they_claim(tmp_path: Path) -> None:
    # ma-rlhf.md section 4, rows 18 to 20: means over padding, a length with pads and a prompt token, micro-steps.
    roles = {"ref_model": causal("qwen2"), "model": causal("llama")}
    made = trainer(tmp_path, roles=roles, num_steps=1, batch_size=10, sampling=Sampling(max_new_tokens=30))
    prompts = made.prompts.batch(made_indices(made))
    responses = made.respond(prompts, generator(0, "sample", 0))
    rollout = made.complete(prompts, responses)
    texts = decode(made.tokenizer, prompts, responses)
    made.train()
    (found,) = metrics(tmp_path)
    mask, kl = rollout.response_mask, rollout.old_logprobs - rollout.ref_logprobs
    lengths = mask.sum(1).float()
    assert lengths.unique().numel() > 1
    ended = torch.stack([(ids == EOS).any() for ids in rollout.response_ids]).float()
    wanted = {
        "rollout/length": lengths.mean(),
        "rollout/kl": kl[mask].mean(),
        "rollout/kl_sequence": torch.stack([row[m].sum() for row, m in zip(kl, mask, strict=True)]).mean(),
        "rollout/entropy": -rollout.old_logprobs[mask].mean(),
        "rollout/eos_rate": ended.mean(),
        "score/mean": torch.tensor(count_w7(texts)).mean(),
        "score/std": torch.tensor(count_w7(texts)).std(),
        "credit/actions": (lengths / 5).ceil().mean(),
        "credit/value_mean": rollout.values[mask].mean(),
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(float(value), abs=1e-5, rel=1e-4), name
    assert found["tokens"] == int(lengths.sum())
    assert found["samples"] == 10
    assert found["score/objective"] == pytest.approx(found["score/mean"] - 0.05 * found["rollout/kl_sequence"])


def made_indices(made: PPOTrainer) -> list[int]:
    return indices_of(0, made.args.batch_size, made.args.seed, len(made.prompts))


@pytest.mark.parametrize(("penalty", "scale"), [(None, False), (2.5, False), (2.5, True)])
def test_a_response_without_an_end_pays_the_penalty_after_scaling(
    penalty: float | None, scale: bool, tmp_path: Path
) -> None:
    # One token a response and a critic that says zero: the advantage is what the response is paid.
    def stars(completions: list[str], **_: Any) -> list[float]:
        return [3.0 + len(text) for text in completions]

    settings = {"missing_eos_penalty": penalty, "scale_scores": scale, "sampling": Sampling(max_new_tokens=1)}
    model = causal("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 3  # type: ignore[union-attr, operator] # a linear layer
    run(tmp_path, roles={"reward_model": stars, "model": model}, num_steps=2, batch_size=64, **settings)
    first, second = metrics(tmp_path)
    assert 0 < first["rollout/eos_rate"] < 1
    factor = 1 / first["score/std"] if scale else 1.0
    assert [first["score/scale"], second["score/scale"]] == pytest.approx([factor, factor])
    paid = first["score/mean"] * factor - (penalty or 0) * (1 - first["rollout/eos_rate"])
    assert first["credit/advantage_mean"] == pytest.approx(paid, rel=1e-4)


def test_scores_that_do_not_vary_are_not_scaled(tmp_path: Path) -> None:
    run(tmp_path, roles={"reward_model": lambda completions, **_: [2.0] * len(completions)}, scale_scores=True)
    assert [record["score/scale"] for record in metrics(tmp_path)] == [1.0] * 3


def test_a_batch_of_one_response_can_be_trained_on(tmp_path: Path) -> None:
    run(tmp_path, batch_size=1, scale_scores=True)
    assert [record["samples"] for record in metrics(tmp_path)] == [1, 2, 3]


def test_held_out_prompts_are_evaluated_at_the_start_every_k_updates_and_at_the_end(tmp_path: Path) -> None:
    """abc.md section 10 row 14 and ma-rlhf.md section 4 row 21: only training reward was logged."""

    def words(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text.split())) for text in completions]

    roles = {"eval_dataset": data(HELD_OUT), "eval_rewards": [words]}
    run(tmp_path, roles=roles, num_steps=5, eval_steps=2, num_logged_samples=2)
    evaluated = [record for record in metrics(tmp_path) if "eval/score" in record]
    assert [record["step"] for record in evaluated] == [0, 2, 4, 5]
    assert set(evaluated[0]) == {
        "step", "samples", "tokens", "eval/score", "eval/kl_sequence", "eval/length", "eval/objective", "eval/words",
    }  # fmt: skip
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (step, prompt) for step in (0, 2, 4, 5) for prompt in HELD_OUT[:2]
    ]
    for sample in samples:
        assert sample["score"] == count_w7([sample["response"]])[0]


def test_two_evaluations_of_one_policy_say_the_same_at_every_step_and_under_every_seed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-30, "eval_steps": 1}
    for seed in (0, 1):
        run(tmp_path / str(seed), roles={"eval_dataset": data(HELD_OUT)}, seed=seed, **settings)
    lines = [line for seed in ("0", "1") for line in metrics(tmp_path / seed)]
    assert len({tuple(value for name, value in line.items() if name.startswith("eval/")) for line in lines}) == 1


def test_evaluating_more_often_changes_nothing_else(tmp_path: Path) -> None:
    for every in (1, 0):
        run(tmp_path / str(every), roles={"eval_dataset": data(HELD_OUT)}, eval_steps=every)
    often, never = (
        [{k: v for k, v in record.items() if not k.startswith("eval/")} for record in metrics(tmp_path / name)]
        for name in ("1", "0")
    )
    assert often[1:] == never


def test_a_short_data_set_begins_again(tmp_path: Path) -> None:
    seen: list[str] = []

    def stars(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(prompts)
        return count_w7(completions)

    run(tmp_path, roles={"reward_model": stars, "train_dataset": data(PROMPTS[:3])}, num_steps=3, batch_size=8)
    assert len(seen) == 24
    assert {seen.count(prompt) for prompt in PROMPTS[:3]} == {8}


def test_a_reward_function_gets_the_columns_of_its_prompts(tmp_path: Path) -> None:
    def stars(prompts: list[str], completions: list[str], answer: list[int], **_: Any) -> list[float]:
        assert [PROMPTS.index(prompt) for prompt in prompts] == answer
        assert len(completions) == len(answer)
        return [0.0] * len(answer)

    run(tmp_path, roles={"reward_model": stars, "train_dataset": data(PROMPTS, answer=list(range(5)))})
    assert len(metrics(tmp_path)) == 3


def test_a_failing_reward_loses_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def stars(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("the judge is away")
        return count_w7(completions)

    with pytest.raises(ConnectionError, match="the judge is away"):
        run(tmp_path / "failed", roles={"reward_model": stars}, num_steps=4)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "failed")] == [2]
    resumed = run(tmp_path / "failed", roles={"reward_model": stars}, num_steps=4, resume=True)
    whole = run(tmp_path / "whole", num_steps=4)
    assert all(map(torch.equal, learned(resumed), learned(whole)))
    assert metrics(tmp_path / "failed") == metrics(tmp_path / "whole")


def test_a_reward_that_fails_in_evaluation_loses_only_that_evaluation(tmp_path: Path) -> None:
    evaluations: list[int] = []

    def stars(prompts: list[str], completions: list[str]) -> list[float]:
        evaluations.extend([1] * (prompts[0] in HELD_OUT))
        if len(evaluations) == 2 and prompts[0] in HELD_OUT:
            raise ConnectionError("the judge is away")
        return count_w7(completions)

    settings: dict[str, Any] = {"roles": {"reward_model": stars, "eval_dataset": data(HELD_OUT)}, "eval_steps": 2}
    with pytest.raises(ConnectionError):
        run(tmp_path / "failed", num_steps=4, **settings)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "failed")] == [2]
    resumed = run(tmp_path / "failed", num_steps=4, resume=True, **settings)
    whole = run(tmp_path / "whole", num_steps=4, **settings)
    assert all(map(torch.equal, learned(resumed), learned(whole)))
    assert [line["step"] for line in metrics(tmp_path / "failed")] == [0, 1, 2, 3, 4]


def test_a_score_that_is_not_a_number_stops_the_run_with_its_row(tmp_path: Path) -> None:
    def stars(completions: list[str], **_: Any) -> list[float]:
        return [0.0, math.nan] + [0.0] * (len(completions) - 2)

    with pytest.raises(ValueError, match="stars returned nan for response 1"):
        run(tmp_path, roles={"reward_model": stars})
    assert latest_checkpoint(tmp_path) is not None


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first step may be the one not taken
def test_a_run_whose_steps_are_not_finite_stops_after_the_limit(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"3 optimizer steps in a row were not finite .*policy/loss is nan"):
        run(tmp_path, learning_rate=1e30, num_steps=20, ppo=PPOConfig(max_skipped_steps=2))
    lines = metrics(tmp_path)
    assert [line["update/skipped_steps"] for line in lines] == [0.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_models_that_are_lost_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="the policy holds numbers that are not finite and is not saved"):
        run(tmp_path, learning_rate=1e39, num_steps=1)
    assert latest_checkpoint(tmp_path) is None
    assert not (tmp_path / "model").exists()


def test_a_model_in_half_precision_learns_in_float32(tmp_path: Path) -> None:
    model = causal("llama", torch.bfloat16)
    run(tmp_path, roles={"model": model}, num_steps=1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class Witness(TrainerCallback):
    """Write down what it hears; ask for a checkpoint or a stop after given updates."""

    def __init__(self, save: int | None = None, stop: int | None = None) -> None:
        self.heard: list[tuple[str, int]] = []
        self.save, self.stop = save, stop
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *given: Any, **_: Any) -> None:
        self.heard.append(("begin", given[1].global_step))

    def on_evaluate(self, *given: Any, **context: Any) -> None:
        self.heard.append(("evaluate", given[1].global_step))
        assert "eval/score" in context["metrics"]

    def on_log(self, *_given: Any, **context: Any) -> None:
        self.logs.append(context["logs"])

    def on_save(self, *given: Any, **_: Any) -> None:
        self.heard.append(("save", given[1].global_step))

    def on_step_end(self, *given: Any, **context: Any) -> None:
        _, state, control = given
        assert {"model", "processing_class"} <= context.keys()
        self.heard.append(("step", state.global_step))
        control.should_save = state.global_step == self.save
        control.should_training_stop = state.global_step == self.stop

    def on_train_end(self, *given: Any, **_: Any) -> None:
        self.heard.append(("end", given[1].global_step))


def test_callbacks_hear_of_everything_and_may_save_and_stop(tmp_path: Path) -> None:
    witness = Witness(save=1, stop=3)
    roles = {"callbacks": [witness], "eval_dataset": data(HELD_OUT)}
    run(tmp_path, roles=roles, num_steps=6, eval_steps=2)
    assert witness.heard == [
        ("begin", 0),
        ("step", 1),
        ("save", 1),
        ("evaluate", 2),
        ("step", 2),
        ("step", 3),
        ("save", 3),
        ("end", 3),
    ]
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [1, 3]
    assert [log["samples"] for log in witness.logs] == [0, 8, 16, 24]
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_request_for_a_checkpoint_is_heard_once(tmp_path: Path) -> None:
    run(tmp_path, roles={"callbacks": [Witness(save=2)]}, num_steps=5, save_steps=2, save_total_limit=9)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [2, 4, 5]


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    run(tmp_path, log_with="tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events.parent))
    log.Reload()
    names = set(log.Tags()["scalars"])
    assert set(metrics(tmp_path)[-1]) - {"step"} <= names
    assert [event.value for event in log.Scalars("score/mean")] == pytest.approx(
        [record["score/mean"] for record in metrics(tmp_path)]
    )


def test_a_run_with_a_tracker_can_be_resumed(tmp_path: Path) -> None:
    stopped = run(tmp_path / "a", roles={"callbacks": [Witness(stop=2)]}, log_with="tensorboard", num_steps=4)
    assert stopped.counters["step"] == 2
    resumed = run(tmp_path / "a", log_with="tensorboard", num_steps=4, resume=True)
    whole = run(tmp_path / "b", num_steps=4)
    assert all(map(torch.equal, learned(resumed), learned(whole)))


def test_adapters_are_trained_against_their_own_base_and_saved_alone(tmp_path: Path) -> None:
    base = causal("llama", initializer_range=0.08)
    untouched = {name: p.clone() for name, p in causal("llama", initializer_range=0.08).named_parameters()}
    made = run(tmp_path, roles={"model": base, "peft_config": LORA}, num_steps=6, learning_rate=3e-2, save_steps=3)
    lines = metrics(tmp_path)
    assert lines[0]["rollout/kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["rollout/kl"] > 1e-4
    for name, parameter in base.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, untouched[name.replace(".base_layer", "")])
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert all("lora" in name for name in load_file(tmp_path / "model" / "adapter_model.safetensors"))
    saved = latest_checkpoint(tmp_path)
    assert saved is not None
    assert all("lora" in name for name in load_file(saved.path / "policy.safetensors"))
    prompts, responses = sampled(made, 9)
    texts = (prompts.prompt_ids, prompts.prompt_mask, responses.response_ids, responses.response_mask)
    with torch.no_grad():
        wanted = Policy(causal("llama", initializer_range=0.08), (EOS,))(*texts, made.args.sampling)
    torch.testing.assert_close(made.complete(prompts, responses).ref_logprobs, wanted, atol=1e-5, rtol=1e-5)


def test_the_beginning_of_adapters_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def beginning(seed: int, global_seed: int) -> list[torch.Tensor]:
        torch.manual_seed(global_seed)
        model = causal("llama")
        made = trainer(tmp_path, roles={"model": model, "peft_config": LORA}, seed=seed)
        return [p.detach() for name, p in made.policy.module.named_parameters() if "lora_A" in name]

    assert all(map(torch.equal, beginning(0, 1), beginning(0, 2)))
    assert not all(map(torch.equal, beginning(0, 1), beginning(1, 1)))


def test_the_saved_policy_is_the_trained_one_with_its_tokenizer(tmp_path: Path) -> None:
    """ma-rlhf.md section 4 row 21: the tokenizer was loaded again by a hub name."""
    made = run(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        theirs, ours = loaded(ids).logits, made.accelerator.unwrap_model(made.policy.module).model(ids).logits
    assert torch.equal(theirs, ours)
    assert words().get_vocab() == type(made.tokenizer).from_pretrained(tmp_path / "model").get_vocab()


def test_models_and_tokenizers_are_found_by_their_folders(tmp_path: Path) -> None:
    for name, model in (("policy", causal("llama")), ("reward", classifier("llama"))):
        model.save_pretrained(tmp_path / name)
        words().save_pretrained(tmp_path / name)
    roles = {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "reward"), "processing_class": None}
    run(tmp_path / "by-path", roles=roles, credit=replace(CREDIT, redistribution=Attention()))
    roles = {"model": causal("llama"), "reward_model": classifier("llama")}
    run(tmp_path / "by-hand", roles=roles, credit=replace(CREDIT, redistribution=Attention()))
    assert metrics(tmp_path / "by-path") == metrics(tmp_path / "by-hand")


def test_a_policy_stored_in_bfloat16_learns_in_float32(tmp_path: Path) -> None:
    causal("llama", torch.bfloat16).save_pretrained(tmp_path / "policy")
    words().save_pretrained(tmp_path / "policy")
    made = trainer(tmp_path / "run", roles={"model": str(tmp_path / "policy"), "processing_class": None})
    assert {p.dtype for p in learned(made)} == {torch.float32}


def test_two_trainers_share_a_reward_model_that_neither_changes(tmp_path: Path) -> None:
    model = classifier("llama")
    for name in ("first", "second"):
        made = run(tmp_path / name, roles={"reward_model": model})
        assert any((x - y).abs().max() > 1e-4 for x, y in zip(learned(made)[-9:], learned_of(model)[-9:], strict=True))
    assert all(map(torch.equal, learned_of(model), learned_of(classifier("llama"))))
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")


def learned_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def test_trainers_of_different_precision_run_in_one_process(tmp_path: Path) -> None:
    for name, bf16 in (("no", False), ("yes", True), ("no again", False)):
        run(tmp_path / name, bf16=bf16)
    assert metrics(tmp_path / "no") == metrics(tmp_path / "no again") != metrics(tmp_path / "yes")


def refused() -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    reward, policy = classifier("llama"), causal("llama")
    return {
        "reward model as critic": ({"reward_model": reward, "value_model": reward}, {}, "is the reward model"),
        "policy as reference": ({"model": policy, "ref_model": policy}, {}, "ref_model is the policy itself"),
        "reference of another vocabulary": (
            {"ref_model": causal("llama", vocab_size=50)}, {}, "vocabulary of 50 tokens, the policy of 48"
        ),
        "critic of another vocabulary": (
            {"value_model": classifier("llama", vocab_size=50)}, {}, "the critic has a vocabulary of 50 tokens"
        ),
        "function without attention": (
            {}, {"credit": replace(CREDIT, redistribution=Attention())}, "needs attention of a reward model"
        ),
        "policy without such a layer": (
            {}, {"credit": replace(CREDIT, redistribution=PolicyAttention(layer=2))}, r"layer 2 is not .*\[0, 1\]"
        ),
        "policy without such a head": (
            {}, {"credit": replace(CREDIT, redistribution=PolicyAttention(heads=(4,)))}, r"heads is \(4,\).* 0 to 3"
        ),
        "reward model without such a head": (
            {"reward_model": reward}, {"credit": replace(CREDIT, redistribution=Attention(heads=(9,)))}, "heads 0 to 3"
        ),
        "policy without attention": (
            {"model": causal("mamba"), "value_model": reward},
            {"credit": replace(CREDIT, redistribution=PolicyAttention())},
            "no attention layer",
        ),
        "reward of two labels": (
            {"reward_model": classifier("llama", num_labels=2)}, {}, "has 2 labels"
        ),
        "no column": ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, {}, "its columns are text"),
        "no prompts": ({"train_dataset": Dataset.from_dict({"prompt": []})}, {}, "the data set is empty"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused())
def test_what_does_not_fit_together_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    roles, changes, message = refused()[case]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, roles=roles, **changes)
    assert not any(tmp_path.iterdir())


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="is not empty; resume it"):
        run(tmp_path)
    with pytest.raises(ValueError, match="is a run of another configuration: seed is 0 there and 1 here"):
        run(tmp_path, seed=1, resume=True)


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path) -> None:
    before = left_behind(tmp_path, run(tmp_path))
    assert left_behind(tmp_path, run(tmp_path, resume=True)) == before


OTHERS: dict[str, dict[str, Any]] = {
    "train_dataset": {"train_dataset": data(PROMPTS[::-1])},
    "eval_dataset": {"eval_dataset": data(PROMPTS[:2])},
    "ref_model": {"ref_model": causal("llama", initializer_range=0.05)},
    "reward_model": {"reward_model": classifier("llama", initializer_range=0.05)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_a_run_is_not_resumed_with_other_data_or_models(name: str, adapters: bool, tmp_path: Path) -> None:
    """What a checkpoint does not hold is recognised; what is refused loses nothing."""
    roles: dict[str, Any] = {"reward_model": classifier("llama"), "eval_dataset": data(PROMPTS)}
    others = OTHERS[name]
    if adapters:
        roles["peft_config"] = LORA
        if name == "ref_model":  # the policy without adapters
            name, others = "model", {"model": others["ref_model"]}
    before = left_behind(tmp_path, run(tmp_path, roles=roles, eval_steps=3))
    assert left_behind(tmp_path, run(tmp_path, roles=roles, eval_steps=3, resume=True)) == before
    kept = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=f"^{name} is not what the run in .* was given; give the same again"):
        run(tmp_path, roles=roles | others, eval_steps=3, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == kept


class Share:
    """A redistribution, and a reward, of a user's own."""

    def __init__(self, part: float) -> None:
        self.part = part

    def __call__(self, rollout: Any, scores: Any, **_: Any) -> torch.Tensor:
        return self.part * scores.scores[:, None] * rollout.response_mask

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [self.part * len(text) for _, text in zip(prompts, completions, strict=True)]


@dataclass(frozen=True)
class Length:
    """A reward of a user's own, as a dataclass."""

    scale: float

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [self.scale * len(text) for _, text in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize("kind", [Length, lambda scale: Share(scale).reward])
def test_a_run_is_not_resumed_with_another_reward_of_ones_own(kind: Any, tmp_path: Path) -> None:
    before = left_behind(tmp_path, run(tmp_path, roles={"reward_model": kind(1.0)}))
    assert left_behind(tmp_path, run(tmp_path, roles={"reward_model": kind(1.0)}, resume=True)) == before
    with pytest.raises(ValueError, match=r"^reward_model is not what the run in .* was given"):
        run(tmp_path, roles={"reward_model": kind(2.0)}, resume=True)


def test_a_run_is_not_resumed_with_another_object_of_ones_own(tmp_path: Path) -> None:
    def go(part: float, **settings: Any) -> Any:
        return run(tmp_path, credit=CreditConfig(redistribution=Share(part)), **settings)

    before = left_behind(tmp_path, go(0.9))
    assert left_behind(tmp_path, go(0.9, resume=True)) == before
    with pytest.raises(ValueError, match=r"^credit is not what the run in .* was given"):
        go(0.1, resume=True)


def test_a_tokenizer_whose_padding_ends_texts_trains_the_same(tmp_path: Path) -> None:
    # abc.md section 10, row 4: with pad = eos the end was taken for padding.
    tokenizer = words()
    tokenizer.pad_token = tokenizer.eos_token
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=20), "num_steps": 4, "missing_eos_penalty": 1.0}
    run(tmp_path / "apart", roles={"model": causal("llama")}, **settings)
    run(tmp_path / "same", roles={"model": causal("llama"), "processing_class": tokenizer}, **settings)
    ours = metrics(tmp_path / "same")
    assert any(0 < line["rollout/eos_rate"] < 1 for line in ours)
    assert ours == metrics(tmp_path / "apart")


def test_chats_are_prompts_and_are_written_as_such_beside_their_responses(tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    roles = {"processing_class": tokenizer, "train_dataset": data(chats), "eval_dataset": data(chats)}
    run(tmp_path / "chat", roles=roles, eval_steps=3)
    run(tmp_path / "text", roles={"eval_dataset": data(PROMPTS)}, eval_steps=3)
    assert metrics(tmp_path / "chat") == metrics(tmp_path / "text")
    samples = (tmp_path / "chat" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in samples[:4]] == chats[:4]


def test_a_real_model_trains_on_real_text(shared: Path, tmp_path: Path) -> None:
    path = str(shared / "data" / "stories260k")

    def brevity(completions: list[str], **_: Any) -> list[float]:
        return [-len(text) / 10 for text in completions]

    roles = {"model": path, "reward_model": brevity, "processing_class": None}
    prompts = data(["Once upon a time", "The dog", "One day, Tom", "Lily wanted"])
    run(tmp_path, roles=roles | {"train_dataset": prompts}, sampling=Sampling(max_new_tokens=16, temperature=0.8))
    lines = metrics(tmp_path)
    assert all(line["policy/sampler_gap"] < 1e-4 for line in lines)
    assert all(line["policy/ratio_max"] == 1 for line in lines)
    assert lines[0]["rollout/kl"] == pytest.approx(0, abs=1e-5)
