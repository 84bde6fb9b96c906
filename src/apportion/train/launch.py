"""`apportion ppo`: the settings of a run by name, from paths to models and data to a trained policy."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from apportion.data.apps import Apps, CodeContests
from apportion.data.files import Files, Source
from apportion.data.humaneval import HumanEval
from apportion.data.imdb import ImdbPairs, ImdbReviews
from apportion.data.mbpp import Mbpp
from apportion.pretrained import check_policy, check_reward_model, refuse_pickles
from apportion.score.function_reward import RewardFunction, ScoringFunction
from apportion.score.program_tests import ProgramTests
from apportion.train.arguments import PPOArguments, to_yaml
from apportion.train.learner import tokenizer_of
from apportion.train.run import check_run_folder

SOURCES: tuple[type[Source], ...] = (Files, ImdbPairs, ImdbReviews, Apps, CodeContests, HumanEval, Mbpp)
"""What `data` knows by a short name; sources of your own are chosen by their dotted path."""

SCORING: tuple[type[ScoringFunction], ...] = (ProgramTests,)
"""What `reward_function` knows by a short name."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters of PEFT.

    Attributes:
        r: Rank; 0 trains the whole policy.
        alpha: Scale.
        target_modules: Layers that get one; PEFT's own choice for the architecture by default.

    Raises:
        ValueError: If a number is out of range.
    """

    r: int = 0
    alpha: int = 32
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.r < 0:
            raise ValueError(f"lora.r is {self.r}; choose a positive rank, or 0 for no adapters")
        if self.alpha < 1:
            raise ValueError(f"lora.alpha is {self.alpha}; choose at least 1")


@dataclass(frozen=True, kw_only=True)
class PPORecipe(PPOArguments):
    """Everything that `apportion ppo` needs to know.

    Attributes:
        model: The policy to be trained: a folder or a hub name.
        reward_model: A sequence classifier with one label: a folder or a hub name. Give this or `reward_function`.
        reward_function: Dotted path of a function `(prompts, completions, **columns) -> list[float]`; or one with
            settings by its name, such as `ProgramTests`.
        reward_template: Dotted path of a function from prompt and response to the text that the reward model reads.
        ref_model: What the policy is held to; by default the policy as it begins.
        value_model: What the critic starts from; by default the reward model, or the policy where that cannot be.
        data: Prompts: rows with a column `prompt`, and those held out. Files of your own, or a class by name.
        eval_functions: Dotted paths of reward functions that only evaluate.
        lora: Low-rank adapters.

    Raises:
        ValueError: If neither or both of `reward_model` and `reward_function` are given.
    """

    model: str
    reward_model: str | None = None
    reward_function: ScoringFunction | str | None = None
    reward_template: str | None = None
    ref_model: str | None = None
    value_model: str | None = None
    data: Source = field(default_factory=Files)
    eval_functions: list[str] = field(default_factory=list)
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        """Refuse two rewards, and none."""
        super().__post_init__()
        if (self.reward_model is None) == (self.reward_function is None):
            given = f"reward_model is {self.reward_model} and reward_function {self.reward_function}"
            raise ValueError(f"{given}; give exactly one of them")


def ppo(recipe: PPORecipe, config_text: str | None = None) -> None:
    """Train a policy as a recipe says.

    Args:
        recipe: The settings.
        config_text: What the run folder keeps as config.yaml.

    Raises:
        ValueError: For anything in the recipe that does not fit together.
        FileNotFoundError: If a model or data file is not there.
    """
    config_text = config_text or to_yaml(recipe)
    check_run_folder(recipe.output_dir, config_text, resume=recipe.resume)
    for path in (recipe.model, recipe.reward_model, recipe.ref_model, recipe.value_model):
        if path is not None:
            check_model(path)
    for path in filter(None, (recipe.model, recipe.ref_model)):
        check_policy(path)
    if recipe.reward_model is not None:
        check_reward_model(recipe.reward_model)
    reward = recipe.reward_model if recipe.reward_function is None else function_of(recipe.reward_function)
    template = None if recipe.reward_template is None else named(recipe.reward_template)
    eval_rewards = [named(path) for path in recipe.eval_functions]
    tokenizer = tokenizer_of(recipe.model)
    reward_tokenizer = None if recipe.reward_model is None else tokenizer_of(recipe.reward_model)
    data = recipe.data(tokenizer)
    if eval_rewards and "eval" not in data:
        raise ValueError(f"eval_functions is {recipe.eval_functions}, but no rows are held out; give data.eval_rows")

    from apportion.train.ppo import PPOTrainer

    trainer = PPOTrainer(
        recipe,
        model=recipe.model,
        reward_model=reward,  # type: ignore[arg-type] # one of the two is given
        reward_processing_class=reward_tokenizer,
        reward_template=template,
        ref_model=recipe.ref_model,
        value_model=recipe.value_model,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        eval_rewards=eval_rewards,
        peft_config=_peft_config(recipe.lora),
        config_text=config_text,
    )
    if trainer.accelerator.is_main_process:
        held_out = trainer.evaluation.prompts.dropped if trainer.evaluation else 0
        tell_dropped(trainer.prompts.dropped + held_out, recipe.max_prompt_length)
    trainer.train()
    if trainer.accelerator.is_main_process:
        print(f"policy: {recipe.output_dir}/model, metrics: {recipe.output_dir}/metrics.jsonl")


def check_model(path: str) -> None:
    """Refuse a path that is neither a folder with a model nor the name of one on the hub; no weights are loaded.

    Raises:
        FileNotFoundError: If there is no such folder, and the hub does not give such a model; or the folder holds none.
        ValueError: If its weights would have to be unpickled, or their file is damaged.
    """
    folder = Path(path)
    if folder.is_file():
        raise FileNotFoundError(f"model {path} is a file; give the folder that save_pretrained wrote, or a hub name")
    if folder.is_dir() and not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{path} holds no model (no config.json); give the folder that save_pretrained wrote")
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"model folder {path} does not exist; give a folder, or a hub name such as owner/model")
    try:
        options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
        if not any(cached_file(path, name, **options) for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError("no config.json")
    except OSError as error:
        reason = str(error).partition(". ")[0]
        raise FileNotFoundError(
            f"there is no model folder {path}, and the hub does not give a model of this name ({reason})"
        ) from error
    refuse_pickles(path)
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "numpy"):  # reads the head of the file alone
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); copy or save the model again") from error


def tell_dropped(count: int, limit: int) -> None:
    """Tell on stderr how many prompts were dropped for being longer than a limit, in tokens; nothing for none."""
    if count:
        print(f"prompts dropped: {count}, longer than max_prompt_length ({limit})", file=sys.stderr)


def named(path: str) -> Callable[..., Any]:
    """Import a function by its dotted path.

    Args:
        path: Such as `my_module.my_function`; modules in the working directory are found too.

    Returns:
        The function.

    Raises:
        ValueError: If there is no such module or no such function in it.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module.strip(".") == module != "" else None
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} cannot be imported ({error}); give a dotted path such as my_module.my_function"
        ) from error
    if not callable(found):
        raise ValueError(f"{path} is not a function; give a dotted path such as my_module.my_function")
    return found


def function_of(given: ScoringFunction | str) -> RewardFunction:
    """Take a reward function as a recipe names it.

    Args:
        given: The function with its settings, or a dotted path.

    Raises:
        ValueError: If there is no function of this path.
    """
    if isinstance(given, ScoringFunction):
        return given
    found = named(given)
    if isinstance(found, type):
        raise ValueError(f"{given} is a class; derive it from ScoringFunction and give its settings, or a function")
    return found


def _peft_config(lora: Lora) -> Any:
    """Make PEFT's configuration of ours; None where no adapters are wanted."""
    if not lora.r:
        return None
    from peft import LoraConfig

    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")
