"""The tokenizer of the task `reviews`: one token a word."""

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apportion.data.reviews import grammar
from apportion.data.small_models import small_tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer."""
    return small_tokenizer(grammar.vocabulary(), pre_tokenizers.WhitespaceSplit())
