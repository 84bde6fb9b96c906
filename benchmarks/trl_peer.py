"""TRL's PPO trainer on a workload, paced by `step.py`. Runs in an environment of its own (trl==1.12.0)."""

import json
import os
import sys
import tempfile

work_text = sys.argv[1]
if json.loads(work_text)["bf16"]:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch --mixed_precision bf16` sets it

import torch  # noqa: E402
import trl.experimental.ppo.ppo_trainer as host  # noqa: E402  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402  # pyright: ignore[reportMissingImports]
from workload import Meter, Pace, Workload, policy, prompts, scorer, tokenizer  # noqa: E402


def main(work: Workload) -> None:
    words, meter = tokenizer(), Meter()
    meter.watch(host, "batch_generation", "generation")
    meter.watch(host, "forward", "forwards", when=lambda: not torch.is_grad_enabled())
    meter.watch(host, "get_reward", "forwards")
    meter.watch(host, "selective_log_softmax", "forwards", when=lambda: not torch.is_grad_enabled())
    meter.watch(host, "forward", "optimisation", when=torch.is_grad_enabled)
    meter.watch(host, "selective_log_softmax", "optimisation", when=torch.is_grad_enabled)
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        total_episodes=work.rows * 100_000,
        per_device_train_batch_size=work.micro_rows,
        gradient_accumulation_steps=work.rows // work.micro_rows,
        num_ppo_epochs=work.epochs,
        local_rollout_forward_batch_size=work.rows,
        num_sample_generations=0,
        response_length=work.new,
        stop_token="eos" if work.mean_length else None,
        temperature=1.0,
        learning_rate=1e-6,
        bf16=work.bf16,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**9,
    )
    trainer = PPOTrainer(
        config,
        processing_class=words,
        model=policy(work),
        ref_model=policy(work),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=Dataset.from_dict({"input_ids": words(prompts(work))["input_ids"]}),
        callbacks=[Pace(meter)],
    )
    meter.watch(trainer.accelerator, "backward", "optimisation")
    meter.watch(trainer.optimizer, "step", "optimisation")
    trainer.train()


if __name__ == "__main__":
    main(Workload(**json.loads(work_text)))
