"""Train the same runs in one process or in several; run by test_processes.py, under torchrun or alone.

Each run leaves its folder and, as `learned.safetensors` in it, all parameters after the last update.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback

from apportion import (
    GRPO,
    Attention,
    CreditConfig,
    EveryToken,
    PolicyAttention,
    PPOConfig,
    PPOTrainer,
    ReinforcePlusPlus,
    Sampling,
    WholeResponse,
)
from families import classifier
from trainers import HELD_OUT, data, trainer

CREDIT = CreditConfig(kl_coef=0.05)
WHITE = replace(CREDIT, whiten_advantages=True)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "whitened": {"credit": WHITE},
    "minibatches": {"credit": CREDIT, "ppo": PPOConfig(num_mini_batches=3)},
    "whitened minibatches": {"credit": WHITE, "ppo": PPOConfig(num_mini_batches=3, num_ppo_epochs=2)},
    # As many minibatches as responses: in each, all processes but one have no row.
    "rows": {"ppo": PPOConfig(num_mini_batches=8)},
    "macro ratio in small micro-batches": {"ppo": PPOConfig(ratio="macro", num_ppo_epochs=2, micro_batch_tokens=20)},
    "attention and scaled scores": {
        "credit": replace(CREDIT, redistribution=Attention(), termination=EveryToken()),
        "scale_scores": True,
    },
    "attention of the policy": {"credit": replace(CREDIT, redistribution=PolicyAttention(), termination=EveryToken())},
    "attention of the policy, minibatches": {
        "credit": replace(CREDIT, redistribution=PolicyAttention(mode="last")),
        "ppo": PPOConfig(num_mini_batches=3),
    },
    "groups": {
        "credit": replace(CREDIT, advantage=GRPO(group_size=4), redistribution=Attention()),
        "ppo": PPOConfig(loss_aggregation="sequence_mean", num_mini_batches=3, micro_batch_tokens=40),
    },
    "reward to go": {"credit": replace(CREDIT, advantage=ReinforcePlusPlus(gamma=0.9))},
    "whitened groups": {
        "credit": replace(CREDIT, advantage=ReinforcePlusPlus(group_size=2), termination=WholeResponse()),
        "ppo": PPOConfig(ratio="macro_mean", clip="token", loss_aggregation="constant", num_ppo_epochs=2),
    },
    "gradient checkpointing": {"gradient_checkpointing": True},
    "adapters": {},
    "stopped and resumed": {},
}


class StopAfterOne(TrainerCallback):
    """Stop the run after its first update."""

    def on_step_end(self, *given: Any, **_: Any) -> None:
        given[2].should_training_stop = True


def made(folder: Path, name: str, **more: Any) -> PPOTrainer:
    roles: dict[str, Any] = {"reward_model": classifier("llama"), "eval_dataset": data(HELD_OUT)}
    roles |= {"peft_config": LORA} if name == "adapters" else {}
    roles |= {"callbacks": [StopAfterOne()]} if more.pop("stop", False) else {}
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=10), "eval_steps": 2, "eval_batch_size": 1}
    # Adam moves a parameter by up to the learning rate even where its gradient is nothing but rounding.
    settings |= {"learning_rate": 1e-4, "critic_learning_rate": 1e-4}
    return trainer(folder, roles=roles, **settings | RUNS[name] | more)


def main(folder: Path) -> None:
    for name in RUNS:
        if name == "stopped and resumed":
            made(folder / name, name, stop=True).train()
        one = made(folder / name, name, resume=name == "stopped and resumed")
        one.train()
        modules = {role: learner.module for role, learner in one.state.learners.items()}
        parameters = {
            f"{role}.{key}": value.detach().clone()
            for role, module in modules.items()
            for key, value in one.accelerator.unwrap_model(module).named_parameters()
        }
        if one.accelerator.is_main_process:
            save_file(parameters, folder / name / "learned.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
