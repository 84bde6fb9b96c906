"""apportion's PPO trainer on a workload, paced by `step.py`."""

import json
import sys
import tempfile
from dataclasses import replace
from typing import Any

from datasets import Dataset
from workload import Meter, Pace, Workload, policy, prompts, scorer, tokenizer

import apportion.train.ppo as host
from apportion.batch import Credit, Rollout, Scores
from apportion.credit.advantages import GAE
from apportion.credit.assign import CreditConfig
from apportion.credit.attention import Attention, PolicyAttention
from apportion.credit.redistribution import PrefixDifference, Terminal
from apportion.credit.termination import EveryToken, FixedNgram
from apportion.sampling import Sampling
from apportion.train.arguments import PPOArguments
from apportion.update.ppo import PPOConfig

METHODS = {
    "token PPO": CreditConfig(termination=EveryToken(), redistribution=Terminal(), advantage=GAE(per="token")),
    "MA-PPO": CreditConfig(termination=FixedNgram(n=5), redistribution=Terminal()),
    "ABC": CreditConfig(termination=EveryToken(), redistribution=Attention(beta=0.8), advantage=GAE(per="token")),
    "ABC-D": CreditConfig(
        termination=EveryToken(), redistribution=PolicyAttention(beta=0.8), advantage=GAE(per="token")
    ),
    "PrefixDifference": CreditConfig(
        termination=EveryToken(), redistribution=PrefixDifference(), advantage=GAE(per="token")
    ),
}


def arguments(work: Workload) -> PPOArguments:
    return PPOArguments(
        output_dir=tempfile.mkdtemp(),
        num_steps=100_000,
        batch_size=work.rows,
        sampling=Sampling(max_new_tokens=work.new),
        ppo=PPOConfig(
            num_ppo_epochs=work.epochs,
            num_mini_batches=work.mini_batches,
            micro_batch_tokens=work.micro_rows * (work.prompt + work.new),
        ),
        learning_rate=1e-6,
        critic_learning_rate=1e-6,
        eval_steps=0,
        save_steps=0,
        bf16=work.bf16,
    )


def main(work: Workload, methods: list[str]) -> None:
    words, meter = tokenizer(), Meter()

    def next_method(done: int) -> dict[str, str]:
        """Let the methods take turns, an update each."""
        trainer.args = replace(trainer.args, credit=METHODS[methods[done % len(methods)]])
        return {"method": methods[(done - 1) % len(methods)]}

    trainer = host.PPOTrainer(
        replace(arguments(work), credit=METHODS[methods[0]]),
        model=policy(work),
        ref_model=policy(work),
        reward_model=scorer(),
        value_model=scorer(),
        processing_class=words,
        train_dataset=Dataset.from_dict({"prompt": prompts(work)}),
        callbacks=[Pace(meter, next_method)],
    )
    assign = host.assign_credit

    def assign_as_named(rollout: Rollout, scores: Scores, config: CreditConfig, **more: Any) -> Credit:
        """Refuse to time an update under the name of a method that its credit does not follow."""
        if config != trainer.args.credit:
            raise RuntimeError(f"credit was assigned by {config}, while the turn is that of {trainer.args.credit}")
        return assign(rollout, scores, config, **more)

    setattr(host, "assign_credit", assign_as_named)  # noqa: B010 - for the type checker
    meter.watch(trainer, "respond", "generation")
    meter.watch(trainer, "complete", "forwards")
    meter.watch(trainer, "score", "forwards")
    meter.watch(host, "assign_credit", "credit")
    meter.watch(host, "update", "optimisation")
    trainer.train()


if __name__ == "__main__":
    main(Workload(**json.loads(sys.argv[1])), sys.argv[2].split(","))
