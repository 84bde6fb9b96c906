"""The reward of programs: numbers of the paper, lines of errors, and what rows report."""

from typing import Any

import pytest
import torch

from apportion import Limits, Needs, Problem, ProgramTests, SandboxError, Tests
from apportion.batch import Prompts
from apportion.data.functions.tokenizer import code_tokenizer
from apportion.rollout import Responses
from apportion.score import programs
from apportion.score.function_reward import FunctionReward
from batches import without_type_checks

HEAD = 'def f(x):\n    """a number, plus 3"""\n'
PROBLEM = Problem(
    task_id="t", prompt=HEAD, head=HEAD, tests=Tests(inputs=[[1], [2], [-3]], outputs=[4, 5, 7], function="f")
).to_json()
REWARD = ProgramTests(limits=Limits(wall_seconds=4, cpu_seconds=4))
COMPLETIONS = {
    "    return x + 3\n": -0.3 + 1.3 * 2 / 3,
    "    return x * (\n": -1.0,
    "    x = x + 3\n    return y + 3\n": -0.6,
    "    while True: x = x + 1\n": -0.6,
    "    return 7\n": -0.3 + 1.3 / 3,
    "    return\n": -0.3,
}


def test_the_numbers_of_the_paper() -> None:
    found = REWARD([HEAD] * 6, [*COMPLETIONS], problem=[PROBLEM] * 6, task_id=["t"] * 6)
    assert found == pytest.approx([*COMPLETIONS.values()])


def test_lines_of_errors_are_the_policys_own() -> None:
    found = REWARD.errors([HEAD] * 6, [*COMPLETIONS], problem=[PROBLEM] * 6)
    texts = [None if span is None else text[slice(*span)] for text, span in zip(COMPLETIONS, found, strict=True)]
    assert texts == [None, "return x * (", "return y + 3", None, None, None]


def test_a_prelude_moves_no_line() -> None:
    tests = Tests(inputs=[""], outputs=["1"], prelude="import math\nimport re\n")
    problem = Problem(task_id="t", prompt="p", tests=tests).to_json()
    text = "x = math.floor(1.5)\nprint(z)\n"
    assert REWARD.errors(["p"], [text], problem=[problem]) == [(20, 28)]


def test_rows_report_each_test() -> None:
    first, second, *_ = REWARD.details([HEAD] * 6, [*COMPLETIONS], problem=[PROBLEM] * 6)
    assert first == {
        **{"all_passed": 0.0, "compiled": 1.0, "status": "ok", "passed": 2, "failed": 1},
        "per_test": ["passed", "passed", "failed"],
    }
    assert second["compiled"] == 0.0
    assert second["line"] == 3
    assert second["message"].startswith("SyntaxError")


def test_programs_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run_tests = programs.run_tests

    def counting(program: str, *arguments: Any, **more: Any) -> programs.Outcome:
        ran.append(program)
        return run_tests(program, *arguments, **more)

    monkeypatch.setattr(programs, "run_tests", counting)
    reward = ProgramTests()
    texts = ["    return x + 3\n", "    return 7\n", "    return x + 3\n"]
    for _ in range(2):
        reward([HEAD] * 3, texts, problem=[PROBLEM] * 3)
    reward.details([HEAD] * 3, texts, problem=[PROBLEM] * 3)
    assert sorted(ran) == sorted({HEAD + text for text in texts})


def test_a_machine_without_boxes_is_told_of_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        FunctionReward(ProgramTests(), code_tokenizer(), ["problem"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers is 0; choose at least 1"),
        ({"backend": "docker"}, "backend is 'docker'; choose one of"),
    ],
)
def test_settings_that_run_nothing_are_refused(settings: dict, message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        ProgramTests(**settings)


def batch(texts: list[str]) -> tuple[Prompts, Responses]:
    """Prompts and responses as the trainer has them: padded, and closed by the end-of-text token."""
    tokenizer = code_tokenizer()
    prompt = torch.tensor([tokenizer(HEAD)["input_ids"]] * len(texts))
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    columns = {"problem": [PROBLEM] * len(texts)}
    prompts = Prompts(
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        texts=[HEAD] * len(texts),
        columns=columns,
    )
    return prompts, Responses(response_ids=ids, response_mask=mask, logprobs=torch.zeros(ids.shape))


def test_tokens_of_the_line_are_marked() -> None:
    tokenizer = code_tokenizer()
    prompts, responses = batch([*COMPLETIONS][:3])
    scores = FunctionReward(REWARD, tokenizer)(prompts, responses, Needs(error_tokens=True))
    assert scores.error_tokens is not None
    marked = [
        str(tokenizer.decode(ids[blamed]))
        for ids, blamed in zip(responses.response_ids, scores.error_tokens, strict=True)
    ]
    assert [text.strip() for text in marked] == ["", "return x * (", "return y + 3"]
    assert FunctionReward(REWARD, tokenizer)(prompts, responses).error_tokens is None


def test_a_function_that_reports_no_errors_is_refused() -> None:
    def length(completions: list[str], **_: object) -> list[float]:
        return [float(len(text)) for text in completions]

    with pytest.raises(ValueError, match="needs the lines of errors, which length does not report; give a reward"):
        FunctionReward(length, code_tokenizer()).check(Needs(error_tokens=True))
