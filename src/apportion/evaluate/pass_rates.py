"""How many problems are solved: pass@k by difficulty, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from apportion.evaluate.statistics import RESAMPLES, Estimate, interval

DIFFICULTIES = ("introductory", "interview", "competition")
"""Of APPS, in its order; others follow in that of the alphabet."""

BLOCK = 2_000_000
"""Problems that are drawn at once for the bootstrap, over its resamples."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the chance that at least one of k samples is right, without bias.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)

    Args:
        n: Samples drawn, at least k.
        c: How many of them are right.
        k: Samples that one has to choose from.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there are fewer samples than k, or more right ones than samples.

    Source:
        Chen et al., 2021 (https://arxiv.org/abs/2107.03374), equation 1 and figure 3.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"n is {n}, c {c} and k {k}; give 1 <= k <= n and 0 <= c <= n")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


@dataclass(frozen=True, kw_only=True)
class Solved:
    """How the samples of a problem fared.

    Attributes:
        task_id: Of the problem.
        difficulty: Of the problem; empty where the benchmark has none.
        n: Samples.
        correct: Samples that passed every test.
    """

    task_id: str
    difficulty: str
    n: int
    correct: int

    def rate(self, k: int) -> float:
        """Estimate pass@k; 0 without any sample."""
        return pass_at_k(self.n, self.correct, k) if self.n else 0.0

    def record(self, ks: Sequence[int]) -> dict[str, Any]:
        """Write it for JSON, with pass@k for each k."""
        counts = {"task_id": self.task_id, "difficulty": self.difficulty, "n": self.n, "correct": self.correct}
        return counts | {f"pass@{k}": self.rate(k) for k in ks}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """pass@k of a group of problems.

    Attributes:
        problems: How many there are.
        samples: How many they have.
        rates: For each k, the mean over problems.
    """

    problems: int
    samples: int
    rates: dict[int, Estimate]

    def record(self) -> dict[str, Any]:
        """Write it for JSON."""
        rates = {f"pass@{k}": {"value": x.value, "low": x.low, "high": x.high} for k, x in self.rates.items()}
        return {"problems": self.problems, "samples": self.samples} | rates


def by_difficulty(solved: Sequence[Solved], ks: Sequence[int]) -> dict[str, Rates]:
    """Group problems by difficulty.

    Args:
        solved: At least one problem.
        ks: The k of pass@k.

    Returns:
        The rates of each difficulty that is named, then of `all`.
    """
    named = {problem.difficulty for problem in solved if problem.difficulty}
    ordered = [*(name for name in DIFFICULTIES if name in named), *sorted(named - {*DIFFICULTIES})]
    groups = {name: [problem for problem in solved if problem.difficulty == name] for name in ordered}
    return {name: _rates(group, ks) for name, group in (groups | {"all": [*solved]}).items()}


def mean_over_problems(values: Float[np.ndarray, " S"]) -> Estimate:
    """Return the mean, with the 95 % percentile interval of a bootstrap over problems from two problems on.

    Where no problem is solved, or every one, the interval has no width: resamples cannot show what was never seen.
    """
    if len(values) < 2:
        return Estimate(value=float(values.mean()))
    numbers, size = np.random.default_rng(0), max(1, BLOCK // len(values))
    sizes = [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]
    means = [values[numbers.integers(len(values), size=(rows, len(values)))].mean(axis=1) for rows in sizes]
    low, high = interval(np.concatenate(means)[:, None])
    return Estimate(value=float(values.mean()), low=float(low[0]), high=float(high[0]))


def table_of(groups: dict[str, Rates], ks: Sequence[int]) -> Table:
    """Lay rates out as a table."""
    table = Table(caption="in brackets: 95 % interval over problems")
    for name in ("difficulty", "problems", "samples", *(f"pass@{k} %" for k in ks)):
        table.add_column(name, justify="left" if name == "difficulty" else "right", no_wrap="@" not in name)
    for name, group in groups.items():
        table.add_row(name, str(group.problems), str(group.samples), *(_shown(group.rates[k]) for k in ks))
    return table


def _rates(solved: list[Solved], ks: Sequence[int]) -> Rates:
    rates = {k: mean_over_problems(np.array([problem.rate(k) for problem in solved])) for k in ks}
    return Rates(problems=len(solved), samples=sum(problem.n for problem in solved), rates=rates)


def _shown(rate: Estimate) -> str:
    """Write a rate in percent."""
    text = f"{100 * rate.value:.2f}"
    return text if rate.low is None or rate.high is None else f"{text} [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
