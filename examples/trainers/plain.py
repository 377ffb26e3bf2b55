"""A plain training loop: a GRU reads a word's letters and says how many syllables it has.

python -m examples.trainers.plain [STEPS]     # 300 steps take about 15 seconds
"""

import torch
from torch import Tensor, nn

import fastseq
from examples.g2p.data import SPECIAL, Lexicon, alphabet, divide, read_cmudict, spell
from examples.trainers import steps_given

VOWELS = "AEIOU"  # with which CMUdict's vowels begin; each is the centre of a syllable
MOST = 6  # syllables; the few words with more count as these


class Syllables(nn.Module):
    """Letters [B, S] and lengths [B] to logits [B, MOST]."""

    def __init__(self, letters: int, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, hidden)
        self.gru = fastseq.GRU(hidden, hidden, bidirectional=True, batch_first=True)
        self.out = nn.Linear(2 * hidden, MOST)

    def forward(self, source: Tensor, lengths: Tensor) -> Tensor:
        _, h_n = self.gru(self.embedding(source), lengths=lengths)  # neither sorted nor packed
        return self.out(torch.cat([h_n[0], h_n[1]], 1))


def encode(lexicon: Lexicon, letters: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Letters [N, S], lengths [N] and classes [N] of the words, by their first pronunciation."""
    counts = [sum(phoneme[0] in VOWELS for phoneme in entries[0]) for entries in lexicon.values()]
    return *spell(list(lexicon), letters), torch.tensor(counts).clamp(1, MOST) - 1


def train(lexicon: Lexicon, steps: int, size: int = 128) -> tuple[Syllables, float]:
    """The model, and the share of held-out words that it counts right."""
    rest, held_out = divide(lexicon, 0.05)
    letters, _ = alphabet(rest)
    source, lengths, classes = encode(rest, letters)
    model = Syllables(len(letters) + SPECIAL)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(source), (size,))
        loss = nn.functional.cross_entropy(model(source[rows], lengths[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    source, lengths, classes = encode(held_out, letters)
    with torch.no_grad():
        right = model.eval()(source, lengths).argmax(1) == classes
    return model, right.float().mean().item()


if __name__ == "__main__":
    steps = steps_given(__doc__)
    torch.manual_seed(0)
    _, right = train(read_cmudict(), steps)
    print(f"{100 * right:.1f} % of held-out words counted right")
