import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from apportion.data.answers import answer
from apportion.data.apps import ANY_LENGTH, PRELUDE, Apps, CodeContests, problem_of
from apportion.data.problem_sets import loads
from apportion.data.problems import Problem
from apportion.score.programs import run_many, run_tests
from command_line import write_jsonl

HUGE = "7" * 5000

# Written for these tests; of code_contests_sample by name.
SOLUTIONS = {
    "2": """
from collections import deque
digits = input().strip()
places = {}
for place, digit in enumerate(digits):
    places.setdefault(digit, []).append(place)
jumps, queue = {0: 0}, deque([0])
while queue:
    here = queue.popleft()
    for there in (here - 1, here + 1, *places.pop(digits[here], ())):
        if 0 <= there < len(digits) and there not in jumps:
            jumps[there] = jumps[here] + 1
            queue.append(there)
print(jumps[len(digits) - 1])
""",
    "3": """
from collections import Counter
n = int(input())
before, after = (Counter(input().strip() for _ in range(n)) for _ in range(2))
print(sum((before - after).values()))
""",
    "9": """
import sys
n, k, *edges = map(int, sys.stdin.read().split())
parents = list(range(n + 1))
def root(x):
    while parents[x] != x:
        parents[x] = x = parents[parents[x]]
    return x
for u, v, black in zip(*[iter(edges)] * 3):
    if not black:
        parents[root(u)] = root(v)
sizes = [0] * (n + 1)
for x in range(1, n + 1):
    sizes[root(x)] += 1
print((n**k - sum(size**k for size in sizes)) % (10**9 + 7))
""",
    "17": """
digits, said = sorted(input().strip()), input().strip()
if digits[0] == "0" and digits[-1] != "0":
    first = next(place for place, digit in enumerate(digits) if digit != "0")
    digits.insert(0, digits.pop(first))
print("OK" if "".join(digits) == said else "WRONG_ANSWER")
""",
}


def row(**changes: Any) -> dict[str, Any]:
    """A problem as the hub has it."""
    content = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]}
    written = {"id": 7, "question": "Add one.", "solutions": json.dumps(["def f(x):\n    return x + 1"])}
    return written | {"input_output": json.dumps(content), "difficulty": "interview", "starter_code": ""} | changes


def problem(form: str = "question", **changes: Any) -> Problem:
    made = problem_of(row(**changes), form)  # type: ignore[arg-type]
    assert made is not None
    return made


def asked(**content: Any) -> Problem:
    """A problem with these tests."""
    return problem(input_output=json.dumps(content))


def program(made: Problem) -> str:
    return answer(made.solutions[0], made.head).program


def test_the_original_layout_is_read_in_order_with_difficulties_and_official_names(shared: Path) -> None:
    problems = Apps(path=str(shared / "data" / "apps_sample")).problems("train")
    assert [p.task_id for p in problems] == ["1", "2404", "4184"]
    assert [p.difficulty for p in problems] == ["interview", "introductory", "introductory"]
    assert [p.tests.function for p in problems] == [None, "findKthPositive", "is_prime"]
    assert problems[1].prompt.startswith("Given an array arr")
    assert "class Solution:" in problems[1].prompt


def test_a_folder_of_problems_itself_is_read(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "apps_sample"
    wanted = Apps(path=str(folder)).problems("train")
    assert Apps(path=str(folder / "train")).splits() == ("train",)
    assert Apps(path=str(folder / "train")).problems("train") == wanted
    for name in ("mine", "copy/test"):
        place = tmp_path / name
        place.mkdir(parents=True)
        (place / "0001").symlink_to((folder / "train" / "0001").resolve())
    assert Apps(path=str(tmp_path / "mine")).problems("train") == wanted[:1]
    assert Apps(path=str(tmp_path / "copy" / "test")).problems("test") == wanted[:1]


def test_the_hubs_form_gives_the_same_problems(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "apps_sample"
    rows = []
    for place in sorted((folder / "train").iterdir()):
        texts = {
            name: (place / file) for name, file in (("question", "question.txt"), ("starter_code", "starter_code.py"))
        }
        texts |= {name: place / f"{name}.json" for name in ("input_output", "solutions")}
        rows.append(
            {"id": int(place.name)}
            | {name: path.read_text() if path.exists() else "" for name, path in texts.items()}
            | json.loads((place / "metadata.json").read_text())
        )
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:1])
    originals = Apps(path=str(folder)).problems("train")
    assert Apps(path=str(tmp_path)).problems("train") == originals
    assert Apps(path=str(tmp_path)).problems("test") == originals[:1]
    assert Apps(path=str(tmp_path / "train.jsonl")).problems("train") == originals


def test_the_hubs_lines_are_taken_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no hub here: the cache is filled as huggingface_hub fills it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--codeparrot--apps"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    write_jsonl(repository / "snapshots" / ("0" * 40) / "train.jsonl", [row()])
    assert [p.task_id for p in Apps().problems("train")] == ["7"]


def test_the_solutions_of_people_pass(shared: Path) -> None:
    problems = Apps(path=str(shared / "data" / "apps_sample")).problems("train")
    pairs = [(answer(text, p.head).program, p.tests) for p in problems for text in p.solutions]
    assert [outcome.failed for outcome in run_many(pairs)] == [0] * len(pairs)
    assert len(pairs) == 90


def test_solutions_to_problems_of_codecontests_pass_and_are_told_from_wrong_ones(shared: Path) -> None:
    path = shared / "data" / "code_contests_sample" / "code_contests_apps_form.jsonl"
    problems = {p.task_id: p for p in CodeContests(path=str(path)).problems("train")}
    assert len(problems) == 20
    assert (problems["0"].difficulty, len(problems["0"].tests)) == ("MEDIUM", 101)
    assert [outcome.failed for outcome in run_many([(SOLUTIONS[i], problems[i].tests) for i in SOLUTIONS])] == [0] * 4
    wrong = run_tests(SOLUTIONS["17"].replace("first = ", "first = 0 * "), problems["17"].tests)
    assert wrong.failed > 0


def test_codecontests_as_it_was_before_it_took_the_form_of_apps_is_the_same(shared: Path) -> None:
    folder = shared / "data" / "code_contests_sample"
    files = ("code_eval_code_contests.jsonl", "code_contests_apps_form.jsonl")
    original, taken = (CodeContests(path=str(folder / file)).problems("train") for file in files)
    assert original == taken


def test_tests_of_another_kind_are_no_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"id": 1, "content": "Echo.", "test": [{"input": {"stdin": "1"}, "output": {"stdout": "1"}}], "labels": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", [good, good | {"id": 2, "test": "[1]"}, good | {"id": 3, "test": [{}]}])
    problems = CodeContests(path=str(path)).problems("train")
    assert [(p.task_id, p.prompt, p.difficulty, len(p.tests)) for p in problems] == [("1", "Echo.", "", 1)]
    assert "problems dropped: 2 of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        {"input_output": None},
        {"input_output": ""},
        {"input_output": "{}"},
        {"input_output": "[]"},
        {"input_output": "{not json"},
        {"input_output": json.dumps({"inputs": [], "outputs": []})},
        {"input_output": json.dumps({"inputs": ["1"], "outputs": []})},
        {"question": " \n"},
        {"id": None},
    ],
)
def test_a_problem_without_tests_or_statement_is_none(given: dict[str, Any]) -> None:
    assert problem_of(row(**given), "question") is None


def test_such_problems_are_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "apps.jsonl", [row(), row(id=8, input_output=""), row(id=9, solutions="")])
    problems = Apps(path=str(path)).problems("train")
    assert [p.task_id for p in problems] == ["7", "9"]
    assert problems[1].solutions == ()
    assert capsys.readouterr().err == (f"problems dropped: 1 of 3 in {path} (train), without tests that can be used\n")


def test_lists_of_lines_are_text() -> None:
    made = asked(inputs=[["1", "2"], "3\n4"], outputs=[["3"], "7"])
    assert (made.tests.inputs, made.tests.outputs) == (("1\n2", "3\n4"), ("3", "7"))
    adds = "print(int(input()) + int(input()))"
    assert run_tests(adds, made.tests).passed == 2


def test_arguments_that_are_no_list_are_one_argument() -> None:
    made = asked(fn_name="f", inputs=["ab", ["ab"]], outputs=["ba", ["ba"]])
    assert made.tests.inputs == (["ab"], ["ab"])
    assert run_tests("def f(x):\n    return x[::-1]", made.tests).passed == 2


def test_keys_that_were_numbers_are_numbers_again_also_for_a_reward() -> None:
    made = asked(fn_name="f", inputs=[[{"1": 2}], [{"a": 1}]], outputs=[{"2": 1}, [{"1": "a"}]])
    assert made.tests.inputs == ([{1: 2}], [{"a": 1}])
    assert made.tests.outputs == ({2: 1}, [{1: "a"}])
    read = Problem.from_json(made.to_json())
    assert read.tests == made.tests
    assert run_tests("def f(x):\n    return {v: k for k, v in x.items()}", read.tests).passed == 2


def test_integers_of_thousands_of_digits_arrive() -> None:
    text = json.dumps({"fn_name": "f", "inputs": [["HUGE"]], "outputs": ["-HUGE"]})
    text = text.replace('"HUGE"', HUGE).replace('"-HUGE"', f"-{HUGE}")
    made = problem(input_output=text)
    read = Problem.from_json(made.to_json())
    assert read.tests == made.tests
    assert run_tests("def f(x):\n    assert len(str(x)) == 5000\n    return -x", read.tests).passed == 1
    assert loads(f'{{"x": [1, -{HUGE}]}}')["x"][1] % 10 == 3  # -...7 modulo 10


def test_a_script_may_print_an_integer_of_any_length() -> None:
    made = asked(inputs=[HUGE], outputs=[HUGE])
    assert run_tests("print(int(input()))", made.tests).passed == 1
    assert PRELUDE.startswith(ANY_LENGTH)


def test_what_apps_imports_is_imported_for_both_kinds() -> None:
    script = "print(gcd(4, 6), Counter('aab')['a'], heapq.nlargest(1, [3]), math.floor(1.5))"
    assert run_tests(script, asked(inputs=[""], outputs=["2 2 [3] 1"]).tests).passed == 1
    made = asked(fn_name="f", inputs=[[[1, 2]]], outputs=[[3]])
    solution = "class Solution:\n    def f(self, x: List[int]) -> int:\n        return sum(x)"
    assert run_tests(solution, made.tests).passed == 1


def test_the_prompt_is_the_bare_question_or_that_of_apps() -> None:
    assert problem().prompt == "Add one."
    assert problem(starter_code="def f(x):").prompt == "Add one.\ndef f(x):"
    assert problem("apps", starter_code="def f(x):").prompt == (
        "\nQUESTION:\nAdd one.\ndef f(x):\n\nUse Call-Based format\n\nANSWER:\n"
    )
    script = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    assert problem("apps", input_output=script).prompt == (
        "\nQUESTION:\nAdd one.\n\n\nUse Standard Input format\n\nANSWER:\n"
    )


@pytest.mark.parametrize("form", ["question", "apps"])
def test_a_solution_stands_on_a_line_of_its_own_and_passes(form: str) -> None:
    made = problem(form)
    assert "\ndef f(x):" in made.prompt + made.solutions[0]
    assert run_tests(program(made), made.tests).passed == 2


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither train\.jsonl nor train/0000/question\.txt"):
        Apps(path=str(tmp_path)).problems("train")
