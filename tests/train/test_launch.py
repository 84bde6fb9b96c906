import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from apportion.train.launch import Lora, PPORecipe, named
from apportion.train.run import check_place, check_run_folder
from command_line import HELD_OUT, PROMPTS, apportion, metrics_but_times, read_jsonl, refusal, words

SETTINGS = "--num_steps 2 --batch_size 4 --sampling.max_new_tokens 6 --learning_rate 1e-3 --eval_steps 1"
RUN = f"ppo --model STORIES --reward_model TASK/reward --data.path TASK/prompts.jsonl {SETTINGS}"
HELD = "--data.eval_path TASK/held_out.jsonl"


def run(line: str, task: Path) -> str:
    """Run a command that has to succeed quietly; return what it printed."""
    done = apportion(*words(line, task))
    assert (done.code, done.err) == (0, ""), done
    return done.out


def test_a_run_tells_where_it_lies_and_its_folder_is_complete(task: Path, here: Path) -> None:
    assert run(f"{RUN} {HELD} --output_dir run", task) == "policy: run/model, metrics: run/metrics.jsonl\n"
    assert {".lock", "config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"} == {
        p.name for p in Path("run").iterdir()
    }
    assert [record["step"] for record in metrics_but_times(here / "run")] == [0, 1, 2]
    assert {sample["prompt"] for sample in read_jsonl(here / "run" / "samples.jsonl")} == set(HELD_OUT)
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["credit"]["kl_coef"] == 0.05  # a default, resolved
    assert config["data"]["init_args"]["eval_path"] == str(task / "held_out.jsonl")


def test_the_kept_configuration_repeats_the_run_bit_for_bit(task: Path, here: Path) -> None:
    choice = "--credit.termination RandomizedNgram --credit.redistribution Attention --credit.whiten_advantages"
    run(f"{RUN} {HELD} {choice} --output_dir run", task)
    run("ppo --config run/config.yaml --output_dir again", task)
    assert metrics_but_times(here / "run") == metrics_but_times(here / "again")
    one, two = (load_file(here / name / "model" / "model.safetensors") for name in ("run", "again"))
    assert all(one[key].equal(two[key]) for key in one)


def test_another_seed_gives_another_run(task: Path, here: Path) -> None:
    run(f"{RUN} --output_dir run", task)
    run("ppo --config run/config.yaml --output_dir other --seed 1", task)
    assert metrics_but_times(here / "run") != metrics_but_times(here / "other")


def test_resuming_starts_where_nothing_is_and_leaves_what_is_complete(task: Path, here: Path) -> None:
    run(f"{RUN} --resume --output_dir run", task)
    before = (here / "run" / "metrics.jsonl").read_text()
    run(f"{RUN} --output_dir run --resume", task)
    run("ppo --config run/config.yaml --resume", task)
    assert (here / "run" / "metrics.jsonl").read_text() == before


def test_a_run_of_another_configuration_is_not_resumed(task: Path, here: Path) -> None:
    run(f"{RUN} --output_dir run", task)
    before = {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*")}
    told = refusal(apportion(*words(f"{RUN} --output_dir run --resume --credit.kl_coef 0.1 --seed 3", task)))
    assert "seed is 0 there and 3 here" in told
    assert "credit.kl_coef is 0.05 there and 0.1 here" in told
    told = refusal(apportion(*words(f"{RUN} --output_dir run", task)))
    assert "is not empty" in told
    assert {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*")} == before


def test_dropped_prompts_are_counted_where_the_user_sees_it(task: Path, here: Path) -> None:
    line = f"{RUN} {HELD} --data.path TASK/long.jsonl --max_prompt_length 10 --output_dir run"
    done = apportion(*words(line, task))
    assert done.code == 0
    assert done.err == "prompts dropped: 1, longer than max_prompt_length (10)\n"
    assert (here / "run" / "model").is_dir()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_low_rank_adapters_are_trained_and_saved_alone_and_generate_reads_them(task: Path, here: Path) -> None:
    run(f"{RUN} {HELD} --lora.r 4 --lora.alpha 8 --lora.target_modules q_proj v_proj --output_dir run", task)
    saved = {path.name for path in (here / "run" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert "model.safetensors" not in saved
    adapters = yaml.safe_load((here / "run" / "model" / "adapter_config.json").read_text())
    assert (adapters["r"], adapters["lora_alpha"], sorted(adapters["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    trained = load_file(here / "run" / "model" / "adapter_model.safetensors")
    assert any(value.any() for name, value in trained.items() if "lora_B" in name)
    answers = "--data.path TASK/held_out.jsonl --sampling.max_new_tokens 6"
    run(f"generate --model run/model --ref_model STORIES {answers} --output out.jsonl", task)
    run(f"generate --model run/model --ref_model run/model {answers} --output same.jsonl", task)
    assert any(abs(row["kl"]) > 1e-3 for row in read_jsonl(here / "out.jsonl"))
    assert all(abs(row["kl"]) < 1e-4 for row in read_jsonl(here / "same.jsonl"))


FUNCTIONS = """
from dataclasses import dataclass
from datasets import Dataset, DatasetDict
from apportion.credit.termination import TerminationCondition
from apportion.data.files import Source
from apportion.masked import is_last

seen = []

def mood_reward(prompts, completions, mood, **columns):
    seen.append((list(prompts), list(mood)))
    return [float(value) for value in mood]

def letters(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def nothing(prompts, completions, **columns):
    return [float("nan")] * len(prompts)

@dataclass(frozen=True)
class Every(TerminationCondition):
    k: int = 2

    def __call__(self, rollout):
        mask = rollout.response_mask
        return mask & (mask.cumsum(1) % self.k == 0) | is_last(mask)

class Halves:
    def __init__(self, first: float = 0.5):
        self.first = first

    def __call__(self, rollout, scores, *, gamma, steps):
        mask = rollout.response_mask
        begins = mask & (mask.cumsum(1) == 1)
        return scores.scores[:, None] * (self.first * begins + (1 - self.first) * is_last(mask))

@dataclass(frozen=True, kw_only=True)
class Greetings(Source):
    rows: int = 4

    def __call__(self, tokenizer):
        return DatasetDict(train=Dataset.from_dict({"prompt": ["Hi", "Hello", "Oh", "Yes"][: self.rows]}))
"""


@pytest.fixture
def mine(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own in the working directory."""
    (here / "my_own.py").write_text(FUNCTIONS)
    monkeypatch.delitem(sys.modules, "my_own", raising=False)
    return "my_own"


def test_rewards_of_the_user_get_the_columns_and_evaluate_under_their_names(mine: str, task: Path, here: Path) -> None:
    line = f"{RUN} {HELD} --output_dir run --eval_functions {mine}.letters {mine}.mood_reward"
    given = words(line, task)
    place = given.index("--reward_model")
    given[place : place + 2] = ["--reward_function", f"{mine}.mood_reward"]
    assert apportion(*given).code == 0
    last = metrics_but_times(here / "run")[-1]
    assert last["eval/score"] == last["eval/mood_reward"] == 0  # the held-out rows' column
    assert last["eval/letters"] > 0
    asked = dict(pair for prompts, moods in sys.modules[mine].seen for pair in zip(prompts, moods, strict=True))
    assert {prompt: asked[prompt] for prompt in PROMPTS if prompt in asked} == {
        p: len(p) for p in PROMPTS if p in asked
    }


def test_scores_that_are_no_numbers_stop_the_run_in_one_line(mine: str, task: Path, here: Path) -> None:
    data = "--data.path TASK/prompts.jsonl --output_dir run"
    line = f"ppo --model STORIES --reward_function {mine}.nothing {data} {SETTINGS}"
    told = refusal(apportion(*words(line, task)))
    assert "nothing returned nan for response 0 (4 such of 4)" in told
    assert not (here / "run" / "model").exists()


def test_classes_of_the_user_are_found_in_the_working_directory(mine: str, task: Path, here: Path) -> None:
    own = f"--credit.termination {mine}.Every --credit.termination.k 3 --data {mine}.Greetings --data.rows 3"
    length = "--sampling.min_new_tokens 6 --output_dir run"
    run(f"ppo --model STORIES --reward_model TASK/reward {SETTINGS} {length} {own}", task)
    assert [record["credit/actions"] for record in metrics_but_times(here / "run")] == [2, 2]  # six tokens by threes
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["data"] == {"class_path": f"{mine}.Greetings", "init_args": {"rows": 3}}
    run("ppo --config run/config.yaml --output_dir again", task)
    assert metrics_but_times(here / "run") == metrics_but_times(here / "again")


def test_a_redistribution_of_the_user_trains_alone_and_in_a_mixture(mine: str, task: Path, here: Path) -> None:
    begun = f"ppo --model STORIES --reward_model TASK/reward --data.path TASK/prompts.jsonl {SETTINGS}"
    own = {"class_path": f"{mine}.Halves", "init_args": {"first": 0.75}}
    parts = [{"redistribution": own, "weight": 1.0}]
    chosen = {"own": own, "mixture": {"class_path": "Mixture", "init_args": {"parts": parts}}}
    for name, redistribution in chosen.items():
        (here / f"{name}.yaml").write_text(yaml.safe_dump({"credit": {"redistribution": redistribution}}))
        run(f"{begun} --config {name}.yaml --output_dir {name}", task)
    alone, mixed = (metrics_but_times(here / name) for name in chosen)
    assert alone == mixed
    run(f"{begun} --output_dir terminal", task)
    assert metrics_but_times(here / "terminal") != alone
    run("ppo --config mixture/config.yaml --output_dir again", task)
    assert metrics_but_times(here / "again") == mixed


def test_nothing_of_a_working_directory_is_needed_twice_on_the_path(here: Path, task: Path) -> None:
    for _ in range(2):
        refusal(apportion("ppo", "--model", task / "stories"))
    assert sys.path.count(str(here)) == 1


def test_a_place_that_can_be_made_is_left_unmade(here: Path) -> None:
    check_place(here / "a" / "b")
    check_run_folder("a/b", "seed: 0\n", resume=False)
    assert not list(here.iterdir())


def test_a_function_is_named_by_a_dotted_path() -> None:
    assert named("json.dumps").__name__ == "dumps"


@pytest.mark.parametrize("path", ["", "json", ".json", "..", "json.", "json.nothing", "nowhere.f", "json.dumps.f"])
def test_what_is_no_path_to_a_function_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"dotted path such as my_module\.my_function"):
        named(path)


def test_recipes_refuse_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"lora\.alpha is 0; choose at least 1"):
        Lora(r=4, alpha=0)
    with pytest.raises(ValueError, match="num_steps is 0; choose at least 1"):
        PPORecipe(model="m", reward_model="r", num_steps=0)
