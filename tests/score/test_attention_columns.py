"""Column means equal those of eager maps for every family, by any blocks, and those of slow loops in random cases."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import reference
from apportion import AttentionRequest, PolicyAttention, Scores
from apportion.score import attention_columns
from apportion.score.attention_columns import CapturedColumns, capture_attention, capture_columns
from apportion.score.attention_row import visible_keys
from apportion.score.attention_tap import AttentionCall
from attention_maps import (
    EAGER,
    GROUPED,
    LAYER,
    SDPA,
    TAPPED,
    TOKENS,
    LargestTensor,
    dense_maps,
    make,
    padded,
    recorded,
    slow_mean_map,
)
from batches import mask_of_lengths, random_rollout

WINDOW = 6
ANSWER = 7  # columns at the end that hold the response


def show(captured: Any, module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
    """Let a capture see a layer's arguments without a model."""
    captured.observe(AttentionCall(module=module, query=query, key=key, mask=mask, options=options))


def answer_of(inputs: dict[str, Tensor]) -> Tensor:
    """The last tokens of each text as its response, at different columns of each row."""
    mask = inputs["attention_mask"].bool()
    return mask & (mask.flip(1).cumsum(1).flip(1) <= ANSWER)


def sliding(family: str) -> bool:
    """Whether the layer that is read has a window (of all families, only Mistral has no full layer)."""
    return family == "mistral"


def means_of_maps(maps: Tensor, rows: Tensor, *, window: int | None = None) -> Tensor:
    """(B, K). Column means of (B, Q, K) maps by the definition, one row and column at a time."""
    means = torch.zeros(maps.shape[0], maps.shape[2])
    for b in range(len(maps)):
        for j in range(maps.shape[2]):
            seeing = [q for q in range(maps.shape[1]) if rows[b, q] and q >= j and (window is None or q - j < window)]
            if seeing:
                means[b, j] = maps[b, seeing, j].mean()
    return means


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SDPA + EAGER)
@torch.no_grad()
def test_the_means_equal_those_of_eager_output_attentions(family: str, side: str) -> None:
    inputs, _ = padded(side)
    answer, model = answer_of(inputs), make(family)
    with capture_columns(model, answer) as captured:
        model(**inputs)
    maps = make(family, "eager")(**inputs, output_attentions=True).attentions[LAYER.get(family, 2)]
    wanted = means_of_maps(maps.float().mean(1), answer, window=WINDOW if sliding(family) else None)
    assert captured.weights.dtype == torch.float32
    torch.testing.assert_close(captured.weights, wanted, atol=1e-5, rtol=0)
    assert captured.weights[answer].std() > 1e-3  # uniform columns would prove nothing


@pytest.mark.parametrize("family", TAPPED)
@torch.no_grad()
def test_the_means_of_a_bfloat16_model_are_those_of_the_float32_softmax_of_its_queries_and_keys(family: str) -> None:
    inputs, _ = padded("left")
    answer, model = answer_of(inputs), make(family, dtype=torch.bfloat16)
    with recorded(model, family, LAYER.get(family, 2)) as seen, capture_columns(model, answer) as captured:
        model(**inputs)
    wanted = means_of_maps(dense_maps(seen).mean(1), answer, window=WINDOW if sliding(family) else None)
    torch.testing.assert_close(captured.weights, wanted, atol=1e-5, rtol=0)
    if family in SDPA:  # under the model's own kernel too
        with capture_columns(model, answer) as captured:
            model(**inputs)
        torch.testing.assert_close(captured.weights, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SDPA + EAGER)
@torch.no_grad()
def test_the_means_of_an_eager_bfloat16_model_equal_those_of_its_output_attentions(family: str, side: str) -> None:
    inputs, _ = padded(side)
    answer, model = answer_of(inputs), make(family, "eager", dtype=torch.bfloat16)
    with capture_columns(model, answer) as captured:
        model(**inputs)
    maps = model(**inputs, output_attentions=True).attentions[LAYER.get(family, 2)]
    wanted = means_of_maps(maps.float().mean(1), answer, window=WINDOW if sliding(family) else None)
    torch.testing.assert_close(captured.weights, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_autocast_leaves_the_weights_in_float32() -> None:
    inputs, _ = padded("left")
    answer, model = answer_of(inputs), make("llama")
    seen: dict[str, Tensor] = {}

    class Spy(CapturedColumns):
        def of_call(self, call: AttentionCall) -> Tensor:
            seen.update(query=call.query, key=call.key)
            return super().of_call(call)

    captured = Spy(answer)
    with attention_columns.capturing(model, captured, None), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    arguments = {"mask": None, "options": {"scaling": seen["query"].shape[-1] ** -0.5}}
    maps = dense_maps(seen | arguments)[:1].mean(1)  # the first row has no padding
    torch.testing.assert_close(captured.weights[:1], means_of_maps(maps, answer[:1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 700, 10**9])
@torch.no_grad()
def test_blocks_of_any_size_give_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = padded("left")
    answer, model = answer_of(inputs), make("qwen2")
    with capture_columns(model, answer) as whole:
        model(**inputs)
    monkeypatch.setattr(attention_columns, "BLOCK", block)
    with capture_columns(model, answer) as captured:
        model(**inputs)
    torch.testing.assert_close(captured.weights, whole.weights, atol=1e-6, rtol=0)


@torch.no_grad()
def test_every_layer_and_head_can_be_chosen() -> None:
    inputs, _ = padded("left")
    answer, model = answer_of(inputs), make("llama")
    maps = make("llama", "eager")(**inputs, output_attentions=True).attentions
    for layer, heads in ((0, None), (-1, (1, 3)), (1, (2,))):
        with capture_columns(model, answer, layer, heads) as captured:
            model(**inputs)
        chosen = maps[layer] if heads is None else maps[layer][:, list(heads)]
        torch.testing.assert_close(captured.weights, means_of_maps(chosen.mean(1), answer), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_row_alone_and_without_padding_has_the_means_that_it_has_in_a_batch() -> None:
    inputs, _ = padded("left")
    answer, model = answer_of(inputs), make("gpt_neox")
    with capture_columns(model, answer) as captured:
        model(**inputs)
    for b in range(3):
        valid = inputs["attention_mask"][b].bool()
        with capture_columns(model, answer[b : b + 1, valid]) as alone:
            model(input_ids=inputs["input_ids"][b : b + 1, valid])
        torch.testing.assert_close(captured.weights[b, valid], alone.weights[0], atol=1e-5, rtol=0)
        assert (captured.weights[b, ~valid] == 0).all()


def random_case(case: int) -> tuple[CapturedColumns, dict[str, Any], dict[str, Any], list[list[list[bool]]], Any]:
    """Draw a layer's arguments; return also what each query sees, as nested lists."""
    draw, generator = random.Random(case), torch.Generator().manual_seed(case)
    rows, groups, repeats, width = 2, draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([1, 4])
    heads, queries = groups * repeats, draw.choice([1, 5, 8])
    keys = queries + draw.choice([0, 3])
    softcap, window = draw.choice([None, 1.5]), draw.choice([None, 3])
    sinks = torch.randn(heads, generator=generator) if draw.random() < 0.4 else None
    padding = torch.rand(rows, keys, generator=generator) < 0.8
    here = torch.arange(queries)[:, None] + keys - queries
    columns = torch.arange(keys)[None]
    sees = padding[:, None] & (columns <= here) & (columns > here - (window or 99))
    scaling = draw.choice([None, 0.7])
    masks = {"bool": sees[:, None], "additive": torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]}
    kind = draw.choice(["bool", "additive", "padding"])
    mask = padding.long() if kind == "padding" else masks[kind]
    chosen = draw.choice([None, (heads - 1,), tuple(range(heads))])
    captured = CapturedColumns(torch.rand(rows, queries, generator=generator) < 0.7, chosen)
    arguments = {
        "query": torch.randn(rows, heads, queries, width, generator=generator),
        "key": torch.randn(rows, groups, keys, width, generator=generator),
        "mask": mask,
        "options": {"scaling": scaling, "softcap": softcap, "s_aux": sinks, "sliding_window": window},
    }
    options = {"scaling": scaling or width**-0.5, "softcap": softcap}
    return captured, arguments, options, sees.tolist(), sinks


@pytest.mark.parametrize("case", range(150))
def test_the_means_equal_the_slow_loops(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_columns, "BLOCK", [1, 60, 2**22][case % 3])
    captured, arguments, options, visible, sinks = random_case(case)
    show(captured, nn.Identity(), *(arguments[name] for name in ("query", "key", "mask", "options")))
    query, key = arguments["query"].double(), arguments["key"].double()
    for b in range(2):

        def sees(q: int, k: int, b: int = b) -> bool:
            return visible[b][q][k]

        mean = slow_mean_map(query[b], key[b], captured.heads, sees, sinks, **options)
        counted = [q for q, counts in enumerate(captured.rows[b].tolist()) if counts]
        wanted = reference.column_means(mean, counted, sees)
        assert captured.weights[b].tolist() == pytest.approx(wanted, abs=1e-5)


def arguments_of(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Query and key of one head whose map is these rows on the last keys; what they lack of 1 is on a first key."""
    tokens = len(rows)
    logs = torch.full((tokens, tokens + 1), -1e4)
    for q, row in enumerate(rows):
        logs[q, 0] = math.log(1 - sum(row)) if sum(row) < 1 else -1e4
        logs[q, 1 : len(row) + 1] = torch.tensor(row).log()
    return logs[None, None], torch.eye(tokens + 1)[None, None]


# abc.md section 2: three rows of generation; and a fourth, which a teacher-forced pass has besides.
VECTOR = [[0.5], [0.4, 0.1], [0.3, 0.1, 0.1], [0.2, 0.1, 0.2, 0.3]]
# Columns over all rows: (.5+.4+.3+.2)/4, (.1+.1+.1)/3, (.1+.2)/2, .3/1; sum .9.
TEACHER = {"mean": [0.35 / 0.9, 0.1 / 0.9, 0.15 / 0.9, 0.3 / 0.9], "last": [0.25, 0.125, 0.25, 0.375]}
OFFICIAL = {"mean": [0, 2 / 3, 1 / 6, 1 / 6], "last": [0, 0.6, 0.2, 0.2]}
GENERATED = {"mean": [2 / 3, 1 / 6, 1 / 6, 0], "last": [0.6, 0.2, 0.2, 0]}


class OneLayer(nn.Module):
    """A model of nothing but an attention layer that is called with given queries and keys."""

    class Attention(nn.Module):
        """Found by its name and number."""

        layer_idx = 0

    def __init__(self) -> None:
        super().__init__()
        self.attention = OneLayer.Attention()


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize(
    ("legacy", "shift", "wanted"), [(False, False, TEACHER), (True, True, OFFICIAL), (True, False, GENERATED)]
)
def test_the_vectors_of_the_document(mode: Any, legacy: bool, shift: bool, wanted: dict[str, list[float]]) -> None:
    """abc.md section 2: from a map to alpha, teacher-forced, as released, and correct over the rows of generation."""
    request = PolicyAttention(mode=mode, legacy_shift=legacy).needs.policy_attention
    assert request is not None
    query, key = arguments_of(VECTOR)
    model, answer = OneLayer(), torch.ones(1, 4, dtype=torch.bool)
    with capture_attention(model, request, answer) as captured:
        show(captured, model.attention, query, key, None, {"scaling": 1.0})
    redistribution = PolicyAttention(beta=1.0, mode=mode, legacy_shift=shift)
    scores = Scores(scores=torch.ones(1), policy_attention=captured.weights[:, 1:])
    alpha = redistribution(random_rollout(mask_of_lengths(4)), scores)
    assert alpha.tolist()[0] == pytest.approx(wanted[mode], abs=1e-6)


@pytest.mark.parametrize("case", range(30))
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_the_shift_equals_the_released_weights(mode: Any, case: int) -> None:
    draw = random.Random(case)
    rows = []
    for q in range(draw.randint(2, 7)):
        row = [draw.random() + 0.01 for _ in range(q + 1)]
        rows.append([x / (sum(row) + draw.random()) for x in row])
    request = PolicyAttention(mode=mode, legacy_shift=True).needs.policy_attention
    assert request is not None
    query, key = arguments_of(rows)
    model = OneLayer()
    with capture_attention(model, request, torch.ones(1, len(rows), dtype=torch.bool)) as captured:
        show(captured, model.attention, query, key, None, {"scaling": 1.0})
    scores = Scores(scores=torch.ones(1), policy_attention=captured.weights[:, 1:])
    alpha = PolicyAttention(beta=1.0, mode=mode, legacy_shift=True)(random_rollout(mask_of_lengths(len(rows))), scores)
    wanted = reference.normalised(reference.official_abc_d(rows[:-1], mode))
    assert alpha.tolist()[0] == pytest.approx(wanted, abs=1e-5)


def test_a_mask_of_numbers_is_refused() -> None:
    """As tokenizers give it: `~` of numbers would be no mask. (In tests, shapes and types are checked even sooner.)"""
    with pytest.raises(ValueError, match=r"torch.int64; give a bool one, such as mask.bool\(\)"):
        attention_columns.check_is_bool(torch.ones(1, 4, dtype=torch.long))


@torch.no_grad()
def test_no_tensor_of_the_size_of_the_attention_map_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """abc.md section 2: O(T) memory beside a block."""
    tokens = 1024
    long: dict[str, Any] = GROUPED | {"vocab_size": 8, "num_hidden_layers": 1, "max_position_embeddings": tokens}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**long), attn_implementation="sdpa").eval()
    ids = torch.ones(1, tokens, dtype=torch.long)
    monkeypatch.setattr(attention_columns, "BLOCK", tokens * 32)
    with LargestTensor() as largest, capture_columns(model, ids.bool()) as captured:
        model(ids, logits_to_keep=1, use_cache=False)
    assert captured.weights.shape == (1, tokens)
    assert largest.elements < tokens * tokens // 8


@torch.no_grad()
def test_other_masks_give_the_same_means() -> None:
    """Flash attention's padding mask of two dimensions, and flex attention's block mask."""

    def kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        causal = visible_keys(torch.arange(TOKENS), TOKENS, causal=True, window=options["sliding_window"])
        full = causal[None, None] if mask is None else causal & mask[:, None, None].bool()
        return sdpa_attention_forward(module, query, key, value, full, scaling=options["scaling"])

    inputs, _ = padded("left")
    answer, model = answer_of(inputs), make("mistral")
    with capture_columns(model, answer) as wanted:
        model(**inputs)
    ALL_ATTENTION_FUNCTIONS["padding_only"] = kernel
    AttentionMaskInterface.register("padding_only", flash_attention_mask)
    model.config._attn_implementation = "padding_only"
    try:
        with capture_columns(model, answer) as captured:
            model(**inputs)
    finally:
        del ALL_ATTENTION_FUNCTIONS["padding_only"]
        AttentionMaskInterface._global_mapping.pop("padding_only")
    torch.testing.assert_close(captured.weights, wanted.weights, atol=1e-5, rtol=0)

    padding = inputs["attention_mask"].bool()
    block = create_block_mask(
        lambda row, _, query, key: (key <= query) & padding[row, key], B=3, H=None, Q_LEN=20, KV_LEN=20, device="cpu"
    )
    query, key = torch.randn(2, 3, 2, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    dense = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & padding[:, None, None]
    found = [CapturedColumns(answer), CapturedColumns(answer)]
    for one, mask in zip(found, (block, dense), strict=True):
        show(one, nn.Identity(), query, key, mask, {})
    torch.testing.assert_close(found[0].weights, found[1].weights, atol=0, rtol=0)


def test_rows_that_do_not_fit_the_input_are_refused() -> None:
    model = make("llama")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"rows has shape \(3, 4\), the model's input \(3, 20\)"),
        capture_columns(model, torch.ones(3, 4, dtype=torch.bool)),
    ):
        model(**padded("right")[0])


@torch.no_grad()
def test_without_any_row_every_mean_is_zero() -> None:
    inputs, _ = padded("left")
    model = make("llama")
    nothing = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    with capture_attention(model, AttentionRequest(row="mean"), nothing) as captured:
        model(**inputs)
    assert torch.equal(captured.weights, torch.zeros(3, TOKENS))
