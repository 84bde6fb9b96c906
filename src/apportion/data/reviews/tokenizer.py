"""A word-level tokenizer and a small Llama for the task `reviews`, saved and loaded as any other."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apportion.data.reviews import grammar

PAD, BOS, EOS, UNK = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token a word, `<s>` before a text as Llama's tokenizers do, padding apart from EOS."""
    words = {word: index for index, word in enumerate((*SPECIAL, *grammar.vocabulary()))}
    backend = Tokenizer(models.WordLevel(words, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def small_llama(tokenizer: PreTrainedTokenizerFast, *, seed: int, positions: int = 256) -> LlamaForCausalLM:
    """Build a Llama of about half a million parameters with random weights, the same for the same seed.

    The global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
