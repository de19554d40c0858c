from __future__ import annotations

import pytest

from gracile.report import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.01234, "0.0123"), (12.34, "12.3"), (1234.0, "1234"), (1.2e-7, "1.20e-07"), (-0.5, "-0.5"),
     (100.0, "100"), (float("inf"), "∞"), (float("nan"), "not a number")],
)  # fmt: skip
def test_digits(value, shown):
    assert text.digits(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(12, "12 B"), (999, "999 B"), (1102, "1.10 kB"), (221_300, "221 kB"), (1.25e9, "1.25 GB")]
)
def test_bytes(value, shown):
    assert text.show_bytes(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.412, "0.412 ms"), (5.61, "5.61 ms"), (15.24, "15.2 ms"), (12_000, "12.0 s")]
)
def test_milliseconds(value, shown):
    assert text.show_ms(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.44, "0.4 s"), (14.2, "14 s"), (412, "6 min 52 s"), (7800, "2 h 10 min")]
)
def test_seconds(value, shown):
    assert text.show_seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(512, "512"), (9999, "9\u202f999"), (269_722, "270 k"), (40_813_184, "40.8 M")]
)
def test_counts(value, shown):
    assert text.show_count(value) == shown


def test_ratios_in_words():
    assert text.show_ratio(15.2, 5.61, "faster", "slower") == "2.71× faster"
    assert text.show_ratio(10, 15, "faster", "slower") == "1.50× slower"
    assert text.show_ratio(10, 10.01, "faster", "slower") == "unchanged"
    assert text.show_ratio(0, 10, "faster", "slower") == text.ABSENT


def test_differences_have_a_sign_and_points():
    assert text.show_difference(-0.0062, True) == "−0.62 pt"
    assert text.show_difference(0.004, True) == "+0.40 pt"
    assert text.show_difference(-0.00001, True) == "unchanged"
    assert text.show_difference(-1.5, False) == "−1.5"


def test_an_agreement_just_below_one_is_not_shown_as_one():
    assert text.show_any(0.9996) == "0.9996"
    assert text.show_any(1.4495e-5) == "1.45e-05"
    assert text.show_any(True) == "yes"
    assert text.show_any(None) == text.ABSENT
    assert text.show_any({"a": [1, 2.0]}) == "a 1, 2"
