"""Random batches for tests, their padding and holes filled with what must never be read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import jaxtyping
import torch
from torch import Tensor

import reference
from apportion import (
    Attention,
    Credit,
    CreditConfig,
    ErrorLine,
    Mixture,
    PolicyAttention,
    PrefixDifference,
    Redistribution,
    Rollout,
    Scores,
    Terminal,
    Uniform,
)

JUNK_ID = 7


@contextmanager
def without_type_checks() -> Iterator[None]:
    """Call the program as users do: the type checker of the tests refuses some arguments before our errors can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def mask_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """Write a mask with ones and zeros."""
    return torch.tensor(rows, dtype=torch.bool)


def mask_of_lengths(*lengths: int, width: int | None = None) -> Tensor:
    """Right-padded responses of the given lengths."""
    columns = torch.arange(max(lengths) if width is None else width)
    return columns < torch.tensor(lengths)[:, None]


def random_rollout(mask: Tensor, seed: int = 0, *, grid: float | None = None) -> Rollout:
    """Draw a rollout; with a grid, log-probabilities are multiples of it, so that ties occur."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        drawn = -3 * torch.rand(mask.shape, generator=generator)
        return drawn if grid is None else (drawn / grid).round() * grid

    prompt_mask = torch.rand(len(mask), 4, generator=generator) < 0.8
    rollout = Rollout(
        prompt_ids=torch.randint(10, 1000, prompt_mask.shape, generator=generator),
        prompt_mask=prompt_mask,
        response_ids=torch.randint(10, 1000, mask.shape, generator=generator),
        response_mask=mask,
        old_logprobs=logprobs(),
        ref_logprobs=logprobs(),
        values=torch.randn(mask.shape, generator=generator),
        entropies=-logprobs(),
    )
    return spoiled(rollout)


def spoiled(rollout: Rollout) -> Rollout:
    """Put NaN, and some token, wherever nothing may be read."""
    mask, prompt_mask = rollout.response_mask, rollout.prompt_mask
    numbers = ("old_logprobs", "ref_logprobs", "values", "entropies")
    given = {name: x for name in numbers if (x := getattr(rollout, name)) is not None}
    return replace(
        rollout,
        prompt_ids=rollout.prompt_ids.masked_fill(~prompt_mask, JUNK_ID),
        response_ids=rollout.response_ids.masked_fill(~mask, JUNK_ID),
        **{name: x.masked_fill(~mask, torch.nan) for name, x in given.items()},
    )


def random_scores(mask: Tensor, seed: int = 0) -> Scores:
    """Draw scores with all that a redistribution may need; NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(mask.shape, generator=generator)
    prefix = torch.randn(len(mask), mask.shape[1] + 1, generator=generator)
    policy_attention = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed + 1))
    blamed = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed + 2))
    read = torch.cat([torch.ones_like(mask[:, :1]), mask], 1) if mask.shape[1] else mask.new_ones(len(mask), 1)
    return Scores(
        scores=3 * torch.randn(len(mask), generator=generator),
        attention=attention.masked_fill(~mask, torch.nan),
        policy_attention=policy_attention.masked_fill(~mask, torch.nan),
        prefix_scores=prefix.masked_fill(~read, torch.nan),
        error_tokens=((blamed < 0.3) & (torch.arange(len(mask))[:, None] % 3 > 0)) | ~mask,
    )


def padded(rollout: Rollout, *, left: int = 0, right: int = 0, prompt_left: int = 0) -> Rollout:
    """Add padding on either side; what stands in it is junk."""
    sides = {"prompt": (prompt_left, 0), "response": (left, right)}
    tensors = {}
    for f in fields(rollout):
        x = getattr(rollout, f.name)
        if not isinstance(x, Tensor):
            continue
        fill = torch.nan if x.is_floating_point() else False if x.dtype == torch.bool else JUNK_ID
        tensors[f.name] = torch.nn.functional.pad(x, sides["prompt" if "prompt" in f.name else "response"], value=fill)
    if (text := rollout.text) is not None:
        spans = torch.nn.functional.pad(text.spans, (0, 0, left, right))
        return Rollout(**tensors, text=replace(text, spans=spans))
    return Rollout(**tensors)


def padded_scores(scores: Scores, *, left: int = 0, right: int = 0) -> Scores:
    """Widen scores along with `padded`; the bare prompt keeps its place at the front."""
    assert scores.attention is not None
    assert scores.policy_attention is not None
    assert scores.prefix_scores is not None
    assert scores.error_tokens is not None
    prompt, rest = scores.prefix_scores[:, :1], scores.prefix_scores[:, 1:]
    widen = torch.nn.functional.pad
    return Scores(
        scores=scores.scores,
        attention=widen(scores.attention, (left, right), value=torch.nan),
        policy_attention=widen(scores.policy_attention, (left, right), value=torch.nan),
        prefix_scores=torch.cat([prompt, widen(rest, (left, right), value=torch.nan)], 1),
        error_tokens=widen(scores.error_tokens, (left, right), value=True),
    )


def cut(credit: Credit, left: int, width: int) -> Credit:
    """Take the columns that `padded` did not add."""
    return of_credit(credit, lambda x: x[:, left : left + width])


def of_credit(credit: Credit, function: Callable[[Tensor], Tensor]) -> Credit:
    """Apply a function to every tensor of a credit."""
    return Credit(**{f.name: function(getattr(credit, f.name)) for f in fields(credit)})


def assert_same(found: Credit, wanted: Credit, *, atol: float = 1e-5) -> None:
    """Compare two credits; NaN is never equal."""
    assert torch.equal(found.macro_ids, wanted.macro_ids)
    for f in fields(found):
        torch.testing.assert_close(getattr(found, f.name), getattr(wanted, f.name), atol=atol, rtol=1e-5, msg=None)


def valid(x: Tensor, mask: Tensor, row: int) -> list[float]:
    """List the valid entries of a row as Python floats."""
    return x[row][mask[row]].double().tolist()


def reference_row(rollout: Rollout, scores: Scores, row: int) -> reference.Row:
    """Cut one row out of a batch, without its padding."""
    assert scores.attention is not None
    assert scores.policy_attention is not None
    assert scores.prefix_scores is not None
    assert scores.error_tokens is not None
    mask = rollout.response_mask
    return reference.Row(
        old_logprobs=valid(rollout.old_logprobs, mask, row),
        ref_logprobs=valid(rollout.ref_logprobs, mask, row),
        values=valid(rollout.values, mask, row),
        score=float(scores.scores[row]),
        attention=valid(scores.attention, mask, row),
        policy_attention=valid(scores.policy_attention, mask, row),
        prefix_scores=[float(scores.prefix_scores[row, 0]), *valid(scores.prefix_scores[:, 1:], mask, row)],
        error_tokens=scores.error_tokens[row][mask[row]].tolist(),
    )


def for_reference(redistribution: Redistribution | Callable) -> tuple:
    """Name a redistribution as `reference.redistribute` knows it."""
    if isinstance(redistribution, Mixture):
        return ("mixture", *((part.weight, for_reference(part.redistribution)) for part in redistribution.parts))
    names = {
        Terminal: "terminal",
        Uniform: "uniform",
        Attention: "attention",
        PolicyAttention: "policy",
        PrefixDifference: "prefix",
        ErrorLine: "error",
    }
    return (names[type(redistribution)], *vars(redistribution).values())


def difference(config: CreditConfig) -> str:
    """Name a configuration by what is not the default."""
    changed = {name: value for name, value in vars(config).items() if value != getattr(CreditConfig(), name)}
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"
