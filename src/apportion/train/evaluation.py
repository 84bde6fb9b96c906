"""Evaluation on held-out prompts: the same prompts and the same random numbers each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from apportion.batch import Prompts
from apportion.data.prompts import PromptSet
from apportion.score.function_reward import FunctionReward
from apportion.score.reward_model import decode, name_of
from apportion.streams import generator

if TYPE_CHECKING:
    from apportion.train.ppo import PPOTrainer


TAKEN = frozenset({"index", "prompt", "response", "score", "kl", "kl_sequence", "length", "objective"})
"""What an evaluation calls its own columns; no reward function can have such a name."""


class Evaluation:
    """Score responses to held-out prompts by the reward and by others that the policy is not trained on.

    Random numbers depend neither on the step nor on the run's seed: the difference between two evaluations is one
    between policies.

    Args:
        prompts: Held-out prompts.
        trainer: Samples, and holds the reward and the reference.
        rewards: Further reward functions.

    Raises:
        ValueError: If one of them has the name of another, or of a metric.
    """

    def __init__(self, prompts: PromptSet, trainer: PPOTrainer, rewards: Sequence[FunctionReward]) -> None:
        check_names([reward.function for reward in rewards])
        self.prompts, self.trainer, self.rewards = prompts, trainer, rewards
        self.samples: list[dict[str, Any]] = []

    def __call__(self) -> dict[str, float]:
        """Evaluate the policy as it stands.

        Returns:
            Metrics under `eval/`, means over all held-out prompts; of what a reward function says besides, means of
            what it says of every response as a float.
        """
        args, accelerator = self.trainer.args, self.trainer.accelerator
        size = args.eval_batch_size or args.batch_size
        starts = range(0, len(self.prompts), size)[accelerator.process_index :: accelerator.num_processes]
        rows = [row for start in starts for row in self._rows(start, min(size, len(self.prompts) - start))]
        if accelerator.num_processes > 1:
            rows = gather_object(rows)
        rows.sort(key=lambda row: row["index"])
        names = [name for name in rows[0] if all(isinstance(row.get(name), float) for row in rows)]
        means = {f"eval/{name}": sum(row[name] for row in rows) / len(rows) for name in names}
        self.samples = [
            {name: value for name, value in row.items() if name != "index"} for row in rows[: args.num_logged_samples]
        ]
        if (scale := self.trainer.score_scale) is not None:
            means["eval/objective"] = means["eval/score"] * scale - args.credit.kl_coef * means["eval/kl_sequence"]
        return means

    @torch.no_grad()
    def _rows(self, start: int, size: int) -> list[dict[str, Any]]:
        """Respond to some prompts and measure each response."""
        trainer = self.trainer
        indices = range(start, start + size)
        prompts = self.prompts.batch(indices, trainer.accelerator.device)
        numbers = generator(0, "evaluate")
        responses = trainer.respond(prompts, numbers, first=start, total=len(self.prompts))
        rollout = trainer.complete(prompts, responses, with_values=False)
        columns = {
            "score": trainer.score(prompts, responses).scores,
            "kl_sequence": rollout.kl.sum(1),
            "length": rollout.lengths.float(),
        }
        columns |= {name_of(reward.function): reward(prompts, responses).scores for reward in self.rewards}
        texts, details = decode(trainer.tokenizer, prompts, responses), None
        if isinstance(trainer.reward, FunctionReward):
            details = trainer.reward.details(prompts, texts)
        rows = measured_rows(prompts, texts, columns, details)
        return [{"index": index} | row for index, row in zip(indices, rows, strict=True)]


def measured_rows(
    prompts: Prompts, texts: list[str], columns: dict[str, Tensor], details: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Put each response beside its prompt and what was measured of it.

    Args:
        prompts: B prompts.
        texts: Their responses.
        columns: Measurements by name, (B) each.
        details: What else is known of each response; a measurement of the same name stands in its place.

    Returns:
        B records with `prompt`, `response`, the measurements and the details.
    """
    numbers = {name: values.tolist() for name, values in columns.items()}
    records = []
    for row, (prompt, text) in enumerate(zip(prompts.texts, texts, strict=True)):
        head, more = {"prompt": prompt, "response": text}, {} if details is None else details[row]
        records.append(head | more | {name: values[row] for name, values in numbers.items()} | head)
    return records


def check_names(functions: Sequence[Callable[..., Any]]) -> None:
    """Refuse reward functions whose numbers would overwrite others.

    Raises:
        ValueError: If one has the name of another, or of a column that an evaluation has already.
    """
    names = [name_of(function) for function in functions]
    for place, name in enumerate(names):
        if name in TAKEN or name in names[:place]:
            raise ValueError(f"a reward function is called {name!r}, as another column is; give it another name")
