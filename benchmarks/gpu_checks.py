"""What `gpu.py` checks: the package on CUDA against the package on the CPU."""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from gpu_workload import TINY, Watch, batch, policy, scorer, trainer_of
from torch import Tensor
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from workload import EOS, PAD

from apportion import (
    GAE,
    Attention,
    CreditConfig,
    EveryToken,
    FixedNgram,
    Perplexity,
    PPOConfig,
    PrefixDifference,
    RandomizedNgram,
    Sampling,
    Shuffled,
    ShuffledBoundaries,
    Terminal,
    Uniform,
    WholeResponse,
    assign_credit,
)
from apportion.models import Critic, Policy, inputs
from apportion.score.attention import capture_row
from apportion.update.ppo import Learner, update

Claim = tuple[str, float, float]
"""What is claimed, what was found, and the most that it may be."""


def claims() -> Iterator[Claim]:
    """Check everything."""
    return itertools.chain(credit_checks(), ratio_checks(), update_check(), attention_checks())


def configurations() -> Iterator[CreditConfig]:
    """Every termination with every redistribution, under three settings of the rest."""
    terminations = (
        *(EveryToken(), FixedNgram(n=5), RandomizedNgram(), WholeResponse()),
        *(Perplexity(), Perplexity(variant="segment"), Perplexity(early=True), ShuffledBoundaries(Perplexity())),
    )
    redistributions = (Terminal(), Uniform(beta=0.5), Attention(), PrefixDifference(), Shuffled(inner=Attention()))
    by_token = CreditConfig(advantage=GAE(gamma=0.99, per="token"), macro_value="position", whiten_advantages=True)
    for rest in (CreditConfig(), by_token, CreditConfig.official()):
        for termination, redistribution in itertools.product(terminations, redistributions):
            yield replace(rest, termination=termination, redistribution=redistribution)


def credit_checks() -> Iterator[Claim]:
    """Compare the credit of every configuration, and look for host synchronisation."""
    here, there = batch(16, 300), batch(16, 300, "cuda")
    largest, waits, every = 0.0, [], list(configurations())
    for config in every:
        expected, found = assign_credit(*here, config), assign_credit(*there, config)
        gaps = (distance(getattr(found, f.name), getattr(expected, f.name)) for f in fields(found))
        largest = max(largest, *gaps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assign_credit(*there, config)
        except RuntimeError as error:
            waits.append(f"{config}: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    print(*waits, sep="\n", file=sys.stderr)
    yield f"assign_credit equals the CPU's, {len(every)} configurations: largest difference", largest, 1e-5
    yield f"assign_credit waits for the device: configurations of {len(every)} that do", len(waits), 0


def ratio_checks() -> Iterator[Claim]:
    """Look at the ratio of updates that have one pass."""
    for bf16 in (False, True):
        watch = Watch(turns=2)
        trainer = trainer_of(TINY, (8, 12, 24), bf16, watch, num_steps=2)
        trainer.train()
        names = ("policy/ratio_mean", "policy/ratio_max")
        gap = max(abs(logs[name] - 1) for logs in watch.logs for name in names)
        kind = "bf16 autocast" if bf16 else "float32"
        yield f"first ratio is 1, {kind}: distance of mean and largest from 1", gap, 0
        gap = max(logs["policy/sampler_gap"] for logs in watch.logs)
        yield f"log-probabilities of sampling and training agree, {kind}, nats", gap, 0.1 if bf16 else 1e-4


def update_check() -> Iterator[Claim]:
    """Take one update of two epochs on either device; the accelerator of the CPU comes first and is forgotten."""
    here, there = (changes(device) for device in ("cpu", "cuda"))
    found = float((here - there).norm() / here.norm())
    yield "one PPO update in float32 changes the parameters as on the CPU, relative norm of the difference", found, 1e-4


def changes(device: str) -> Tensor:
    """Update once by plain gradient descent, which unlike Adam does not blow up rounding; return what changed."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device == "cpu")
    rollout, scores = batch(12, 40, device)
    modules = [Policy(policy(TINY, device="cpu"), (EOS,)).to(device), Critic(scorer(TINY, device="cpu")).to(device)]
    learners = [Learner(module=m, optimizer=torch.optim.SGD(m.parameters(), lr=0.1)) for m in modules]
    before = [p.detach().clone() for m in modules for p in m.parameters()]
    update(
        learners[0],
        learners[1],
        rollout,
        assign_credit(rollout, scores, CreditConfig()),
        PPOConfig(num_ppo_epochs=2, num_mini_batches=2, micro_batch_tokens=150),
        sampling=Sampling(max_new_tokens=40),
        accelerator=accelerator,
        generator=torch.Generator().manual_seed(0),
    )
    after = [p.detach() for m in modules for p in m.parameters()]
    return torch.cat([(new - old).flatten().double().cpu() for new, old in zip(after, before, strict=True)])


def families() -> dict[str, PreTrainedConfig]:
    """Tiny models with grouped heads, and wide weights: under narrow ones attention is uniform and proves nothing."""
    shape: dict[str, Any] = TINY | {"vocab_size": 64, "head_dim": 16, "initializer_range": 0.3, "pad_token_id": PAD}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    return {
        "Llama": LlamaConfig(**shape),
        "Qwen3": Qwen3Config(**shape),
        "Mistral": MistralConfig(**shape, sliding_window=6),
        "Gemma 3": Gemma3TextConfig(**shape, sliding_window=6, layer_types=kinds),
    }


def attention_checks() -> Iterator[Claim]:
    """Compare captured rows with eager maps on the same device.

    Eager maps of a bfloat16 model are rounded in every layer, and are no reference at 1e-5: there, the row is compared
    with the map of the same weights in float32, of which eager's own map in bfloat16 is so far as the limit allows.
    """
    kernels = ["sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]
    for name, config in families().items():
        gap = max(distance(captured(config, "sdpa", side), eager(config, side)) for side in ("left", "right"))
        yield f"captured row equals eager's, {name}, sdpa, float32", gap, 1e-5
    for kernel, (name, config) in itertools.product(kernels, families().items()):
        truth = {side: eager(config, side, rounded=True) for side in ("left", "right")}
        gap = max(distance(captured(config, kernel, side, torch.bfloat16), truth[side]) for side in truth)
        rounding = max(distance(eager(config, side, torch.bfloat16), truth[side]) for side in truth)
        claim = f"captured row, {name}, {kernel}, bfloat16: from float32's; limit: twice the distance of eager's"
        yield claim, gap, 2 * rounding


def text(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw three texts of different lengths: ids, mask, and the column of the last token of each."""
    lengths = torch.tensor([[24], [15], [9]], device="cuda")
    columns = torch.arange(24, device="cuda")
    mask = columns >= 24 - lengths if side == "left" else columns < lengths
    ids = torch.randint(1, 64, mask.shape, generator=torch.Generator().manual_seed(1)).cuda() * mask
    return ids, mask, torch.where(mask, columns, -1).amax(1)


def tiny(config: PreTrainedConfig, kernel: str, dtype: torch.dtype) -> Any:
    """Make a model of a family; the same weights under every kernel."""
    torch.manual_seed(7)
    model: Any = AutoModel.from_config(type(config).from_dict(config.to_dict()), attn_implementation=kernel)
    return model.to("cuda", dtype).eval()


@torch.no_grad()
def captured(config: PreTrainedConfig, kernel: str, side: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Capture the row of the last layer under a fast kernel."""
    model, (ids, mask, last) = tiny(config, kernel, dtype), text(side)
    with capture_row(model, last) as capture:
        model(**inputs(model, ids, mask))
    return capture.row


@torch.no_grad()
def eager(config: PreTrainedConfig, side: str, dtype: torch.dtype = torch.float32, *, rounded: bool = False) -> Tensor:
    """Read the same row off full maps; of weights rounded to bfloat16 if asked."""
    model, (ids, mask, last) = tiny(config, "eager", torch.bfloat16 if rounded else dtype).to(dtype), text(side)
    maps = model(**inputs(model, ids, mask), output_attentions=True).attentions[-1]
    return maps[torch.arange(3), :, last].float().mean(1)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference."""
    return float((ours.double().cpu() - theirs.double().cpu()).abs().max())
