"""A small model of Stanza, trained on three sentences."""

import io
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apportion import Stanza

TREEBANK = """
(ROOT (S (NP (DT The) (JJ quick) (NN fox)) (VP (VBD jumped) (PP (IN over) (NP (DT the) (JJ lazy) (NN dog)))) (. .)))
(ROOT (S (NP (DT The) (NN dog)) (VP (VBD saw) (NP (DT a) (NN film))) (. .)))
(ROOT (S (NP (PRP It)) (VP (VBD was) (RB not) (ADJP (JJ good))) (. .)))
"""
WORDS = ["The", "quick", "fox", "jumped", "over", "the", "lazy", "dog"]
WORDS += ["saw", "a", "film", "It", "was", "not", "good"]


def write_stanza(folder: Path) -> Stanza:
    """Train a tokeniser and a constituency parser of Stanza on three sentences, and return a parser that reads them."""
    torch.manual_seed(0)
    random.seed(0)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.random.fork_rng():
        _train_tokenizer(folder)
        _train_constituency(folder)
    (folder / "resources.json").write_text("{}")
    paths = {"tokenize_model_path": "tokenize.pt", "constituency_model_path": "constituency.pt"}
    paths |= {"constituency_pretrain_path": "words.pt"}
    options: dict[str, Any] = {name: str(folder / path) for name, path in paths.items()}
    options |= {"processors": "tokenize,constituency", "constituency_pretagged": True, "allow_unknown_language": True}
    return Stanza("xx", model_dir=str(folder), options=options)


def _train_constituency(folder: Path) -> None:
    from stanza.models import constituency_parser
    from stanza.models.common.foundation_cache import FoundationCache
    from stanza.models.common.pretrain import Pretrain
    from stanza.models.constituency import parser_training, tree_reader

    vectors = "".join(f"{w} {' '.join(f'{x:.3f}' for x in torch.randn(8).tolist())}\n" for w in [*WORDS, "."])
    (folder / "words.txt").write_text(vectors)
    Pretrain(str(folder / "words.pt"), str(folder / "words.txt"), save_to_file=True).load()
    sizes = {"hidden_size": 64, "tag_embedding_dim": 4, "delta_embedding_dim": 16, "transition_embedding_dim": 16}
    sizes |= {"transition_hidden_size": 16, "pattn_num_layers": 0, "lattn_d_proj": 0, "reduce_heads": 2}
    no_noise = dict.fromkeys(("word_dropout", "lstm_input_dropout", "predict_dropout", "lstm_layer_dropout"), 0)
    no_noise |= {"rare_word_unknown_frequency": 0, "tag_unknown_frequency": 1}  # there is no tagger
    rest = {"wordvec_pretrain_file": folder / "words.pt", "save_dir": folder, "device": "cpu"}
    rest |= {"optim": "adamw", "learning_rate": 0.01}
    words = [word for name, value in (sizes | no_noise | rest).items() for word in (f"--{name}", str(value))]
    options = constituency_parser.parse_args([*words, "--no_multistage"])
    trees = tree_reader.read_trees(TREEBANK)
    cache = FoundationCache()
    trainer, sequences, _, _ = parser_training.build_trainer(options, trees, trees[-1:], [], cache, None)
    answers = {transition: torch.tensor([place]) for place, transition in enumerate(trainer.transitions)}
    data, loss = parser_training.compose_train_data(trees, sequences), nn.CrossEntropyLoss(reduction="sum")
    trainer.train()
    for epoch in range(60):
        parser_training.train_model_one_epoch(epoch, trainer, answers, lambda x: x, loss, data, None, options)
    trainer.save(str(folder / "constituency.pt"), save_optimizer=False)


def _train_tokenizer(folder: Path) -> None:
    from stanza.models import tokenizer
    from stanza.models.tokenization.data import DataLoader
    from stanza.models.tokenization.trainer import Trainer

    drawn = random.Random(0)
    texts = [[_sentence(drawn) for _ in range(drawn.randint(1, 4))] for _ in range(150)]
    (folder / "train.txt").write_text("\n\n".join(" ".join(text) for text in texts) + "\n\n")
    (folder / "train.labels").write_text("\n\n".join("0".join(map(_labels, text)) for text in texts) + "\n\n")
    files = {"txt": str(folder / "train.txt"), "label": str(folder / "train.labels")}
    words = ["--lang", "xx", "--shorthand", "xx_tiny", "--emb_dim", "8", "--hidden_dim", "16", "--no_use_mwt", "--cpu"]
    options = tokenizer.parse_args(words)
    options |= {"feat_funcs": tokenizer.DEFAULT_FEAT_FUNCS, "feat_dim": len(tokenizer.DEFAULT_FEAT_FUNCS)}
    options |= {"num_dict_feat": 0}
    batches = DataLoader(options, input_files=files)
    options["vocab_size"] = len(batches.vocab)
    nothing = {"lexicon": None, "dictionary": None, "foundation_cache": None}
    trainer = Trainer(args=options, vocab=batches.vocab, device="cpu", **nothing)
    trainer.change_lr(2e-2)
    for _ in range(150):
        trainer.update(batches.next(unit_dropout=0.1, feat_unit_dropout=0.1))
    trainer.save(str(folder / "tokenize.pt"))


def _sentence(drawn: random.Random) -> str:
    return " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(2, 9))) + "."


def _labels(sentence: str) -> str:
    """Write 1 under the last character of a word, 2 under that of a sentence."""
    following = sentence[1:] + "\n"
    return "".join(
        "2" if b == "\n" else "1" if a != " " and b in " ." else "0" for a, b in zip(sentence, following, strict=True)
    )
