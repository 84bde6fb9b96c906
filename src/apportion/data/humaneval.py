"""HumanEval: functions to be completed from their signature and description."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from apportion.data.problem_sets import ProblemSet, read_rows
from apportion.data.problems import Problem, Tests


@dataclass(frozen=True, kw_only=True)
class HumanEval(ProblemSet):
    """164 functions in Python; an answer continues the prompt. One test each, which asserts everything.

    Attributes:
        path: HumanEval.jsonl.gz of https://github.com/openai/human-eval, the same unpacked, or a name on the hub, by
            default openai/openai_humaneval. Or the sanitized MBPP as CodeT has it in this form (`MbppEval/2`), whose
            answers are put behind the signature without its docstring: its references are indented otherwise.

    Source:
        Chen et al., 2021 (https://arxiv.org/abs/2107.03374); where completions are cut off, too. CodeT: Chen et al.,
        2022 (https://arxiv.org/abs/2207.10397), https://github.com/microsoft/CodeT.
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
            prompt, function, test = row["prompt"], row["entry_point"], row["test"]
            is_mbpp = str(row["task_id"]).startswith("MbppEval/")
            checks = [_asserts(test) if is_mbpp else f"{test}\ncheck({function})"]
            yield Problem(
                task_id=row["task_id"],
                prompt=prompt,
                head=prompt.partition("    '''")[0] if is_mbpp else prompt,
                tests=Tests(checks=checks, setup="" if is_mbpp else _helpers(prompt, function)),
                solutions=(row["canonical_solution"],) if row.get("canonical_solution") else (),
            )


def _helpers(prompt: str, function: str) -> str:
    """Take what a prompt defines besides the function: tests that call it are to have the task's, not the program's."""
    given = [node for node in ast.parse(f"{prompt}\n    pass").body if getattr(node, "name", "") != function]
    has_helpers = any(isinstance(node, ast.FunctionDef) for node in given)
    return "\n".join(map(ast.unparse, given)) if has_helpers else ""


def _asserts(test: str) -> str:
    """Take what `check` of CodeT's MBPP does, for one program has a `check` of its own; its tests lack `math`."""
    return "import math\n" + dedent(test.partition("\n")[2])
