import numpy as np
import torch

from gracile.nn.cells import start_in_cells

ENDS = torch.tensor(-4.0), torch.tensor(3.0)


def start(weight: torch.Tensor, prior: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Where values start, and the share of them that start at their grid points: their codes are not the nearest."""
    low, high = (end.expand_as(weight) for end in ENDS)
    found = start_in_cells(weight, prior, torch.ones_like(weight), low, high)
    changed = (found == weight) & ((weight != 0) | (prior != 0))
    return found, float(changed.double().mean())


def agreeing(weight: np.ndarray, prior: np.ndarray) -> int:
    """The most values of a row that some factor rounds to the weight, of many factors tried."""
    factors = np.linspace(0, 4, 200_001)[1:, None]
    return int((np.clip(np.round(factors * prior), -4, 3) == weight).sum(1).max())


def test_values_rounded_to_nearest_start_at_the_prior_up_to_a_factor_per_row() -> None:
    generator = torch.Generator().manual_seed(1)
    prior = torch.randn(6, 40, generator=generator)
    weight = (prior * torch.tensor([0.8, 1.0, 1.3, 1.9, 0.6, 1.1])[:, None]).round().clamp(*ENDS)
    found, changed = start(weight, prior)
    assert changed == 0
    assert torch.equal(found.round(), weight)
    free = (found - weight).abs() < 0.489
    assert float(free.float().mean()) > 0.9
    for values, priors, inside in zip(found, prior, free):
        ratio = (values / priors)[inside]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_the_factor_is_the_one_for_which_most_codes_are_nearest() -> None:
    generator = torch.Generator().manual_seed(2)
    prior = torch.randn(5, 12, generator=generator)
    for _ in range(8):
        weight = (1.2 * prior + 0.6 * torch.randn(5, 12, generator=generator)).round().clamp(*ENDS)
        _, changed = start(weight, prior)
        expected = sum(agreeing(w, p) for w, p in zip(weight.double().numpy(), prior.double().numpy()))
        assert round(60 * (1 - changed)) >= expected  # the factors tried leave gaps that the exact one has not


def test_codes_that_were_solved_for_start_at_themselves() -> None:
    prior = torch.tensor([[2.2, -1.3, 0.6, 3.4], [5.0, 3.4, 3.4, -5.0]])
    weight = torch.tensor([[2.0, -2.0, 1.0, 3.0], [3.0, 3.0, 3.0, -4.0]])
    found, changed = start(weight, prior)
    # First row: 2.2, 0.6 and 3.4 keep their codes for factors from .8333 to 1.1364, and -1.3 goes to -1 for them up to
    # 1.1538. Second: all keep theirs from .7353 on, since the others are ends.
    factor = (0.5 / 0.6 + 2.5 / 2.2) / 2
    assert changed == 0.125
    torch.testing.assert_close(found[0], torch.tensor([2.2 * factor, -2.0, 0.6 * factor, 3.4 * factor]))
    assert torch.equal(found[1].round().clamp(*ENDS), weight[1])


def test_rows_that_say_nothing_start_at_their_codes() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, -1.0]])
    prior = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.0, -2.0, 3.0]])
    found, changed = start(weight, prior)
    assert torch.equal(found, weight)
    assert abs(changed - 5 / 9) < 1e-6  # zeros are where the prior is
