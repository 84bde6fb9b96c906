"""Everything that a run of the task `functions` reads, in one folder."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from apportion.data.functions import operations
from apportion.data.functions.operations import Function
from apportion.data.functions.tokenizer import code_tokenizer
from apportion.data.problems import Problem, Tests
from apportion.data.small_models import write_start


@dataclass(frozen=True, kw_only=True)
class FunctionsData:
    """Say how much of the task to write; the same values give the same bytes.

    Attributes:
        seed: Seed of problems, solutions and initial weights.
        sft: Problems with a solution each, for supervised fine-tuning.
        prompts: Problems to train the policy on.
        prompts_eval: Problems held out.
        tests: Calls that a solution is tested by.
        right: Share of the solutions for fine-tuning that are right; the others have one mistake.

    Raises:
        ValueError: If a number is out of range.
    """

    seed: int = 0
    sft: int = 6144
    prompts: int = 2048
    prompts_eval: int = 256
    tests: int = 5
    right: float = 0.6

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("sft", "prompts", "prompts_eval", "tests"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; choose at least 1")
        if not 0 <= self.right <= 1:
            raise ValueError(f"right is {self.right}; choose a share in [0, 1]")

    def datasets(self) -> dict[str, Dataset]:
        """Draw every split; no function is in two of them, or in one of them twice.

        Returns:
            `sft` (prompt, completion), `prompts` and `prompts_eval` (prompt, problem, task_id).
        """
        functions = self._functions()
        sizes = {name: getattr(self, name) for name in ("sft", "prompts", "prompts_eval")}
        return {name: Dataset.from_list(list(self._rows(name, size, functions))) for name, size in sizes.items()}

    def _functions(self) -> Iterator[Function]:
        rng = random.Random(f"{self.seed} functions")
        seen: set[str] = set()
        while True:
            function = operations.draw(rng)
            if function.head not in seen:
                seen.add(function.head)
                yield function

    def _rows(self, split: str, size: int, functions: Iterator[Function]) -> Iterator[dict[str, str]]:
        rng = random.Random(f"{self.seed} {split}")
        for place in range(size):
            function = next(functions)
            if split == "sft":
                is_right = rng.random() < self.right
                completion = function.body if is_right else operations.spoiled(rng, function)
                yield {"prompt": function.head, "completion": completion}
            else:
                problem = self._problem(rng, function, f"functions/{split}/{place}")
                yield {"prompt": problem.prompt, "problem": problem.to_json(), "task_id": problem.task_id}

    def _problem(self, rng: random.Random, function: Function, task_id: str) -> Problem:
        arguments = [operations.argument(rng, function) for _ in range(self.tests)]
        outputs = [function.value(given) for given in arguments]
        tests = Tests(inputs=[[given] for given in arguments], outputs=outputs, function="f")
        return Problem(task_id=task_id, prompt=function.head, head=function.head, tests=tests)


def write_functions(folder: str | Path, config: FunctionsData | None = None) -> Path:
    """Write tokenizer, base model and data of the task to a folder.

        base/                                     tokenizer and a small Llama with random weights
        sft.jsonl                                 prompt, completion
        prompts.jsonl, prompts_eval.jsonl         prompt, problem, task_id

    Args:
        folder: Made where it is missing. Files of an earlier call are replaced.
        config: Sizes and seed.

    Returns:
        The folder.
    """
    config = config or FunctionsData()
    return write_start(folder, code_tokenizer(), config.datasets(), seed=config.seed)
