"""Data sets that a user names: files of JSON, JSON lines, Parquet or CSV, or a name on the hub."""

import json
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class Source(ABC):
    """Where the rows of a stage come from: the setting in a recipe, and the function that reads them.

    Recipes choose a subclass by name; a user's own is chosen by its dotted path.
    """

    @abstractmethod
    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
        """Read the rows.

        Args:
            tokenizer: The model's, for sources that measure text in tokens.

        Returns:
            `train`, and `eval` where rows are held out. No prompt is in both.
        """


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Rows as they are in a file or on the hub, with rows held out by prompt.

    Attributes:
        path: A file (.json, .jsonl, .parquet, .csv, also compressed), or a data set's name on the hub.
        split: Which split of it.
        config: Which configuration of a data set on the hub; None for its only one.
        eval_path: Held-out rows in another file or data set; None for none.
        eval_split: Held-out rows in another split of `eval_path`, or of `path`; None for none.
        eval_rows: Where neither is given: how many rows of `path` to hold out, about; rows of one prompt stay together.
        max_rows: Read this many rows of `path` at most, the first ones; None for all.
        seed: Decides which rows are held out.
    """

    path: str = ""
    split: str = "train"
    config: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_rows: int = 0
    max_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.eval_rows < 0:
            raise ValueError(f"eval_rows is {self.eval_rows}; give 0 to hold nothing out")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}; give None for all rows")
        if self.eval_rows and (self.eval_path or self.eval_split):
            raise ValueError(
                "give eval_rows, or eval_path and eval_split, but not both: one says which rows are held out"
            )

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
        """Read the rows.

        Raises:
            FileNotFoundError, ValueError: See `load`.
            ValueError: If no path is given, or a prompt of the held-out rows is among the training rows too.
        """
        del tokenizer  # the rows are text already
        if not self.path:
            raise ValueError("no data is named; give data.path: a file, or a data set's name on the hub")
        rows = load(self.path, split=self.split, config=self.config)
        rows = rows.select(range(min(len(rows), self.max_rows or len(rows))))
        if self.eval_rows:
            return split_by_prompt(rows, eval_rows=self.eval_rows, seed=self.seed)
        if not (self.eval_path or self.eval_split):
            return DatasetDict({"train": rows})
        held_out = load(self.eval_path or self.path, split=self.eval_split or "train", config=self.config)
        if shared := _prompts(rows) & _prompts(held_out):
            raise ValueError(
                f"{len(shared)} prompts of the held-out rows are training prompts too, such as {_short(min(shared))}; "
                "what they measure would be memory: leave them out of one of the two, or let eval_rows split one file"
            )
        return DatasetDict({"train": rows, "eval": held_out})


def load(path: str | Path, *, split: str = "train", columns: Sequence[str] = (), config: str | None = None) -> Dataset:
    """Read a file, or a data set on the hub.

    Args:
        path: A file or a hub name. What ends like a data file, or begins like a path, is a file.
        split: Which split; a file is all "train".
        columns: Columns that have to be there.
        config: Which configuration of a data set on the hub.

    Returns:
        At least one row.

    Raises:
        FileNotFoundError: If there is no such file, and no such data set.
        ValueError: If a file is of no known kind or cannot be read, a split or column is missing, or there is no row.
    """
    path = str(path)
    rows = _read_file(Path(path), split) if _is_file(path) else _read_hub(path, split, config)
    if not len(rows):
        raise ValueError(f"{path} is empty; give at least one row")
    require_columns(rows, columns, path)
    return rows


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write rows under another name first: a file of this name is whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    temporary.replace(path)


def require_columns(rows: Dataset, columns: Sequence[str], name: str = "the data set") -> None:
    """Refuse rows that lack a column.

    Raises:
        ValueError: With the columns there are.
    """
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {' or '.join(map(repr, missing))}; its columns are {', '.join(rows.column_names)}"
        )


def split_by_prompt(rows: Dataset, *, eval_rows: int, seed: int) -> DatasetDict:
    """Hold rows out so that no prompt is on both sides; rows of one prompt go together.

    Args:
        rows: With a column `prompt` or `messages`; otherwise a row is its own prompt.
        eval_rows: Rows to hold out; more only as far as the rows of the last prompt reach.
        seed: Decides which.

    Returns:
        `train` and `eval`, each in the order of `rows`.

    Raises:
        ValueError: If no row is left for training.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(_keys(rows)):
        groups.setdefault(key, []).append(index)
    order = list(groups)
    random.Random(seed).shuffle(order)
    held: list[int] = []
    while len(held) < eval_rows and order:
        held += groups[order.pop()]
    if not order:
        raise ValueError(f"eval_rows is {eval_rows}, but of {len(rows)} rows none would be left to train on")
    chosen = set(held)
    return DatasetDict(
        {
            "train": rows.select([index for index in range(len(rows)) if index not in chosen]),
            "eval": rows.select(sorted(chosen)),
        }
    )


def _keys(rows: Dataset) -> list[str]:
    """Name the prompt of each row: what its model is asked, whatever it is to answer."""
    if "prompt" in rows.column_names:
        prompts = rows["prompt"]
    elif "messages" in rows.column_names:
        prompts = [[turn for turn in messages if turn["role"] != "assistant"] for messages in rows["messages"]]
    else:
        prompts = rows.to_list()
    return [
        prompt if isinstance(prompt, str) else json.dumps(prompt, default=str, sort_keys=True) for prompt in prompts
    ]


def _prompts(rows: Dataset) -> set[str]:
    return set(_keys(rows))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _is_file(path: str) -> bool:
    """Tell a file from a name on the hub, also where the file is missing."""
    return _kind(Path(path)) in READERS or path.startswith((".", "/", "~")) or Path(path).exists()


def _kind(path: Path) -> str:
    """Return the ending that says how a file is read, such as .jsonl for rows.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _read_file(path: Path, split: str) -> Dataset:
    path = path.expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"data file {path} is a folder; name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    if _kind(path) not in READERS:
        raise ValueError(f"data file {path} is of no known kind; give {', '.join(READERS)}, compressed or not")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; give at least one row")
    try:
        with _unlogged("datasets"):
            return load_dataset(READERS[_kind(path)], data_files=str(path), split=split)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        reason = (str(error.__cause__ or error) or "no data").splitlines()[0]
        if reason.endswith(("no data", "no data!")):  # how a file without rows shows
            raise ValueError(f"{path} is empty; give at least one row") from error
        raise ValueError(f"data file {path} cannot be read as {READERS[_kind(path)]}: {reason}") from error


@contextmanager
def _unlogged(library: str) -> Iterator[None]:
    """Keep a library from logging what is raised as an error anyway."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_hub(name: str, split: str, config: str | None) -> Dataset:
    try:
        return load_dataset(name, config, split=split)
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise FileNotFoundError(f"there is no file {name}, and the hub gives no data set of this name") from error
