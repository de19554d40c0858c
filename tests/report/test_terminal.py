from __future__ import annotations

import io

from rich.console import Console

from gracile.report import Measurement, Report
from gracile.report.terminal import render

EXPECTED = """\
ResNet-20 on CIFAR-10

OpenVINO, batch 32, 2 threads

                            before (f32)   after (int8)          change
 ──────────────────────────────────────────────────────────────────────
 Accuracy                        91.48 %        90.86 %        −0.62 pt
 Latency, median                 15.2 ms        5.61 ms    2.71× faster
 Latency, 95th percentile        17.0 ms        6.28 ms    2.71× faster
 Model file                      1.10 MB         221 kB   4.98× smaller
 Parameters in memory            1.09 MB         190 kB   5.75× smaller
 Bits per weight                    32.2            8.6     3.74× fewer
 Parameters                        270 k          176 k     1.53× fewer
 MACs per example                 40.8 M         19.2 M     2.13× fewer


OpenVINO, batch 1, 2 threads

                            before (f32)   after (int8)         change
 ─────────────────────────────────────────────────────────────────────
 Latency, median                0.741 ms       0.412 ms   1.80× faster
 Latency, 95th percentile        0.83 ms       0.461 ms   1.80× faster


Goal met: drop 0.62 pt, at most 0.96 pt with 95 % confidence: within the limit of 1 pt
Why it ended here: the next narrower width lost more quality than allowed

Skipped: 10 layers
  9 × its output is added to a shortcut of fixed width: layer1.0.conv2, layer1.1.conv2,
layer1.2.conv2 and 6 more
  1 × its output is the model's output: linear"""


def test_the_table_as_a_person_sees_it(report):
    assert str(report) == EXPECTED


def test_user_strings_are_not_taken_for_markup():
    hostile = "[bold red]x[/] [link=http://a]y[/link]"
    measurement = Measurement(label="a", target=hostile, batch_size=1, precision=hostile, latency_p50_ms=1.0)
    report = Report(title=hostile, verdict=hostile, before=(measurement,), after=(measurement,))
    assert str(report).count(hostile) >= 3


def test_colours_appear_only_where_the_console_has_them(report):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    console.print(render(report))
    assert "\x1b[" in console.file.getvalue()
    assert "\x1b[" not in str(report)


def test_a_report_of_nothing_is_still_text():
    assert str(Report(title="bare", verdict="Not measured")) == "bare\n\nResult: Not measured"
