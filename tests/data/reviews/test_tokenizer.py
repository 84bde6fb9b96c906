import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apportion.data.reviews.grammar import Mood, continuation, opening
from apportion.data.reviews.tokenizer import word_tokenizer
from apportion.data.small_models import small_llama


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [f"{opening(rng)} {continuation(rng, words=40, mood=Mood())}" for _ in range(count)]


def test_decoding_gives_back_what_was_encoded_also_after_saving_and_loading(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (word_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        for text in texts(50):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert len(ids) == 1 + len(text.split())


def test_a_text_begins_with_one_mark_and_is_not_ended() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer("we saw the film")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_the_end_mark_written_in_a_text_is_the_end_token_and_no_padding() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer("good . </s>")["input_ids"][-1] == tokenizer.eos_token_id
    assert len({str(tokenizer(mark)["input_ids"][1]) for mark in ("<pad>", "<s>", "</s>", "<unk>", "good")}) == 5


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    state = torch.get_rng_state()
    first, again, other = (small_llama(tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    first.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert 400_000 < loaded.num_parameters() < 600_000
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
