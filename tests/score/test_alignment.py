"""Weights and scores are carried between tokenisations of one text without loss, and inputs hold what they should."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from apportion.score.alignment import Alignment, Template, align, concatenation, transfer_weights
from apportion.score.attention import capture_row
from apportion.score.spans import Span, token_spans

TEXT = "The été was 🎉 good"


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, no BOS, pad = EOS."""
    mark = "<|endoftext|>"
    path = str(shared / "data" / "gpt2_tokenizer" / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=path, eos_token=mark, pad_token=mark)


@pytest.fixture(scope="module")
def stories(shared: Path) -> PreTrainedTokenizerFast:
    """Sentencepiece BPE with byte fallback, puts a BOS, its decoder strips one leading space."""
    return AutoTokenizer.from_pretrained(shared / "data" / "stories260k")


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    """Continuation marks and tidied punctuation: a joining rule that only the decoder knows."""
    vocabulary = ["<pad>", "<unk>", "play", "##ing", "a", "film", ".", "##s"]
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", unk_token="<unk>")


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return "".join(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def ids_of(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    assert isinstance(ids, list)
    assert None not in ids, "a piece is not in the vocabulary"
    return ids


def texts_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[bytes]:
    """Cut the decoded text at the spans."""
    data = decoded(tokenizer, ids).encode()
    return [data[start:end] for start, end in token_spans(tokenizer, ids)]


def aligned(
    policy: PreTrainedTokenizerFast,
    reward: PreTrainedTokenizerFast,
    rows: list[tuple[list[int], list[int]]],
    template: Template = concatenation,
    prompts: list[str] | None = None,
    close_with_eos: bool = True,
) -> Alignment:
    """Align rows of prompt and response ids, padded as a rollout pads them."""
    prompt_width, width = (max(len(row[side]) for row in rows) for side in (0, 1))
    return align(
        policy_tokenizer=policy,
        reward_tokenizer=reward,
        prompt_ids=torch.tensor([[0] * (prompt_width - len(prompt)) + prompt for prompt, _ in rows]),
        prompt_mask=torch.tensor([[False] * (prompt_width - len(p)) + [True] * len(p) for p, _ in rows]),
        response_ids=torch.tensor([row + [0] * (width - len(row)) for _, row in rows]),
        response_mask=torch.tensor([[True] * len(row) + [False] * (width - len(row)) for _, row in rows]),
        template=template,
        prompts=prompts,
        close_with_eos=close_with_eos,
    )


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def end(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    assert isinstance(tokenizer.eos_token_id, int)
    return [tokenizer.eos_token_id]


def names(tokenizer: PreTrainedTokenizerFast, alignment: Alignment, row: int = 0) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(alignment.input_ids[row][alignment.attention_mask[row]].tolist()))


def read(alignment: Alignment, row: int = 0) -> list[int]:
    return alignment.prefix_index[row].tolist()


def columns_as_weights(alignment: Alignment) -> Tensor:
    """One-hot rows are the transfer matrix: [k, t] is what token t gets of column k (of a batch of one)."""
    size = alignment.input_ids.shape[1]
    return torch.stack([alignment.to_policy(torch.eye(size)[k : k + 1])[0] for k in range(size)])


# Spans of sampled ids


def test_byte_level_tokens_that_split_a_character_have_spans_inside_of_it(gpt2: PreTrainedTokenizerFast) -> None:
    ids = gpt2.encode(TEXT)
    assert b"".join(texts_of(gpt2, ids)) == TEXT.encode()
    assert b"\xf0\x9f" in b" ".join(texts_of(gpt2, ids)).split(b" ")
    assert texts_of(gpt2, gpt2.encode("🎉")) == [b"\xf0\x9f", b"\x8e", b"\x89"]


def test_sentencepiece_tokens_with_byte_fallback_have_spans_inside_of_characters(
    stories: PreTrainedTokenizerFast,
) -> None:
    # BOS is special; the decoder strips the space that the tokenizer put before the first word.
    ids = stories.encode("The 🎉é")
    assert texts_of(stories, ids) == [b"", b"The", b" ", b"\xf0", b"\x9f", b"\x8e", b"\x89", "é".encode()]


def test_only_one_leading_space_is_stripped(stories: PreTrainedTokenizerFast) -> None:
    space, word = ids_of(stories, "\u2581", "\u2581a")
    assert texts_of(stories, [space, word]) == [b"", b" a"]
    assert texts_of(stories, [word, word]) == [b"a", b" a"]


def test_spans_follow_the_sampled_tokens_where_these_are_not_canonical(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast
) -> None:
    for tokenizer, pieces in ((gpt2, ["f", "il", "m", "Ġgood"]), (stories, ["f", "i", "l", "m", "\u2581", "g", "o"])):
        ids = ids_of(tokenizer, *pieces)
        text = decoded(tokenizer, ids)
        assert plain(tokenizer, text) != ids
        expected = [piece.replace("Ġ", " ").replace("\u2581", " ").encode() for piece in pieces]
        assert texts_of(tokenizer, ids) == expected


def test_bytes_that_are_no_character_share_the_replacement_character(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast
) -> None:
    # Byte-level: the two tokens of a cut emoji (3 of 4 bytes) make one U+FFFD of 3 bytes, 2 and 1 of which are theirs.
    assert texts_of(gpt2, gpt2.encode("🎉")[:2] + gpt2.encode("x")) == [b"\xef\xbf", b"\xbd", b"x"]
    # Byte fallback: one U+FFFD a token, in the whole run.
    run = ids_of(stories, "<0xC3>", "<0xA9>", "<0xC3>", "\u2581a")
    assert texts_of(stories, run) == ["\ufffd".encode()] * 3 + [b" a"]


def test_special_tokens_have_empty_spans_where_they_stand(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, "<s>", "film", "</s>", "is", "<unk>", "good", "</s>")
    assert token_spans(tokenizer, ids) == [(0, 0), (0, 4), (4, 4), (4, 7), (7, 7), (7, 12), (12, 12)]


def test_words_joined_by_spaces_own_the_space_before_them(tokenizer: PreTrainedTokenizerFast) -> None:
    assert texts_of(tokenizer, plain(tokenizer, "the film is good")) == [b"the", b" film", b" is", b" good"]


def test_an_unknown_joining_rule_is_read_off_the_decoder(wordpiece: PreTrainedTokenizerFast) -> None:
    ids = ids_of(wordpiece, "a", "play", "##ing", "film", "##s")
    assert texts_of(wordpiece, ids) == [b"a", b" play", b"ing", b" film", b"s"]
    ids = ids_of(wordpiece, "<pad>", "##s", "film", ".", "##s", "<pad>", "##s", ".")
    assert texts_of(wordpiece, ids) == [b"", b"##s", b" film", b".", b"s", b"", b"s", b"."]


def test_joining_that_depends_on_the_token_before_is_read_off_every_prefix(wordpiece: PreTrainedTokenizerFast) -> None:
    """A decoder of speech writes what is repeated once."""
    speech = PreTrainedTokenizerFast(tokenizer_object=wordpiece.backend_tokenizer, pad_token="<pad>")
    speech.backend_tokenizer.decoder = decoders.CTC(pad_token="<pad>", word_delimiter_token=".", cleanup=False)
    ids = ids_of(speech, "a", "a", "film", "film", "film", ".", "play")
    assert texts_of(speech, ids) == [b"a", b"", b"film", b"", b"", b".", b"play"]


@given(ids=st.lists(st.integers(0, 7), max_size=12))
def test_tokens_joined_one_by_one_are_those_of_every_prefix(wordpiece: PreTrainedTokenizerFast, ids: list[int]) -> None:
    spans, said = token_spans(wordpiece, ids), decoded(wordpiece, ids).encode()
    for place, (_, end) in enumerate(spans):
        assert said[:end] == decoded(wordpiece, ids[: place + 1]).encode()


def test_no_tokens_have_no_spans(gpt2: PreTrainedTokenizerFast, wordpiece: PreTrainedTokenizerFast) -> None:
    assert token_spans(gpt2, []) == token_spans(wordpiece, []) == []


@given(data=st.data())
def test_any_ids_are_covered_in_order_and_without_gaps(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    for tokenizer in (gpt2, stories):
        ids = data.draw(st.lists(st.integers(0, min(len(tokenizer), 600) - 1), max_size=30))
        spans = token_spans(tokenizer, ids)
        text = decoded(tokenizer, ids)
        assert all(before[1] == after[0] for before, after in pairwise([(0, 0), *spans]))
        assert (spans[-1][1] if spans else 0) == len(text.encode())


# Weights


def test_weights_move_by_shared_bytes() -> None:
    # .6 * 2/4 = .30;  .6 * 2/4 + .4 * 2/5 = .46;  .4 * 3/5 = .24
    moved = transfer_weights(torch.tensor([0.6, 0.4]), [(0, 4), (4, 9)], [(0, 2), (2, 6), (6, 9)])
    torch.testing.assert_close(moved, torch.tensor([0.30, 0.46, 0.24]))


def test_equal_tokenisations_leave_weights_as_they_are() -> None:
    spans = [(0, 3), (3, 4), (4, 9), (9, 9)]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(transfer_weights(weights, spans, spans), weights)


def test_a_token_that_straddles_the_prompt_keeps_its_whole_mass() -> None:
    # The response begins at 4: of [2, 8) its part [4, 8) counts, half of it in each target.
    moved = transfer_weights(torch.tensor([0.5, 0.4, 0.1]), [(0, 2), (2, 8), (8, 9)], [(4, 6), (6, 8)])
    torch.testing.assert_close(moved, torch.tensor([0.2, 0.2]))


def test_an_end_of_text_token_gives_its_mass_to_the_last_token() -> None:
    ended = transfer_weights(torch.tensor([0.7, 0.3]), [(0, 4), (4, 4)], [(0, 4), (4, 4)])
    torch.testing.assert_close(ended, torch.tensor([0.7, 0.3]))
    cut = transfer_weights(torch.tensor([0.7, 0.3]), [(0, 4), (4, 4)], [(0, 2), (2, 4)])
    torch.testing.assert_close(cut, torch.tensor([0.35, 0.65]))


def test_weights_without_spans_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="2 weights for 1 source spans"):
        transfer_weights(torch.ones(2), [(0, 1)], [(0, 1)])


def partition(cuts: list[int], length: int) -> list[Span]:
    return list(pairwise([0, *sorted(cuts), length]))


@given(data=st.data(), length=st.integers(1, 60))
def test_the_mass_of_tokens_that_touch_the_response_is_kept(data: st.DataObject, length: int) -> None:
    cuts = st.lists(st.integers(0, length), max_size=20)
    source, target = partition(data.draw(cuts), length), partition(data.draw(cuts), length)
    prompt = data.draw(st.integers(0, length))
    response = [(max(start, prompt), max(end, prompt)) for start, end in target if end >= prompt]
    weights = torch.tensor(data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(source), max_size=len(source))))
    moved = transfer_weights(weights, source, response)
    touching = torch.tensor([end > prompt or (start == end == length) for start, end in source])
    torch.testing.assert_close(moved.sum(), weights[touching].sum(), atol=1e-6 * len(source), rtol=1e-6)
    assert (moved >= 0).all()


# Batches


def test_alignment_with_the_same_tokenizer_is_the_identity(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    cases = (
        (gpt2, "The film", " was 🎉 good été", []),
        (stories, "The film", " was 🎉 good", end(stories)),
        (tokenizer, "the film", "was not good .", end(tokenizer)),
    )
    for same, prompt, response, last in cases:
        bos = stories.encode("") if same is stories else []
        prompt_ids = plain(same, prompt)
        response_ids = plain(same, prompt + ("" if response[0] == " " else " ") + response)[len(prompt_ids) :] + last
        alignment = aligned(same, same, [(bos + prompt_ids, response_ids)])
        assert alignment.input_ids[0].tolist() == bos + prompt_ids + response_ids
        first = len(bos + prompt_ids)
        assert torch.equal(columns_as_weights(alignment)[first:], torch.eye(len(response_ids)))
        assert columns_as_weights(alignment)[:first].sum() == 0
        assert read(alignment) == list(range(first - 1, first + len(response_ids)))


def test_the_response_is_decoded_in_the_context_of_its_prompt(
    stories: PreTrainedTokenizerFast, gpt2: PreTrainedTokenizerFast
) -> None:
    # Alone, sentencepiece would decode the response to "was good", and the text would read "The filmwas good".
    prompt = plain(stories, "The film")
    response = plain(stories, "The film was good")[len(prompt) :]
    assert names(gpt2, aligned(stories, gpt2, [(prompt, response)])) == ["The", "Ġfilm", "Ġwas", "Ġgood"]


def test_a_merge_across_the_boundary_is_read_at_the_true_last_token(gpt2: PreTrainedTokenizerFast) -> None:
    # Defect 2 of abc.md: the prompt ends in a space, the response starts with "Boss". Re-tokenised, the two merge, and
    # counting in the policy's tokens would read a padding row.
    prompt, response = plain(gpt2, "I met the "), plain(gpt2, "Boss today")
    short = (plain(gpt2, "I"), plain(gpt2, " met the very kind old man today"))
    alignment = aligned(gpt2, gpt2, [(prompt, response), short])
    assert names(gpt2, alignment) == ["I", "Ġmet", "Ġthe", "ĠBoss", "Ġtoday"]
    assert len(prompt) + len(response) == 6
    assert alignment.read_index[0] == 4
    rows = torch.tensor([[0.1, 0.1, 0.1, 0.5, 0.2, 0.0, 0.0, 0.0], [0.0] * 8])
    torch.testing.assert_close(alignment.to_policy(rows)[0, :3], torch.tensor([0.5, 0.2, 0.0]))
    # The bare prompt "I met the " is scored at "the"; "Boss" ends with the merged token.
    assert read(alignment)[:3] == [2, 3, 4]


def test_there_is_one_bos_also_where_template_and_policy_put_one(stories: PreTrainedTokenizerFast) -> None:
    # Defect 3 of abc.md.
    def template(prompt: str, response: str) -> str:
        return f"<s>{prompt}{response}"

    prompt = stories.encode("The film")
    response = plain(stories, "The film was good")[len(prompt) - 1 :]
    for chosen in (concatenation, template):
        alignment = aligned(stories, stories, [(prompt, response)], template=chosen)
        assert names(stories, alignment).count("<s>") == 1
        assert alignment.input_ids[0, 0] == stories.bos_token_id
        assert alignment.to_policy(torch.ones(alignment.input_ids.shape)).sum() == len(response)


def test_with_pad_as_eos_the_score_is_read_where_the_classification_head_reads(gpt2: PreTrainedTokenizerFast) -> None:
    # Defect 4 of abc.md: the head reads the rightmost token that is not the padding token, so not the EOS.
    response = plain(gpt2, " was good") + end(gpt2)
    alignment = aligned(gpt2, gpt2, [(plain(gpt2, "It"), response)])
    assert names(gpt2, alignment) == ["It", "Ġwas", "Ġgood", "<|endoftext|>"]
    assert alignment.read_index.tolist() == [2]
    assert read(alignment) == [0, 1, 2, 2]


def test_an_end_of_text_is_translated_and_only_where_the_policy_ended(
    stories: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, response = plain(tokenizer, "the film"), plain(tokenizer, "was good")
    alignment = aligned(tokenizer, stories, [(prompt, response + end(tokenizer)), (prompt, response)])
    assert names(stories, alignment, 0)[-1] == "</s>"
    assert names(stories, alignment, 1) == names(stories, alignment, 0)[:-1]
    assert (alignment.read_index == alignment.attention_mask.sum(dim=1) - 1).all()
    size = alignment.input_ids.shape[1]
    rows = torch.nn.functional.one_hot(torch.tensor([size - 1, size - 2]), size).float()
    assert alignment.to_policy(rows).tolist() == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    open_ended = aligned(tokenizer, stories, [(prompt, response + end(tokenizer))], close_with_eos=False)
    assert names(stories, open_ended) == names(stories, alignment, 1)


def test_an_eos_that_the_reward_tokenizer_adds_itself_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    reward = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    prompt, response = plain(tokenizer, "the film"), plain(tokenizer, "was good")
    for closing, last in ((end(tokenizer), 2), ([], 1)):
        alignment = aligned(tokenizer, reward, [(prompt, response + closing)])
        assert names(reward, alignment) == ["<s>", "the", "film", "was", "good", "</s>"]
        assert columns_as_weights(alignment)[-1].nonzero().tolist() == [[last]]
        assert read(alignment) == [*[2, 3, 4, 5][: last + 1], 5]


def test_a_template_is_kept_apart_from_the_response(gpt2: PreTrainedTokenizerFast) -> None:
    def template(prompt: str, response: str) -> str:
        return f"Q: {prompt}\nA:{response}\nEnd"

    response = plain(gpt2, " A: good A:")
    alignment = aligned(gpt2, gpt2, [(plain(gpt2, "ignored"), response)], template=template, prompts=["A: A:"])
    tokens = names(gpt2, alignment)
    assert tokens == ["Q", ":", "ĠA", ":", "ĠA", ":", "Ċ", "A", ":", "ĠA", ":", "Ġgood", "ĠA", ":", "Ċ", "End"]
    matrix = columns_as_weights(alignment)
    assert torch.equal(matrix[9:14], torch.eye(5))
    assert matrix[:9].sum() == matrix[14:].sum() == 0
    # Bare prompt at ":" of "A:", the last prefix where the model itself reads its score.
    assert read(alignment) == [8, 9, 10, 11, 12, 15]


def test_a_template_may_strip_the_response_but_not_change_it(gpt2: PreTrainedTokenizerFast) -> None:
    response = plain(gpt2, "  very good \n")
    alignment = aligned(gpt2, gpt2, [(plain(gpt2, "It"), response)], template=lambda p, r: f"{p}: {r.strip()}.")
    assert names(gpt2, alignment) == ["It", ":", "Ġvery", "Ġgood", "."]
    kept = columns_as_weights(alignment)[2:4]
    assert kept.sum(dim=1).tolist() == [1.0, 1.0]
    assert gpt2.convert_ids_to_tokens(response)[1:3] == ["Ġvery", "Ġgood"]
    assert kept.argmax(dim=1).tolist() == [1, 2]
    for changing in (lambda p, r: p + r.upper(), lambda p, _r: p):
        with pytest.raises(ValueError, match="changes the response '  very good"):
            aligned(gpt2, gpt2, [(plain(gpt2, "It"), response)], template=changing)


def test_prefix_scores_are_those_of_texts_within_the_prefix(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast
) -> None:
    prompt = plain(stories, "The")
    response = plain(stories, "The movie was unbelievable")[len(prompt) :]
    alignment = aligned(stories, gpt2, [(prompt, response)])
    ends = [end for _, end in token_spans(gpt2, alignment.input_ids[0].tolist())]
    position_scores = torch.tensor([ends], dtype=torch.float32)
    # With its end as the score of each position, a prefix's score is the longest text read that lies within it.
    prefixes = [len(stories.decode(prompt + response[:t])) for t in range(len(response) + 1)]
    expected = [max(end for end in ends if end <= prefix) for prefix in prefixes]
    assert alignment.prefix_scores(position_scores).tolist() == [expected]
    assert expected[-1] == ends[-1]


def test_a_batch_of_two_equals_two_batches_of_one(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast
) -> None:
    rows = [
        (plain(gpt2, "The film"), plain(gpt2, " was 🎉 unbelievably good") + end(gpt2)),
        (plain(gpt2, "A very long prompt, this"), plain(gpt2, " one")),
    ]
    both = aligned(gpt2, stories, rows)
    weights = torch.rand(both.input_ids.shape, generator=torch.Generator().manual_seed(0)) * both.attention_mask
    for number, row in enumerate(rows):
        one = aligned(gpt2, stories, [row])
        size, width = one.input_ids.shape[1], one.prefix_index.shape[1]
        assert torch.equal(both.input_ids[number, :size], one.input_ids[0])
        alone = one.to_policy(weights[number : number + 1, :size])
        assert torch.equal(both.to_policy(weights)[number, : width - 1], alone[0])
        assert both.to_policy(weights)[number, width - 1 :].sum() == 0
        assert torch.equal(both.prefix_index[number, :width], one.prefix_index[0])
        assert (both.prefix_index[number, width:] == one.read_index[0]).all()


@given(data=st.data())
def test_all_mass_on_the_response_arrives(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    # Any sampled ids, broken characters and special tokens among them, for a reward model with another tokenizer.
    prompt = plain(gpt2, "The film")
    response = data.draw(st.lists(st.integers(0, 600) | st.just(end(gpt2)[0]), min_size=1, max_size=20))
    alignment = aligned(gpt2, stories, [(prompt, response)])
    matrix = columns_as_weights(alignment)
    touching = matrix.sum(dim=1) > 0
    torch.testing.assert_close(matrix.sum(dim=1)[touching], torch.ones(int(touching.sum())), atol=1e-6, rtol=0)
    prompt_only = len(stories.encode("The film"))
    assert not touching[: prompt_only - 1].any()
    assert touching[prompt_only + 1 :].all()
    assert alignment.prefix_index.diff(dim=1).min() >= 0


@torch.no_grad()
def test_the_last_prefix_score_is_the_score_that_the_reward_model_reports(
    gpt2: PreTrainedTokenizerFast, stories: PreTrainedTokenizerFast, shared: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(shared / "data" / "stories260k", num_labels=1).eval()
    model.config.pad_token_id = stories.pad_token_id
    torch.nn.init.normal_(model.score.weight)
    rows = [
        (plain(gpt2, "Once upon"), plain(gpt2, " a time there was") + end(gpt2)),
        (plain(gpt2, "Lily"), plain(gpt2, " was 🎉")),
    ]
    alignment = aligned(gpt2, stories, rows)
    inputs = {"input_ids": alignment.input_ids, "attention_mask": alignment.attention_mask.long()}
    with capture_row(model, alignment.read_index) as captured:
        scores = model(**inputs).logits[:, 0]
    position_scores = model.score(model.model(**inputs).last_hidden_state)[..., 0]
    prefix_scores = alignment.prefix_scores(position_scores)
    for row, (_, response) in enumerate(rows):
        torch.testing.assert_close(prefix_scores[row, len(response) :], scores[row].expand(6 - len(response)))
        assert (prefix_scores[row, : len(response)] != scores[row]).all()
    weights = alignment.to_policy(captured.row)
    assert (weights.sum(dim=1) < 1).all()
    assert (weights[0] > 0).all()


def test_a_response_without_text_is_scored_on_its_prompt(stories: PreTrainedTokenizerFast) -> None:
    prompt = plain(stories, "The film")
    alignment = aligned(stories, stories, [(prompt, end(stories)), (prompt, [])])
    assert names(stories, alignment, 0) == [*names(stories, alignment, 1), "</s>"]
    assert alignment.to_policy(torch.ones(alignment.input_ids.shape)).tolist() == [[1.0], [0.0]]
    last = len(prompt)
    assert alignment.prefix_index.tolist() == [[last, last + 1], [last, last]]


def test_masked_tokens_inside_a_response_are_read_too(gpt2: PreTrainedTokenizerFast) -> None:
    prompt, response = torch.tensor([plain(gpt2, "It")]), torch.tensor([plain(gpt2, " was very good")])
    alignment = align(
        policy_tokenizer=gpt2,
        reward_tokenizer=gpt2,
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        response_ids=response,
        response_mask=torch.tensor([[True, False, True]]),
    )
    assert names(gpt2, alignment) == ["It", "Ġwas", "Ġvery", "Ġgood"]


def test_values_of_other_tokens_are_refused(gpt2: PreTrainedTokenizerFast) -> None:
    alignment = aligned(gpt2, gpt2, [(plain(gpt2, "It"), plain(gpt2, " was"))])
    with pytest.raises(ValueError, match=r"rows has shape \(1, 3\), the reward model's input \(1, 2\)"):
        alignment.to_policy(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"position_scores has shape \(1, 1\)"):
        alignment.prefix_scores(torch.ones(1, 1))


def test_a_reward_tokenizer_without_padding_token_is_refused(gpt2: PreTrainedTokenizerFast, shared: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_file=str(shared / "data" / "gpt2_tokenizer" / "tokenizer.json"))
    with pytest.raises(ValueError, match="has no padding token: set its pad_token"):
        aligned(gpt2, bare, [(plain(gpt2, "It"), plain(gpt2, " was"))])


def test_a_row_without_any_reward_token_is_refused(
    tokenizer: PreTrainedTokenizerFast, gpt2: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="row 0 has no text"):
        aligned(tokenizer, gpt2, [(tokenizer.encode("novel"), end(tokenizer))], close_with_eos=False)
