"""The reward of programs: run what the policy wrote against the tests of its problem."""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from apportion.data.answers import Answer, answer
from apportion.data.problems import Problem, Tests
from apportion.score.function_reward import Characters, ScoringFunction
from apportion.score.programs import Outcome, program_reward, run_many, run_tests
from apportion.score.sandbox import Backend, BackendName, Limits, backend_named

REMEMBERED = 4096
"""Outcomes that are kept: a policy writes many programs twice, and evaluation asks more than once."""


@dataclass(frozen=True, kw_only=True)
class ProgramTests(ScoringFunction):
    """Score programs by their tests: -1 for what does not compile, -0.6 for an error, else -0.3 + 1.3 * share passed.

    The program is the first fenced block of a completion, or all of it, behind the head of its problem
    (`data.answers.answer`). The data set has a column `problem`, as the sources of problems write it
    (`Problem.to_json`). A time-out counts as an error.

    Attributes:
        limits: What a program may use.
        backend: How boxes are made: "bubblewrap"; or "unsafe-subprocess", which protects nothing.
        workers: Boxes at a time; None for as many as there are cores.

    Raises:
        ValueError: If the number of workers is not positive, or there is no such backend.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), the reward of APPS.
    """

    limits: Limits = field(default_factory=Limits)
    backend: BackendName = "bubblewrap"
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can run nothing."""
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; choose at least 1, or None for as many as there are cores")
        if self.backend not in get_args(BackendName):
            raise ValueError(f"backend is {self.backend!r}; choose one of {', '.join(get_args(BackendName))}")

    def open(self) -> None:
        """Make a box, so that a machine without them is told of before any work.

        Raises:
            SandboxError: If no box can be made; it says what to do.
        """
        run_tests("", Tests(inputs=[""], outputs=[""]), self.limits, backend=self._made)

    def __call__(self, prompts: list, completions: list[str], *, problem: list[str], **_: Any) -> list[float]:
        """Score completions.

        Args:
            prompts: Not looked at.
            completions: What the policy wrote.
            problem: Of each, as `Problem.to_json` writes it.

        Returns:
            One number a completion, in [-1, 1].

        Raises:
            ValueError: If a problem cannot be read.
            SandboxError: If no box can be made.
        """
        del prompts
        return [program_reward(outcome) for _, outcome in self.outcomes(completions, problem)]

    def errors(self, prompts: list, completions: list[str], *, problem: list[str], **_: Any) -> list[Characters | None]:
        """Find the line of each completion that its error names; None without an error or a line of the policy's."""
        del prompts
        found = self.outcomes(completions, problem)
        return [None if outcome.line is None else made.characters(outcome.line) for made, outcome in found]

    def details(self, prompts: list, completions: list[str], *, problem: list[str], **_: Any) -> list[dict[str, Any]]:
        """Say how each program ended: `all_passed` and `compiled` are 1 or 0, `per_test` tells of each test."""
        del prompts
        return [details_of(outcome) for _, outcome in self.outcomes(completions, problem)]

    def outcomes(self, completions: list[str], problem: list[str]) -> list[tuple[Answer, Outcome]]:
        """Run the programs of completions, each once.

        Args:
            completions: What the policy wrote.
            problem: Of each, as `Problem.to_json` writes it.

        Returns:
            The program of each, and how it fared.

        Raises:
            ValueError: If a problem cannot be read.
            SandboxError: If no box can be made.
        """
        problems = {text: Problem.from_json(text) for text in dict.fromkeys(problem)}
        answers = [answer(text, problems[of].head) for text, of in zip(completions, problem, strict=True)]
        keys = [(made.program, of) for made, of in zip(answers, problem, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        pairs = [(program, problems[of].tests) for program, of in new]
        ran = run_many(pairs, self.limits, backend=self._made, workers=self.workers)
        found = {key: self._known[key] for key in keys if key in self._known} | dict(zip(new, ran, strict=True))
        self._remember(found)
        return [(made, found[key]) for made, key in zip(answers, keys, strict=True)]

    @cached_property
    def _made(self) -> Backend:
        return backend_named(self.backend)

    @cached_property
    def _known(self) -> "OrderedDict[tuple[str, str], Outcome]":
        """Outcomes by program and problem, those used last at the end."""
        return OrderedDict()

    def _remember(self, found: dict[tuple[str, str], Outcome]) -> None:
        for key, outcome in found.items():
            self._known[key] = outcome
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)


def details_of(outcome: Outcome) -> dict[str, Any]:
    """Write an outcome for people and for JSON.

    Args:
        outcome: How a program fared.

    Returns:
        `all_passed` and `compiled`, 1.0 or 0.0; `status`, `passed`, `failed`, `per_test` with the end of each test;
        `message` and `line` where there is an error.
    """
    details: dict[str, Any] = {
        "all_passed": float(outcome.failed == 0),
        "compiled": float(outcome.status != "compile_error"),
        "status": outcome.status,
        "passed": outcome.passed,
        "failed": outcome.failed,
        "per_test": [result.end for result in outcome.per_test],
    }
    if outcome.status != "ok":
        details |= {"message": outcome.message, "line": outcome.line}
    return details
