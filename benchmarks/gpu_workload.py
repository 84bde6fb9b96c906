"""Models, rollouts and trainers for `gpu.py`, all random."""

import tempfile
from dataclasses import fields, replace
from typing import Any

import torch
from apportion_peer import METHODS
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from workload import EOS, PAD, Workload, prompts, tokenizer

import apportion.train.ppo as host
from apportion import PPOArguments, Rollout, Sampling, Scores

SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, "num_labels": 1}
TINY: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LARGE: dict[str, Any] = TINY | {
    "vocab_size": 32_768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


def policy(shape: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cuda") -> LlamaForCausalLM:
    """Make a policy with random weights; a bias keeps it from drawing padding or the end of text."""
    model = made(LlamaForCausalLM, shape, dtype, device)
    head = nn.Linear(shape["hidden_size"], shape["vocab_size"], device=device, dtype=dtype)
    head.weight = model.get_input_embeddings().weight
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[[PAD, EOS]] = -1e4
    head.bias.requires_grad_(False)
    model.set_output_embeddings(head)
    return model


def scorer(
    shape: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cuda"
) -> LlamaForSequenceClassification:
    """Make a reward model, or a critic, with random weights."""
    return made(LlamaForSequenceClassification, shape, dtype, device)


def made(kind: Any, shape: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """Make a model on a device; one that is compared across devices is made on the CPU and moved."""
    torch.manual_seed(0)
    with torch.device(device):
        return kind(LlamaConfig(**shape, **SPECIAL)).to(dtype).eval()


def batch(rows: int, tokens: int, device: str = "cpu", vocabulary: int = 8192) -> tuple[Rollout, Scores]:
    """Draw a rollout whose prompts and responses have many lengths, and its scores."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    begins = torch.randint(0, 8, (rows, 1), generator=generator)
    old, ref = -3 * torch.rand(2, rows, tokens, generator=generator)
    rollout = Rollout(
        prompt_ids=torch.randint(2, vocabulary, (rows, 8), generator=generator),
        prompt_mask=torch.arange(8) >= begins,
        response_ids=torch.randint(2, vocabulary, (rows, tokens), generator=generator),
        response_mask=torch.arange(tokens) < lengths,
        old_logprobs=old,
        ref_logprobs=ref,
        values=torch.randn(rows, tokens, generator=generator),
    )
    scores = Scores(
        scores=torch.randn(rows, generator=generator),
        attention=torch.rand(rows, tokens, generator=generator),
        prefix_scores=torch.randn(rows, tokens + 1, generator=generator),
    )
    return on(rollout, device), on(scores, device)


def on(group: Any, device: str) -> Any:
    """Move the tensors of a frozen group."""
    return replace(group, **{field.name: getattr(group, field.name).to(device) for field in fields(group)})


def turn_of(number: int) -> str:
    """Say whose turn an update is; each round begins with another method, so that none has a place of its own."""
    turn, place = divmod(number, len(METHODS))
    return list(METHODS)[(turn + place) % len(METHODS)]


class Enough(Exception):
    """All updates were measured; the run is left before it writes a checkpoint."""


class Watch(TrainerCallback):
    """Keep the metrics of each update with the peak of memory in each phase, and let the methods take turns.

    Attributes:
        turns: Updates to be measured.
        end: Whether to leave the run after them.
        logs: Metrics of each update; `peak/PHASE` in GiB.
    """

    def __init__(self, turns: int, end: bool = False) -> None:
        self.turns, self.end = turns, end
        self.logs: list[dict[str, float]] = []
        self.peaks: dict[str, float] = {}
        self.trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Watch the phases of a trainer."""
        self.trainer = trainer
        self._watch(trainer, "respond", "generate")
        self._watch(trainer, "complete", "score")
        self._watch(trainer, "score", "score")
        self._watch(host, "assign_credit", "credit")
        self._watch(host, "update", "update")

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep the metrics of an update."""
        self.logs.append(logs | self.peaks)
        self.peaks = {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Let the next method take its turn."""
        if self.trainer is not None:
            following = turn_of(len(self.logs))
            self.trainer.args = replace(self.trainer.args, credit=METHODS[following])
        if self.end and len(self.logs) == self.turns:
            raise Enough

    def _watch(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.reset_peak_memory_stats()
            try:
                return function(*args, **kwargs)
            finally:
                peak = torch.cuda.max_memory_allocated() / 2**30
                self.peaks[f"peak/{phase}"] = max(peak, self.peaks.get(f"peak/{phase}", 0))

        setattr(owner, name, watched)


def trainer_of(
    shape: dict[str, Any], size: tuple[int, int, int], bf16: bool, watch: Watch, num_steps: int = 100_000
) -> host.PPOTrainer:
    """Make a trainer with random models: so many rows of so long prompts and so many new tokens."""
    rows, prompt, new = size
    frozen = torch.bfloat16 if bf16 else torch.float32
    return host.PPOTrainer(
        PPOArguments(
            output_dir=tempfile.mkdtemp(),
            num_steps=num_steps,
            batch_size=rows,
            credit=METHODS["token PPO"],
            sampling=Sampling(max_new_tokens=new),
            learning_rate=1e-6,
            critic_learning_rate=1e-6,
            eval_steps=0,
            save_steps=0,
            bf16=bf16,
        ),
        model=policy(shape),
        ref_model=policy(shape, frozen),
        reward_model=scorer(shape, frozen),
        value_model=scorer(shape),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": prompts(Workload(prompt=prompt))}),
        callbacks=[watch],
    )
