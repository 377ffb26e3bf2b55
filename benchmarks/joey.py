"""JoeyNMT's own modules, models and trainer, for benchmarks and tests.

It is installed without its requirements: what its models, searches and trainer only import has stand-ins here.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from torch import nn

__all__ = ["BOS", "EOS", "PAD", "UNK", "joey_model", "joeynmt", "trainer", "vocabulary"]

UNK, PAD, BOS, EOS = 0, 1, 2, 3  # JoeyNMT's defaults
# A board, tokenizers, metrics and a progress bar, which may be absent.
ABSENT = ("torch.utils.tensorboard", "sentencepiece", "subword_nmt", "sacrebleu", "sacrebleu.metrics", "tqdm")


@cache
def joeynmt(name: str) -> ModuleType:
    """A module of joeynmt."""
    with _stand_ins():
        return importlib.import_module(f"joeynmt.{name}")


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Where JoeyNMT is imported, what is not installed has every name; elsewhere it is as absent as it was."""
    missing = [name for name in ABSENT if _is_absent(name)]
    sys.modules |= {name: MagicMock(name=name) for name in missing}
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _is_absent(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return True
    return False


def vocabulary(size: int) -> Any:
    """JoeyNMT's own, of so many tokens."""
    special = {"unk": UNK, "pad": PAD, "bos": BOS, "eos": EOS}
    names = {f"{name}_token": f"<{name}>" for name in special} | {f"{name}_id": k for name, k in special.items()}
    words = [f"w{index}" for index in range(len(special), size)]
    return joeynmt("vocabulary").Vocabulary(words, SimpleNamespace(lang_tags=[], sep_token=None, **names))


def joey_model(
    sizes: tuple[int, int] = (12, 13), *, encoder: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None,
    embedding: int = 6, **options: Any,
) -> nn.Module:  # fmt: skip
    """A model by JoeyNMT's own builder, with its initial values, of vocabularies of these sizes."""
    config = model_config(encoder, decoder, embedding) | options
    source, target = vocabulary(sizes[0]), vocabulary(sizes[1])
    if options.get("tied_embeddings"):
        target = source
    return joeynmt("model").build_model(config, source, target)


def model_config(
    encoder: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, embedding: int = 6
) -> dict[str, Any]:
    """The section "model" of its configuration."""
    embedded = {"embedding_dim": embedding, "scale": False, "dropout": 0.0}
    part = {"type": "recurrent", "rnn_type": "lstm", "hidden_size": 8, "num_layers": 1, "embeddings": embedded}
    return {"encoder": part | (encoder or {}), "decoder": part | (decoder or {})}


def trainer(folder: Path, model: dict[str, Any], training: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(TrainManager, training set, development set) by JoeyNMT's own functions, on `folder`/train.{de,en} and dev.*."""
    side = {"level": "word", "lowercase": False, "voc_limit": 10_000, "voc_min_freq": 1, "tokenizer_type": "basic"}
    data = {"train": str(folder / "train"), "dev": str(folder / "dev"), "dataset_type": "plain",
            "src": side | {"lang": "de"}, "trg": side | {"lang": "en"}}  # fmt: skip
    output = folder / "model"
    output.mkdir(exist_ok=True)
    config = {
        "name": "joey", "model_dir": str(output), "use_cuda": False, "random_seed": 7, "data": data, "model": model,
        "training": {"shuffle": True, "print_valid_sents": [], "scheduling": "exponential"} | training,
        "testing": {"beam_size": 1, "batch_size": 8, "batch_type": "sentence", "eval_metrics": [],
                    "max_output_length": 8},
    }  # fmt: skip
    args = joeynmt("config").parse_global_args(config, rank=0, mode="train")
    joeynmt("helpers").set_seed(args.seed)
    built, train, dev, _ = joeynmt("prediction").prepare(args, rank=0, mode="train")
    manager = joeynmt("training").TrainManager(
        rank=0, model=built, model_dir=args.model_dir, device=args.device, autocast=args.autocast, seed=args.seed,
        train_args=args.train, dev_args=joeynmt("config").set_validation_args(args.test),
    )  # fmt: skip
    return manager, train, dev
