"""What docs/method.md tells trainers of their own runs as it stands, and reads what eager maps hold."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_maps import PAD, make

METHOD = Path(__file__).parents[2] / "docs" / "method.md"
LENGTHS = ((3, 6), (5, 4), (1, 1))  # of prompts and responses
P, T = 5, 6


def documented() -> str:
    """The indented lines below the sentence on trainers of one's own."""
    _, _, after = METHOD.read_text().partition("A trainer of your own that samples with another engine")
    lines = after.partition("\n    ")[2].partition("\n###")[0]
    return textwrap.dedent("    " + lines)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_trainer_of_ones_own_reads_the_policys_attention_as_documented(family: str) -> None:
    model, eager = make(family), make(family, "eager")
    lengths = torch.tensor(LENGTHS)
    prompt_mask = torch.arange(P) >= P - lengths[:, :1]
    response_mask = torch.arange(T) < lengths[:, 1:]
    attention_mask = torch.cat([prompt_mask, response_mask], 1)
    drawn = torch.randint(3, 40, attention_mask.shape, generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "prompt_mask": prompt_mask,
        "response_mask": response_mask,
        "input_ids": drawn.where(attention_mask, PAD),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "scores": torch.ones(len(LENGTHS)),
    }
    exec(documented(), names)
    found = names["scores"].policy_attention
    assert found.shape == (len(LENGTHS), T)
    for row, (prompt, length) in enumerate(LENGTHS):
        ids = names["input_ids"][row][attention_mask[row]][None]
        maps = eager(ids, output_attentions=True).attentions[-1][0].mean(0)[prompt:, prompt:]
        wanted = torch.stack([maps[j:, j].mean() for j in range(length)])
        torch.testing.assert_close(found[row, :length], wanted, atol=1e-6, rtol=1e-5)
