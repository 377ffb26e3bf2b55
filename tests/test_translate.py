"""examples/translate: its data, its scores, its models in both libraries, and the whole of it on a made-up language."""

import collections
import copy
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.training import batches
from examples.training.files import DataError
from examples.training.loop import Training
from examples.training.recipe import LIBRARIES
from examples.translate import __main__ as command
from examples.translate import data
from examples.translate.model import PAPERS, build, load, read, translate
from examples.translate.recipe import PLANS, Plan, Recipe
from examples.translate.score import bleu

pytest.importorskip("sacremoses")
sacrebleu = pytest.importorskip("sacrebleu")

EPS = torch.finfo(torch.float32).eps
WORDS = {"Ein": "a", "Hund": "dog", "Mann": "man", "Vogel": "bird", "Ball": "ball", "Kind": "child", "Baum": "tree"}
VERBS = {"sieht": "sees", "sucht": "seeks", "trägt": "carries", "malt": "paints"}


def toy(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of a made-up German, whose words change places in half of them, and their translations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: dict[str, str]) -> str:
        return list(words)[int(torch.randint(len(words), (), generator=generator))]

    pairs = []
    nouns = {word: meaning for word, meaning in WORDS.items() if word != "Ein"}
    for _ in range(count):
        who, verb, what = draw(nouns), draw(VERBS), draw(nouns)
        if torch.rand((), generator=generator) < 0.5:
            pairs.append((f"Ein {who} {verb} ein-ein {what}.", f"a {nouns[who]} {VERBS[verb]} a {nouns[what]}."))
        else:
            pairs.append((f"{what}, {verb} ein {who}!", f"A {nouns[who]} {VERBS[verb]}, {nouns[what]}!"))
    return pairs


def write(folder: Path, part: str, pairs: list[tuple[str, str]]) -> None:
    for language, side in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
        with gzip.open(folder / f"{part}.{language}.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in side)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as --data takes it."""
    torch.set_num_threads(1)
    for seed, (part, count) in enumerate(zip(data.PARTS, (400, 40, 40), strict=True)):
        write(tmp_path, part, toy(count, seed))
    return tmp_path


def small(paper: str, **options: Any) -> Plan:
    plan = {"paper": paper, "embedding": 16, "hidden": 24, "layers": PLANS[paper].layers, "batch": 32, "least": 1}
    return Plan(**(plan | options))


def test_texts_are_lower_cased_and_tokenised(folder: Path) -> None:
    splits = data.load(folder)
    assert [len(part.source) for part in splits] == [400, 40, 40]
    assert splits.train.target[0][-1] in ".!"
    assert " ".join(data.tokenize("Er, der „T-Shirts“ trägt.", "de")) == 'er , der " t @-@ shirts " trägt .'
    tokens = data.tokenize("The man's T-shirt, red.", "en")
    assert " ".join(tokens) == "the man 's t @-@ shirt , red ."
    assert data.detokenize(tokens) == "the man's t-shirt, red."


def test_a_vocabulary_has_the_frequent_words() -> None:
    sentences = ["a b a", "b c", "d d d"]
    assert data.vocabulary([s.split() for s in sentences], 2) == ["d", "a", "b"]
    text = data.Text([["a", "x", "d"]], [["b", "y"]])
    pairs = data.encode(text, ["d", "a"], ["b"], backwards=False)
    assert pairs.source.tolist() == [[5, data.UNKNOWN, 4]]
    assert pairs.target.tolist() == [[batches.BOS, 4, data.UNKNOWN, batches.EOS]]
    assert data.encode(text, ["d", "a"], ["b"], backwards=True).source.tolist() == [[4, data.UNKNOWN, 5]]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("val.en", b"one\ntwo\n", r"val\.en\.gz:3: missing, .*val\.de\.gz has a line 3"),
        ("val.de", b"one\ntwo\n", r"val\.de\.gz:3: missing, .*val\.en\.gz has a line 3"),
        ("train.de", b"eins\n\nzwei\n", r"train\.de\.gz:2: the line is empty"),
        ("train.en", b"one\n \t\n", r"train\.en\.gz:2: the line is empty"),
        ("train.en", b"one\ntw\xff\n", r"train\.en\.gz:2: not UTF-8 \(byte 3\)"),
        ("test_2016_flickr.de", b"", r"test_2016_flickr\.de\.gz:1: the file is empty"),
    ],
)
def test_malformed_files_are_refused_by_line(
    folder: Path, name: str, content: bytes, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    assert command.main(["train", "--data", str(folder), "--out", str(folder / "out")]) == 2
    assert re.search(fault, capsys.readouterr().err)
    assert not (folder / "out").exists()


def test_damaged_and_missing_files_are_refused(folder: Path) -> None:
    path = folder / "train.de.gz"
    whole = path.read_bytes()
    for content, line in ((whole[: len(whole) // 2], r"\d+"), (whole[:5], "1"), (b"plain text\n", "1")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.de\.gz:{line}: cut or damaged: "):
            data.load(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"train\.de\.gz: no such file; wanted .*, from https://"):
        data.load(folder)


def test_without_data_the_command_says_where_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["train"]) == 2
    error = capsys.readouterr().err
    assert "--data DIR" in error
    assert "https://github.com/multi30k/dataset" in error


def test_bleu_is_that_of_the_sacrebleu_command(tmp_path: Path) -> None:
    references = ["a man 's dog runs in the park .", "two t @-@ shirts hang there .", "she sings"]
    said = ["A man 's dog walks in the park .", "two t @-@ shirts hang here .", "she sings"]
    (tmp_path / "said").write_text("\n".join(said) + "\n")
    (tmp_path / "references").write_text("\n".join(references) + "\n")
    files = [str(tmp_path / "references"), "-i", str(tmp_path / "said")]
    options = ["-tok", "none", "-lc", "--force", "-b", "-w", "12"]
    done = subprocess.run([sys.executable, "-m", "sacrebleu", *files, *options], capture_output=True, text=True)
    ours = bleu([t.split() for t in said], [r.split() for r in references])
    assert f"{ours:.12f}" == done.stdout.strip(), done.stderr
    expected = 100.0  # of 1 to 4 tokens in a row: those that are in the reference, of those that were said
    for right, count in ((16, 18), (11, 15), (7, 12), (4, 10)):
        expected *= (right / count) ** 0.25
    assert ours == pytest.approx(expected, rel=1e-12)


def loss_and_gradients(model: Any, batch: batches.Batch, seed: int) -> dict[str, torch.Tensor]:
    """The loss, and every parameter's gradient by its name in state_dict."""
    torch.manual_seed(seed)  # of dropout
    model.zero_grad()
    loss = model.loss(*batch, label_smoothing=0.1)
    loss.backward()
    names = {p.data_ptr(): name for name, p in model.state_dict().items()}
    return {names[p.data_ptr()]: p.grad for p in model.parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("paper", PAPERS)
def test_both_libraries_train_the_same_model(folder: Path, paper: str, ragged: bool) -> None:
    """Dropout drawn alike; the error from float64 is at most twice that of torch.nn, and eight roundings.

    Root mean squares over six draws: of one draw the ratio is luck, 0.5 to 5 where gradients cancel.
    """
    recipe = Recipe(data.load(folder), small(paper, dropout=0.3))
    ours, theirs = recipe.models(0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    supply = recipe.batches(torch.Generator().manual_seed(0))
    batch = next(b for b in supply if (b.length is not None) == ragged)
    values, errors, stock_errors = (collections.defaultdict(list) for _ in range(3))
    for seed in range(6):
        exact = loss_and_gradients(copy.deepcopy(theirs).double(), batch, seed)
        found, stock = (loss_and_gradients(model, batch, seed) for model in (ours, theirs))
        assert found.keys() == stock.keys() == exact.keys()
        for name, value in exact.items():
            values[name].append(value)
            errors[name].append(found[name] - value)
            stock_errors[name].append(stock[name] - value)

    def size(draws: list[torch.Tensor]) -> float:
        return torch.stack(draws).square().mean().sqrt().item()

    for name in values:
        assert size(errors[name]) <= 2 * size(stock_errors[name]) + 8 * EPS * size(values[name]), name
        assert size(values[name]) > 0, name


@pytest.mark.parametrize("paper", PAPERS)
def test_both_libraries_go_on_alike(folder: Path, paper: str) -> None:
    """Losses of ten steps of AdamW, the development set's, and translations; either reads the other's parameters."""
    recipe = Recipe(data.load(folder), small(paper))
    models = recipe.models(0)
    losses: list[list[float]] = [[], []]
    for kept, model in zip(losses, models, strict=True):
        torch.manual_seed(1)
        optimizer, supply = recipe.optimizer(model), recipe.batches(torch.Generator().manual_seed(2))
        kept += [recipe.step(model, optimizer, batch).item() for batch in supply[:10]]
        model.eval()
        kept.append(recipe.dev_loss(model))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
    ours, theirs = models
    theirs.load_state_dict(ours.state_dict())
    sentences = recipe.splits.dev.source
    for beams in (1, 3):
        assert translate(ours, sentences, beams) == translate(theirs, sentences, beams)
    ours.load_state_dict(theirs.state_dict())


def test_a_sentence_is_translated_alike_alone_and_among_others(folder: Path) -> None:
    recipe = Recipe(data.load(folder), small("bahdanau"))
    model, sentences = recipe.models(0)[0].eval(), recipe.splits.dev.source[:12]
    for beams in (1, 2):
        assert [translate(model, [s], beams)[0] for s in sentences] == translate(model, sentences, beams)


def test_sutskevers_source_is_read_backwards(folder: Path) -> None:
    recipe = Recipe(data.load(folder), small("sutskever"))
    sentence = recipe.splits.train.source[0]
    source, _ = read(recipe.build(), [sentence])
    names = recipe.words_of[0]
    assert [names[i - data.SPECIAL] for i in source[0]] == sentence[::-1]
    assert recipe.pairs.source[0, : len(sentence)].equal(source[0])


def test_tokens_are_the_targets_that_are_predicted(folder: Path) -> None:
    recipe = Recipe(data.load(folder), small("cho"))
    supply = recipe.batches(torch.Generator().manual_seed(0))
    wanted = sum(len(sentence) + 1 for sentence in recipe.splits.train.target)
    assert sum(batch.tokens for batch in supply) == sum(map(recipe.words, supply)) == recipe.epoch == wanted


TRAIN = ["--embedding", "16", "--hidden", "32", "--batch", "16", "--least", "1", "--dropout", "0.1", "--rate", "0.01"]


def test_train_then_say(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out"
    arguments = ["train", "--data", str(folder), *TRAIN, "--steps", "800", "--out", str(out), "--beams", "3"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    found = re.search(r"test_2016_flickr: BLEU ([\d.]+) by 1 beam\(s\), ([\d.]+) by 3 beam", printed)
    assert found is not None
    assert float(found[1]) > 95
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "log.json"}
    log = json.loads((out / "log.json").read_text())
    assert log["threads"] == 1
    assert log["plan"]["steps"] == 800
    best = max(row["scores"]["bleu"] for row in log["history"])
    assert f"best BLEU {best:.2f}" in printed
    assert log["test"]["1"] == pytest.approx(float(found[1]), abs=0.005)
    sentences = ["Ein Hund sieht ein-ein Baum.", "Kind, malt ein Vogel!"]
    translations = ["a dog sees a tree.", "a bird paints, child!"]
    checkpoint = ["--checkpoint", str(out / "model.safetensors")]
    for beams in ("1", "4"):
        assert command.main(["say", *sentences, *checkpoint, "--beams", beams]) == 0
        assert capsys.readouterr().out.splitlines() == translations
    text = f"{sentences[0]}\n \n{sentences[1]}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert command.main(["say", *checkpoint]) == 0
    assert capsys.readouterr().out.splitlines() == [translations[0], "", translations[1]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ein\nHu\xff\n")))
    assert command.main(["say", *checkpoint]) == 2
    assert "standard input:2: not UTF-8" in capsys.readouterr().err


def test_what_is_said_is_by_the_newest_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "OUT", tmp_path)
    assert command.newest() == tmp_path / "bahdanau-fastseq" / "model.safetensors"  # for the message that names it
    for age, name in enumerate(("luong-torch", "cho-fastseq", "bahdanau-fastseq")):
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir()
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert command.newest() == tmp_path / "luong-torch" / "model.safetensors"


@pytest.mark.parametrize("given", ["2", "1", "-0.1", "nan"])
def test_a_dropout_that_is_none_is_refused_at_once(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parser().parse_args(["train", f"--dropout={given}"])
    assert f"{given} is not a probability from 0 to below 1" in capsys.readouterr().err


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_interrupted_run_goes_on_to_the_same_model(
    folder: Path, library: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def until_ninth(self: Training, *args: Any) -> None:
        if self.steps == 9:
            raise KeyboardInterrupt
        update(self, *args)

    update = Training.update
    arguments = ["train", "--data", str(folder), *TRAIN, "--steps", "14", "--library", library, "--save-every", "0.001"]
    whole, stopped = ([*arguments, "--out", str(folder / name)] for name in ("whole", "stopped"))
    assert command.main(whole) == 0
    monkeypatch.setattr(Training, "update", until_ninth)
    assert command.main(stopped) == 130
    printed = capsys.readouterr().out
    assert "interrupted" in printed
    assert printed.count("test_2016_flickr") == 1  # whole's
    load(folder / "stopped" / "model.safetensors")
    assert command.main([*stopped, "--model", "luong"]) == 2
    assert "paper=bahdanau, now luong" in capsys.readouterr().err
    monkeypatch.setattr(Training, "update", update)
    assert command.main(stopped) == 0
    assert "going on behind step 9" in capsys.readouterr().out
    logs = [json.loads((folder / name / "log.json").read_text()) for name in ("whole", "stopped")]
    for log in logs:
        for row in log["history"]:
            del row["seconds"], row["evaluating"]
    assert logs[0] == logs[1]
    models = [load(folder / name / "model.safetensors").state_dict() for name in ("whole", "stopped")]
    assert all(t.equal(models[1][name]) for name, t in models[0].items())


def test_curves_are_drawn_of_logs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for library in LIBRARIES:
        runs.append(str(folder / library))
        arguments = ["--steps", "3", "--library", library, "--model", "cho", "--out", runs[-1]]
        assert command.main(["train", "--data", str(folder), *TRAIN, *arguments]) == 0
    logs = [json.loads((Path(run) / "log.json").read_text()) for run in runs]
    losses = [[row["loss"] for row in log["history"]] for log in logs]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)  # the same dropout too
    picture = folder / "new" / "curve.png"
    capsys.readouterr()
    assert command.main(["curve", *runs, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (folder / "torch" / "log.json").write_text("{")
    for run, fault in ((folder, "no log there"), (folder / "torch", "cut or edited")):
        assert command.main(["curve", str(run), "--out", str(picture)]) == 2
        assert fault in capsys.readouterr().err


def test_wrong_models_and_options_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.safetensors"
    assert command.main(["say", "ein", "--checkpoint", str(path)]) == 2
    assert "no model there" in capsys.readouterr().err
    model = build("cho", ["ein"], ["a"], embedding=4, hidden=4, layers=1, dropout=0.0, limit=3)
    model.extra = {}
    model.save(path)
    assert command.main(["say", "ein", "--checkpoint", str(path)]) == 2
    assert "not a model of this program" in capsys.readouterr().err
    assert command.main(["train", "--data", str(folder), "--layers", "2", "--out", str(folder / "out")]) == 2
    assert "layers=2 of bahdanau" in capsys.readouterr().err
