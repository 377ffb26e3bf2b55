"""BLEU of lower-cased tokens, as `sacrebleu -tok none -lc` counts it."""

from typing import NamedTuple

from ..training.files import DataError
from .data import Sentence


class Scores(NamedTuple):
    bleu: float  # 0 to 100
    loss: float  # nats per word

    @property
    def cost(self) -> float:
        return -self.bleu

    @property
    def brief(self) -> str:
        return f"BLEU {self.bleu:.1f}, loss {self.loss:.2f}"


def bleu(translations: list[Sentence], references: list[Sentence]) -> float:
    """Corpus BLEU (Papineni et al. 2002) by sacreBLEU (Post 2018)."""
    try:
        import sacrebleu
    except ImportError:
        raise DataError("the package sacrebleu is missing: pip install sacrebleu") from None
    metric = sacrebleu.BLEU(tokenize="none", lowercase=True, force=True)  # force: yes, the text is tokenised
    return metric.corpus_score([" ".join(t) for t in translations], [[" ".join(r) for r in references]]).score
