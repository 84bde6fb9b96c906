"""`apportion generate`: responses to held-out prompts, and what they are worth."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from apportion.batch import Prompts
from apportion.data.files import Files, Source
from apportion.data.prompts import PromptSet, encode_prompts
from apportion.evaluate.sampler import Sampler
from apportion.pretrained import check_reward_model, load_scorer
from apportion.rollout import complete
from apportion.sampling import Sampling
from apportion.score.function_reward import FunctionReward, ScoringFunction
from apportion.score.reward_model import Reward, RewardModel, decode, name_of
from apportion.streams import generator
from apportion.train.evaluation import check_names, measured_rows
from apportion.train.launch import check_model, function_of, named, tell_dropped
from apportion.train.learner import check_vocabulary, tokenizer_of
from apportion.train.run import check_place


@dataclass(frozen=True, kw_only=True)
class Generate:
    """What `apportion generate` needs to know.

    Attributes:
        model: The policy: a folder or a hub name.
        output: JSON-lines file; it must not be there yet.
        ref_model: The reference that the divergence is measured from; without one no divergence is reported.
        reward_model: A sequence classifier with one label.
        reward_function: Dotted path of a function `(prompts, completions, **columns) -> list[float]`; or one with
            settings by its name, such as `ProgramTests`.
        reward_template: Dotted path of a function from prompt and response to the text that the reward model reads.
        data: Prompts: the held-out rows where the source holds some out, else all of them.
        sampling: What responses are drawn from.
        num_prompts: Take only so many prompts, from the first; None for all.
        batch_size: Responses that are sampled at once.
        max_prompt_length: Prompts of more tokens are dropped and counted.
        strict: Refuse prompts that are too long instead of dropping them.
        seed: Decides what is sampled.
        bf16: Compute in bfloat16 where it is safe.

    Raises:
        ValueError: If a number is out of range.
    """

    model: str
    output: str
    ref_model: str | None = None
    reward_model: str | None = None
    reward_function: ScoringFunction | str | None = None
    reward_template: str | None = None
    data: Source = field(default_factory=Files)
    sampling: Sampling = field(default_factory=Sampling)
    num_prompts: int | None = None
    batch_size: int = 32
    max_prompt_length: int = 512
    strict: bool = False
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("num_prompts", "batch_size", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; choose at least 1")


def generate(settings: Generate) -> None:
    """Write one JSON line a prompt: `prompt`, `response`, `length`, and, as far as asked, `kl`, `score`, and rewards.

    `length` counts tokens, the end-of-text token among them; `kl` is the sum over them, in nats; `score` is the reward
    model's, and the number of a reward function has the function's name. The file appears when it is complete.

    Raises:
        ValueError: If the output is there already or cannot be written, the data have no usable prompt, the models do
            not share a vocabulary, or a score is not finite.
        FileNotFoundError: If a model or the data are not there.
    """
    output = Path(settings.output)
    if output.exists():
        raise ValueError(f"{output} is there already; choose another output, or remove it")
    check_place(output.parent)
    for path in (settings.model, settings.ref_model, settings.reward_model):
        if path is not None:
            check_model(path)
    if settings.reward_model is not None:
        check_reward_model(settings.reward_model)
    if settings.reward_function is not None:
        check_names([function_of(settings.reward_function)])
    measure = _Measure(settings)
    tell_dropped(measure.prompts.dropped, settings.max_prompt_length)
    count = _write(measure, output)
    print(f"responses: {count} in {output}")


def _write(measure: "_Measure", output: Path) -> int:
    """Write the lines under a temporary name and rename it when they are complete; count them."""
    size, count, console = measure.settings.batch_size, len(measure.prompts), Console(stderr=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            for start in track(range(0, count, size), "responses", console=console, disable=not console.is_terminal):
                for row in measure(range(start, min(start + size, count))):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
        temporary.rename(output)
    finally:
        temporary.unlink(missing_ok=True)
    return count


class _Measure:
    """Models and prompts, loaded once; called with prompt numbers."""

    def __init__(self, settings: Generate) -> None:
        self.settings = settings
        self.tokenizer = tokenizer_of(settings.model)
        splits = settings.data(self.tokenizer)
        data = splits.get("eval", splits["train"])
        data = data.select(range(min(settings.num_prompts or len(data), len(data))))
        self.prompts: PromptSet = encode_prompts(
            data, self.tokenizer, max_prompt_length=settings.max_prompt_length, strict=settings.strict
        )
        check_vocabulary("reference", settings.ref_model, settings.model)
        self.sampler = Sampler(settings.model, settings.sampling, bf16=settings.bf16)
        self.reference = None if settings.ref_model is None else self.sampler.load(settings.ref_model)
        self.rewards = self._rewards()
        self.numbers = generator(settings.seed, "generate")
        self.uniforms = torch.rand(len(self.prompts), settings.sampling.max_new_tokens, generator=self.numbers)

    def __call__(self, indices: range) -> list[dict[str, Any]]:
        """Respond to some prompts and measure each response."""
        prompts = self.prompts.batch(indices, self.sampler.device)
        with self.sampler.precision(), torch.no_grad():
            return self._measured(prompts, indices)

    def _measured(self, prompts: Prompts, indices: range) -> list[dict[str, Any]]:
        sampling = self.settings.sampling
        responses = self.sampler(prompts, self.uniforms[indices.start : indices.stop])
        columns = {"length": responses.response_mask.sum(1)}
        if self.reference is not None:
            rollout = complete(
                prompts, responses, reference=self.reference, critic=None, sampling=sampling, budget=16_384
            )
            columns["kl"] = rollout.kl.sum(1)
        columns |= {name: reward(prompts, responses).scores for name, reward in self.rewards.items()}
        texts = decode(self.tokenizer, prompts, responses)
        functions = [reward for reward in self.rewards.values() if isinstance(reward, FunctionReward)]
        details = functions[0].details(prompts, texts) if functions else None
        return measured_rows(prompts, texts, columns, details)

    def _rewards(self) -> dict[str, Reward]:
        """Load the rewards that are asked for, by the name of their column."""
        rewards: dict[str, Reward] = {}
        if self.settings.reward_model is not None:
            path, template = self.settings.reward_model, self.settings.reward_template
            rewards["score"] = RewardModel(
                self.sampler.placed(load_scorer(path)),
                tokenizer_of(path),
                self.tokenizer,
                template=None if template is None else named(template),
            )
        if self.settings.reward_function is not None:
            function = function_of(self.settings.reward_function)
            rewards[name_of(function)] = FunctionReward(function, self.tokenizer, self.prompts.columns)
        return rewards
