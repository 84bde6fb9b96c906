"""Samples of programs, in the form of HumanEval: read from a file, or drawn from a model."""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from apportion.data.answers import answer
from apportion.data.problem_sets import json_lines
from apportion.data.problems import Problem
from apportion.data.prompts import encode_prompts
from apportion.evaluate.journal import progress, written
from apportion.evaluate.sampler import Sampler
from apportion.score.reward_model import decode
from apportion.streams import generator
from apportion.train.launch import tell_dropped


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An answer to a problem.

    Attributes:
        task_id: Of the problem.
        number: Which of its samples, from 0.
        completion: What was written.
    """

    task_id: str
    number: int
    completion: str


def read_samples(path: Path, known: Collection[str], remedy: str = "") -> list[Sample]:
    """Read samples, lines of `task_id` and `completion`.

    A number may have zeros in front, as the folders of APPS do: `0001` is the problem `1`.

    Args:
        path: JSON lines, compressed by gzip or not.
        known: Names of the problems.
        remedy: What to tell beside, of a name that is not known.

    Returns:
        At least one, in order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is malformed or of a problem that is not known, with its number; or there is none.
    """
    samples: list[Sample] = []
    counts: Counter[str] = Counter()
    for number, row in json_lines(path):
        task_id, completion = row.get("task_id"), row.get("completion")
        if isinstance(task_id, bool) or not isinstance(task_id, str | int) or not isinstance(completion, str):
            raise ValueError(f"{path}, line {number}: a sample has a task_id and a completion of text")
        name = str(task_id)
        if name not in known and name.isdecimal():
            name = name.lstrip("0") or "0"
        if name not in known:
            example = min(known, key=lambda one: (len(one), one), default="none")
            told = f"there is no problem {str(task_id)!r}; names are such as {example!r}{remedy}"
            raise ValueError(f"{path}, line {number}: {told}")
        samples.append(Sample(task_id=name, number=counts[name], completion=completion))
        counts[name] += 1
    if not samples:
        raise ValueError(f"{path} holds no samples; give a line of task_id and completion for each")
    return samples


def draw_samples(
    path: Path,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    num_samples: int,
    batch_size: int,
    max_prompt_length: int,
    seed: int,
    stops: Sequence[str],
) -> None:
    """Draw samples of problems into a file; those that are there already are not drawn again.

    What a problem draws depends on the seed, its name and the number of the sample, and on nothing beside.

    Args:
        path: JSON lines, appended to.
        problems: What is asked.
        sampler: Who is asked.
        num_samples: Completions of each problem.
        batch_size: Responses that are sampled at once.
        max_prompt_length: Problems with prompts of more tokens get no samples, and are counted.
        seed: Decides what is drawn.
        stops: Where completions are cut off.

    Raises:
        ValueError: If the file holds samples of other problems, or no prompt is usable.
    """
    rows = Dataset.from_list([{"prompt": problem.prompt, "task_id": problem.task_id} for problem in problems])
    prompts = encode_prompts(rows, sampler.tokenizer, max_prompt_length=max_prompt_length)
    tell_dropped(prompts.dropped, max_prompt_length)
    names = prompts.columns["task_id"]
    heads = {problem.task_id: problem.head for problem in problems}
    wanted = [(row, number) for row in range(len(names)) for number in range(num_samples)]
    there = [row.get("task_id") for row in written(path)]
    if there != [names[row] for row, _ in wanted[: len(there)]]:
        raise ValueError(f"{path} holds samples of other problems; choose another output, or remove it")
    with path.open("a", encoding="utf-8") as file, progress("samples", len(wanted), len(there)) as advance:
        for start in range(len(there), len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            chances = torch.stack([_uniforms(sampler, seed, names[row], number) for row, number in batch])
            asked = prompts.batch([row for row, _ in batch], sampler.device)
            texts = decode(sampler.tokenizer, asked, sampler(asked, chances))
            for (row, _), text in zip(batch, texts, strict=True):
                completion = cut(text, stops, heads[names[row]])
                file.write(json.dumps({"task_id": names[row], "completion": completion}) + "\n")
            file.flush()
            advance(len(batch))


def cut(completion: str, stops: Sequence[str], head: str = "") -> str:
    """Cut a completion off where the first of several texts begins; one whose program is a fenced block stays whole."""
    parts = answer(completion, head).parts
    if not parts or parts[0][1] > 0:
        return completion
    places = [place for stop in stops if (place := completion.find(stop)) >= 0]
    return completion[: min(places, default=len(completion))]


def _uniforms(sampler: Sampler, seed: int, task_id: str, number: int) -> Float[Tensor, " T"]:
    """The random numbers of one sample."""
    return torch.rand(sampler.sampling.max_new_tokens, generator=generator(seed, f"pass@k/{task_id}", number))
