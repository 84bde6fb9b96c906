"""Problems of programming contests and interviews: APPS, and CodeContests in the form of APPS.

Source:
    Hendrycks et al., 2021 (https://arxiv.org/abs/2105.09938), https://github.com/hendrycks/apps. How its tests are read
    is that of its eval/testing_util.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from apportion.data.problem_sets import Part, ProblemSet, json_lines, loads, read_rows
from apportion.data.problems import Problem, Tests

Form = Literal["question", "apps"]

ANY_LENGTH = "__import__('sys').set_int_max_str_digits(0)\n"
"""Lets a program print integers of any length, as Python did when the solutions were written."""

PRELUDE = f"""\
{ANY_LENGTH}\
import sys
import time
import itertools
from itertools import accumulate, product, permutations, combinations
import collections
from collections import Counter, OrderedDict, deque, defaultdict, ChainMap
from functools import lru_cache
import math
from math import sqrt, sin, cos, tan, ceil, fabs, floor, gcd, exp, log, log2
import fractions
from typing import List, Tuple
import random
import heapq
from heapq import *
"""
"""What APPS runs before a program, but for `import numpy as np`, which would take longer than most tests."""


@dataclass(frozen=True, kw_only=True)
class Apps(ProblemSet):
    r"""APPS: 5,000 problems to train on and 5,000 to test, of three difficulties; an answer is a whole program.

    Attributes:
        path: A name on the hub, by default codeparrot/apps; a folder with `train.jsonl` and `test.jsonl` in the hub's
            form, or with the original's `train/0000/question.txt` and so on; or one such file or folder `train`, which
            is then all there is.
        form: "question" for the bare statement, with the code to start from below it where there is some, as the model
            cards of MA-RLHF have it; "apps" for APPS's own, `\nQUESTION:\n...\nUse Standard Input
            format\n\nANSWER:\n`.
    """

    part: Part = "ppo"
    form: Form = "question"

    hub: ClassVar[str] = "codeparrot/apps"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}; give 'question' or 'apps'")

    def splits(self) -> tuple[str, ...]:
        """Those of `train` and `test` that a folder has; `train` for a file, and for a folder of problems itself."""
        path = Path(self.place).expanduser()
        if path.is_file():
            return ("train",)
        if not path.is_dir():
            return ("train", "test")
        if found := tuple(split for split in ("train", "test") if _place(path, split)):
            return found
        if any(path.glob("*/question.txt")):
            return ("test" if path.resolve().name == "test" else "train",)
        raise FileNotFoundError(
            f"{path} has neither train.jsonl nor train/0000/question.txt nor 0000/question.txt; give a folder of APPS"
        )

    def read(self, split: str) -> Iterator[Problem | None]:
        """Read a split in order; None in place of a problem without tests that can be used."""
        path = Path(self.place).expanduser()
        place = _place(path, split) or path if path.is_dir() else None
        if place is not None and place.is_dir():
            rows = map(_row_of_folder, sorted(folder for folder in place.iterdir() if folder.is_dir()))
        elif place is not None:
            rows = read_rows(str(place))
        else:
            rows = read_rows(self.place) if path.is_file() else _hub_rows(self.place, split)
        return (problem_of(row, self.form) for row in rows)


@dataclass(frozen=True, kw_only=True)
class CodeContests(ProblemSet):
    """Problems of CodeContests; an answer is a whole program.

    Nothing is imported before a program: the contests promise nothing.

    Attributes:
        path: A file of JSON lines: `problem_id`, `question`, `input_output` in the form of APPS, and `difficulty` or
            `labels` with one; or as SandboxFusion has them, `id`, `content`, `labels`, and `test` with a list of
            `{"input": {"stdin": ...}, "output": {"stdout": ...}}`.

    Source:
        Li et al., 2022 (https://arxiv.org/abs/2203.07814); https://github.com/bytedance/SandboxFusion.
    """

    def splits(self) -> tuple[str, ...]:
        """One: a file is all there is."""
        return ("train",)

    def read(self, split: str) -> Iterator[Problem | None]:
        """Read a split in order; None in place of a problem without tests that can be used."""
        rows = map(_row_of_fusion, read_rows(self.place, split))
        return (problem_of(row, "question", prelude=ANY_LENGTH) for row in rows)


def problem_of(row: Mapping[str, Any], form: Form, prelude: str = PRELUDE) -> Problem | None:
    r"""Make a problem of a row of APPS.

    Args:
        row: `problem_id` or `id`, `question`, `input_output`, and where there are some `solutions`, `difficulty` and
            `starter_code`; what is structured is given as it is or as JSON text.
        form: Of the prompt.
        prelude: Source that runs before each program.

    Returns:
        The problem; None where it has no statement or no tests that can be used. Its solutions begin with the line
        break that the bare statement lacks.
    """
    tests = _tests(_structured(row.get("input_output")), prelude)
    name, question = row.get("problem_id", row.get("id")), row.get("question") or ""
    if tests is None or name is None or not question.strip():
        return None
    solutions = _structured(row.get("solutions")) or []
    labels = _structured(row.get("labels"))
    return Problem(
        task_id=str(int(name)) if str(name).isdecimal() else str(name),
        prompt=_prompt(question, row.get("starter_code") or "", tests, form),
        tests=tests,
        difficulty=str(row.get("difficulty") or (labels.get("difficulty") if isinstance(labels, dict) else "") or ""),
        solutions=tuple(("\n" if form == "question" else "") + solution for solution in solutions),
    )


def _prompt(question: str, starter: str, tests: Tests, form: Form) -> str:
    """Write the prompt; APPS's own as its training does (train/dataset_apps/APPSBaseDataset.py)."""
    if form == "question":
        return f"{question}\n{starter}" if starter else question
    kind = "Call-Based" if tests.function else "Standard Input"
    return f"\nQUESTION:\n{question}\n{starter}\n\nUse {kind} format\n\nANSWER:\n"


def _structured(value: Any) -> Any:
    """Read what may be JSON text; None where it is none."""
    if not isinstance(value, str):
        return value
    try:
        return loads(value) if value.strip() else None
    except ValueError:
        return None


def _tests(content: Any, prelude: str) -> Tests | None:
    """Make tests of `input_output`; None where there are none, or not as many outputs as inputs."""
    if not isinstance(content, Mapping):
        return None
    inputs, outputs = content.get("inputs") or [], content.get("outputs") or []
    if not inputs or len(inputs) != len(outputs):
        return None
    if not (function := content.get("fn_name")):
        return Tests(inputs=[*map(_text, inputs)], outputs=[*map(_text, outputs)], prelude=prelude)
    arguments = [_first_with_numbers(given if isinstance(given, list) else [given]) for given in inputs]
    values = [_first_with_numbers(value) if isinstance(value, list) else _with_numbers(value) for value in outputs]
    return Tests(inputs=arguments, outputs=values, function=str(function), prelude=prelude)


def _text(value: Any) -> str:
    """Read text, which some problems give as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _first_with_numbers(values: list) -> list:
    """Undo in the first of several values what JSON does to keys, as APPS does."""
    return [*map(_with_numbers, values[:1]), *values[1:]]


def _with_numbers(value: Any) -> Any:
    """Turn the keys of a mapping into the integers that they all were before JSON made text of them."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): item for key, item in value.items()}
    except ValueError:
        return value


def _place(folder: Path, split: str) -> Path | None:
    """Find a split in a folder: a folder or a file."""
    names = (split, f"{split}.jsonl", f"{split}.jsonl.gz")
    return next((folder / name for name in names if (folder / name).exists()), None)


def _row_of_folder(folder: Path) -> dict[str, Any]:
    """Read a problem of the original layout as a row of the hub's."""
    row: dict[str, Any] = {"problem_id": folder.name}
    files = {"question": "question.txt", "input_output": "input_output.json", "solutions": "solutions.json"}
    for name, file in (files | {"starter_code": "starter_code.py", "metadata": "metadata.json"}).items():
        path = folder / file
        row[name] = path.read_text(encoding="utf-8") if path.is_file() else ""
    metadata = _structured(row.pop("metadata"))
    return (metadata if isinstance(metadata, dict) else {}) | row


def _row_of_fusion(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a problem as SandboxFusion has it as a row of APPS; others stay as they are."""
    if "test" not in row or "input_output" in row:
        return row
    try:
        pairs = [(test["input"]["stdin"], test["output"]["stdout"]) for test in _structured(row["test"]) or []]
    except (KeyError, TypeError):
        pairs = []  # no tests that can be used
    content = {"inputs": [given for given, _ in pairs], "outputs": [wanted for _, wanted in pairs]}
    return {**row, "question": row.get("content"), "input_output": content}


def _hub_rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    """Read a split of a data set on the hub: its JSON lines, for the script beside them is not run by datasets 4."""
    try:
        file = hf_hub_download(name, f"{split}.jsonl", repo_type="dataset")
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError):
        return read_rows(name, split)  # other files, or none: datasets knows them, or says why not
    return (row for _, row in json_lines(Path(file)))
