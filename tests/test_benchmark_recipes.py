"""Trainings from end to end, of a recipe so small that its outcome is known."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import end_to_end, run
from benchmarks.end_to_end import BLOCK, TRIALS, Trial, recipe_table, train
from benchmarks.equality import Unequal
from benchmarks.results import Report


class Guess:
    """Learns one number by steps of the rate: its development set's loss is the distance that is left."""

    plan = SimpleNamespace(rate=1.0)

    def __init__(self, second: float = 0.0) -> None:
        self.second, self.calls = second, list[tuple[str, int]]()

    def models(self, seed: int) -> tuple[nn.Module, nn.Module]:
        first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(first.weight, float(seed))
        nn.init.constant_(second.weight, seed + self.second)
        return first, second

    def batches(self, generator: torch.Generator) -> list[Any]:
        return [SimpleNamespace(number=n, tokens=7) for n in torch.randperm(4, generator=generator).tolist()]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), self.plan.rate)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Tensor:
        self.calls.append((str(id(model)), batch.number))
        with torch.no_grad():
            (weight,) = model.parameters()
            weight += optimizer.param_groups[0]["lr"]
            return weight.sum() + torch.rand(())  # as dropout would draw

    def dev_loss(self, model: nn.Module) -> float:
        assert not model.training
        return 100.0 - float(next(model.parameters()).detach())


def trial(recipe: Guess, level: float, most: int = 200) -> Trial:
    return Trial("guess", lambda: recipe, level, 2 * BLOCK, most)  # type: ignore[arg-type, return-value]


def test_both_see_the_same_batches_and_end_when_both_are_good() -> None:
    recipe = Guess()
    level = 100 - 1 - sum(min(1, (n + 1) / end_to_end.WARMUP) for n in range(4 * BLOCK))  # after so many steps
    found = train(trial(recipe, level + 1e-3), 1)
    ours, theirs = found.learners
    assert (ours.library, theirs.library) == ("fastseq", "torch")
    assert ours.steps_to_target == theirs.steps_to_target == 4 * BLOCK
    assert ours.losses == theirs.losses
    assert len(ours.losses) == 4 * BLOCK
    assert [steps for _, steps, _ in ours.quality] == [2 * BLOCK, 4 * BLOCK]
    assert ours.seconds_to_target == ours.quality[-1][0]
    assert found.worst_loss == 0
    blocks = [recipe.calls[k : k + BLOCK] for k in range(0, len(recipe.calls), BLOCK)]
    assert [len({model for model, _ in block}) for block in blocks] == [1] * 8  # in turns
    seen: dict[str, list[int]] = {}
    for model, number in recipe.calls:
        seen.setdefault(model, []).append(number)
    first, second = seen.values()
    assert first == second


def test_what_is_not_reached_is_said() -> None:
    found = train(trial(Guess(), 0.0, most=20), 1)
    assert [side.seconds_to_target for side in found.learners] == [None, None]
    (line,) = recipe_table(Report({}, [], {}, recipes=[found])).lines
    assert list(line)[6:9] == ["not", "not", ""]


def test_other_losses_end_the_training() -> None:
    with pytest.raises(Unequal, match="guess: by step 5 losses differ by"):
        train(trial(Guess(second=1e-3), 0.0), 1)


@pytest.mark.parametrize("side", [0, 1])
def test_a_loss_that_is_not_a_number_ends_the_training(side: int) -> None:
    recipe = Guess()
    step, seen = recipe.step, list[str]()

    def broken(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Tensor:
        if str(id(model)) not in seen:
            seen.append(str(id(model)))
        loss = step(model, optimizer, batch)
        return loss * torch.nan if seen.index(str(id(model))) == side and len(recipe.calls) % 2 else loss

    recipe.step = broken  # type: ignore[method-assign]
    with pytest.raises(Unequal, match="differ by nan"):
        train(trial(recipe, 0.0), 1)


def test_a_recipe_that_lacks_its_data_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(end_to_end.FOLDER, raising=False)
    reasons = {t.name: t.unavailable() for t in TRIALS}
    assert all("names no folder with Multi30k" in str(reasons[n]) for n in reasons if n.startswith("translate"))
    monkeypatch.setenv(end_to_end.FOLDER, str(tmp_path))
    assert "lacks train.de.gz" in str(TRIALS[-1].unavailable())
    for part, end in itertools.product(("train", "val", "test_2016_flickr"), ("de", "en")):
        (tmp_path / f"{part}.{end}.gz").touch()
    monkeypatch.setattr(end_to_end, "find_spec", lambda name: None)
    assert all("is not installed: pip install 'fastseq-rnn[demo]'" in str(t.unavailable()) for t in TRIALS)
    absent: dict[str, str] = {}
    monkeypatch.setattr(run, "TRIALS", [replace(TRIALS[0], make=lambda: pytest.fail("made"))])
    found = run._recipes(SimpleNamespace(absent=absent), None, None, 1)  # type: ignore[arg-type]
    assert found == []
    assert list(absent) == [f"recipe {TRIALS[0].name}"]
