"""Tiny models with attention that is worth reading, and the maps that captures are held against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import reference

TOKENS = 20
LENGTHS = (20, 13, 9)
VOCABULARY = 50
PAD = 0
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED: dict[str, Any] = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": PAD}
OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": PAD}
SLIDING_LAST = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING_FIRST = ["full_attention", "sliding_attention", "full_attention"]
MIXTURE: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}

# Wide initial weights, or random attention would be uniform and any row would look right.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, initializer_range=0.3),
    "qwen2": Qwen2Config(**GROUPED, initializer_range=0.3),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8, initializer_range=0.3),
    "mistral": MistralConfig(**GROUPED, sliding_window=6, initializer_range=0.3),
    "gemma2": Gemma2Config(
        **GROUPED,
        head_dim=8,
        attn_logit_softcapping=2.0,
        initializer_range=0.3,
        sliding_window=6,
        layer_types=SLIDING_FIRST,
    ),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=8, initializer_range=0.3, sliding_window=6, layer_types=SLIDING_LAST
    ),
    "gpt2": GPT2Config(**OLD, initializer_range=0.3, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48, pad_token_id=PAD, initializer_range=0.3),
    "gpt_oss": GptOssConfig(**GROUPED, **MIXTURE, head_dim=8, sliding_window=6, initializer_range=0.3),
    "gptj": GPTJConfig(**OLD, rotary_dim=4, initializer_range=0.3),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        attention_types=[[["local", "global", "local"], 1]],
        window_size=6,
        initializer_range=0.3,
    ),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3),
    "falcon": FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.3
    ),
}
LAYER = {"gemma3": 1, "gpt_oss": 1, "gpt_neo": 1}
SDPA = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2", "gpt_neox")
EAGER = ("gemma2", "gpt_oss", "gptj", "gpt_neo", "bloom", "falcon")
HOOKED = ("gptj", "gpt_neo", "bloom", "falcon")
TAPPED = tuple(family for family in SDPA + EAGER if family not in HOOKED)


def make(family: str, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    implementation = implementation or ("sdpa" if family in SDPA else "eager")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(
            type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict()), attn_implementation=implementation
        )
    return model.to(dtype).eval()


def padded(side: str) -> tuple[dict[str, Tensor], Tensor]:
    """Three rows of different lengths, and the column of the last token of each."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(1, VOCABULARY, (len(LENGTHS), TOKENS), generator=generator)
    lengths = torch.tensor(LENGTHS)[:, None]
    columns = torch.arange(TOKENS)[None]
    mask = columns < lengths if side == "right" else columns >= TOKENS - lengths
    last = (columns * mask).argmax(dim=1)
    return {"input_ids": input_ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}, last


def eager_row(model: nn.Module, inputs: dict[str, Tensor], layer: int, read_index: Tensor) -> Tensor:
    maps = model(**inputs, output_attentions=True).attentions[layer]
    return maps[torch.arange(len(read_index)), :, read_index].float().mean(dim=1)


def dense_maps(arguments: dict[str, Any]) -> Tensor:
    """All rows of a layer in float32 from the arguments of its attention function, with repeated keys."""
    query, key, options = arguments["query"].float(), arguments["key"].float(), arguments["options"]
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * options["scaling"]
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    mask = causal if arguments["mask"] is None else arguments["mask"]
    bias = (
        torch.zeros(mask.shape).masked_fill(~mask, -1e30) if mask.dtype == torch.bool else mask.float().clamp(min=-1e30)
    )
    scores = scores + bias
    if options.get("s_aux") is not None:
        sinks = options["s_aux"].float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return scores.softmax(dim=-1)


def slow_mean_map(
    query: Tensor,
    key: Tensor,
    heads: tuple[int, ...] | None,
    sees: Callable[[int, int], bool],
    sinks: Tensor | None,
    **options: Any,
) -> list[list[float]]:
    """The mean map of one row's heads, (H, Q, D) and (G, K, D), by loops over Python's numbers."""
    repeats = len(query) // len(key)
    maps = [
        reference.attention_map(
            query[h].tolist(),
            key[h // repeats].tolist(),
            sees=sees,
            sink=None if sinks is None else float(sinks[h]),
            **options,
        )
        for h in heads or range(len(query))
    ]
    return reference.mean_map(maps)


@contextmanager
def recorded(model: PreTrainedModel, family: str, layer: int) -> Iterator[dict[str, Any]]:
    """Run a model under a kernel of its own name that records: the family's ordinary one, which keeps its maps."""
    seen: dict[str, Any] = {}
    kernel = sdpa_attention_forward
    if family in EAGER:
        kernel = vars(__import__(type(model).__module__, fromlist=["_"]))["eager_attention_forward"]

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        if module.layer_idx == layer:
            seen.update(query=query, key=key, mask=mask, options=options)
        return kernel(module, query, key, value, mask, **options)[0], None

    implementation = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["recording"] = record
    AttentionMaskInterface.register("recording", eager_mask if family in EAGER else sdpa_mask)
    model.config._attn_implementation = "recording"
    try:
        yield seen
    finally:
        model.config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS["recording"]
        AttentionMaskInterface._global_mapping.pop("recording")


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result
