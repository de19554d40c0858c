from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

import gracile as gc
from gracile.config import to_config
from gracile.context import Context
from gracile.recipe import Only, Recorder, Step, merge_records
from gracile.report.model import StepRecord
from gracile.select import Select
from gracile.surgery import Swap


@dataclass(frozen=True)
class Note(Step):
    """Records which of the model's layers it may touch."""

    word: str = "x"

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        recorder = Recorder(self)
        select = context.select or Select()
        for name, module in model.named_modules():
            if name and select.matches(name):
                recorder.skip(name, type(module).__name__, self.word)
        recorder.numbers[self.word] = 1.0
        recorder.numbers["last"] = float(len(recorder.layers))
        recorder.notes.append(self.word)
        recorder.edits.append(Swap(self.word, "Identity"))
        return recorder.record()


def net() -> nn.Module:
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), "b": nn.Linear(1, 1)})


def context() -> Context:
    return Context(gc.Data(), net(), net())


def names(record: StepRecord, word: str = "x") -> list[str]:
    return [row.name for row in record.layers if row.reason == word]


def test_only_restricts_and_nested_ones_narrow_further() -> None:
    assert names(Note()(net(), context())) == ["a", "a.0", "a.1", "b"]
    assert names(gc.only("a", Note())(net(), context())) == ["a", "a.0", "a.1"]
    assert names(gc.only(("a.0", "b"), Note())(net(), context())) == ["a.0", "b"]
    assert names(gc.only("a", gc.only("*.1", Note()))(net(), context())) == ["a.1"]
    assert names(gc.only("a", gc.only("b", Note()))(net(), context())) == []


def test_only_checks_its_patterns_and_the_step_s_own() -> None:
    gc.only("a.0", Note()).check(net(), context())
    with pytest.raises(gc.ConfigError, match="No layer matches 'c'"):
        gc.only("c", Note()).check(net(), context())
    with pytest.raises(gc.DataError, match="needs training data"):
        gc.only("a", gc.Distill()).check(net(), context())
    with pytest.raises(gc.DataError, match="needs training data"):
        gc.Recipe(Note(), gc.Distill()).check(net(), context())


def test_a_recipe_is_a_step_that_runs_its_steps_in_order() -> None:
    record = gc.Recipe(Note("x"), gc.only("b", Note("y")))(net(), context())
    assert names(record) == ["a", "a.0", "a.1", "b"] and names(record, "y") == ["b"]
    assert record.notes == ("x", "y") and record.numbers == {"x": 1.0, "y": 1.0, "last": 1.0}
    assert [e.name for e in record.edits if isinstance(e, Swap)] == ["x", "y"]
    assert record.title == "Note, Note (only b)"


def test_leaves_push_only_down_through_nested_recipes() -> None:
    a, b, c = Note("1"), Note("2"), Note("3")
    nested = gc.Recipe(a, gc.only("a", gc.Recipe(b, gc.only("a.0", gc.Recipe(c)))), gc.Recipe(a))
    assert nested.leaves() == [a, Only(("a",), b), Only(("a",), Only(("a.0",), c)), a]
    assert a.leaves() == [a]
    whole, parts = nested(net(), context()), [leaf(net(), context()) for leaf in nested.leaves()]
    assert whole.layers == merge_records({}, "", parts).layers


def test_records_say_which_step_made_them_as_json() -> None:
    recipe = gc.Recipe(gc.only("a", Note("z")))
    record = recipe(net(), context())
    assert json.loads(json.dumps(record.step)) == {
        "type": "Recipe",
        "steps": [{"type": "Only", "patterns": ["a"], "step": {"type": "Note", "word": "z"}}],
    }
    assert record.seconds >= 0


@pytest.mark.parametrize("step", [Note(), gc.only("a", Note()), gc.Recipe(Note()), gc.Prune(0.5)])
def test_steps_cannot_be_changed(step: Any) -> None:
    name = dataclasses.fields(step)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(step, name, None)
    assert step == step and hash(step) == hash(step)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: gc.Recipe(),
        lambda: gc.Recipe(gc.Prune),  # type: ignore[arg-type]
        lambda: gc.Recipe([gc.Prune(0.3)]),  # type: ignore[arg-type]
        lambda: gc.Recipe(gc.W8A8),  # type: ignore[arg-type]
        lambda: gc.only("", Note()),
        lambda: gc.only((), Note()),
        lambda: gc.only(("a", 3), Note()),  # type: ignore[arg-type]
        lambda: gc.only("a", Note),  # type: ignore[arg-type]
        lambda: gc.only("a", gc.W8A8),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_step_or_pattern_is_refused(bad: Any) -> None:
    with pytest.raises(gc.ConfigError):
        bad()


def test_a_recipe_goes_by_its_steps() -> None:
    recipe = gc.Recipe(gc.Prune(0.3), gc.Quantize(gc.W8A8))
    assert recipe == gc.Recipe(gc.Prune(0.3), gc.Quantize(gc.W8A8)) != gc.Recipe(gc.Prune(0.3))
    assert recipe.steps == (gc.Prune(0.3), gc.Quantize(gc.W8A8))
    assert to_config(recipe)["steps"][1]["scheme"]["name"] == "W8A8"
