import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from apportion.batch import Prompts
from apportion.evaluate.sampler import Sampler
from apportion.models import Policy
from apportion.pretrained import load_policy
from apportion.rollout import sample
from apportion.sampling import Sampling
from apportion.streams import generator
from command_line import HELD_OUT, PROMPTS, apportion, read_jsonl, refusal, words

GENERATE = "generate --model STORIES --data.path TASK/prompts.jsonl --sampling.max_new_tokens 8"

REWARDS = """
class Mood:
    def __call__(self, prompts, completions, mood, **columns):
        return mood

mood = Mood()

def letters(prompts, completions, **columns):
    return [len(text) for text in completions]
"""


def rows(line: str, task: Path) -> list[dict]:
    """Generate, and read what was written."""
    done = apportion(*words(f"{line} --output out.jsonl", task))
    assert (done.code, done.err) == (0, ""), done
    written = read_jsonl(Path("out.jsonl"))
    assert done.out == f"responses: {len(written)} in out.jsonl\n"
    Path("out.jsonl").unlink()
    return written


def sampled_ids(task: Path) -> list[tuple[list[int], list[int]]]:
    """Sample the command's responses one prompt at a time, and return the token ids of prompts and responses."""
    tokenizer = AutoTokenizer.from_pretrained(task / "stories")
    policy = Policy(load_policy(str(task / "stories")), (tokenizer.eos_token_id,))
    sampling, numbers = Sampling(max_new_tokens=8), generator(0, "generate")
    uniforms, ids = torch.rand(len(PROMPTS), 8, generator=numbers), []
    for row, text in enumerate(PROMPTS):
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        prompts = Prompts(
            prompt_ids=prompt, prompt_mask=torch.ones_like(prompt, dtype=torch.bool), texts=[text], columns={}
        )
        answer = sample(policy, prompts, sampling, uniforms[row : row + 1], pad_id=0)
        ids.append((prompt[0].tolist(), answer.response_ids[0][answer.response_mask[0]].tolist()))
    return ids


def test_no_accelerator_is_asked_for_where_there_is_none(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch 2.6 that is an error."""

    def refuse() -> None:
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", refuse)
    assert Sampler(str(task / "stories"), Sampling()).device == torch.device("cpu")


@pytest.mark.usefixtures("here")
def test_score_divergence_and_length_are_those_of_plain_transformers(task: Path) -> None:
    written = rows(f"{GENERATE} --ref_model TASK/moved --reward_model TASK/reward", task)
    tokenizer = AutoTokenizer.from_pretrained(task / "stories")
    policy, reference = (AutoModelForCausalLM.from_pretrained(task / name) for name in ("stories", "moved"))
    scorer = AutoModelForSequenceClassification.from_pretrained(task / "reward")
    assert [row["prompt"] for row in written] == list(PROMPTS)
    for row, (prompt, response) in zip(written, sampled_ids(task), strict=True):
        text, place = torch.tensor([prompt + response]), torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        with torch.no_grad():
            chances = [model(text).logits[0, place].log_softmax(-1) for model in (policy, reference)]
            score = scorer(text).logits[0, 0]
        tokens = torch.arange(len(response)), torch.tensor(response)
        assert row["response"] == tokenizer.decode(prompt + response, skip_special_tokens=True)[len(row["prompt"]) :]
        assert row["length"] == len(response)
        assert row["kl"] == pytest.approx(float((chances[0] - chances[1])[tokens].sum()), abs=1e-4)
        assert row["score"] == pytest.approx(float(score), abs=1e-4)
    assert max(abs(row["kl"]) for row in written) > 1e-3  # the reference has moved


@pytest.mark.usefixtures("here")
def test_a_model_does_not_diverge_from_itself(task: Path) -> None:
    for row in rows(f"{GENERATE} --ref_model STORIES", task):
        assert row["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.usefixtures("here")
def test_only_what_was_asked_for_is_measured(task: Path) -> None:
    assert {tuple(row) for row in rows(GENERATE, task)} == {("prompt", "response", "length")}


@pytest.mark.usefixtures("here")
def test_responses_depend_on_the_seed_and_not_on_the_batch(task: Path) -> None:
    def texts(more: str) -> list[str]:
        return [row["response"] for row in rows(f"{GENERATE} {more}", task)]

    assert texts("--batch_size 2") == texts("--batch_size 6") == texts("--batch_size 5")
    assert texts("--seed 1") != texts("--seed 0")
    assert texts("--num_prompts 2") == texts("")[:2]


@pytest.mark.usefixtures("here")
def test_held_out_prompts_are_taken_where_there_are_some(task: Path) -> None:
    written = rows(f"{GENERATE} --data.eval_path TASK/held_out.jsonl", task)
    assert [row["prompt"] for row in written] == list(HELD_OUT)


@pytest.mark.usefixtures("here")
def test_long_prompts_are_dropped_and_counted(task: Path) -> None:
    line = f"{GENERATE} --data.path TASK/long.jsonl --max_prompt_length 10 --output out.jsonl"
    done = apportion(*words(line, task))
    assert (done.code, done.out) == (0, "responses: 1 in out.jsonl\n")
    assert done.err == "prompts dropped: 1, longer than max_prompt_length (10)\n"


def test_reward_functions_have_a_column_of_their_name(task: Path, here: Path) -> None:
    (here / "my_rewards.py").write_text(REWARDS)
    for row in rows(f"{GENERATE} --reward_function my_rewards.letters", task):
        assert row["letters"] == len(row["response"])
    for row in rows(f"{GENERATE} --reward_function my_rewards.mood", task):
        assert row["Mood"] == len(row["prompt"])


def test_where_it_fails_no_file_is_left_and_the_next_try_is_not_refused(task: Path, here: Path) -> None:
    told = refusal(apportion(*words(f"{GENERATE} --reward_model TASK/nan_reward --output out.jsonl", task)))
    assert "the reward model returned nan" in told
    assert not list(here.iterdir())
    assert len(rows(GENERATE, task)) == len(PROMPTS)


def test_folders_of_the_output_are_made(task: Path, here: Path) -> None:
    assert apportion(*words(f"{GENERATE} --num_prompts 1 --output a/b/out.jsonl", task)).code == 0
    assert [path.name for path in (here / "a" / "b").iterdir()] == ["out.jsonl"]


def test_it_is_quiet_where_there_is_no_terminal(task: Path, here: Path) -> None:
    line = f"{GENERATE} --num_prompts 1 --reward_model TASK/reward --output out.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "apportion", *words(line, task)], capture_output=True, text=True, check=True, cwd=here
    )
    assert (done.stdout, done.stderr) == ("responses: 1 in out.jsonl\n", "")
