"""Programming problems as data of a stage: prompts with what tests their answers, or prompts with solutions."""

import gzip
import json
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from apportion.data.files import Source, load
from apportion.data.problems import Problem

Part = Literal["sft", "ppo", "all"]


@dataclass(frozen=True, kw_only=True)
class ProblemSet(Source):
    """Problems of a benchmark, as prompts for a policy whose reward runs programs, or with solutions to fine-tune on.

    The problems that are trained on are shuffled and cut in two: the first `sft_share` is the part "sft", the others
    are the part "ppo". A prompt that is in another part too, or held out, is left out of the rows to train on. Problems
    without tests that can be used are dropped, and counted on stderr.

    Attributes:
        path: Where they are; by default the benchmark's name on the hub, where it has one.
        part: "sft" for rows of `prompt` and `completion`, one a solution; "ppo" for rows of `prompt`, `problem` (which
            `ProgramTests` reads), `task_id` and `difficulty`, one a problem; "all" for such rows of every problem.
        sft_share: Share of the problems that is the part "sft", in [0, 1].
        max_solutions: Solutions of a problem that are rows, the first ones; None for all.
        difficulties: Only problems of these; empty for all.
        eval_rows: Problems to hold out of those to train on, the last ones; 0 for the benchmark's test split instead,
            where there is one beside the other.
        split_seed: Of the shuffle.

    Raises:
        ValueError: If a value is out of range.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743): 20 % of APPS for fine-tuning, 80 % for PPO; the shuffle is that of
        its code, `numpy.random.RandomState(1234)`.
    """

    path: str = ""
    part: Part = "all"
    sft_share: float = 0.2
    max_solutions: int | None = None
    difficulties: list[str] = field(default_factory=list)
    eval_rows: int = 0
    split_seed: int = 1234

    hub: ClassVar[str] = ""
    """Its name on the hub."""
    stops: ClassVar[tuple[str, ...]] = ()
    """Where the completion of a model that was not taught to end is cut off."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.part not in get_args(Part):
            raise ValueError(f"part is {self.part!r}; give one of {', '.join(get_args(Part))}")
        if not 0 <= self.sft_share <= 1:
            raise ValueError(f"sft_share is {self.sft_share}, but a share lies in [0, 1]")
        if self.max_solutions is not None and self.max_solutions < 1:
            raise ValueError(f"max_solutions is {self.max_solutions}; give at least 1, or None for all")
        if self.eval_rows < 0:
            raise ValueError(f"eval_rows is {self.eval_rows}; give 0 for the test split, or a number to hold out")

    @property
    def place(self) -> str:
        """Where the problems are read from."""
        return self.path or self.hub

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """List the splits that are there; the first one is trained on."""

    @abstractmethod
    def read(self, split: str) -> Iterator[Problem | None]:
        """Read a split in order; None in place of a problem without tests that can be used."""

    def problems(self, split: str) -> list[Problem]:
        """Read the problems of a split.

        Args:
            split: One of `splits`.

        Returns:
            At least one.

        Raises:
            FileNotFoundError: If there are no such data.
            ValueError: If they cannot be read, two problems have one name, or none is left.
        """
        return [problem for problem in self._read(split) if problem is not None and self._wanted(problem)]

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
        """Read the problems and make rows of them.

        Returns:
            `train`, and `eval` where problems are held out, both of the part's columns. No prompt is in two of: the
            `train` of "sft", the `train` of "ppo", and `eval`.

        Raises:
            FileNotFoundError, ValueError: See `problems`.
            ValueError: If no row is left.
        """
        del tokenizer  # problems are text
        first, *others = self.splits()
        train, other, held = self._parted(self._read(first))
        if not self.eval_rows and "test" in others:
            held = self.problems("test")
        taken = {problem.prompt for problem in (*other, *held)}
        kept = [problem for problem in train if problem.prompt not in taken]
        tell_dropped(len(train) - len(kept), len(train), f"{self.place}, with a prompt that is in another part too")
        splits = {"train": self._rows(kept), "eval": self._rows(held)}
        if not splits["train"]:
            what = "has a solution" if self.part == "sft" else "is left"
            raise ValueError(f"{self.place}: no problem of the part {self.part!r} {what}; change part or sft_share")
        return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items() if rows})

    def _read(self, split: str) -> list[Problem | None]:
        """Read a split whole; tell what is dropped, refuse what cannot be told apart."""
        if not self.place:
            raise ValueError("no data is named; give data.path: a file, a folder, or a data set's name on the hub")
        if split not in self.splits():
            raise ValueError(f"{self.place} has no split {split!r}; it has {', '.join(self.splits())}")
        found = list(self.read(split))
        usable = [problem for problem in found if problem is not None]
        tell_dropped(len(found) - len(usable), len(found), f"{self.place} ({split}), without tests that can be used")
        names = [problem.task_id for problem in usable]
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise ValueError(f"{self.place}: two problems are called {twice!r}; give each a task_id of its own")
        if not any(map(self._wanted, usable)):
            known = ", ".join(sorted({problem.difficulty for problem in usable} - {""})) or "not given"
            what = f"is of {' or '.join(self.difficulties)}; its difficulties are {known}" if usable else "can be used"
            raise ValueError(f"{self.place}: no problem {what}")
        return found

    def _wanted(self, problem: Problem) -> bool:
        return not self.difficulties or problem.difficulty in self.difficulties

    def _parted(self, found: list[Problem | None]) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """Share problems out: the part that is asked for, the other part, and those to hold out.

        Who goes where depends neither on `difficulties` nor on which problems are usable.
        """
        order = np.arange(len(found))
        np.random.RandomState(self.split_seed).shuffle(order)
        shuffled = [found[place] for place in order]
        cut = 0 if self.part == "all" else round(self.sft_share * len(found))
        blocks = [
            [problem for problem in block if problem is not None and self._wanted(problem)]
            for block in (shuffled[:cut], shuffled[cut:])
        ]
        rest = len(blocks[1]) - self.eval_rows
        if rest < 0:
            raise ValueError(f"eval_rows is {self.eval_rows}, but there are {len(blocks[1])} problems to hold out from")
        held = blocks[1][rest:]
        if self.part == "sft":
            return blocks[0], [], held  # what the parts share stays here, so that one of them has it
        return blocks[1][:rest], blocks[0], held

    def _rows(self, problems: Sequence[Problem]) -> list[dict[str, str]]:
        """Make the rows of a part."""
        if self.part == "sft":
            return [
                {"prompt": problem.prompt, "completion": solution}
                for problem in problems
                for solution in islice(filter(str.strip, problem.solutions), self.max_solutions)
            ]
        return [
            {
                "prompt": problem.prompt,
                "problem": problem.to_json(),
                "task_id": problem.task_id,
                "difficulty": problem.difficulty,
            }
            for problem in problems
        ]


def tell_dropped(count: int, total: int, why: str) -> None:
    """Tell on stderr how many problems were dropped; nothing for none."""
    if count:
        print(f"problems dropped: {count} of {total} in {why}", file=sys.stderr)


def read_rows(path: str, split: str = "train", config: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Read rows of a file, or of a data set on the hub.

    Args:
        path: JSON lines, compressed by gzip or not; another file that `load` reads; or a hub name.
        split: Which split of a data set on the hub; a file is all of one.
        config: Which configuration of a data set on the hub.

    Yields:
        The rows.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        ValueError: If it cannot be read.
    """
    file = Path(path).expanduser()
    if file.is_file() and (file.suffix == ".jsonl" or file.name.endswith(".jsonl.gz")):
        yield from (row for _, row in json_lines(file))
    else:
        yield from load(path, split="train" if file.exists() else split, config=config)  # pyright: ignore[reportReturnType]


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of JSON lines, compressed by gzip or not, one at a time.

    Args:
        path: The file; empty lines are passed over.

    Yields:
        The number of each line, from 1, and its row.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object; with its number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(line)
        except (ValueError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}, line {number}: {error}; give one JSON object a line") from error


def _object(line: bytes) -> dict[str, Any]:
    row = loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"{line[:40]!r} is no JSON object")
    return row


def loads(text: str) -> Any:
    """Read JSON, also where its integers have thousands of digits, which Python refuses to read.

    Raises:
        ValueError: If the text is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=lambda digits: int(Decimal(digits)))
