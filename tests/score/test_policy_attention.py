"""The policy's attention while it samples is that of eager maps of each finished text, by any blocks and kernels."""

import functools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import reference
from apportion import AttentionRequest, PolicyAttention, Sampling, Scores
from apportion.models import Policy
from apportion.rollout import Responses, sample
from apportion.score import policy_attention
from apportion.score.attention_row import visible_keys
from apportion.score.attention_tap import AttentionCall, Listener, Unseen
from apportion.score.policy_attention import SampledAttention
from attention_maps import EAGER, HOOKED, LAYER, SDPA, LargestTensor, make, slow_mean_map
from batches import mask_of_lengths, random_rollout
from families import causal, prompts_of

WINDOW, LONGEST = 6, 20
SAMPLING = Sampling(max_new_tokens=LONGEST, temperature=0.9)
# So many tokens end a response that the lengths differ, and rows leave the batch.
ENDS = tuple(range(2, 8))
PROMPTS = ([15, 16, 17, 18, 19], [30, 31, 32], [40], [23, 24, 25, 26])
MEAN, LAST = AttentionRequest(row="mean"), AttentionRequest(row="last")


def respond(
    model: nn.Module | Policy,
    request: AttentionRequest | None,
    *,
    prompts: tuple[list[int], ...] = PROMPTS * 3,
    rows: slice = slice(None),
    sampling: Sampling = SAMPLING,
    ends: tuple[int, ...] = ENDS,
) -> Responses:
    """Responses to some of the prompts; a prompt draws the same, whichever are with it."""
    longest = sampling.max_new_tokens
    uniforms = torch.rand(len(prompts), longest, generator=torch.Generator().manual_seed(4))[rows]
    reader = None if request is None else SampledAttention(request)
    policy = model if isinstance(model, Policy) else Policy(model, ends)
    return sample(policy, prompts_of(*prompts[rows]), sampling, uniforms, pad_id=0, reader=reader)


def attention(responses: Responses) -> Tensor:
    assert responses.attention is not None
    return responses.attention


def request_of(mode: Any, *, legacy: bool) -> AttentionRequest:
    request = PolicyAttention(mode=mode, legacy_shift=legacy).needs.policy_attention
    assert request is not None
    return request


@functools.cache
def eager(family: str) -> PreTrainedModel:
    return make(family, "eager")


def eager_maps(family: str, prompt: list[int], response: Tensor, layer: int) -> Tensor:
    """(H, n, n). Attention of a response's tokens to each other, of the finished text alone and without padding."""
    text = torch.tensor([prompt + response.tolist()])
    with torch.no_grad():
        maps = eager(family)(input_ids=text, output_attentions=True).attentions
    return maps[layer][0].float()[:, len(prompt) :, len(prompt) :]


def wanted_of(maps: Tensor, request: AttentionRequest, window: int | None) -> Tensor:
    """(n). The definition, one column at a time, of (n, n)."""
    stop, wanted = len(maps) - request.before_last, torch.zeros(len(maps))
    for j in range(stop):
        seeing = [q for q in range(j, stop) if window is None or q - j < window]
        wanted[j] = maps[seeing, j].mean() if request.row == "mean" else maps[stop - 1, j]
    return wanted


def check(family: str, found: Responses, request: AttentionRequest, layer: int, window: int | None) -> None:
    lengths = found.response_mask.sum(1)
    assert lengths.unique().numel() > 3
    assert lengths.max() > policy_attention.BLOCK
    assert lengths.min() <= 2
    assert (attention(found)[~found.response_mask] == 0).all()
    assert attention(found)[found.response_mask].std() > 1e-3  # uniform columns would prove nothing
    for b, length in enumerate(lengths.tolist()):
        maps = eager_maps(family, (PROMPTS * 3)[b], found.response_ids[b, :length], layer)
        maps = maps if request.heads is None else maps[list(request.heads)]
        wanted = wanted_of(maps.mean(0), request, window)
        torch.testing.assert_close(attention(found)[b, :length], wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("family", SDPA + EAGER)
def test_the_attention_is_that_of_eager_maps_of_each_text_alone(family: str, mode: Any, legacy: bool) -> None:
    request = request_of(mode, legacy=legacy)
    found = respond(make(family), request)
    check(family, found, request, LAYER.get(family, 2), WINDOW if family == "mistral" else None)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_an_eager_policy_shows_its_maps(family: str, mode: Any) -> None:
    request = request_of(mode, legacy=False)
    found = respond(make(family, "eager"), request)
    check(family, found, request, LAYER.get(family, 2), WINDOW if family == "mistral" else None)


@pytest.mark.parametrize(
    ("family", "layer", "heads", "window"),
    [
        ("llama", 0, None, None),
        ("llama", -1, (1, 3), None),
        ("gemma3", 2, (0,), WINDOW),  # a sliding layer, whose cache drops keys
        ("gemma2", 1, None, WINDOW),
        ("gpt_oss", -1, (2,), WINDOW),
        ("gptj", 1, (0, 2), None),
    ],
)
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_every_layer_and_head_can_be_chosen(
    family: str, layer: int, heads: tuple[int, ...] | None, window: int | None, mode: Any
) -> None:
    request = AttentionRequest(row=mode, layer=layer, heads=heads)
    check(family, respond(make(family), request), request, layer, window)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gptj"])
def test_what_is_drawn_is_the_same_with_a_reader_and_without(family: str) -> None:
    plain = respond(make(family), None)
    assert plain.attention is None
    for request in (MEAN, request_of("last", legacy=True)):
        read = respond(make(family), request)
        assert torch.equal(read.response_ids, plain.response_ids)
        torch.testing.assert_close(read.logprobs, plain.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "gptj", "bloom"])
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_a_response_alone_is_read_as_in_any_batch(family: str, mode: Any) -> None:
    request = request_of(mode, legacy=False)
    together = respond(make(family), request)
    for b in range(4):
        alone = respond(make(family), request, rows=slice(b, b + 1))
        length = alone.response_ids.shape[1]
        torch.testing.assert_close(attention(alone)[0], attention(together)[b, :length], atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_response_whose_only_token_is_no_query_has_no_attention(family: str, mode: Any) -> None:
    found = respond(make(family), request_of(mode, legacy=True), sampling=Sampling(max_new_tokens=1))
    assert found.response_ids.shape == attention(found).shape == (12, 1)
    assert (attention(found) == 0).all()
    assert (
        attention(respond(make(family), request_of(mode, legacy=False), sampling=Sampling(max_new_tokens=1))) > 0
    ).all()


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bloom"])
def test_blocks_of_any_size_give_the_same(family: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [attention(respond(make(family), request)) for request in (MEAN, LAST)]
    monkeypatch.setattr(policy_attention, "BLOCK", block)
    for request, x in zip((MEAN, LAST), wanted, strict=True):
        torch.testing.assert_close(attention(respond(make(family), request)), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["mean", "last"])
def test_a_model_without_cache_is_read_the_same(mode: Any) -> None:
    model, request = causal("llama"), request_of(mode, legacy=False)
    wanted = respond(model, request)

    class Uncached(type(model)):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )

    policy = Policy(model, ENDS)
    model.__class__ = Uncached
    found = respond(policy, request)
    assert torch.equal(found.response_ids, wanted.response_ids)
    torch.testing.assert_close(attention(found), attention(wanted), atol=1e-5, rtol=0)


def test_autocast_reads_in_float32_what_the_layer_was_given() -> None:
    wanted = respond(make("llama"), MEAN, ends=())
    with torch.autocast("cpu", torch.bfloat16):
        found = respond(make("llama"), MEAN, ends=())
    assert attention(found).dtype == torch.float32
    same = (found.response_ids == wanted.response_ids).all(1)
    assert same.any()
    torch.testing.assert_close(attention(found)[same], attention(wanted)[same], atol=0.05, rtol=0)
    assert (attention(found)[same] != attention(wanted)[same]).any()


def with_padding_mask(model: PreTrainedModel) -> None:
    """Give a model the masks of flash attention, of two dimensions or none, in a kernel that runs anywhere."""

    def kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        queries, keys = query.shape[2], key.shape[2]
        here = torch.arange(keys - queries, keys)
        visible = visible_keys(here, keys, causal=True, window=options.get("sliding_window"))
        full = visible[None, None] if mask is None else visible & mask[:, None, None, -keys:].bool()
        return sdpa_attention_forward(module, query, key, value, full, scaling=options["scaling"])

    ALL_ATTENTION_FUNCTIONS["padding_only_flash"] = kernel
    AttentionMaskInterface.register("padding_only_flash", flash_attention_mask)
    model.config._attn_implementation = "padding_only_flash"


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)], ids=["batch", "one row"])
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_the_masks_of_flash_attention_are_understood(mode: Any, rows: slice) -> None:
    request = request_of(mode, legacy=False)
    wanted, model = respond(make("llama"), request, rows=rows), make("llama")
    with_padding_mask(model)
    try:
        found = respond(model, request, rows=rows)
    finally:
        del ALL_ATTENTION_FUNCTIONS["padding_only_flash"]
        AttentionMaskInterface._global_mapping.pop("padding_only_flash")
    assert torch.equal(found.response_ids, wanted.response_ids)
    torch.testing.assert_close(attention(found), attention(wanted), atol=1e-5, rtol=0)


def show(listener: Listener, module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
    """Let a listener see a layer's arguments without a model."""
    listener.observe(AttentionCall(module=module, query=query, key=key, mask=mask, options=options))


def reader_of(request: AttentionRequest, rows: int, longest: int) -> SampledAttention:
    """A reader that has begun to look on at what is no model."""
    reader = SampledAttention(request)
    with reader.reading(OneLayer(), torch.zeros(rows, longest)):
        return reader


class OneLayer(nn.Module):
    """A model of nothing but an attention layer."""

    class Attention(nn.Module):
        """Found by its name and number."""

        layer_idx = 0
        config: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.attention = OneLayer.Attention()


Case = tuple[SampledAttention, Tensor, list[list[list[bool]]], dict[str, Any], Tensor, Tensor]


def masks_of(kind: str, sees: Tensor, padding: Tensor, first: int) -> Any:
    """The mask of one query in the form of a kernel; `sees` is (B, 1, K)."""
    if kind == "block":
        keys = sees.shape[-1]

        def mask_mod(b: Tensor, _h: Tensor, _q: Tensor, k: Tensor) -> Tensor:
            return sees[b, 0, k]

        return create_block_mask(mask_mod, len(sees), None, 1, keys, device="cpu")
    additive = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]
    return {"bool": sees[:, None], "additive": additive, "padding": padding[:, : first + 1].long()}[kind]


@pytest.mark.parametrize("case", range(150))
def test_the_attention_equals_the_slow_loops(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any mask, window, cap, sinks, rows that leave and queries that do not count, against Python's own numbers."""
    monkeypatch.setattr(policy_attention, "BLOCK", [1, 3, 8][case % 3])
    draw, generator = random.Random(case), torch.Generator().manual_seed(case)
    rows, groups, repeats, width = 3, draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([1, 4])
    heads, tokens, before = groups * repeats, draw.choice([1, 6, 11]), draw.choice([1, 3])
    keys = before + tokens
    softcap, window = draw.choice([None, 1.5]), draw.choice([None, 3])
    sinks = torch.randn(heads, generator=generator) if draw.random() < 0.4 else None
    kind = draw.choice(["bool", "additive", "padding", "block"])
    padding = torch.rand(rows, keys, generator=generator) < 0.8
    here, columns = torch.arange(keys)[:, None], torch.arange(keys)[None]
    sees = padding[:, None] & (columns <= here) & (columns > here - (window or 99))
    request = AttentionRequest(row=draw.choice(["mean", "last"]), heads=draw.choice([None, (heads - 1,)]))
    query = torch.randn(rows, heads, keys, width, generator=generator)
    key = torch.randn(rows, groups, keys, width, generator=generator)
    options = {"scaling": 0.7, "softcap": softcap, "s_aux": sinks, "sliding_window": window}
    reader, leaves_at = reader_of(request, rows, tokens), draw.randint(1, tokens)
    counts = torch.rand(rows, tokens, generator=generator) < 0.7
    counts[0, leaves_at:] = False
    model = OneLayer()
    for place in range(tokens):
        active = torch.arange(1 if place >= leaves_at else 0, rows)
        q = before + place
        trimmed = slice(max(0, q - 2), q + 1) if window and kind != "padding" and case % 2 else slice(0, q + 1)
        seen = sees[active, q : q + 1, trimmed]
        mask = masks_of(kind, seen, padding[active], q)
        show(reader, model.attention, query[active, :, q : q + 1], key[active][:, :, trimmed], mask, options)
        reader.gather(active, place, counts[active, place])
    found = reader.attention
    for b in range(rows):
        visible = sees[b].tolist()

        def see(q: int, k: int, visible: list[list[bool]] = visible) -> bool:
            return visible[q][k]

        mean = slow_mean_map(
            query[b].double(), key[b].double(), request.heads, see, sinks, scaling=0.7, softcap=softcap
        )
        counted = [before + place for place in range(tokens) if counts[b, place]]
        if request.row == "last":
            wanted = [mean[counted[-1]][j] if counted else 0.0 for j in range(keys)]
        else:
            wanted = reference.column_means(mean, counted, see)
        assert found[b].tolist() == pytest.approx(wanted[before:], abs=1e-5)


@pytest.mark.parametrize("told", ["positions", "bounds"])
def test_a_single_row_begins_where_its_positions_or_bounds_say(told: str) -> None:
    """Flash attention takes no mask for one row, and finds its beginning by the positions, or is told it."""
    model = OneLayer()
    model.attention.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    reader = reader_of(MEAN, 1, 4)
    query, key = torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2)
    for place in range(4):  # two keys of another text stand before the sequence
        last = slice(place + 2, place + 3)
        options = {
            "positions": {"position_ids": torch.tensor([[place]])},
            "bounds": {"cu_seq_lens_k": torch.tensor([0, 2, place + 3])},
        }[told]
        show(reader, model.attention, query[:, :, last], key[:, :, : place + 3], None, options)
        reader.gather(torch.arange(1), place, torch.tensor([True]))
    rows = [1, 1 / 2, 1 / 3, 1 / 4]
    wanted = [sum(rows[j:]) / (4 - j) for j in range(4)]
    assert reader.attention.tolist()[0] == pytest.approx(wanted, abs=1e-6)


def test_a_bias_of_positions_is_that_of_each_query() -> None:
    generator, tokens = torch.Generator().manual_seed(2), 5
    query, key = torch.randn(2, 2, 2, tokens, 4, generator=generator).unbind()
    bias = torch.randn(1, 2, tokens, tokens, generator=generator)
    reader = reader_of(MEAN, 2, tokens)
    for q in range(tokens):
        options = {"scaling": 1.0, "position_bias": bias[:, :, q : q + 1, : q + 1]}
        show(reader, nn.Identity(), query[:, :, q : q + 1], key[:, :, : q + 1], None, options)
        reader.gather(torch.arange(2), q, torch.ones(2, dtype=torch.bool))
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    maps = (query @ key.mT + bias).masked_fill(~causal, -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(reader.attention, maps.sum(1) / causal.sum(0), atol=1e-6, rtol=0)


def test_a_call_that_is_not_of_a_token_is_replaced_by_the_next() -> None:
    """As of a prompt that is read while the reader looks on, or of a layer that is called twice."""
    reader, ones = reader_of(MEAN, 1, 2), torch.tensor([True])
    for place in range(2):
        for stray in (True, False):
            query = torch.full((1, 1, 1, 1), 9.0 if stray else 0.0)
            key = torch.arange(place + 2.0)[None, None, :, None]
            show(reader, nn.Identity(), query, key, None, {"scaling": 1.0})
        reader.gather(torch.arange(1), place, ones)
    # A stray call that no other could have followed does not spoil the rows before it either.
    show(reader, nn.Identity(), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 7, 1), None, {"scaling": 1.0})
    show(reader, nn.Identity(), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 9, 1), None, {"scaling": 1.0})
    assert reader.attention.tolist()[0] == pytest.approx([(1 / 2 + 1 / 3) / 2, 1 / 3], abs=1e-6)
    with pytest.raises(Unseen, match="no attention row was captured"):
        reader.gather(torch.arange(1), 2, ones)


# abc.md section 2: three rows of generation; and a fourth, which a teacher-forced pass has besides.
VECTOR = [[0.5], [0.4, 0.1], [0.3, 0.1, 0.1], [0.2, 0.1, 0.2, 0.3]]
TEACHER = {"mean": [0.35 / 0.9, 0.1 / 0.9, 0.15 / 0.9, 0.3 / 0.9], "last": [0.25, 0.125, 0.25, 0.375]}
OFFICIAL = {"mean": [0, 2 / 3, 1 / 6, 1 / 6], "last": [0, 0.6, 0.2, 0.2]}


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize(("legacy", "wanted"), [(False, TEACHER), (True, OFFICIAL)])
def test_the_vectors_of_the_document(mode: Any, legacy: bool, wanted: dict[str, list[float]]) -> None:
    """abc.md section 2: from a map to alpha, teacher-forced and as released."""
    request = request_of(mode, legacy=legacy)
    reader = reader_of(request, 1, 4)
    for place, row in enumerate(VECTOR[:3] if legacy else VECTOR):
        reader.keep(torch.tensor([1 - sum(row), *row])[None, None, None])
        reader.gather(torch.arange(1), place, torch.tensor([True]))
    scores = Scores(scores=torch.ones(1), policy_attention=reader.attention)
    alpha = PolicyAttention(beta=1.0, mode=mode, legacy_shift=legacy)(random_rollout(mask_of_lengths(4)), scores)
    assert alpha.tolist()[0] == pytest.approx(wanted[mode], abs=1e-6)


def test_no_tensor_of_the_size_of_the_attention_map_is_made() -> None:
    """abc.md section 2: O(T) memory, for the maps of generation are not stored."""
    longest = 300
    model = causal("llama", hidden_size=8, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1024)
    prompts, sampling = ([5, 6], [7]), Sampling(max_new_tokens=longest)
    with LargestTensor() as largest:
        found = respond(model, MEAN, prompts=prompts, sampling=sampling, ends=())
    assert attention(found).shape == (2, longest)
    assert largest.elements < len(prompts) * longest * longest // 8


def test_a_policy_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer 3 is not an attention layer.*choose one of \[0, 1, 2\]"):
        respond(make("llama"), AttentionRequest(row="mean", layer=3))
    for family in ("llama", "gptj"):  # at the first token, not with the first block
        with pytest.raises(ValueError, match=r"heads is \(4,\).* 0 to 3"):
            respond(
                make(family), AttentionRequest(row="mean", heads=(4,)), sampling=Sampling(max_new_tokens=2), ends=()
            )
    with pytest.raises(Unseen, match="FalconAttention returned no attention map"):
        respond(make("falcon", "sdpa"), MEAN)
    model = make("gpt2")
    model.train()
    with pytest.raises(Unseen, match=r"drops out.*call model.eval\(\)"):
        respond(model, MEAN)


def test_a_reader_begins_anew_with_every_batch() -> None:
    reader, model = SampledAttention(MEAN), make("llama")
    found = []
    for prompts in (PROMPTS * 3, ([21, 22],), PROMPTS * 3):
        uniforms = torch.rand(len(prompts), LONGEST, generator=torch.Generator().manual_seed(4))
        policy = Policy(model, ENDS)
        found.append(sample(policy, prompts_of(*prompts), SAMPLING, uniforms, pad_id=0, reader=reader))
    assert attention(found[1]).shape == found[1].response_ids.shape
    assert torch.equal(attention(found[0]), attention(found[2]))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_nothing_of_the_reader_stays_with_the_model(family: str) -> None:
    model = make(family)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    wanted = respond(model, MEAN)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert torch.equal(respond(model, None).response_ids, wanted.response_ids)
    assert family in HOOKED or not hooks[0]


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_compiled_policy_is_read(family: str) -> None:
    short = Sampling(max_new_tokens=policy_attention.BLOCK + 1)
    wanted, model = respond(make(family), MEAN, sampling=short), make(family)
    model.base_model.compile(backend="eager")
    found = respond(model, MEAN, sampling=short)
    assert torch.equal(found.response_ids, wanted.response_ids)
    torch.testing.assert_close(attention(found), attention(wanted), atol=1e-5, rtol=0)
