"""Hint against NumPy, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gracile.errors import ConfigError
from gracile.losses import Hint


def test_it_is_the_squared_error_in_variances_of_the_teacher() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(4, 6, 5)), 3 + 2 * generator.normal(size=(4, 6, 5))
    wanted = 0.5 * ((ours - theirs) ** 2).mean() / theirs.var()
    found = Hint(weight=0.5)(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(found) == pytest.approx(wanted, rel=1e-5)  # float32


def test_states_that_are_all_alike_give_a_finite_loss() -> None:
    same = torch.full((3, 4), 2.0)
    assert float(Hint()(same, same)) == 0
    assert torch.isfinite(Hint()(same + 1e-3, same))


@pytest.mark.parametrize("settings", [{"layers": ()}, {"layers": "a.*"}, {"weight": 0.0}, {"weight": float("inf")}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Hint(**settings)
