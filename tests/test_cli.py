import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apportion.cli import COMMANDS
from command_line import apportion, refusal, words

PPO = "ppo --model STORIES --reward_model TASK/reward --data.path TASK/prompts.jsonl --output_dir run"
GENERATE = "generate --model STORIES --data.path TASK/prompts.jsonl --output out.jsonl"

# What a user gets wrong, and what the line has to say: the value, and the remedy or what there is.
REFUSED = {
    "unknown command": ("ppoo", "'ppoo'", "did you mean ppo?"),
    "unknown recipe": ("ppo --config imdb-smal", "'imdb-smal'", "did you mean imdb-small?"),
    "unknown recipe to show": ("recipes imdb-smal", "'imdb-smal'", "did you mean imdb-small?"),
    "two recipes to show": ("recipes one two", "'two' is one too many"),
    "missing configuration": ("ppo --config runs/nope.yaml", "configuration runs/nope.yaml does not exist"),
    "recipe without the section": ("compare --config imdb-small", "'compare'", "it has", "reward, ppo"),
    "unknown setting": (f"{PPO} --nun_steps 3", "--nun_steps", "did you mean --num_steps"),
    "abbreviated setting": (f"{PPO} --num_step 3", "--num_step 3", "did you mean --num_steps"),
    "setting of a group": (f"{PPO} --kl_coef 0.1", "--kl_coef", "did you mean --credit.kl_coef"),
    "setting of another class": (f"{PPO} --credit.redistribution.beta 0.5", "'beta'", "Terminal"),
    "where the settings of a class are told": (
        f"{PPO} --credit.redistribution PolicyAttention --credit.redistribution.row 1",
        "'row'",
        "see --credit.redistribution.help apportion.PolicyAttention",
    ),
    "help of no class": ("ppo --credit.termination.help", "give a class that --credit.termination can be"),
    "help of an unknown class": ("ppo --credit.termination.help Perplexit", "'Perplexit'", "did you mean Perplexity"),
    "help of a missing module": ("ppo --credit.termination.help nowhere.Mine", "'nowhere'", "my_module.MyClass"),
    "help of two classes": ("ppo --credit.termination.help CodeParse Delimiter", "'CodeParse Delimiter'"),
    "help of nothing": ("ppo --credit.nothing.help CodeParse", "--credit.nothing.help"),
    "misspelt setting of a class": (f"{PPO} --data.pth x", "'pth'", "did you mean path?"),
    "stray word": ("ppo stray", "stray", "--help"),
    "wrong type": (f"{PPO} --num_steps many", "--num_steps: many", "give int"),
    "wrong type of a choice": (f"{PPO} --eval_batch_size many", "--eval_batch_size: many", "give int"),
    "wrong type in a class": (f"{PPO} --credit.termination.n x", "--credit.termination.n: x", "give int"),
    "wrong choice": (f"{PPO} --ppo.ratio all", "--ppo.ratio: all", "'token', 'macro', 'macro_mean'"),
    "path without a value": (f"{PPO} --data.path --output_dir z", "--data.path has no value; give it one"),
    "wrong switch": (f"{PPO} --resume maybe", "--resume: maybe", "give bool"),
    "unknown class": (f"{PPO} --credit.termination FixedNgran", "'FixedNgran'", "did you mean FixedNgram?"),
    "unknown inner class": (
        f"{PPO} --credit.redistribution Shuffled --credit.redistribution.inner Atention",
        "--credit.redistribution.inner",
        "did you mean Attention",
    ),
    "missing inner class": (f"{PPO} --credit.redistribution Shuffled", "inner", "give it"),
    "unknown module": (f"{PPO} --credit.termination nowhere.Mine", "nowhere.Mine", "my_module.MyClass"),
    "class of another kind": (f"{PPO} --credit.termination json.JSONDecoder", "json.JSONDecoder", "derive"),
    "no model": ("ppo --reward_model TASK/reward", "model", "give it"),
    "no data": ("ppo --model STORIES --reward_model TASK/reward", "give data.path"),
    "no runs": ("compare", "apportion compare RUN..."),
    "n = 0": (f"{PPO} --credit.termination FixedNgram --credit.termination.n 0", "n is 0", "at least 1"),
    "cutoff = 0": (f"{PPO} --credit.termination CodeParse --credit.termination.cutoff 0", "cutoff is 0", "at least 1"),
    "unknown grammar": (
        f"{PPO} --credit.termination CodeParse --credit.termination.language c_sharp",
        "'c_sharp'",
        "pip install tree-sitter tree-sitter-c-sharp",
    ),
    "unknown parser": (
        f"{PPO} --credit.termination ConstituencyParse --credit.termination.backend Stanzo",
        "'Stanzo'",
        "did you mean Stanza",
    ),
    "no regular expression": (
        f"{PPO} --credit.termination Delimiter --credit.termination.pattern '['",
        "pattern is '['",
        "escape what is meant literally",
    ),
    "beta over 1": (
        f"{PPO} --credit.redistribution Attention --credit.redistribution.beta 1.5",
        "beta is 1.5",
        "choose a number in [0, 1]",
    ),
    "beta under 0": (
        f"{PPO} --credit.redistribution Uniform --credit.redistribution.beta=-0.1",
        "beta is -0.1",
        "choose a number in [0, 1]",
    ),
    "heads twice": (
        f"{PPO} --credit.redistribution PolicyAttention --credit.redistribution.heads [1,1]",
        "heads is (1, 1)",
        "each once",
    ),
    "row of another name": (
        f"{PPO} --credit.redistribution Attention --credit.redistribution.row first",
        "--credit.redistribution.row",
        "'read', 'last', 'mean'",
    ),
    "weights that do not sum to 1": (
        f"{PPO} --credit.redistribution Mixture "
        "--credit.redistribution.parts "
        "'[{redistribution: Uniform, weight: 0.5}, {redistribution: Terminal, weight: 0.6}]'",
        "0.5, 0.6 and sum to 1.1",
        "make them sum to 1",
    ),
    "function that is no redistribution": (f"{PPO} --credit.redistribution json.dumps", "dumps is no redistribution"),
    "negative kl_coef": (f"{PPO} --credit.kl_coef -1", "kl_coef is -1", "at least 0"),
    "negative rank": (f"{PPO} --lora.r -4", "lora.r is -4", "positive rank"),
    "two rewards": (f"{PPO} --reward_function mine.reward", "mine.reward", "exactly one"),
    "no reward": ("ppo --model STORIES --data.path TASK/prompts.jsonl", "exactly one"),
    "no such reward function": (
        "ppo --model STORIES --reward_function nowhere.f",
        "nowhere.f",
        "my_module.my_function",
    ),
    "reward function that is none": (
        "ppo --model STORIES --reward_function json.nothing",
        "json.nothing",
        "not a function",
    ),
    "relative reward function": ("ppo --model STORIES --reward_function ..f", "..f", "my_module.my_function"),
    "reward function without attention": (
        "ppo --model STORIES --reward_function json.dumps --data.path TASK/prompts.jsonl --output_dir run "
        "--credit.redistribution Attention",
        "needs attention of a reward model; dumps is a function",
        "give a reward model",
    ),
    "evaluation without held-out rows": (f"{PPO} --eval_functions json.dumps", "json.dumps", "give data.eval_rows"),
    "reward function called as a column": (
        f"{GENERATE} --reward_function mine.length",
        "'length'",
        "another name",
    ),
    "missing data": (f"{PPO} --data.path nope.jsonl", "nope.jsonl does not exist"),
    "missing model": (f"{PPO} --model ./nope", "./nope does not exist", "give a folder, or a hub name"),
    "missing model that may be on the hub": (f"{PPO} --model runs/sft", "no model folder runs/sft", "hub"),
    "missing reward model": (f"{PPO} --reward_model runs/reward", "no model folder runs/reward", "hub"),
    "missing reference": (f"{PPO} --ref_model runs/sft", "no model folder runs/sft", "hub"),
    "folder without a model": (f"{PPO} --model .", "holds no model", "give the folder"),
    "pickled policy": (f"{PPO} --model TASK/pickled", "pickled", "safetensors", "save the model again"),
    "pickled reference": (f"{PPO} --ref_model TASK/pickled", "pickled", "safetensors", "save the model again"),
    "damaged policy": (f"{PPO} --model TASK/damaged", "damaged", "copy or save the model again"),
    "damaged reward model": (f"{PPO} --reward_model TASK/damaged", "damaged", "copy or save the model again"),
    "file for a model": (f"{PPO} --model TASK/prompts.jsonl", "prompts.jsonl is a file", "give the folder"),
    "no tokenizer": (f"{PPO} --model TASK/no_tokenizer", "no_tokenizer has no tokenizer", "save one"),
    "no tokenizer: sft": (
        "sft --model TASK/no_tokenizer --data.path TASK/prompts.jsonl",
        "has no tokenizer",
        "save one",
    ),
    "missing column": (f"{PPO} --data.path TASK/texts.jsonl", "'prompt'", "its columns are text, label"),
    "empty data set": (f"{PPO} --data.path TASK/nothing.jsonl", "nothing.jsonl is empty", "at least one row"),
    "empty prompt": (f"{PPO} --data.path TASK/empty_prompt.jsonl", "row 1 is empty", "drop"),
    "long prompt, strictly": (
        f"{PPO} --data.path TASK/long.jsonl --max_prompt_length 10 --strict",
        "1 of 2 prompts are longer than max_prompt_length (10)",
        "raise the limit",
    ),
    "only long prompts": (
        f"{PPO} --data.path TASK/long.jsonl --max_prompt_length 1",
        "2 of 2 prompts",
        "raise the limit",
    ),
    "no padding token": (f"{PPO} --model TASK/no_padding", "no padding token", "set one"),
    "two labels": (f"{PPO} --reward_model TASK/two_labels", "2 labels", "with one"),
    "two labels of the critic": (f"{PPO} --value_model TASK/two_labels", "2 labels", "with one"),
    "classifier for a policy": (f"{PPO} --model TASK/two_labels", "ForSequenceClassification", "give a causal lang"),
    "classifier for a reference": (
        f"{PPO} --ref_model TASK/two_labels",
        "writes no text",
        "give a causal language model",
    ),
    "infinite learning rate": (f"{PPO} --learning_rate .inf", "learning_rate is inf", "choose a positive number"),
    "decay of 1.5": (f"{PPO} --adam_beta1 1.5", "adam_beta1 is 1.5", "choose a number in [0, 1)"),
    "more tokens than positions": (
        f"{PPO} --sampling.max_new_tokens 600",
        "max_new_tokens (600) exceed the 512 positions",
        "lower max_prompt_length or sampling.max_new_tokens",
    ),
    "folder for data": (f"{PPO} --data.path TASK", "is a folder", "name a file in it"),
    "reward model without a head": (f"{PPO} --reward_model STORIES", "stories", "give a reward model"),
    "reference of another vocabulary": (
        f"{PPO} --ref_model TASK/other_vocabulary",
        "the reference has a vocabulary of 300 tokens, the policy of 512",
        "use models that share one",
    ),
    "mapping for the parts of a mixture": (
        f"{PPO} --credit.redistribution Mixture --credit.redistribution.parts '{{Terminal: 0.5}}'",
        "--credit.redistribution.parts: {'Terminal': 0.5} is given",
        "give a list such as [{redistribution: ..., weight: ...}, ...]",
    ),
    "mapping for lengths": (
        f"{PPO} --credit.termination RandomizedNgram --credit.termination.lengths '{{a: 1}}'",
        "--credit.termination.lengths: {'a': 1} is given",
        "give a list",
    ),
    "unknown schedule": (f"{PPO} --lr_scheduler_type foo", "lr_scheduler_type is 'foo'", "choose one of linear"),
    "unknown tracker": (f"{PPO} --log_with foo", "log_with is 'foo', which is not installed", "install it"),
    "file for a run folder": (f"{PPO} --output_dir TASK/prompts.jsonl", "prompts.jsonl cannot be written", "another"),
    "run folder in a file": (f"{PPO} --output_dir TASK/prompts.jsonl/run", "cannot be written", "choose another"),
    "run folder that root cannot make": (f"{PPO} --output_dir /proc/run", "/proc/run cannot be written", "another"),
    "run folder that is not empty": (
        f"{PPO} --output_dir TASK",
        "is not empty",
        "resume it (--resume), or choose another",
    ),
    "resume of no run": (f"{PPO} --output_dir TASK --resume", "holds no config.yaml", "choose another"),
    "generate: output is there": (
        f"{GENERATE} --output TASK/prompts.jsonl",
        "prompts.jsonl is there already",
        "another",
    ),
    "generate: output in a file": (f"{GENERATE} --output TASK/prompts.jsonl/x", "cannot be written", "choose another"),
    "generate: output that root cannot make": (f"{GENERATE} --output /proc/a/b", "/proc/a cannot be written"),
    "generate: missing data": (f"{GENERATE} --data.path nope.jsonl", "nope.jsonl does not exist"),
    "generate: missing column": (f"{GENERATE} --data.path TASK/texts.jsonl", "its columns are text, label"),
    "generate: empty data set": (f"{GENERATE} --data.path TASK/nothing.jsonl", "is empty"),
    "generate: empty prompt": (f"{GENERATE} --data.path TASK/empty_prompt.jsonl", "row 1 is empty"),
    "generate: long prompt, strictly": (
        f"{GENERATE} --data.path TASK/long.jsonl --max_prompt_length 10 --strict",
        "1 of 2 prompts",
    ),
    "generate: missing model": (f"{GENERATE} --model runs/sft", "no model folder runs/sft"),
    "generate: pickled policy": (f"{GENERATE} --model TASK/pickled", "safetensors"),
    "generate: no padding token": (f"{GENERATE} --model TASK/no_padding", "no padding token"),
    "generate: two labels": (f"{GENERATE} --reward_model TASK/two_labels", "2 labels"),
    "generate: reward model without a head": (f"{GENERATE} --reward_model STORIES", "give a reward model"),
    "generate: reference of another vocabulary": (
        f"{GENERATE} --ref_model TASK/other_vocabulary",
        "300 tokens, the policy of 512",
    ),
    "generate: NaN score": (f"{GENERATE} --reward_model TASK/nan_reward --sampling.max_new_tokens 2", "returned nan"),
    "generate: no prompts": (f"{GENERATE} --num_prompts 0", "num_prompts is 0", "at least 1"),
    "compare: no run": ("compare nope", "nope is not a run folder"),
    "compare: report in a file": ("compare nope --output TASK/prompts.jsonl/x", "cannot be written", "choose another"),
    "quickstart: no steps": ("quickstart --num_steps 0", "num_steps is 0", "at least 1"),
    "quickstart: folder of something else": ("quickstart --output_dir TASK", "holds no quickstart", "choose another"),
    "quickstart: file for a folder": (
        "quickstart --output_dir TASK/prompts.jsonl",
        "cannot be written",
        "choose another",
    ),
    "sft: missing model": ("sft --model runs/sft --data.path TASK/prompts.jsonl", "no model folder runs/sft"),
    "sft: missing data": ("sft --model STORIES --data.path nope.jsonl", "nope.jsonl does not exist"),
    "sft: missing column": (
        "sft --model STORIES --data.path TASK/texts.jsonl",
        "'completion'",
        "they have text, label",
    ),
    "reward: missing data": ("reward --model STORIES --data.path nope.jsonl", "nope.jsonl does not exist"),
    "reward: missing column": (
        "reward --model STORIES --data.path TASK/texts.jsonl",
        "'rejected'",
        "they have text, label",
    ),
    "reward: empty data set": ("reward --model STORIES --data.path TASK/nothing.jsonl", "is empty"),
    "reward: pickled": ("reward --model TASK/pickled --data.path TASK/pairs.jsonl", "safetensors"),
    "reward: no padding token": ("reward --model TASK/no_padding --data.path TASK/pairs.jsonl", "give pad_token"),
    "reward: run folder that is not empty": (
        "reward --model STORIES --data.path TASK/pairs.jsonl --output_dir TASK",
        "is not empty",
    ),
}


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED.keys())
def test_an_error_of_a_user_is_one_line_that_names_value_and_remedy_and_writes_nothing(
    line: tuple[str, ...], task: Path, here: Path
) -> None:
    command, *named = line
    (here / "mine.py").write_text("def length(prompts, completions): return [0.0] * len(prompts)\n")
    told = refusal(apportion(*words(command, task)))
    assert told.startswith(f"apportion {command.split()[0]}: error: ")
    assert [part for part in named if part not in told] == [], told
    assert [path.name for path in here.iterdir() if path.name != "__pycache__"] == ["mine.py"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [b", "mine.yaml cannot be read as YAML"),
        ("- a\n- b\n", "mine.yaml holds no settings"),
        ("\x00", "mine.yaml cannot be read as YAML"),
        ("modle: x", "did you mean model?"),
        ("num_steps: many", "--num_steps: many"),
        ("credit: {kl: 1}", "kl"),
        ("credit: {termination: {class_path: FixedNgram, init_args: {m: 3}}}", "'m'"),
        ("sft:\n  model: x\n", "has no section 'ppo'; it has sft"),
        ("ppo:\nsft:\n  model: x\n", "model has no default"),
        ("sft:\n  model: x\nppoo:\n  model: x\n", "'ppoo' is no command (did you mean ppo?)"),
        ("", "model has no default"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(text: str, named: str, here: Path) -> None:
    (here / "mine.yaml").write_text(text)
    assert named in refusal(apportion("ppo", "--config", "mine.yaml"))


def test_errors_are_one_line_in_a_process_of_their_own_too(task: Path, here: Path) -> None:
    command = [sys.executable, "-m", "apportion", *words(f"{PPO} --reward_model TASK/nan_reward", task)]
    command += ["--num_steps=1", "--batch_size=2", "--sampling.max_new_tokens=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert "the reward model returned nan for response 0" in done.stderr


def test_where_an_error_came_from_is_shown_on_request(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPORTION_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"nope\.yaml"):
        apportion("ppo", "--config", here / "nope.yaml")


def test_help_takes_less_than_a_second_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, apportion.cli; code = apportion.cli.main(['--help']); "
        "print(code, *sorted({'torch', 'transformers', 'datasets', 'yaml', 'rich'} & set(sys.modules)))"
    )
    before = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *usage, last = done.stdout.splitlines()
    assert last == "0"
    assert all(any(name in line for line in usage) for name in COMMANDS)
    assert os.times().children_user - before < 1  # seconds of processor: the machine may be busy


def test_without_a_command_the_usage_is_shown() -> None:
    assert apportion().code == 2
    assert "apportion COMMAND" in apportion().out
    assert apportion("--version").out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_its_settings(command: str) -> None:
    shown = apportion(command, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert f"usage: apportion {command}" in shown.out
    assert COMMANDS[command].help[:40] in " ".join(shown.out.split())


@pytest.mark.parametrize(
    ("flag", "kind", "setting"),
    [
        ("--credit.termination.help", "CodeParse", "--credit.termination.cutoff CUTOFF"),
        ("--credit.redistribution.help", "apportion.PolicyAttention", "--credit.redistribution.legacy_shift"),
        ("--credit.advantage.help", "RLOO", "--credit.advantage.group_size"),
        ("--credit.value_smoothing.help", "FixedNgram", "--credit.value_smoothing.n N"),
        ("--credit.termination.inner.help", "Perplexity", "--credit.termination.variant"),
        ("--data.help", "Mbpp", "--data.path"),
        ("--reward_function.help", "ProgramTests", "--reward_function.limits"),
    ],
)
def test_a_class_explains_its_settings(flag: str, kind: str, setting: str) -> None:
    for asked in ((flag, kind), (f"{flag}={kind}", "--seed=1"), ("--config", "reviews", "--resume", flag, kind)):
        shown = apportion("ppo", *asked)
        assert (shown.code, shown.err) == (0, "")
        assert setting in shown.out


def resolved(*argv: object) -> dict:
    shown = apportion(*argv, "--print_config")
    assert (shown.code, shown.err) == (0, ""), shown
    return yaml.safe_load(shown.out)


@pytest.mark.parametrize("pattern", ["[.!?]", r"[\n]", "#", "null", "a: b", "5", r"\n\n", "x=y", '"quoted"'])
@pytest.mark.parametrize("is_one_word", [False, True])
def test_text_of_a_class_is_taken_as_it_is(pattern: str, is_one_word: bool) -> None:
    """And not as YAML, in which a class of characters is a list."""
    flag = "--credit.termination.pattern"
    words = [f"{flag}={pattern}"] if is_one_word else [flag, pattern]
    argv = ["ppo", "--model=m", "--reward_model=r", "--data.path=p", "--credit.termination=Delimiter", *words]
    assert resolved(*argv)["credit"]["termination"]["init_args"] == {"pattern": pattern}


def write_yaml(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def config(here: Path) -> Path:
    termination = {"class_path": "FixedNgram", "init_args": {"n": 10}}
    content = {"model": "m", "reward_model": "r", "seed": 1, "credit": {"termination": termination, "kl_coef": 0.2}}
    return write_yaml(here / "mine.yaml", content)


def test_flags_override_files_wherever_they_stand(config: Path) -> None:
    for argv in (
        ["--seed", 7, "--config", config],
        ["--config", config, "--seed", 7],
        [f"--config={config}", "--seed=7"],
    ):
        assert resolved("ppo", *argv)["seed"] == 7


def test_a_later_file_overrides_an_earlier_one_and_keeps_the_rest(config: Path) -> None:
    second = write_yaml(config.with_name("second.yaml"), {"seed": 2, "credit": {"redistribution": "Attention"}})
    both = resolved("ppo", "--config", config, "--credit.kl_coef=0.3", "--config", second)
    assert (both["seed"], both["model"], both["credit"]["kl_coef"]) == (2, "m", 0.3)
    assert both["credit"]["termination"]["init_args"] == {"n": 10}
    assert both["credit"]["redistribution"]["class_path"].endswith("Attention")


def test_a_file_without_suffix_is_read_by_its_path(config: Path) -> None:
    plain = config.rename(config.with_name("plain"))
    assert resolved("ppo", "--config", plain)["seed"] == 1


def test_the_section_of_the_command_is_taken(here: Path) -> None:
    write_yaml(here / "all.yaml", {"description": "x", "ppo": {"model": "p"}, "generate": {"model": "g"}})
    assert resolved("ppo", "--config", "all.yaml")["model"] == "p"
    assert resolved("generate", "--config", "all.yaml")["model"] == "g"


@pytest.mark.parametrize("path", ["Perplexity", "apportion.Perplexity", "apportion.credit.termination.Perplexity"])
def test_a_class_is_chosen_by_short_name_or_dotted_path_over_that_of_a_file(path: str, config: Path) -> None:
    chosen = resolved("ppo", "--config", config, "--credit.termination", path, "--credit.termination.variant=segment")
    assert chosen["credit"]["termination"]["class_path"].endswith(".Perplexity")
    assert chosen["credit"]["termination"]["init_args"] == {"variant": "segment", "early": False}


def test_a_setting_of_the_class_of_a_file_is_changed_alone(config: Path) -> None:
    chosen = resolved("ppo", "--config", config, "--credit.termination.n", 4)["credit"]["termination"]
    assert chosen["class_path"].endswith("FixedNgram")
    assert chosen["init_args"] == {"n": 4}


@pytest.mark.parametrize("path", ["GRPO", "apportion.GRPO", "apportion.credit.groups.GRPO"])
def test_an_estimator_is_chosen_by_short_name_or_dotted_path(path: str) -> None:
    chosen = resolved("ppo", "--config", "reviews", "--credit.advantage", path, "--credit.advantage.group_size", 4)
    assert chosen["credit"]["advantage"]["class_path"].endswith(".GRPO")
    assert chosen["credit"]["advantage"]["init_args"] == {"group_size": 4}


def test_settings_of_the_default_estimator_need_not_name_it(config: Path) -> None:
    flags = resolved("ppo", "--config", config, "--credit.advantage.lam", 0.5)["credit"]["advantage"]
    second = write_yaml(config.with_name("second.yaml"), {"credit": {"advantage": {"lam": 0.5}}})
    assert resolved("ppo", "--config", config, "--config", second)["credit"]["advantage"] == flags
    assert flags["class_path"].endswith(".GAE")
    assert flags["init_args"] == {"gamma": 1.0, "lam": 0.5, "per": "action"}


def test_groups_that_do_not_fit_are_refused_in_one_line(config: Path) -> None:
    given = ("ppo", "--config", config, "--data.path", "x.jsonl", "--credit.advantage", "RLOO")
    told = refusal(apportion(*given, "--batch_size", 12))
    assert "batch_size is 12 responses, not a multiple of the 8 that RLOO compares (group_size); change one" in told
    told = refusal(apportion(*given, "--credit.redistribution", "PrefixDifference"))
    assert "redistribution is PrefixDifference, whose differences may be negative" in told


def test_classes_nest(config: Path) -> None:
    inner = ("--credit.redistribution.inner", "Attention", "--credit.redistribution.inner.beta", 0.3)
    chosen = resolved("ppo", "--config", config, "--credit.redistribution", "Shuffled", *inner)["credit"][
        "redistribution"
    ]
    assert chosen["class_path"].endswith("Shuffled")
    assert chosen["init_args"]["inner"]["class_path"].endswith("Attention")
    assert chosen["init_args"]["inner"]["init_args"]["beta"] == 0.3


MIXTURE = """
credit:
  redistribution:
    class_path: Mixture
    init_args:
      parts:
        - {redistribution: {class_path: Attention, init_args: {beta: 1.0, heads: [0, 2]}}, weight: 0.5}
        - {redistribution: PolicyAttention, weight: 0.25}
        - {redistribution: my_spread.Ends, weight: 0.25}
"""
SPREAD = """
import torch

class Ends:
    def __init__(self, first: float = 0.5):
        self.first = first

    def __call__(self, rollout, scores, *, gamma, steps):
        return self.first * torch.ones_like(rollout.values)

def evenly(rollout, scores, *, gamma, steps):
    return torch.ones_like(rollout.values)
"""


def test_a_mixture_is_a_list_of_redistributions_and_weights(config: Path) -> None:
    config.with_name("my_spread.py").write_text(SPREAD)
    config.with_name("mixture.yaml").write_text(MIXTURE)
    chosen = resolved("ppo", "--config", config, "--config", config.with_name("mixture.yaml"))
    parts = chosen["credit"]["redistribution"]["init_args"]["parts"]
    assert [part["weight"] for part in parts] == [0.5, 0.25, 0.25]
    attention, policy, own = (part["redistribution"] for part in parts)
    assert attention["class_path"].endswith(".Attention")
    assert attention["init_args"] == {"beta": 1.0, "layer": None, "heads": [0, 2], "row": "read"}
    assert policy["class_path"].endswith(".PolicyAttention")
    assert own["class_path"] == "my_spread.Ends"
    assert own["init_args"] == {"first": 0.5}
    again = write_yaml(config.with_name("again.yaml"), chosen)
    assert resolved("ppo", "--config", again) == chosen
    flags = (
        "--credit.redistribution=Mixture",
        "--credit.redistribution.parts",
        "[{redistribution: Uniform, weight: 0.4}, {redistribution: Terminal, weight: 0.6}]",
    )
    parts = resolved("ppo", "--config", config, *flags)["credit"]["redistribution"]["init_args"]["parts"]
    assert [part["redistribution"]["class_path"].rpartition(".")[2] for part in parts] == ["Uniform", "Terminal"]


def test_a_class_or_function_of_the_user_is_a_redistribution(config: Path) -> None:
    config.with_name("my_spread.py").write_text(SPREAD)
    given = ("--credit.redistribution", "my_spread.Ends", "--credit.redistribution.first", 0.25)
    chosen = resolved("ppo", "--config", config, *given)["credit"]["redistribution"]
    assert chosen == {"class_path": "my_spread.Ends", "init_args": {"first": 0.25}}
    chosen = resolved("ppo", "--config", config, "--credit.redistribution", "my_spread.evenly")
    assert chosen["credit"]["redistribution"] == "my_spread.evenly"
    again = write_yaml(config.with_name("again.yaml"), chosen)
    assert resolved("ppo", "--config", again) == chosen


OWN_TERMINATION = """
class Halves:
    def __init__(self, parts: int = 2):
        self.parts = parts

    def __call__(self, rollout):
        return rollout.response_mask

def every(rollout):
    return rollout.response_mask
"""


def test_a_class_or_function_of_the_user_is_a_termination(config: Path) -> None:
    config.with_name("my_cut.py").write_text(OWN_TERMINATION)
    given = ("--credit.termination", "my_cut.Halves", "--credit.termination.parts", 3)
    chosen = resolved("ppo", "--config", config, *given)["credit"]["termination"]
    assert chosen == {"class_path": "my_cut.Halves", "init_args": {"parts": 3}}
    given = ("--credit.termination=my_cut.every", "--credit.value_smoothing=my_cut.every")
    chosen = resolved("ppo", "--config", config, *given)
    assert chosen["credit"]["termination"] == chosen["credit"]["value_smoothing"] == "my_cut.every"
    again = write_yaml(config.with_name("again.yaml"), chosen)
    assert resolved("ppo", "--config", again) == chosen
    given = ("--credit.termination=ShuffledBoundaries", "--credit.termination.inner=my_cut.every")
    chosen = resolved("ppo", "--config", config, *given)["credit"]["termination"]
    assert chosen["init_args"]["inner"] == "my_cut.every"


@pytest.mark.parametrize("source", ["Files", "ImdbReviews", "ImdbPairs"])
def test_the_sources_of_the_package_are_known_by_short_name(source: str, config: Path) -> None:
    chosen = resolved("ppo", "--config", config, "--data", source, "--data.path", "x.jsonl")["data"]
    assert chosen["class_path"].endswith(f".{source}")
    assert chosen["init_args"]["path"] == "x.jsonl"


@pytest.mark.parametrize(
    ("given", "means"),
    [
        (["--resume"], True),
        (["--resume", "--seed=3"], True),
        (["--resume", "false"], False),
        (["--resume=false"], False),
    ],
)
def test_a_bare_switch_is_true_and_false_is_false(given: list[str], means: bool, config: Path) -> None:
    assert resolved("ppo", *given, "--config", config)["resume"] is means


def test_a_bare_switch_of_a_chosen_class_is_true_and_another_setting_of_it_wants_its_value(config: Path) -> None:
    given = ("ppo", "--config", config, "--credit.termination", "Perplexity", "--credit.termination.early", "--bf16")
    assert resolved(*given)["credit"]["termination"]["init_args"]["early"] is True
    told = refusal(apportion("ppo", "--config", config, "--credit.termination", "FixedNgram", "--credit.termination.n"))
    assert "--credit.termination.n has no value; give it one" in told


def test_lists_are_given_as_words_or_as_yaml(config: Path) -> None:
    for given in (["a.b", "c.d"], ["[a.b, c.d]"]):
        assert resolved("ppo", "--config", config, "--eval_functions", *given)["eval_functions"] == ["a.b", "c.d"]
    assert resolved("ppo", "--config", config, "--eval_functions", "a.b")["eval_functions"] == ["a.b"]
    assert resolved("ppo", "--config", config, "--lora.target_modules", "null")["lora"]["target_modules"] is None


def test_runs_stand_before_or_after_the_flags() -> None:
    expected = {"runs": ["one", "it's \\ two"], "output": "there"}
    assert resolved("compare", "one", "it's \\ two", "--output", "there") == expected
    assert resolved("compare", "--output", "there", "one", "it's \\ two") == expected
    assert resolved("compare", "--output=there", "--runs", "one", "it's \\ two") == expected


EVERYTHING = (
    "--credit.termination RandomizedNgram --credit.redistribution Shuffled --credit.redistribution.inner "
    "PrefixDifference --credit.score_clamp 2.5 --ppo.cliprange_value null --lora.r 4 --lora.target_modules q_proj "
    "--sampling.top_p 0.9 --eval_functions a.b --data.eval_rows 5 --learning_rate 1e-5 --resume"
)


def test_what_print_config_prints_is_read_back_as_the_same(config: Path) -> None:
    printed = resolved("ppo", "--config", config, *EVERYTHING.split())
    assert printed["learning_rate"] == 1e-5
    again = write_yaml(config.with_name("again.yaml"), printed)
    assert resolved("ppo", "--config", again) == printed


def test_an_interrupted_command_says_so_without_a_traceback(here: Path) -> None:
    (here / "stopping.py").write_text("raise KeyboardInterrupt")
    done = apportion("generate", "--model", "m", "--output", "o", "--data", "stopping.Source")
    assert (done.code, done.err) == (130, "apportion generate: interrupted\n")
