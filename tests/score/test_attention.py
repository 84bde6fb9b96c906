"""The captured row equals eager attention for every family, and capturing leaves the model as it was."""

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2

from apportion.batch import AttentionRequest
from apportion.score.attention import CapturedRow, capture_row, check_request
from apportion.score.attention_row import attention_row, mask_rows, visible_keys
from apportion.score.attention_tap import find_attention
from attention_maps import (
    EAGER,
    GROUPED,
    LAYER,
    LENGTHS,
    SDPA,
    TAPPED,
    TOKENS,
    VOCABULARY,
    LargestTensor,
    dense_maps,
    eager_row,
    make,
    padded,
    recorded,
)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SDPA + EAGER)
@torch.no_grad()
def test_the_row_equals_eager_output_attentions(family: str, side: str) -> None:
    inputs, last = padded(side)
    model = make(family)
    with capture_row(model, last) as captured:
        model(**inputs)
    expected = eager_row(make(family, "eager"), inputs, LAYER.get(family, 2), last)
    assert captured.row.dtype == torch.float32
    torch.testing.assert_close(captured.row, expected, atol=1e-5, rtol=0)
    assert captured.row.std(dim=1).min() > 1e-3  # uniform rows would prove nothing


@pytest.mark.parametrize("family", [family for family in TAPPED if family in EAGER])
@torch.no_grad()
def test_a_kernel_that_shows_no_map_gives_the_same_row_with_softcap_and_sinks(family: str) -> None:
    inputs, last = padded("left")
    model = make(family)
    with recorded(model, family, LAYER.get(family, 2)), capture_row(model, last) as captured:
        model(**inputs)
    expected = eager_row(model, inputs, LAYER.get(family, 2), last)
    torch.testing.assert_close(captured.row, expected, atol=1e-5, rtol=0)
    assert not torch.equal(captured.row, expected)  # it was computed, not taken from the map


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", TAPPED)
@torch.no_grad()
def test_the_row_of_a_bfloat16_model_is_the_float32_softmax_of_its_own_queries_and_keys(family: str, side: str) -> None:
    # As fast kernels, the tap has the queries and keys in bfloat16 and does not round what it makes of them. An eager
    # model does round, and differs by that in every layer.
    inputs, last = padded(side)
    model = make(family, dtype=torch.bfloat16)
    with recorded(model, family, LAYER.get(family, 2)) as seen, capture_row(model, last) as captured:
        model(**inputs)
    expected = dense_maps(seen)[torch.arange(3), :, last].mean(dim=1)
    torch.testing.assert_close(captured.row, expected, atol=1e-5, rtol=0)
    if family in SDPA:  # under the model's own kernel too
        with capture_row(model, last) as captured:
            model(**inputs)
        torch.testing.assert_close(captured.row, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SDPA + EAGER)
@torch.no_grad()
def test_the_row_of_an_eager_bfloat16_model_equals_its_output_attentions(family: str, side: str) -> None:
    inputs, last = padded(side)
    model = make(family, "eager", dtype=torch.bfloat16)
    with capture_row(model, last) as captured:
        model(**inputs)
    expected = eager_row(model, inputs, LAYER.get(family, 2), last)
    torch.testing.assert_close(captured.row, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SDPA)
@torch.no_grad()
def test_in_bfloat16_a_fast_kernel_and_eager_differ_by_rounding_alone(family: str, side: str) -> None:
    # Here 1e-5 cannot be: eager is that far from float32 itself, by its rounding of the scores and of each layer below.
    inputs, last = padded(side)
    model = make(family, dtype=torch.bfloat16)
    with capture_row(model, last) as captured:
        model(**inputs)
    rounded = eager_row(make(family, "eager", torch.bfloat16), inputs, LAYER.get(family, 2), last)
    exact = eager_row(make(family, "eager"), inputs, LAYER.get(family, 2), last)
    torch.testing.assert_close(captured.row, rounded, atol=2e-2, rtol=0)
    assert (rounded - exact).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj"])
@torch.no_grad()
def test_capturing_leaves_the_logits_the_same_to_the_bit(family: str) -> None:
    inputs, last = padded("left")
    model = make(family)
    before = model(**inputs).logits
    with capture_row(model, last):
        during = model(**inputs).logits
    assert torch.equal(before, during)
    assert torch.equal(before, model(**inputs).logits)


@torch.no_grad()
def test_every_layer_can_be_chosen_also_from_the_end() -> None:
    inputs, last = padded("right")
    model, eager = make("mistral"), make("mistral", "eager")
    for layer in (-3, -1, 0, 1, 2):
        with capture_row(model, last, layer=layer) as captured:
            model(**inputs)
        torch.testing.assert_close(captured.row, eager_row(eager, inputs, layer, last), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_default_layer_sees_what_the_last_sliding_layer_of_gemma3_cannot() -> None:
    inputs, last = padded("right")
    model = make("gemma3")
    with capture_row(model, last) as full:
        model(**inputs)
    with capture_row(model, last, layer=2) as sliding:
        model(**inputs)
    assert (full.row[0] > 0).all()
    assert (sliding.row[0, :14] == 0).all()
    assert (sliding.row[0, 14:] > 0).all()


@torch.no_grad()
def test_the_row_is_read_where_the_classification_head_reads() -> None:
    config = LlamaConfig(**GROUPED, initializer_range=0.3)
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    inputs, last = padded("right")
    with capture_row(model, last) as captured:
        scores = model(**inputs).logits
    for row, length in enumerate(LENGTHS):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, :length]}
        with capture_row(model, torch.tensor([length - 1])) as single:
            torch.testing.assert_close(model(**alone).logits, scores[row : row + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(captured.row[row : row + 1, :length], single.row, atol=1e-6, rtol=0)
        assert (captured.row[row, length:] == 0).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
@torch.no_grad()
def test_a_model_inside_peft_is_captured_as_the_model_itself() -> None:
    inputs, last = padded("left")
    plain = make("llama")
    with capture_row(plain, last) as expected:
        plain(**inputs)
    adapted = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with capture_row(adapted, last) as captured:
        adapted(**inputs)
    torch.testing.assert_close(captured.row, expected.row, atol=0, rtol=0)


@torch.no_grad()
def test_with_a_cache_the_row_covers_the_cached_keys() -> None:
    model = make("llama")
    input_ids = padded("right")[0]["input_ids"][:1]
    with capture_row(model, torch.tensor([TOKENS - 1])) as whole:
        model(input_ids)
    for split in (12, TOKENS - 1):
        cache = model(input_ids[:, :split], use_cache=True).past_key_values
        with capture_row(model, torch.tensor([TOKENS - 1 - split])) as continued:
            model(input_ids[:, split:], past_key_values=cache)
        torch.testing.assert_close(continued.row, whole.row, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_kernel_with_a_padding_mask_of_two_dimensions_gives_the_same_row() -> None:
    # As flash attention: its mask builder, and a kernel that applies causality and window by itself.
    def kernel(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        causal = visible_keys(torch.arange(TOKENS), TOKENS, causal=True, window=options["sliding_window"])
        full = causal[None, None] if mask is None else causal & mask[:, None, None].bool()
        return sdpa_attention_forward(module, query, key, value, full, scaling=options["scaling"])

    ALL_ATTENTION_FUNCTIONS["padding_only"] = kernel
    AttentionMaskInterface.register("padding_only", flash_attention_mask)
    model, eager = make("mistral"), make("mistral", "eager")
    model.config._attn_implementation = "padding_only"
    try:
        for side in ("left", "right"):
            inputs, last = padded(side)
            with capture_row(model, last) as captured:
                model(**inputs)
            torch.testing.assert_close(captured.row, eager_row(eager, inputs, 2, last), atol=1e-5, rtol=0)
    finally:
        del ALL_ATTENTION_FUNCTIONS["padding_only"]
        AttentionMaskInterface._global_mapping.pop("padding_only")


def test_a_flex_block_mask_hides_the_same_keys_as_a_bool_mask() -> None:
    padding = padded("left")[0]["attention_mask"].bool()

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - flex passes the head
        return (key <= query) & padding[row, key]

    read_index = torch.tensor([19, 14, 12])
    block = create_block_mask(visible, B=3, H=None, Q_LEN=TOKENS, KV_LEN=TOKENS, device="cpu")
    dense = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & padding[:, None, None]
    expected = mask_rows(dense, nn.Identity(), read_index[:, None], TOKENS, TOKENS, {})
    assert torch.equal(mask_rows(block, nn.Identity(), read_index[:, None], TOKENS, TOKENS, {}), expected)


def test_sequences_packed_for_flash_attention_do_not_see_each_other() -> None:
    # Two sequences of 3 and 4 tokens in one row; the query at column 5 is the third of the second.
    attention: Any = nn.Module()
    attention.config = LlamaConfig()
    attention.config._attn_implementation = "flash_attention_2"
    expected = torch.tensor([[[float("-inf")] * 3 + [0.0] * 3 + [float("-inf")]]])
    for options in (
        {"cu_seq_lens_k": torch.tensor([0, 3, 7], dtype=torch.int32)},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])},
    ):
        assert torch.equal(mask_rows(None, attention, torch.tensor([[5]]), 7, 7, options)[:, :, 0], expected)


def test_a_window_counts_the_querys_own_key() -> None:
    # Window 2 at column 3: columns 2 and 3.
    seen = visible_keys(torch.tensor([3]), 5, causal=True, window=2)
    assert seen.tolist() == [[False, False, True, True, False]]
    with pytest.raises(ValueError, match="bidirectional window of 2 keys"):
        visible_keys(torch.tensor([3]), 5, causal=False, window=2)


def test_a_row_by_hand() -> None:
    # One head, width 1, scaling 1: scores ln 1, ln 2, ln 5 and a sink ln 2 give 1/10, 2/10, 5/10; the sink takes 2/10.
    key = torch.tensor([1.0, 2.0, 5.0, 9.0]).log().view(1, 1, 4, 1)
    bias = torch.tensor([[[0.0, 0.0, 0.0, -torch.inf]]])
    row = attention_row(
        torch.ones(1, 1, 1, 1), key, torch.tensor([0]), bias, scaling=1.0, sinks=torch.tensor([2.0]).log()
    )
    torch.testing.assert_close(row, torch.tensor([[0.1, 0.2, 0.5, 0.0]]))


def test_a_query_that_sees_nothing_has_a_row_of_zeros() -> None:
    bias = torch.full((1, 1, 4), -torch.inf)
    row = attention_row(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 4, 3), torch.tensor([0]), bias)
    assert torch.equal(row, torch.zeros(1, 4))


@torch.no_grad()
def test_no_tensor_of_the_size_of_the_attention_map_is_made() -> None:
    """abc.md section 10 row 19, its peak of memory."""
    tokens = 1024
    long: dict[str, Any] = GROUPED | {"vocab_size": 8, "num_hidden_layers": 1, "max_position_embeddings": tokens}
    config = LlamaConfig(**long)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    input_ids = torch.ones(1, tokens, dtype=torch.long)
    with LargestTensor() as largest, capture_row(model, torch.tensor([tokens - 1])) as captured:
        model(input_ids, logits_to_keep=1, use_cache=False)
    assert captured.row.shape == (1, tokens)
    assert largest.elements < tokens * tokens // 8
    with LargestTensor() as dense:
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()(input_ids, logits_to_keep=1)
    assert dense.elements >= 4 * tokens * tokens  # what the probe would have seen


@torch.no_grad()
def test_a_hooked_layer_drops_its_map() -> None:
    inputs, last = padded("right")
    model = make("gptj")
    kept: list[Any] = []
    with capture_row(model, last):
        handle = find_attention(model).register_forward_hook(lambda _module, _inputs, output: kept.append(output[1]))
        model(**inputs)
    handle.remove()
    assert kept == [None]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_outside_of_the_context_the_function_is_the_original_also_after_an_exception(family: str) -> None:
    inputs, last = padded("right")
    model = make(family)
    attention = find_attention(model)
    names = vars(modeling_gemma2) if family == "gemma2" else ALL_ATTENTION_FUNCTIONS
    key = "eager_attention_forward" if family == "gemma2" else "sdpa"
    original = names[key]
    attributes = set(vars(attention))
    with capture_row(model, last):
        assert names[key] is not original
    with pytest.raises(IndexError), capture_row(model, last):
        model(inputs["input_ids"] + VOCABULARY)
    assert names[key] is original
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    assert set(vars(attention)) == attributes
    with capture_row(model, last) as captured:
        pass
    model(**inputs)
    with pytest.raises(RuntimeError, match="no attention row was captured"):
        _ = captured.row


@torch.no_grad()
def test_a_function_that_was_overridden_before_the_capture_is_overridden_after_it() -> None:
    def own(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with capture_row(make("llama"), torch.tensor([0])):
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@torch.no_grad()
def test_two_models_are_captured_at_once_and_other_models_are_left_alone() -> None:
    inputs, last = padded("right")
    first, second, other = make("llama"), make("qwen2"), make("mistral")
    with capture_row(first, last) as outer, capture_row(second, last) as inner:
        other(**inputs)
        with pytest.raises(RuntimeError, match="no attention row"):
            _ = outer.row
        first(**inputs)
        second(**inputs)
    torch.testing.assert_close(outer.row, eager_row(make("llama", "eager"), inputs, 2, last), atol=1e-5, rtol=0)
    torch.testing.assert_close(inner.row, eager_row(make("qwen2", "eager"), inputs, 2, last), atol=1e-5, rtol=0)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@torch.no_grad()
def test_captures_that_end_in_the_order_they_began_restore_the_function() -> None:
    first, second = capture_row(make("llama"), torch.tensor([0])), capture_row(make("qwen2"), torch.tensor([0]))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    second.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_threads_that_capture_models_of_their_own_do_not_disturb_each_other() -> None:
    inputs, last = padded("right")
    models = [make("llama") for _ in range(2)]
    rows: dict[int, Tensor] = {}

    def run(number: int) -> None:
        for _ in range(5):
            with torch.no_grad(), capture_row(models[number], last) as captured:
                models[number](**inputs)
            rows[number] = captured.row

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(rows[0], rows[1])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@torch.no_grad()
def test_a_compiled_model_is_captured() -> None:
    inputs, last = padded("right")
    model = make("llama")
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    compiled(**inputs)
    with capture_row(compiled, last) as captured:
        compiled(**inputs)
    torch.testing.assert_close(captured.row, eager_row(make("llama", "eager"), inputs, 2, last), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_same_layer_is_not_captured_twice_at_once() -> None:
    model = make("llama")
    last = torch.tensor([0])
    with (
        capture_row(model, last),
        pytest.raises(RuntimeError, match="being captured already"),
        capture_row(model, last),
    ):
        pass
    with capture_row(model, last):
        pass


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_a_model_that_drops_out_is_refused() -> None:
    """abc.md section 10 row 10: weights were dropped out from the second step on."""
    last, adapters = torch.tensor([0]), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
    for model in make("gpt2"), get_peft_model(make("llama"), adapters):
        with pytest.raises(RuntimeError, match=r"drops out.*model\.eval"), capture_row(model.train(), last):
            pass
    with capture_row(make("llama").train(), last):  # no dropout in it
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_without_the_capture(checkpointing: bool) -> None:
    """abc.md section 9 (e): gradient checkpointing runs the layers again, outside of the capture."""
    inputs, last = padded("left")
    gradients = []
    for captured in (False, True):
        model = make("llama").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with capture_row(model, last) if captured else nullcontext() as row:
            loss = model(**inputs, use_cache=False).logits.square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        if row is not None:
            assert not row.row.requires_grad
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
@torch.no_grad()
def test_some_heads_are_averaged(family: str) -> None:
    inputs, last = padded("right")
    maps = make(family, "eager")(**inputs, output_attentions=True).attentions[2]
    wanted = maps[torch.arange(3), :, last][:, [3, 0]].float().mean(1)
    model = make(family)
    with capture_row(model, last, heads=(3, 0)) as captured:
        model(**inputs)
    torch.testing.assert_close(captured.row, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"heads is \(0, 4\), the attention layer has heads 0 to 3"):
        check_request(model, AttentionRequest(heads=(0, 4)))
    with (
        pytest.raises(ValueError, match=r"heads is \(4,\), the attention layer has heads 0 to 3"),
        capture_row(model, last, heads=(4,)),
    ):
        model(**inputs)


def test_a_model_that_shows_no_attention_is_refused_by_a_trial_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"FalconAttention returned no attention map: load .*'eager'.*config\.json"):
        check_request(make("falcon", "sdpa"), AttentionRequest())
    check_request(make("falcon", "eager"), AttentionRequest())
    with pytest.raises(ValueError, match=r"Dropout drops out"):
        check_request(make("gpt2").train(), AttentionRequest())


@torch.no_grad()
def test_a_layer_that_is_not_there_is_refused() -> None:
    for layer in (3, -4):
        with pytest.raises(ValueError, match=rf"layer {layer} is not .* \[0, 1, 2\]"):
            find_attention(make("llama"), layer)
    with pytest.raises(ValueError, match="Linear has no attention layer"):
        find_attention(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="several modules are layer 2"):
        find_attention(nn.ModuleList([make("llama"), make("qwen2")]))


@pytest.mark.parametrize(
    ("read_index", "message"), [([1, 2], "2 entries, the model's input has 3 rows"), ([1, 2, 20], "columns 0 to 19")]
)
@torch.no_grad()
def test_a_read_index_that_does_not_fit_the_input_is_refused(read_index: list[int], message: str) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match=message), capture_row(model, torch.tensor(read_index)):
        model(**padded("right")[0])


@torch.no_grad()
def test_a_layer_that_forms_no_map_asks_for_eager() -> None:
    model = make("falcon", "sdpa")
    with pytest.raises(RuntimeError, match="attn_implementation='eager'"), capture_row(model, torch.tensor([0])):
        model(torch.ones(1, 4, dtype=torch.long))


def test_reading_before_the_forward_pass_is_refused() -> None:
    with pytest.raises(RuntimeError, match="run the model inside"):
        _ = CapturedRow(torch.tensor([0])).row
