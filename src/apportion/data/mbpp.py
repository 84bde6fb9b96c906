"""MBPP: functions to be written from a sentence and the tests that they have to pass."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from apportion.data.problem_sets import ProblemSet, read_rows
from apportion.data.problems import Problem, Tests

SPLITS = {"train": range(601, 975), "validation": range(511, 601), "prompt": range(1, 11), "test": range(11, 511)}
"""Splits by task id, as its README gives them."""


@dataclass(frozen=True, kw_only=True)
class Mbpp(ProblemSet):
    """974 functions in Python, 374 to train on and 500 to test; an answer is a whole program.

    The prompt is the paper's without examples: the description and the asserts, up to `[BEGIN]`.

    Attributes:
        path: mbpp.jsonl or sanitized-mbpp.json of https://github.com/google-research/google-research, or a name on the
            hub, by default google-research-datasets/mbpp. What CodeT made of it in the form of HumanEval is read by
            `HumanEval`.
        edition: Which edition on the hub.

    Source:
        Austin et al., 2021 (https://arxiv.org/abs/2108.07732).
    """

    edition: Literal["full", "sanitized"] = "full"

    hub: ClassVar[str] = "google-research-datasets/mbpp"
    stops: ClassVar[tuple[str, ...]] = ("[DONE]",)

    def splits(self) -> tuple[str, ...]:
        """Those of the paper; `all` for every problem of a file."""
        return (*SPLITS, "all") if Path(self.place).expanduser().is_file() else tuple(SPLITS)

    def read(self, split: str) -> Iterator[Problem | None]:
        """Read a split in order; None in place of a problem without tests.

        Raises:
            ValueError: If a problem is in the form of HumanEval, or has no number that tells its split; with its row.
        """
        for place, row in enumerate(read_rows(self.place, split, self.edition), 1):
            if not _is_in(row, split, f"{self.place}, row {place}"):
                continue
            text, asserts = row.get("text") or row.get("prompt"), list(row.get("test_list") or [])
            if not text or not asserts:
                yield None
                continue
            setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
            yield Problem(
                task_id=str(row["task_id"]),
                prompt=_prompt(text, asserts),
                tests=Tests(checks=asserts, setup=setup),
                solutions=(row["code"].replace("\r\n", "\n").replace("\r", "\n"),) if row.get("code") else (),
            )


def _is_in(row: Mapping[str, Any], split: str, where: str) -> bool:
    """Tell whether a problem is of a split, by its number."""
    task_id = row.get("task_id")
    if "entry_point" in row and "test_list" not in row:
        remedy = "give --benchmark humaneval, or HumanEval as the data"
        raise ValueError(f"{where}: {task_id!r} is a problem in the form of HumanEval; {remedy}")
    if split == "all" and task_id is not None:
        return True
    if not str(task_id).isdecimal():
        raise ValueError(f"{where}: task_id is {task_id!r}, but a number tells the split of a problem; give one")
    return int(str(task_id)) in SPLITS[split]


def _prompt(text: str, asserts: list[str]) -> str:
    """Write the prompt of the paper's figure 1; models that it was shown to end at `[DONE]`."""
    tests = "\n".join(asserts)
    return (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
        f"{tests}\n[BEGIN]\n"
    )
