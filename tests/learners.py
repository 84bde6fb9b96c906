"""A policy, a critic and a rollout with its credit, ready for an update."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from apportion.batch import Credit, Rollout, Scores
from apportion.credit.assign import CreditConfig, assign_credit
from apportion.credit.termination import FixedNgram
from apportion.models import Critic, Policy
from apportion.rollout import complete, sample
from apportion.sampling import Sampling
from apportion.update.config import PPOConfig
from apportion.update.ppo import Learner, update
from families import EOS, PAD, causal, classifier, prompts_of

PROMPTS = ([5, 6, 7, 8], [20, 21], [30], [9, 10, 11], [12, 13], [33, 34, 35, 36, 37])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that one update needs."""

    policy: Learner
    critic: Learner
    rollout: Rollout
    credit: Credit
    sampling: Sampling
    accelerator: Accelerator

    def update(self, config: PPOConfig, seed: int = 0) -> dict[str, float]:
        return update(
            self.policy,
            self.critic,
            self.rollout,
            self.credit,
            config,
            sampling=self.sampling,
            accelerator=self.accelerator,
            generator=torch.Generator().manual_seed(seed),
        )

    def parameters(self) -> list[Tensor]:
        """Copies of everything that learns, policy first."""
        return [p.detach().clone() for learner in (self.policy, self.critic) for p in learner.module.parameters()]

    def logprobs(self) -> Tensor:
        """(B, T) under the policy as it stands."""
        rollout = self.rollout
        texts = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)
        with torch.no_grad():
            return self.policy.module(*texts, self.sampling)


def setting(
    *,
    precision: str = "no",
    sgd: bool = False,
    lr: float = 1e-3,
    sampling: Sampling | None = None,
    repeats: int = 2,
    family: str = "llama",
    learning_budget: int | None = None,
    **credit: Any,
) -> Setting:
    """Make a tiny policy and critic, sample from the policy, and assign credit; the same each time."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    sampling = sampling or Sampling(max_new_tokens=14, top_k=30, temperature=0.9)
    policy, critic = Policy(causal(family), (EOS,)), Critic(classifier("llama"))
    prompts = prompts_of(*PROMPTS * repeats)
    numbers = torch.rand(len(prompts.texts), sampling.max_new_tokens, generator=torch.Generator().manual_seed(3))
    with accelerator.autocast():
        responses = sample(policy, prompts, sampling, numbers, pad_id=PAD)
        rollout = complete(
            prompts,
            responses,
            reference=Policy(causal("gpt2"), (EOS,)),
            critic=critic,
            sampling=sampling,
            budget=10_000,
            learning_budget=learning_budget,
        )
    scores = torch.randn(len(prompts.texts), generator=torch.Generator().manual_seed(4))
    config = CreditConfig(termination=FixedNgram(3), **credit)
    learners = []
    for module in (policy, critic):
        kind = torch.optim.SGD if sgd else torch.optim.AdamW
        module, optimizer = accelerator.prepare(module, kind(module.parameters(), lr=lr))
        learners.append(Learner(module=module, optimizer=optimizer))
    return Setting(
        policy=learners[0],
        critic=learners[1],
        rollout=rollout,
        credit=assign_credit(rollout, Scores(scores=scores), config),
        sampling=sampling,
        accelerator=accelerator,
    )


def with_credit(given: Setting, **changes: Tensor) -> Setting:
    """The same with other numbers in the credit."""
    return replace(given, credit=replace(given.credit, **changes))
