"""HumanEval: functions to be completed from their signature and description."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from apportion.data.problem_sets import ProblemSet, read_rows
from apportion.data.problems import Problem, Tests


@dataclass(frozen=True, kw_only=True)
class HumanEval(ProblemSet):
    """164 functions in Python; an answer continues the prompt. One test each, which asserts everything.

    Attributes:
        path: HumanEval.jsonl.gz of https://github.com/openai/human-eval, the same unpacked, or a name on the hub, by
            default openai/openai_humaneval.

    Source:
        Chen et al., 2021 (https://arxiv.org/abs/2107.03374); where completions are cut off, too.
    """

    hub: ClassVar[str] = "openai/openai_humaneval"
    stops: ClassVar[tuple[str, ...]] = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")

    def splits(self) -> tuple[str, ...]:
        """One."""
        return ("test",)

    def read(self, split: str) -> Iterator[Problem | None]:
        """Read the problems in order; None in place of one without a test."""
        for row in read_rows(self.place, split):
            if not all(row.get(name) for name in ("task_id", "prompt", "test", "entry_point")):
                yield None
                continue
            yield Problem(
                task_id=row["task_id"],
                prompt=row["prompt"],
                head=row["prompt"],
                tests=Tests(checks=[f"{row['test']}\ncheck({row['entry_point']})"]),
                solutions=(row["canonical_solution"],) if row.get("canonical_solution") else (),
            )
