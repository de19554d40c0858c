from __future__ import annotations

from dataclasses import replace

from gracile.report import LayerRow, Measurement, Report, StepRecord, view


def measured(target, batch, p50, precision="f32", threads=2):
    return Measurement(
        label="m", target=target, batch_size=batch, latency_p50_ms=p50, precision=precision, threads=threads
    )


def test_a_result_is_judged_against_the_original_at_its_fastest_there():
    slow, fast = measured("OpenVINO", 32, 15.0), measured("OpenVINO", 32, 9.0, "bf16")
    other, single = measured("ONNX Runtime", 32, 5.0), measured("OpenVINO", 1, 0.7)
    after = (measured("OpenVINO", 32, 4.0), measured("OpenVINO", 1, 0.4), measured("OpenVINO", 8, 1.0))
    pairs = view.pairs(Report(title="", before=(slow, fast, other, single), after=after))
    assert [pair.before for pair in pairs] == [fast, single, slow]  # no batch 8 was measured: the first


def test_where_the_target_has_no_baseline_the_fastest_of_that_batch_size_serves():
    before = (measured("a", 32, 3.0), measured("b", 32, 2.0), measured("b", 1, 1.0))
    (pair,) = view.pairs(Report(title="", before=before, after=(measured("c", 32, 1.5),)))
    assert pair.before == before[1]


def test_without_a_baseline_there_is_no_pair():
    assert view.pairs(Report(title="", after=(measured("a", 1, 1.0),))) == []


def test_rows_say_whether_a_change_is_wanted(report):
    shown = {row.name: row for row in view.rows(view.pairs(report)[0], report)}
    assert (shown["Accuracy"].change, shown["Accuracy"].better) == ("−0.62 pt", False)
    assert (shown["Latency, median"].change, shown["Latency, median"].better) == ("2.71× faster", True)
    slower = replace(report, after=(replace(report.after[0], latency_p50_ms=30.4),))
    row = view.rows(view.pairs(slower)[0], slower)[1]
    assert (row.change, row.better) == ("2.00× slower", False)


def test_what_was_measured_on_one_side_only_is_shown_without_a_change():
    report = Report(title="", before=(measured("a", 1, 1.0),), after=(measured("a", 1, None),))
    (row,) = view.rows(view.pairs(report)[0], report)
    assert (row.before, row.after, row.change) == ("1.00 ms", "–", "–")


def test_a_later_pair_does_not_repeat_what_does_not_depend_on_the_batch(report):
    first, second = view.comparisons(report)
    assert "Model file" in [row.name for row in first[1]]
    assert [row.name for row in second[1]] == ["Latency, median", "Latency, 95th percentile"]


def test_a_metric_outside_0_to_1_is_not_a_percentage(report):
    assert view.in_percent(report)
    loss = {"value": -2.3, "low": -2.4, "high": -2.2, "examples": 10, "name": "negative loss"}
    other = replace(report, candidates=(), before=(replace(report.before[0], quality=loss),), after=())
    assert not view.in_percent(other)


def test_steps_of_one_layer_merge_into_one_line():
    def step(*rows):
        return StepRecord(step={}, title="", seconds=0, layers=rows)

    def row(**more):
        return LayerRow(**{"name": "a", "kind": "Linear", "action": "cut", **more})

    report = Report(
        title="",
        steps=(
            step(row(kept=8, of=16), row(name="b", action="skipped", reason="frozen")),
            step(row(kept=6, of=8, sparsity=0.5)),
            step(row(action="quantized", bits=8.0), row(name="b", action="skipped", reason="frozen")),
        ),
    )
    a, b = view.layers(report)
    assert (a.actions, a.kept, a.of, a.width, a.sparsity, a.bits) == ("cut, quantized", 6, 16, 6 / 16, 0.5, 8.0)
    assert (b.actions, b.reason) == ("skipped", "frozen")
    assert view.skipped_by_reason(report) == [("frozen", ["b"])]


def test_what_was_measured_before_training_is_not_said_of_the_layer_after_it():
    def rows(*actions):
        found = [LayerRow(name="a", kind="Linear", **more) for more in actions]
        return view.layers(
            Report(title="", steps=tuple(StepRecord(step={}, title="", seconds=0, layers=(r,)) for r in found))
        )

    quantized = {"action": "quantized", "bits": 4.0, "range": (0.0, 2.0), "clipped": 0.01, "error": 0.1}
    (before,) = rows(quantized)
    assert (before.range, before.clipped, before.error) == ((0.0, 2.0), 0.01, 0.1)
    (after,) = rows(quantized, {"action": "trained", "range": (0.0, 1.5)})
    assert (after.bits, after.range, after.clipped, after.error) == (4.0, (0.0, 1.5), None, None)
    (again,) = rows(quantized, {"action": "trained"}, {"action": "corrected", "error": 0.05})
    assert (again.clipped, again.error) == (None, 0.05)
