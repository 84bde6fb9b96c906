"""The tokenizer of the task `functions`: words, digits and signs, each with the space before it."""

import re
import string

from tokenizers import Regex, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apportion.data.functions.operations import ON_LISTS, ON_NUMBERS, TO_NUMBER, Function, body_of
from apportion.data.small_models import small_tokenizer

PIECE = r" {4}|\n| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]|\s"


def code_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; of words that the task has not it knows single characters only."""
    steps = (*ON_NUMBERS, *ON_LISTS, *TO_NUMBER)
    texts = [Function(steps, of_list=of_list).head for of_list in (False, True)]
    texts.append(body_of([step.line for step in steps]) + " y")
    words = {word for text in texts for word in re.findall(PIECE, text)}
    words |= {space + sign for sign in string.punctuation + string.digits + string.ascii_letters for space in ("", " ")}
    splitter = pre_tokenizers.Split(Regex(PIECE), "isolated")
    return small_tokenizer(sorted(words | {" ", "\n", "    "}), splitter, decoders.Fuse())
