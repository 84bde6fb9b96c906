"""Tiny random models of many families, made from configurations."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from apportion.batch import Prompts

VOCABULARY = 48
PAD, EOS = 0, 2
IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
# Wide initial weights: with the usual ones every token is as likely as any other, and any code would look right.
SMALL: dict[str, Any] = IDS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
OLD: dict[str, Any] = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
KINDS = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, sliding_window=6),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=6, layer_types=KINDS, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6, layer_types=KINDS),
    "gpt2": GPT2Config(**OLD),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gptj": GPTJConfig(**OLD, rotary_dim=4),
    "opt": OPTConfig(**IDS, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
                     word_embed_proj_dim=16),
    "bloom": BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.25),
    "granite": GraniteConfig(**GROUPED, logits_scaling=4.0),
    "mamba": MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2),
    "falcon_h1": FalconH1Config(**GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8,
                                mamba_d_head=8, mamba_chunk_size=8, lm_head_multiplier=0.5),
    "qwen3_next": Qwen3NextConfig(**GROUPED, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2,
                                  linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
                                  moe_intermediate_size=16, shared_expert_intermediate_size=16,
                                  layer_types=["linear_attention", "full_attention"]),
    # Its trunk stands under another name than the one it says.
    "llama4": Llama4TextConfig(**GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
                               num_experts_per_tok=1),
}  # fmt: skip
NO_CLASSIFIER = ("cohere", "granite", "mamba", "falcon_h1", "llama4")


def causal(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A language model of a family, the same each time."""
    return _made(AutoModelForCausalLM, family, dtype, changes)


def classifier(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A sequence classifier of a family with one label, the same each time."""
    return _made(AutoModelForSequenceClassification, family, dtype, {"num_labels": 1} | changes)


def _made(kind: Any, family: str, dtype: torch.dtype, changes: dict[str, Any]) -> PreTrainedModel:
    config = CONFIGS[family]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return kind.from_config(type(config).from_dict(config.to_dict() | changes)).to(dtype).eval()


def prompts_of(*rows: list[int]) -> Prompts:
    """Left-padded prompts; the padding is PAD."""
    width = max(map(len, rows))
    return Prompts(
        prompt_ids=torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        prompt_mask=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        texts=[" ".join(map(str, row)) for row in rows],
        columns={},
    )
