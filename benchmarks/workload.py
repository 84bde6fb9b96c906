"""What both sides of a benchmark are given, and how both are measured. Imports nothing of either side.

The model is a Llama of 8.39 M parameters (hidden 256, 6 layers, 4 heads, vocabulary 8192, tied embeddings) from one
seed. Its head has a bias on two tokens: padding is never drawn, and the end of text never or at a random early place.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

PAD, EOS, VOCABULARY = 0, 1, 8192
PROMPTS = 512


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One setting of the benchmark, the same for both sides.

    Attributes:
        epochs: PPO epochs.
        mini_batches: Minibatches of an epoch; TRL's side has one.
        rows: Responses an update.
        micro_rows: Rows that a model is given at once in the update.
        prompt: Tokens of a prompt.
        new: Tokens of a response at most.
        mean_length: Responses end after so many tokens on average (geometric, cut at `new`); None for never.
        bf16: Whether the matrix products of training run in bfloat16 (autocast).
    """

    epochs: int = 1
    mini_batches: int = 1
    rows: int = 32
    micro_rows: int = 32
    prompt: int = 32
    new: int = 64
    mean_length: float | None = None
    bf16: bool = False

    def dump(self) -> str:
        """Write it as JSON, which a worker is given as its argument."""
        return json.dumps(asdict(self))


def config() -> LlamaConfig:
    """The model's shape."""
    one_label: Any = {"num_labels": 1}
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **one_label,
    )


def policy(work: Workload) -> LlamaForCausalLM:
    """Make the policy (and, called again, the reference)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).eval()
    head = nn.Linear(256, VOCABULARY)
    embeddings: Any = model.get_input_embeddings()
    head.weight = embeddings.weight
    nn.init.zeros_(head.bias)
    chance = 0 if work.mean_length is None else 1 / work.mean_length
    with torch.no_grad():
        head.bias[PAD] = -1e4
        head.bias[EOS] = math.log(VOCABULARY * chance / (1 - chance)) if chance else -1e4
    head.bias.requires_grad_(False)
    model.set_output_embeddings(head)
    model.generation_config.eos_token_id = EOS
    return model


def scorer() -> LlamaForSequenceClassification:
    """Make the reward model (and, called again, the critic)."""
    torch.manual_seed(1)
    return LlamaForSequenceClassification(config()).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{number}": number for number in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )


def prompts(work: Workload) -> list[str]:
    """Random words."""
    numbers = torch.randint(2, VOCABULARY, (PROMPTS, work.prompt), generator=torch.Generator().manual_seed(2))
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


class Meter:
    """Seconds of CPU time of each phase, and the peak of the resident memory, between two updates.

    CPU time, because it says the same on a machine that has other work; in one thread it is what the clock shows when
    there is none.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.depth = 0

    def watch(self, owner: Any, name: str, phase: str, when: Callable[[], bool] = lambda: True) -> None:
        """Count the time spent in a function under a phase; inner watched functions count for the outer phase."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.depth or not when():
                return function(*args, **kwargs)
            self.depth += 1
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                self.phases[phase] = self.phases.get(phase, 0) + time.process_time() - begin

        setattr(owner, name, watched)

    def start(self) -> None:
        """Begin an update; the peak is set back to what is resident now."""
        self.phases = {}
        Path("/proc/self/clear_refs").write_text("5")
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        """End an update.

        Returns:
            Seconds of each phase, of what is in none (`other`), of all (`cpu`), and on the clock (`wall`); MiB resident
            at the peak (`peak`).
        """
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        whole = {"cpu": cpu, "wall": wall, "peak": _peak()}
        return self.phases | {"other": cpu - sum(self.phases.values())} | whole


def _peak() -> float:
    """Most MiB resident since the peak was last set back, as the kernel counts them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


class Pace(TrainerCallback):
    """Hold a trainer between blocks of updates until the driver says how many come next, and report on them.

    What the driver reads are the lines of standard output that begin with `##`.

    Attributes:
        meter: Measures the updates.
        between: Called with the number of updates done, after each; returns what to add to its report.
    """

    def __init__(self, meter: Meter, between: Callable[[int], dict[str, Any]] = lambda _: {}) -> None:
        self.meter, self.between = meter, between
        self.done, self.left, self.measured = 0, 0, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first block."""
        self._hold()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report on an update; at the end of a block, wait for the next."""
        measured = self.meter.stop()
        self.done += 1
        self.measured.append(measured | self.between(self.done))
        self.left -= 1
        if self.left == 0:
            print("##" + json.dumps(self.measured), flush=True)
            self._hold()
        else:
            self.meter.start()

    def _hold(self) -> None:
        line = sys.stdin.readline().strip()
        if not line:
            sys.exit(0)
        self.left, self.measured = int(line), []
        self.meter.start()
