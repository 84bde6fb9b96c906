import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from apportion.batch import Prompts
from apportion.models import Policy
from apportion.pretrained import load_policy
from apportion.rollout import sample
from apportion.sampling import Sampling
from apportion.streams import generator
from command_line import Outcome, apportion, read_jsonl, refusal, words, write_jsonl

LEVELS = ("introductory", "interview", "introductory")
RIGHT, WRONG, BROKEN, FAILS, SLOW = "print(input())", "print(1)", "print(", "1 / 0", "while True: pass"


@pytest.fixture
def problems(here: Path) -> Path:
    """Three problems in the form of APPS: print what is read."""
    tests = json.dumps({"inputs": ["1", "2"], "outputs": ["1", "2"]})
    rows = [
        {"id": number, "question": f"Echo {number}.", "solutions": "", "input_output": tests, "difficulty": level}
        for number, level in enumerate(LEVELS)
    ]
    return write_jsonl(here / "problems.jsonl", rows)


def write_samples(*pairs: tuple[int, str], path: str = "samples.jsonl") -> Path:
    return write_jsonl(Path(path), [{"task_id": str(name), "completion": text} for name, text in pairs])


def command(more: str = "", samples: str | None = "samples.jsonl") -> str:
    given = f"--samples {samples} " if samples else ""
    return f"pass-at-k --benchmark apps --problems problems.jsonl {given}--output out.jsonl {more}"


def run(more: str = "", samples: str | None = "samples.jsonl") -> Outcome:
    return apportion(*command(more, samples).split())


def summary() -> dict[str, Any]:
    return json.loads(Path("out.summary.json").read_text())


@pytest.mark.usefixtures("problems")
def test_outcomes_problems_and_rates_by_difficulty_are_written_and_shown() -> None:
    write_samples((0, RIGHT), (1, FAILS), (0, WRONG), (1, BROKEN), (2, RIGHT), (2, RIGHT))
    done = run("--k 1 2 --workers 2")
    assert (done.code, done.err) == (0, "")
    records = read_jsonl(Path("out.jsonl"))
    assert [(r["task_id"], r["sample"], r["status"], r["passed"], r["failed"], r["all_passed"]) for r in records] == [
        ("0", 0, "ok", 2, 0, True),
        ("1", 0, "runtime_error", 0, 2, False),
        ("0", 1, "ok", 1, 1, False),
        ("1", 1, "compile_error", 0, 2, False),
        ("2", 0, "ok", 2, 0, True),
        ("2", 1, "ok", 2, 0, True),
    ]
    assert (records[2]["completion"], records[2]["difficulty"]) == (WRONG, "introductory")
    assert records[2]["per_test"] == ["passed", "failed"]
    assert read_jsonl(Path("out.problems.jsonl")) == [
        {"task_id": "0", "difficulty": "introductory", "n": 2, "correct": 1, "pass@1": 0.5, "pass@2": 1.0},
        {"task_id": "1", "difficulty": "interview", "n": 2, "correct": 0, "pass@1": 0.0, "pass@2": 0.0},
        {"task_id": "2", "difficulty": "introductory", "n": 2, "correct": 2, "pass@1": 1.0, "pass@2": 1.0},
    ]
    told = summary()
    rates = {name: group["pass@1"]["value"] for name, group in told["pass_at_k"].items()}
    assert rates == {"introductory": 0.75, "interview": 0.0, "all": 0.5}
    assert told["complete"]
    assert told["status"] == {"ok": 4, "runtime_error": 1, "compile_error": 1}
    rows = [line for line in done.out.splitlines() if "all" in line]
    assert "50.00 [" in rows[0]
    assert "66.67 [" in rows[0]
    assert done.out.endswith("outcomes: 6 in out.jsonl\n")


@pytest.mark.usefixtures("problems")
def test_samples_may_be_compressed_and_programs_in_a_fence() -> None:
    with gzip.open("samples.jsonl.gz", "wt") as file:
        file.write(json.dumps({"task_id": 0, "completion": f"Sure.\n```python\n{RIGHT}\n```\n"}) + "\n")
    assert run("--num_problems 1", "samples.jsonl.gz").code == 0
    assert summary()["pass_at_k"]["all"]["pass@1"] == {"value": 1.0, "low": None, "high": None}


@pytest.mark.usefixtures("problems")
def test_limits_are_those_that_are_given() -> None:
    write_samples((0, SLOW))
    assert run("--num_problems 1 --limits.wall_seconds 0.5").code == 0
    assert summary()["status"] == {"timeout": 1}


@pytest.mark.usefixtures("problems")
def test_problems_without_samples_count_as_not_solved_unless_they_are_left_out() -> None:
    write_samples((0, RIGHT))
    done = run()
    assert done.err == "problems without a sample: 2 of 3, counted as not solved\n"
    assert summary()["pass_at_k"]["all"]["pass@1"]["value"] == pytest.approx(1 / 3)
    done = run("--only_sampled")
    assert done.err == "problems without a sample: 2 of 3, left out\n"
    assert summary()["pass_at_k"]["all"]["pass@1"]["value"] == 1.0


@pytest.mark.usefixtures("problems")
def test_a_run_that_was_stopped_goes_on_and_runs_nothing_again() -> None:
    write_samples((0, RIGHT), (1, WRONG), (2, RIGHT), (2, FAILS), (0, WRONG), (1, RIGHT))
    assert run("--k 2").code == 0
    whole, results = Path("out.jsonl").read_text(), Path("out.problems.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    # What is there is taken as it is: the mark of the first line would be lost if it ran again.
    marked = lines[0].replace('"passed": 2', '"passed": 2, "mark": 1')
    Path("out.jsonl").write_text(marked + lines[1] + lines[2][: len(lines[2]) // 2])
    assert run("--k 2").code == 0
    assert Path("out.jsonl").read_text() == marked + "".join(lines[1:])
    assert Path("out.problems.jsonl").read_text() == results


@pytest.mark.usefixtures("problems")
def test_a_run_that_was_killed_goes_on() -> None:
    write_samples(*((place % 3, f"import time; time.sleep(0.05); print(input(), {place})") for place in range(40)))
    line = [sys.executable, "-m", "apportion", *command("--workers 1").split()]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not Path("out.jsonl").exists() or not Path("out.jsonl").stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = Path("out.jsonl").read_text()
    assert 0 < before.count("\n") < 40
    assert run().code == 0
    assert Path("out.jsonl").read_text().startswith(before[: before.rfind("\n") + 1])
    assert [(r["task_id"], r["sample"]) for r in read_jsonl(Path("out.jsonl"))] == [
        (str(place % 3), place // 3) for place in range(40)
    ]


@pytest.mark.usefixtures("problems")
def test_more_samples_and_another_k_may_follow() -> None:
    write_samples((0, RIGHT), (1, WRONG), (2, RIGHT))
    assert run().code == 0
    before = Path("out.jsonl").read_text()
    write_samples((0, RIGHT), (1, WRONG), (2, RIGHT), (0, WRONG), (1, WRONG), (2, RIGHT))
    assert run("--k 1 2").code == 0
    assert Path("out.jsonl").read_text().startswith(before)
    assert summary()["samples"] == 6


@pytest.mark.usefixtures("problems")
def test_an_output_of_other_settings_or_samples_is_refused_and_stays() -> None:
    write_samples((0, RIGHT), (1, WRONG))
    assert run().code == 0
    before = Path("out.jsonl").read_text()
    assert "out.jsonl is of other settings (limits); choose another output" in refusal(run("--limits.processes 8"))
    assert "out.jsonl is of other settings (problems)" in refusal(run("--num_problems 2"))
    write_samples((0, RIGHT), (1, RIGHT))
    assert "out.jsonl, line 2, is of another sample; choose another output" in refusal(run())
    write_samples((0, RIGHT))
    assert "out.jsonl, line 2, is of another sample" in refusal(run())
    assert Path("out.jsonl").read_text() == before
    write_samples((0, RIGHT), (1, WRONG))
    assert run().code == 0
    Path("out.summary.json").unlink()
    assert "out.jsonl is there already, but not out.summary.json with its settings" in refusal(run())
    Path("out.summary.json").write_text("[]")
    assert "out.summary.json is there already, and something else" in refusal(run())


def test_other_tests_in_a_file_of_the_same_name_are_other_problems(problems: Path) -> None:
    write_samples((0, RIGHT))
    assert run().code == 0
    before, text = Path("out.jsonl").read_text(), problems.read_text()
    problems.write_text(text.replace("Echo", "Say"))  # what is asked changes nothing for samples that are given
    assert run().code == 0
    problems.write_text(text.replace(r"\"2\"]}", r"\"3\"]}"))
    assert problems.read_text() != text
    assert "out.jsonl is of other settings (problems); choose another output, or remove it" in refusal(run())
    assert Path("out.jsonl").read_text() == before


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("name", ["samples.jsonl", "samples.jsonl.gz"])
def test_without_an_output_it_stands_beside_the_samples(name: str) -> None:
    Path("given").mkdir()
    row = json.dumps({"task_id": "0000", "completion": RIGHT}) + "\n"
    with gzip.open(f"given/{name}", "wt") if name.endswith(".gz") else open(f"given/{name}", "w") as file:
        file.write(row)
    done = apportion(*f"pass-at-k --benchmark apps --problems problems.jsonl --samples given/{name} --k 1".split())
    assert done.out.endswith("outcomes: 1 in given/samples.outcomes.jsonl\n")
    assert {path.name for path in Path("given").iterdir()} == {
        name,
        *(f"samples.outcomes.{end}" for end in ("jsonl", "problems.jsonl", "summary.json")),
    }


def test_with_a_model_an_output_has_to_be_given() -> None:
    line = "pass-at-k --benchmark humaneval --model m"
    assert "output is None; with a model give --output FILE.jsonl" in refusal(apportion(*line.split()))


@pytest.mark.usefixtures("here")
def test_samples_of_another_split_of_mbpp_are_told_the_split_that_takes_them(shared: Path) -> None:
    path = shared / "data" / "mbpp" / "mbpp.jsonl"
    write_samples((1, "pass"), (11, "pass"))
    line = f"pass-at-k --benchmark mbpp --problems {path} --samples samples.jsonl --only_sampled"
    told = refusal(apportion(*line.split()))
    assert (
        "line 1: there is no problem '1'; names are such as '11' in the split test; for others give --split all" in told
    )
    assert apportion(*line.split(), "--split", "all").code == 0


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--k 3", "k is 3, but 1 has 1 sample; give a smaller k, or more samples of a problem"),
        ("--k 0", "k is [0]; give numbers of at least 1"),
        ("--workers 0", "workers is 0; choose at least 1"),
        ("--model m", "samples is samples.jsonl and model m; give exactly one of them"),
        ("--split test", "has no split 'test'; it has train"),
        ("--limits.wall_seconds -1", "wall_seconds is -1.0; choose a positive number"),
        ("--backend docker", "docker is given; give one of"),
        ("--benchmark apos", "apos is given; give one of"),
        ("--problems nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("--output samples.jsonl", "samples and output would both be samples.jsonl"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(more: str, message: str) -> None:
    write_samples((0, RIGHT), (0, WRONG), (0, WRONG), (1, RIGHT), (2, RIGHT), (2, RIGHT))
    assert message in refusal(run(more))
    assert not Path("out.jsonl").exists()
    assert not Path("out.summary.json").exists()


@pytest.mark.usefixtures("problems")
def test_samples_or_a_model_have_to_be_given() -> None:
    assert "samples is None and model None; give exactly one of them" in refusal(run(samples=None))
    assert "k is 20, more than the 10 of num_samples" in refusal(run("--model m --k 20", samples=None))


@pytest.mark.usefixtures("problems")
def test_a_sample_of_no_problem_is_told_by_its_line() -> None:
    write_samples((0, RIGHT), (7, RIGHT))
    assert "samples.jsonl, line 2: there is no problem '7'; names are such as" in refusal(run())


@pytest.mark.usefixtures("problems")
def test_without_bubblewrap_the_remedy_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples((0, RIGHT))
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt-get install bubblewrap" in refusal(run())
    assert not Path("out.summary.json").exists()


@pytest.mark.usefixtures("problems")
def test_the_unsafe_backend_is_had_by_name_and_warns() -> None:
    write_samples((0, RIGHT))
    with pytest.warns(UserWarning, match="unsafe-subprocess runs programs with the rights"):
        assert run("--backend unsafe-subprocess --num_problems 1").code == 0
    assert summary()["pass_at_k"]["all"]["pass@1"]["value"] == 1.0


@pytest.mark.usefixtures("here")
def test_references_of_humaneval_score_one_and_empty_bodies_none(shared: Path) -> None:
    path = shared / "data" / "humaneval" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines][:4]
    texts = [(row["task_id"], text) for row in rows for text in (row["canonical_solution"], "    pass\n")]
    write_jsonl(Path("samples.jsonl"), [{"task_id": name, "completion": text} for name, text in texts])
    line = (
        f"pass-at-k --benchmark humaneval --problems {path} --samples samples.jsonl --output out.jsonl --only_sampled"
    )
    done = apportion(*line.split())
    assert done.err == "problems without a sample: 160 of 164, left out\n"
    assert summary()["pass_at_k"] == {
        "all": {"problems": 4, "samples": 8, "pass@1": {"value": 0.5, "low": 0.5, "high": 0.5}}
    }


GENERATE = (
    "pass-at-k --benchmark humaneval --problems HUMANEVAL --model STORIES --output out.jsonl --num_samples 2 "
    "--sampling.max_new_tokens 12 --max_prompt_length 450"
)


def generated(more: str, task: Path, shared: Path) -> list[dict[str, Any]]:
    line = GENERATE.replace("HUMANEVAL", str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz"))
    for path in Path().glob("out.*"):
        path.unlink()
    done = apportion(*words(f"{line} {more}", task))
    assert done.code == 0, done.err
    return read_jsonl(Path("out.samples.jsonl"))


@pytest.mark.usefixtures("here")
def test_a_model_is_sampled_and_what_a_problem_draws_depends_on_the_seed_alone(task: Path, shared: Path) -> None:
    written = generated("--num_problems 3", task, shared)
    assert [row["task_id"] for row in written] == [f"HumanEval/{number // 2}" for number in range(6)]
    assert [row["completion"] for row in read_jsonl(Path("out.jsonl"))] == [row["completion"] for row in written]
    assert generated("--num_problems 3 --batch_size 1", task, shared) == written
    assert generated("--num_problems 2 --num_samples 3", task, shared)[3:5] == written[2:4]
    assert generated("--num_problems 3 --seed 1", task, shared) != written
    problem = written[0]["completion"]
    tokenizer = AutoTokenizer.from_pretrained(task / "stories")
    with gzip.open(shared / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        text = json.loads(next(lines))["prompt"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    prompts = Prompts(prompt_ids=ids, prompt_mask=torch.ones_like(ids, dtype=torch.bool), texts=[text], columns={})
    uniforms = torch.rand(12, generator=generator(0, "pass@k/HumanEval/0", 0))[None]
    policy = Policy(load_policy(str(task / "stories")), (tokenizer.eos_token_id,))
    drawn = sample(policy, prompts, Sampling(max_new_tokens=12), uniforms, pad_id=0).response_ids[0].tolist()
    assert tokenizer.decode(ids[0].tolist() + drawn, skip_special_tokens=True)[len(text) :].startswith(problem)


@pytest.mark.usefixtures("here")
def test_sampling_goes_on_where_it_was_stopped(task: Path, shared: Path) -> None:
    written = generated("--num_problems 3", task, shared)
    lines = Path("out.samples.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").unlink()
    Path("out.samples.jsonl").write_text("".join(lines[:3]) + lines[3][:10])
    line = GENERATE.replace("HUMANEVAL", str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz"))
    assert apportion(*words(f"{line} --num_problems 3", task)).code == 0
    assert read_jsonl(Path("out.samples.jsonl")) == written
    told = refusal(apportion(*words(f"{line} --num_problems 3 --seed 1", task)))
    assert "out.jsonl is of other settings (seed)" in told
    # And what was drawn can be scored as the samples of others.
    line = line.replace("--model STORIES", "--samples out.samples.jsonl").replace("out.jsonl", "again.jsonl")
    assert apportion(*words(f"{line} --num_problems 3", task)).code == 0
    assert Path("again.jsonl").read_text() == Path("out.jsonl").read_text()


@pytest.mark.usefixtures("here")
def test_other_weights_in_a_folder_of_the_same_name_are_another_model(task: Path, shared: Path) -> None:
    shutil.copytree(task / "stories", "m")
    line = GENERATE.replace("HUMANEVAL", str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz"))
    line = line.replace("STORIES", "m") + " --num_problems 1"
    assert apportion(*line.split()).code == 0
    shutil.rmtree("m")
    shutil.copytree(task / "stories", "m")
    Path("m/trainer_state.json").write_text("{}")
    assert apportion(*line.split()).code == 0  # the same again, beside the records of its training
    weights = load_file("m/model.safetensors")
    save_file({name: 0.5 * tensor for name, tensor in weights.items()}, "m/model.safetensors", {"format": "pt"})
    assert "out.jsonl is of other settings (model files); choose another output" in refusal(apportion(*line.split()))


@pytest.mark.usefixtures("here")
def test_problems_with_long_prompts_get_no_samples_and_are_told(task: Path, shared: Path) -> None:
    line = GENERATE.replace("HUMANEVAL", str(shared / "data" / "humaneval" / "HumanEval.jsonl.gz"))
    done = apportion(*words(f"{line} --num_problems 3 --max_prompt_length 300", task))
    assert done.code == 0
    dropped, missing = done.err.splitlines()
    assert dropped == "prompts dropped: 1, longer than max_prompt_length (300)"
    assert missing == "problems without a sample: 1 of 3, counted as not solved"
