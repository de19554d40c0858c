"""Which modules are compared, what they gave, and that Distill lowers the distance between them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.context import Context
from gracile.errors import ConfigError
from gracile.losses import Hint, SoftLabels
from gracile.steps import AdamW, Distill
from gracile.steps.training.hidden_states import HiddenStates, comparable_layers

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, inner), nn.Linear(inner, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(torch.relu(self.up(x))), None


class Net(nn.Module):
    """Two blocks that return tuples, the second inside a sequence that gives the same tensor; a layer called twice."""

    def __init__(self, inner: int = 12, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.twice, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.first, self.rest = Block(inner), nn.Sequential(Block(inner))
        self.pair = nn.Sequential(self.twice)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pair(self.pair(self.stem(x)))
        x, _ = self.first(x)
        x, _ = self.rest(x)
        y: Tensor = self.head(x)
        return y


def layers(student: nn.Module, teacher: nn.Module, *patterns: str) -> list[str]:
    return comparable_layers(student, teacher, lambda net: net(X), patterns or None)


def test_by_default_modules_made_of_others_and_of_equal_tensors_the_innermost() -> None:
    assert layers(Net(), Net()) == ["first", "rest.0"]
    assert layers(Net(inner=5), Net()) == ["first", "rest.0"]


def test_by_pattern_whatever_can_be_compared() -> None:
    assert layers(Net(inner=5), Net(), "rest.0.*", "stem") == ["stem", "rest.0.down"]


def test_a_net_of_plain_layers_is_compared_at_these() -> None:
    one, other = (nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 4), nn.Linear(4, 3)) for n in (8, 5))
    assert layers(one, other) == ["2", "3"]


def test_a_layer_that_was_factorized_is_still_one_layer() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    student = gc.compress(net, gc.Factorize(0.3), gc.Data(calibration=[X])).model
    assert layers(student, net) == ["0"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("first.up", r"\[\(64, 5\)\] in the model and \[\(64, 12\)\] in the teacher"),
        ("twice", r"\[\(64, 8\), \(64, 8\)\]"),
        ("frist", "near it are first"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layers(Net(inner=5), Net(), pattern)
    step, model = Distill(losses=(Hint((pattern,)),)), Net(inner=5)
    with pytest.raises(ConfigError, match=message):
        step.check(model, Context(gc.Data(train=[X]), Net(), Net()))


def test_nets_that_share_no_module_are_refused() -> None:
    with pytest.raises(ConfigError, match="no modules with the same name"):
        layers(Net(), nn.Sequential(nn.Linear(6, 3)))


def test_the_states_are_those_of_the_last_forward_and_gone_afterwards() -> None:
    student, teacher = Net(seed=1), Net()
    states = HiddenStates(["stem", "first"])
    with states.watched(student, teacher):
        student(X)
        teacher(2 * X)
        assert torch.equal(states.student["stem"], student.stem(X))
        assert torch.equal(states.teacher["first"], teacher.first(teacher.pair(teacher.pair(teacher.stem(2 * X))))[0])
        assert states.student["first"].requires_grad
    assert not states.student and not states.teacher
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())


def test_distilling_by_hints_brings_the_states_together_and_says_which() -> None:
    teacher = Net().eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    data = gc.Data(train=[X[:32], X[32:]])

    def distance(net: nn.Module) -> float:
        states = HiddenStates(layers(net, teacher))
        with states.watched(net, teacher), torch.no_grad():
            net(X), teacher(X)
            return sum(float(Hint()(states.student[n], states.teacher[n])) for n in states.layers) / 2

    step = Distill(losses=(Hint(), SoftLabels(1.0)), epochs=20, optimizer=AdamW(5e-3), held_out=0.0)
    result = gc.compress(student, step, data, teacher=teacher)
    assert distance(result.model) < 0.2 * distance(student)
    assert "Hidden states of 2 modules: first, rest.0." in result.report.steps[0].notes
    assert not any(m._forward_hooks for m in teacher.modules())


def test_one_step_is_that_of_the_mean_over_layers() -> None:
    """With plain descent, the change of a weight is the rate times the gradient that autograd gives of the formula."""
    from gracile.steps import SGD

    teacher, student = Net().eval(), Net(seed=1)
    twin = copy.deepcopy(student)
    hints = []
    x = y = X
    for name in ("stem", "first", "rest.0"):
        module, other = twin.get_submodule(name), teacher.get_submodule(name)
        x, y = module(x), other(y)
        x, y = (t[0] if isinstance(t, tuple) else t for t in (x, y))
        if name == "stem":
            x, y = twin.pair(twin.pair(x)), teacher.pair(teacher.pair(y))
        else:
            hints.append(((x - y) ** 2).mean() / y.var(correction=0))
    (sum(hints) / 2).backward()
    before, gradient = twin.first.up.weight.detach(), twin.first.up.weight.grad
    assert gradient is not None
    Distill(losses=(Hint(),), optimizer=SGD(100.0, 0, 0), held_out=0)(
        student, Context(gc.Data(train=[X]), teacher, teacher)
    )
    # the first step of the warm-up has a thousandth of the rate
    torch.testing.assert_close(student.first.up.weight.detach(), before - 0.1 * gradient, rtol=0, atol=1e-6)


def test_with_hints_the_default_is_adam_at_a_rate_that_goes_on_from_a_good_start() -> None:
    trained = []
    for optimizer in (None, AdamW(1e-3)):
        student = Net(seed=1)
        Distill(losses=(Hint(),), epochs=2, optimizer=optimizer, held_out=0)(
            student, Context(gc.Data(train=[X]), Net(), Net())
        )
        trained.append(student.first.up.weight.detach())
    assert torch.equal(*trained)
