"""Roles are what they should be, schedules count updates, and a checkpoint puts everything back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from apportion import PPOArguments
from apportion.models import score_head
from apportion.train.learner import cast_roles, critic_model, end_tokens, make_learner, make_schedule, open_accelerator
from families import EOS, causal, classifier
from trainers import arguments, learned, run, trainer, words

LORA = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def rates(args: PPOArguments) -> list[float]:
    """The learning rate of each update."""
    learner = make_learner(causal("llama"), args.learning_rate, args, open_accelerator(args))
    schedule, found = make_schedule(learner, args), []
    for _ in range(args.num_steps):
        found.append(schedule.get_last_lr()[0])
        for parameter in learner.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        learner.optimizer.step()
        schedule.step()
    return found


def test_the_reference_is_a_frozen_copy_that_does_not_learn_with_the_policy(tmp_path: Path) -> None:
    made = trainer(tmp_path, roles={"model": causal("llama")})
    before = weights(made.reference)
    assert not any(p.requires_grad for p in made.reference.parameters())
    made.train()
    assert all(map(torch.equal, weights(made.reference), before))
    assert not all(map(torch.equal, learned(made)[: len(before)], before))


def test_a_given_reference_is_used(tmp_path: Path) -> None:
    other = causal("qwen2")
    made = trainer(tmp_path, roles={"ref_model": other})
    assert made.reference.model is other


def test_the_critic_starts_as_a_copy_of_the_reward_model() -> None:
    reward = classifier("llama").requires_grad_(False)
    critic = critic_model(None, reward, causal("llama"), same_tokens=True)
    assert critic is not reward
    assert all(map(torch.equal, weights(critic), weights(reward)))
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in reward.parameters())


@pytest.mark.parametrize("same_tokens", [True, False])
def test_the_critic_starts_from_the_policy_where_the_reward_model_cannot_be_used(same_tokens: bool) -> None:
    policy = causal("llama")
    reward: Any = classifier("llama") if not same_tokens else len
    critic = critic_model(None, reward, policy, same_tokens=same_tokens)
    assert torch.equal(weights(critic)[0], weights(policy)[0])
    assert (score_head(critic).weight == 0).all()


@pytest.mark.parametrize("given", ["reward model", "policy"])
def test_a_critic_that_is_made_here_learns_in_float32(given: str, tmp_path: Path) -> None:
    reward: Any = classifier("llama", torch.bfloat16)
    reward.save_pretrained(tmp_path)
    critics = [critic_model(None, reward, causal("llama", torch.bfloat16), same_tokens=given == "reward model")]
    critics.append(critic_model(None, str(tmp_path), causal("llama"), same_tokens=True))
    critics.append(critic_model(str(tmp_path), len, causal("llama"), same_tokens=True))
    assert {p.dtype for critic in critics for p in critic.parameters()} == {torch.float32}


def test_the_head_of_the_critic_starts_at_zero_when_asked(tmp_path: Path) -> None:
    for asked in (True, False):
        critic: Any = classifier("llama")
        cast_roles(causal("llama"), None, critic, words(), arguments(tmp_path, zero_value_head=asked))
        assert bool((critic.score.weight == 0).all()) is asked


def test_both_the_tokenizers_and_the_models_end_tokens_end_a_response() -> None:
    model = causal("llama")
    assert end_tokens(model, words()) == (EOS,)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [9, 5]
    assert end_tokens(model, words()) == (EOS, 5, 9)
    tokenizer = words()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == ()


def test_learning_rates_follow_the_schedule_counted_in_updates(tmp_path: Path) -> None:
    settings = {"num_steps": 4, "learning_rate": 1.0, "critic_learning_rate": 1.0}
    assert rates(arguments(tmp_path, **settings)) == [1.0] * 4
    assert rates(arguments(tmp_path, lr_scheduler_type="linear", **settings)) == [1.0, 0.75, 0.5, 0.25]
    warm = {"lr_scheduler_type": "constant_with_warmup"}
    assert rates(arguments(tmp_path, warmup_steps=2, **warm, **settings)) == [0.0, 0.5, 1.0, 1.0]
    # ma-rlhf.md section 4, row 17: the warm-up ratio always overrode the steps.
    assert rates(arguments(tmp_path, warmup_ratio=0.5, **warm, **settings)) == [0.0, 0.5, 1.0, 1.0]
    cosine = rates(arguments(tmp_path, lr_scheduler_type="cosine", **settings))
    assert cosine == pytest.approx([1.0, 0.8536, 0.5, 0.1464], abs=1e-4)


@pytest.mark.parametrize("kind", ["whole policy", "adapters"])
def test_a_checkpoint_puts_models_optimizers_and_schedules_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    roles = {"peft_config": LORA} if kind == "adapters" else {}
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "roles": roles}
    made = run(tmp_path / "a", **settings)
    tensors, trees = made.state.save()
    other = trainer(tmp_path / "b", **settings)
    assert not all(map(torch.equal, learned(other), learned(made)))
    other.state.load(tensors, trees)
    assert all(map(torch.equal, learned(other), learned(made)))
    again, trees_again = other.state.save()
    assert trees_again == trees
    assert again.keys() == tensors.keys()
    for name, named in tensors.items():
        assert all(torch.equal(again[name][key], named[key]) for key in named)


def test_a_checkpoint_of_adapters_holds_nothing_of_their_base(tmp_path: Path) -> None:
    made = trainer(tmp_path, roles={"peft_config": LORA})
    tensors, _ = made.state.save()
    assert tensors["policy"]
    assert all("lora" in name for name in tensors["policy"])
