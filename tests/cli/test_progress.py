"""Progress: which bars are up, and which lines a log gets."""

from __future__ import annotations

import pytest

from gracile.cli.progress import PAUSE, Bars, Lines
from gracile.cli.terminal import Terminal
from gracile.context import Progress


def test_an_outer_phase_ends_the_phases_inside_it():
    with Bars() as bars:
        bars(Progress("step", 0, 2, "Prune"))
        bars(Progress("gradients", 1, 256))
        assert bars.phases == ("step", "gradients")
        bars(Progress("step", 1, 2, "Distill"))
        assert bars.phases == ("step",)
        bars(Progress("train", 1, 100))
        bars(Progress("train", 100, 100))
        assert bars.phases == ("step",)
        bars(Progress("step", 2, 2))
        assert bars.phases == ()


def test_phases_with_the_same_first_word_share_a_bar():
    with Bars() as bars:
        bars(Progress("measure original", 0, 2))
        bars(Progress("measure compressed", 1, 2))
        assert bars.phases == ("measure",)


def test_a_phase_that_starts_again_counts_from_its_start():
    with Bars() as bars:
        bars(Progress("train", 90, 100))
        bars(Progress("train", 3, 50))
        (task,) = bars._bars.tasks
        assert (task.completed, task.total) == (3, 50)


def test_a_total_may_be_unknown():
    with Bars() as bars:
        bars(Progress("calibrate", 7, None))
        assert bars.phases == ("calibrate",)


def test_lines_tell_short_phases_by_item_and_long_ones_every_half_minute():
    said, now = [], [0.0]
    lines = Lines(said.append, clock=lambda: now[0])
    lines(Progress("step", 0, 2, "Prune"))
    lines(Progress("step", 0, 2, "Prune"))
    for done in range(1, 1000):
        lines(Progress("train", done, 1000, f"loss {done}"))
    assert said == ["step 0/2 Prune"]
    now[0] = PAUSE + 1
    lines(Progress("train", 5, 1000, "loss 5"))
    lines(Progress("train", 6, 1000, "loss 6"))
    assert said == ["step 0/2 Prune", "train 5/1000 loss 5"]
    lines(Progress("step", 2, 2))
    assert len(said) == 2


@pytest.mark.parametrize(("quiet", "expected"), [(True, None), (False, Lines)])
def test_no_bars_where_there_is_no_terminal(quiet, expected, capsys):
    with Terminal(quiet=quiet).progress() as on_progress:
        assert on_progress is None if expected is None else isinstance(on_progress, expected)


def test_quiet_leaves_nothing_but_the_result(run):
    command = ("compress", "shop:make_net", "--quantize", "int8")
    assert "step 0/1" in run(*command, "--out", "a").stderr
    assert run(*command, "--out", "b", "--quiet").stderr == ""
