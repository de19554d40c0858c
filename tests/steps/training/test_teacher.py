"""A teacher with folded batch norms: the same answers, the original untouched, watched layers as they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gracile.steps.training.teacher import folded_teacher


def teacher() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
    )
    for module in net:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return net.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def run(net: nn.Module) -> Tensor:
    out: Tensor = net(X)
    return out


def test_the_copy_answers_as_the_teacher_which_stays_as_it_was() -> None:
    net = teacher()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = folded_teacher(net, run, ())
    assert [type(m).__name__ for m in folded.children()].count("Identity") == 3
    torch.testing.assert_close(folded(X), net(X), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_watched_layer_keeps_its_norm_and_gives_what_it_gave() -> None:
    net = teacher()
    folded = folded_teacher(net, run, ("0",))
    assert isinstance(folded[1], nn.BatchNorm2d) and isinstance(folded[4], nn.Identity)  # type: ignore[index]
    assert torch.equal(folded[0](X), net[0](X))  # type: ignore[index]


def test_a_teacher_without_such_norms_is_taken_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert folded_teacher(net, run, ()) is net
    norm = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval()  # nothing before it to fold it into
    assert folded_teacher(norm, run, ()) is norm
