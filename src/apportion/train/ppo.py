"""PPO with credit assignment: the loop, one line a stage."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from apportion.bars import quiet_bars
from apportion.batch import NOTHING, Credit, Needs, Prompts, Rollout, Scores
from apportion.credit.assign import assign_credit
from apportion.credit.redistribution import needs_of
from apportion.data.prompts import encode_prompts, indices_of
from apportion.pretrained import check_reward_model, load_policy, load_scorer
from apportion.rollout import Responses, complete, sample
from apportion.score.attention import check_request
from apportion.score.function_reward import FunctionReward, RewardFunction
from apportion.score.policy_attention import SampledAttention
from apportion.score.reward_model import Reward, RewardModel, same_vocabulary
from apportion.streams import generator
from apportion.train.arguments import PPOArguments, check_shares, to_yaml
from apportion.train.callbacks import Callbacks
from apportion.train.evaluation import Evaluation
from apportion.train.inputs import check_prints, prints_of
from apportion.train.learner import (
    TrainingState,
    cast_roles,
    check_room,
    check_vocabulary,
    critic_model,
    evaluating,
    open_accelerator,
    tokenizer_of,
    with_adapters,
)
from apportion.train.metrics import batch_metrics
from apportion.train.progress import Stopwatch, progress
from apportion.train.reading import begins_with_last
from apportion.train.run import Checkpoint, Run, latest_checkpoint
from apportion.train.termination import RunCondition
from apportion.train.units import trained_scores, unit_scale
from apportion.update.ppo import gathered, summed, update


class Diverged(RuntimeError):
    """Losses, gradients or parameters are not finite."""


class PPOTrainer:
    """Train a language model by PPO, with credit assigned as the settings say.

    Args:
        args: The settings.
        model: The policy: a causal language model, or a path to one. What learns is held in float32.
        reward_model: What scores responses: a sequence classifier with one label or a path to one, or a function
            `(prompts, completions, **columns) -> list[float]` as in TRL.
        train_dataset: A data set with a column `prompt`; its other columns go to reward functions.
        processing_class: The policy's tokenizer; by default that of the path `model`.
        ref_model: What the policy is held to; by default the policy as it begins.
        value_model: The critic: a sequence classifier with one label or a path to one. By default it starts from the
            reward model, or, where that is a function or has another vocabulary, from the policy. There is none where
            advantages are estimated without one.
        eval_dataset: Held-out prompts.
        eval_rewards: Further reward functions that only evaluate; reported as `eval/<name>`.
        reward_processing_class: The reward model's tokenizer, if it is not the policy's.
        reward_template: From prompt and response to the text that the reward model reads.
        peft_config: Train low-rank adapters instead of the whole policy; the policy without them is the reference.
        callbacks: Callbacks as of transformers' `Trainer`.
        config_text: What the run folder keeps as config.yaml; by default the settings.

    Raises:
        ValueError: For anything that does not fit together, before any long work.
    """

    run: Run | None = None
    """The run folder, open while it trains, on the main process."""

    def __init__(
        self,
        args: PPOArguments,
        *,
        model: str | PreTrainedModel,
        reward_model: str | nn.Module | RewardFunction,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | nn.Module | None = None,
        value_model: str | nn.Module | None = None,
        eval_dataset: Dataset | None = None,
        eval_rewards: Sequence[RewardFunction] = (),
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        reward_template: Callable[[Any, str], str] | None = None,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        config_text: str | None = None,
    ) -> None:
        self.args = args
        self.config_text = config_text or to_yaml(args)
        self.accelerator = open_accelerator(args)
        check_shares(args, self.accelerator.num_processes)
        if value_model is not None and not args.credit.advantage.needs_critic:
            estimator = type(args.credit.advantage).__name__
            raise ValueError(f"value_model is given, but {estimator} has no critic; leave it out")
        for name, other in (("reference", ref_model), ("critic", value_model)):
            check_vocabulary(name, other, model)
        self.tokenizer = processing_class or tokenizer_of(model)
        encode = {"max_prompt_length": args.max_prompt_length, "strict": args.strict}
        self.prompts = encode_prompts(train_dataset, self.tokenizer, **encode)
        eval_prompts = None if eval_dataset is None else encode_prompts(eval_dataset, self.tokenizer, **encode)

        # What learns is held in float32: in bfloat16 a step of a usual learning rate is lost in rounding.
        dtype = "float32" if peft_config is None else "auto"
        policy_model = load_policy(model, dtype=dtype) if isinstance(model, str) else model
        longest = max(split.longest for split in (self.prompts, eval_prompts) if split is not None)
        check_room(policy_model, longest, args.sampling.max_new_tokens)
        reward_tokenizer = reward_processing_class or (
            tokenizer_of(reward_model) if isinstance(reward_model, str) else self.tokenizer
        )
        same_tokens = same_vocabulary(reward_tokenizer, self.tokenizer)
        critic = None
        if args.credit.advantage.needs_critic:
            critic = critic_model(value_model, reward_model, model, same_tokens=same_tokens)
        if peft_config is not None:
            policy_model = with_adapters(policy_model, peft_config, args.seed)
        ref_model = load_policy(ref_model) if isinstance(ref_model, str) else ref_model
        roles = cast_roles(policy_model, ref_model, critic, self.tokenizer, args)
        self.reference, self.as_reference = roles.reference.to(self.accelerator.device), roles.as_reference
        self.state = TrainingState.begin(roles, args, self.accelerator)
        self.policy, self.critic = self.state.learners["policy"], self.state.learners.get("critic")
        self.termination = RunCondition(args.credit, self.tokenizer)
        self.reward = self._make_reward(reward_model, reward_tokenizer, reward_template)
        self._check_attention(policy_model)
        self.evaluation = None
        if eval_prompts is not None and args.eval_steps:
            further = [FunctionReward(function, self.tokenizer, eval_prompts.columns) for function in eval_rewards]
            self.evaluation = Evaluation(eval_prompts, self, further)
        self.callbacks = Callbacks(callbacks, args.num_steps, model=policy_model, processing_class=self.tokenizer)
        self.counters: dict[str, Any] = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0, "skipped_in_a_row": 0}
        self.score_scale: float | None = None if args.scale_scores else 1.0
        self.prints = prints_of(self.prompts, eval_prompts, self.reference, self.reward, args.credit, peft_config)

    def train(self) -> None:
        """Train, from the beginning or from where the run folder was left.

        Raises:
            ValueError: If the run folder cannot be used, a parser cannot be loaded, or a score is not finite (a
                checkpoint is written first).
            Diverged: If too many steps in a row had a loss or gradient that was not finite.
        """
        with self.termination:
            self._train()

    def _train(self) -> None:
        """Run the loop."""
        self._open()
        args = self.args
        if self.counters["step"] == 0:  # for rewards and callbacks that draw: a run draws from streams of its own
            set_seed(args.seed, device_specific=True)
        if self.counters["step"] == 0 and self.evaluation is not None and self._fresh:
            self._log(self.evaluation())
        with progress(args.num_steps, self.counters["step"], self.accelerator.is_main_process) as show:
            for step in range(self.counters["step"], args.num_steps):
                if self.callbacks.stop:
                    break
                watch = Stopwatch()
                prompts = self._prompts_of(step)
                with watch("time/generate"):
                    responses = self.respond(prompts, generator(args.seed, "sample", step))
                with watch("time/score"):
                    rollout = self.complete(prompts, responses, to_learn=True)
                rollout = self.termination.prepared(rollout, watch)
                with watch("time/score"):
                    scores = replace(self._score(prompts, responses), policy_attention=responses.attention)
                self.termination.settle(rollout, watch)
                with watch("time/credit"):
                    credit = assign_credit(rollout, self._scaled(scores, rollout), self.args.credit, reduce=self._sum)
                with watch("time/update"):
                    metrics = self._update(rollout, credit, step)
                self._record(rollout, scores, credit, metrics | watch.times)
                show(metrics=self.last)
        self._finish()

    def respond(
        self, prompts: Prompts, numbers: torch.Generator, *, first: int = 0, total: int | None = None
    ) -> Responses:
        """Sample a response to each prompt of this process.

        Args:
            prompts: B prompts.
            numbers: Generator of the random numbers of the whole batch.
            first: Place of the first prompt in the whole batch.
            total: Size of the whole batch; by default `batch_size`, of which this process has its share.
        """
        sampling, rows = self.args.sampling, len(prompts.prompt_ids)
        for_credit: dict[str, Any] = {}
        if total is None:  # credit is assigned in training only
            first, total = self.accelerator.process_index * rows, self.args.batch_size
            request = needs_of(self.args.credit.redistribution).policy_attention
            for_credit = {
                "with_entropies": "entropies" in self.termination.needs,
                "reader": None if request is None else SampledAttention(request),
            }
        uniforms = torch.rand(total, sampling.max_new_tokens, generator=numbers)[first : first + rows]
        policy = self.accelerator.unwrap_model(self.policy.module)
        with evaluating(policy), self.accelerator.autocast():
            return sample(policy, prompts, sampling, uniforms, pad_id=self.prompts.pad_id, **for_credit)

    def complete(
        self, prompts: Prompts, responses: Responses, *, with_values: bool = True, to_learn: bool = False
    ) -> Rollout:
        """Add what the reference and, if asked, the critic say; `to_learn` keeps its graph where that is of use."""
        critic: Any = self.critic.module if self.critic is not None and with_values else None
        config, masks = self.args.ppo, (prompts.prompt_mask, responses.response_mask)
        keep_graph = critic is not None and to_learn and begins_with_last(*masks, config, self.accelerator)
        with self.accelerator.autocast():
            return complete(
                prompts,
                responses,
                reference=self.reference,
                critic=critic if keep_graph or critic is None else self.accelerator.unwrap_model(critic),
                sampling=self.args.sampling,
                budget=config.micro_batch_tokens,
                learning_budget=config.learning_tokens if keep_graph else None,
                as_reference=self.as_reference,
            )

    def score(self, prompts: Prompts, responses: Responses, needs: Needs = NOTHING) -> Scores:
        """Ask the reward."""
        with self.accelerator.autocast():
            return self.reward(prompts, responses, needs)

    def save_model(self, folder: str) -> None:
        """Save the policy, or its adapters, and the tokenizer as a Hugging Face folder."""
        policy = self.accelerator.unwrap_model(self.policy.module)
        with quiet_bars():
            policy.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _check_attention(self, policy: nn.Module) -> None:
        """Refuse a policy without the attention that credit follows, by a trial in the precision of the run."""
        if (request := needs_of(self.args.credit.redistribution).policy_attention) is not None:
            with self.accelerator.autocast():
                check_request(policy, request)

    def _make_reward(
        self, reward: str | nn.Module | RewardFunction, tokenizer: PreTrainedTokenizerBase, template: Any
    ) -> Reward:
        """Make a reward of what the user gave, and refuse a function where more than scores is needed."""
        needs = needs_of(self.args.credit.redistribution).of_reward
        if not isinstance(reward, str | nn.Module):
            return FunctionReward(reward, self.tokenizer, self.prompts.columns, needs)
        if isinstance(reward, str):
            check_reward_model(reward)
        model = load_scorer(reward) if isinstance(reward, str) else reward
        made = RewardModel(
            model.to(self.accelerator.device),
            tokenizer,
            self.tokenizer,
            budget=self.args.ppo.micro_batch_tokens,
            template=template,
        )
        with self.accelerator.autocast():
            made.check(needs)
        return made

    def _open(self) -> None:
        """Open the run folder and, where there is one, the newest checkpoint."""
        args, folder = self.args, self.args.output_dir
        if self.accelerator.is_main_process:
            self.run = Run.open(folder, self.config_text, resume=args.resume, keep_checkpoints=args.save_total_limit)
        self.accelerator.wait_for_everyone()
        checkpoint = latest_checkpoint(Path(folder)) if args.resume else None
        if checkpoint is not None:
            self._load(checkpoint)
        if self.run is not None:
            self.run.truncate_after(-1 if checkpoint is None else checkpoint.step)
        self._fresh = checkpoint is None
        if args.log_with:
            self.accelerator.init_trackers("apportion", init_kwargs={})
        self.callbacks.begin(self.counters["step"])

    def _load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        tensors, saved = checkpoint.load()
        check_prints(saved.get("prints", {}), self.prints, self.args.output_dir)
        self.state.load(tensors, saved["trees"])
        self.counters, self.score_scale = saved["counters"], saved["score_scale"]

    def _save(self) -> None:
        """Write a checkpoint of where the run stands, once."""
        if self.run is None:
            return
        latest = self.run.latest_checkpoint()
        if latest is not None and latest.step == self.counters["step"]:
            return
        if (lost := self.state.lost()) is not None:
            raise Diverged(f"the {lost} holds numbers that are not finite and is not saved; lower the learning rates")
        tensors, trees = self.state.save()
        content = {"trees": trees, "counters": self.counters, "score_scale": self.score_scale, "prints": self.prints}
        self.run.save_checkpoint(self.counters["step"], tensors, content)
        self.callbacks.saved()

    def _prompts_of(self, step: int) -> Prompts:
        """This process's share of the prompts of an update."""
        args, group = self.args, self.args.credit.advantage.responses_per_prompt
        indices = indices_of(step, args.batch_size, args.seed, len(self.prompts), group)
        share = args.batch_size // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        return self.prompts.batch(indices[first : first + share], self.accelerator.device)

    def _score(self, prompts: Prompts, responses: Responses) -> Scores:
        """Score a rollout; where the reward fails nothing is lost, for the models are as the last update left them."""
        try:
            return self.score(prompts, responses, needs_of(self.args.credit.redistribution).of_reward)
        except Exception:
            if self.state.lost() is None:
                self._save()
            raise

    def _scaled(self, scores: Scores, rollout: Rollout) -> Scores:
        """Scores in the units that are trained on."""
        if self.score_scale is None:
            self.score_scale = unit_scale(gathered(self.accelerator, scores.scores))
        return trained_scores(scores, self._ended(rollout), self.score_scale, self.args.missing_eos_penalty)

    def _ended(self, rollout: Rollout) -> Tensor:
        """(B) bool. Whether each response ends in an end-of-text token."""
        policy = self.accelerator.unwrap_model(self.policy.module)
        ends = torch.isin(rollout.response_ids, torch.tensor(policy.eos_ids, device=rollout.response_ids.device))
        return (ends & rollout.response_mask).any(1)

    def _update(self, rollout: Rollout, credit: Credit, step: int) -> dict[str, float]:
        """Improve policy and critic; stop the run when too many steps in a row could not be taken."""
        metrics = update(
            self.policy,
            self.critic,
            rollout,
            credit,
            self.args.ppo,
            sampling=self.args.sampling,
            accelerator=self.accelerator,
            generator=generator(self.args.seed, "minibatches", step),
        )
        metrics |= self.state.advance()
        skipped = int(metrics["update/skipped_steps"])
        taken = int(metrics["update/optimizer_steps"])
        self.counters["skipped_in_a_row"] = 0 if taken else self.counters["skipped_in_a_row"] + skipped
        if self.counters["skipped_in_a_row"] > self.args.ppo.max_skipped_steps:
            bad = ", ".join(f"{name} is {value}" for name, value in metrics.items() if value - value != 0)
            raise Diverged(
                f"{self.counters['skipped_in_a_row']} optimizer steps in a row were not finite ({bad}); lower the "
                "learning rates and start from the last checkpoint, or from the beginning"
            )
        return metrics

    def _record(self, rollout: Rollout, scores: Scores, credit: Credit, metrics: dict[str, float]) -> None:
        """Count, log, evaluate and save what is due after an update."""
        scale, ended = self.score_scale or 1.0, self._ended(rollout)
        measured = batch_metrics(rollout, scores, credit, ended, scale=scale, args=self.args, reduce=self._sum)
        tokens = int(self._sum(rollout.lengths.sum()))
        self.counters["step"] += 1
        self.counters["samples"] += self.args.batch_size
        self.counters["tokens"] += tokens
        self.counters["seconds"] += sum(value for name, value in metrics.items() if name.startswith("time/"))
        step, args = self.counters["step"], self.args
        due = self.evaluation is not None and (step % max(1, args.eval_steps) == 0 or step == args.num_steps)
        evaluated = self._evaluated(measured | metrics) if due else {}
        self._log(measured | metrics | evaluated)
        self.callbacks.step_end(step, self.last)
        asked = self.callbacks.save
        if asked or (args.save_steps and step % args.save_steps == 0) or step == args.num_steps:
            self._save()

    def _evaluated(self, metrics: dict[str, float]) -> dict[str, float]:
        """Evaluate; where that fails no more than this evaluation is lost."""
        assert self.evaluation is not None  # asked for only then; for the type checker
        try:
            return self.evaluation()
        except Exception:
            self._log(metrics)
            if self.state.lost() is None:
                self._save()
            raise

    def _log(self, metrics: dict[str, float]) -> None:
        """Write one line of metrics, to the run folder and to the trackers."""
        names = ("samples", "tokens", "seconds")
        self.last = {name: self.counters[name] for name in names} | metrics
        if self.run is not None:
            self.run.log(self.counters["step"], self.last)
            if self.evaluation is not None and "eval/score" in metrics:
                self.run.log_samples(self.counters["step"], self.evaluation.samples)
        if self.args.log_with:
            self.accelerator.log(self.last, step=self.counters["step"])
        self.callbacks.logged(self.last)

    def _finish(self) -> None:
        """Write the last checkpoint and the trained policy."""
        self._save()
        if self.run is not None:
            self.run.write_folder("model", self.save_model)
        if self.args.log_with:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        self.callbacks.end()

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        return summed(self.accelerator, x)
