"""Tokenizers and Llamas for the built-in tasks, saved and loaded as any other."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, processors
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apportion.bars import quiet_bars
from apportion.data.files import write_jsonl

PAD, BOS, EOS, UNK = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def small_tokenizer(
    words: Iterable[str], pre_tokenizer: PreTokenizer, decoder: object = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of given words: `<s>` before a text as Llama's tokenizers do, padding apart from EOS.

    Args:
        words: The vocabulary, without special tokens.
        pre_tokenizer: Divides a text into words.
        decoder: Puts words together; None parts them by spaces.

    Returns:
        The tokenizer.
    """
    known = {word: index for index, word in enumerate((*SPECIAL, *words))}
    backend = Tokenizer(models.WordLevel(known, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, known[BOS])])
    if decoder is not None:
        backend.decoder = decoder
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


def write_start(
    folder: str | Path, tokenizer: PreTrainedTokenizerFast, datasets: Mapping[str, Dataset], *, seed: int
) -> Path:
    """Write what a task starts from: `base/`, a tokenizer with a small Llama of random weights, and files of rows.

    Args:
        folder: Made where it is missing. Files of an earlier call are replaced.
        tokenizer: The task's.
        datasets: Rows by the name of their file, without its ending.
        seed: Of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    tokenizer.save_pretrained(folder / "base")
    with quiet_bars():
        small_llama(tokenizer, seed=seed).save_pretrained(folder / "base")
    for name, rows in datasets.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder
