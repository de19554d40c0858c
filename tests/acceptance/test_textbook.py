"""The textbook definitions through `compress`: each gives the numbers of an independent NumPy computation.

Two nets, a multilayer perceptron and a convolutional one, have their forward and backward pass written once more in
float64 NumPy. Tolerances: float32 against float64 over sums of at most a few hundred terms leaves a relative error
near 1e-6; 1e-4 is allowed. What is chosen by rank or threshold must agree exactly, and the gap at the cut is checked to
be wider than that error, so that the choice is decided by the numbers and not by rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import gracile as gc
from gracile.context import Context
from gracile.steps import SGD
from gracile.steps.pruning.scores import score_weights

Array = npt.NDArray[np.float64]
RTOL = 1e-4
CLASSES = 4


class Mlp(nn.Module):
    """fc2(relu(fc1(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class ConvNet(nn.Module):
    """fc(flatten(relu(conv(x)))), a 3 x 3 convolution with padding 1 over 4 x 4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8 * 16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def unfold(x: Array) -> Array:
    """[n, c, 4, 4] -> [n, 16, c * 9]: the 3 x 3 neighbourhood of every pixel, zeros outside."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = [padded[:, :, i : i + 3, j : j + 3].reshape(len(x), -1) for i in range(4) for j in range(4)]
    return np.stack(rows, axis=1)


@dataclass(frozen=True)
class Reference:
    """A net in NumPy: first layer as rows times a matrix, relu, then a linear layer over everything, in that order.

    first, second: names of the two layers. rows: input -> [n, positions, columns] for the first layer's matrix.
    """

    build: Callable[[], nn.Module]
    first: str
    second: str
    shape: tuple[int, ...]
    rows: Callable[[Array], Array]

    def hidden(self, p: dict[str, Array], x: Array) -> tuple[Array, Array]:
        """The first layer's rows, and its output before the relu, [n, units, positions]."""
        rows = self.rows(x)
        matrix = p[f"{self.first}.weight"].reshape(len(p[f"{self.first}.bias"]), -1)
        return rows, (rows @ matrix.T + p[f"{self.first}.bias"]).swapaxes(1, 2)

    def forward(self, p: dict[str, Array], x: Array) -> Array:
        _, z = self.hidden(p, x)
        features = np.maximum(z, 0).reshape(len(x), -1)
        return features @ p[f"{self.second}.weight"].T + p[f"{self.second}.bias"]

    def example_gradients(self, p: dict[str, Array], x: Array, by_logits: Array) -> dict[str, Array]:
        """dL_n/dp of every example n, [n, *shape], from dL_n/dlogits [n, classes]: the chain rule by hand."""
        rows, z = self.hidden(p, x)
        features = np.maximum(z, 0).reshape(len(x), -1)
        by_z = (by_logits @ p[f"{self.second}.weight"]).reshape(z.shape) * (z > 0)
        return {
            f"{self.second}.weight": by_logits[:, :, None] * features[:, None, :],
            f"{self.second}.bias": by_logits,
            f"{self.first}.weight": (by_z @ rows).reshape(len(x), *p[f"{self.first}.weight"].shape),
            f"{self.first}.bias": by_z.sum(axis=2),
        }


REFERENCES = {
    "mlp": Reference(Mlp, "fc1", "fc2", (6,), lambda x: x[:, None, :]),
    "conv": Reference(ConvNet, "conv", "fc", (2, 4, 4), unfold),
}


@dataclass(frozen=True)
class Case:
    """A net with its data, in torch and in NumPy."""

    reference: Reference
    model: nn.Module
    parameters: dict[str, Array]
    x: Array
    labels: npt.NDArray[np.int64]
    data: gc.Data

    @property
    def weights(self) -> tuple[str, str]:
        return f"{self.reference.first}.weight", f"{self.reference.second}.weight"


def numpy_parameters(model: nn.Module) -> dict[str, Array]:
    return {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}


@pytest.fixture(params=sorted(REFERENCES))
def case(request: pytest.FixtureRequest) -> Case:
    reference = REFERENCES[request.param]
    torch.manual_seed(3)
    model = reference.build()
    with torch.no_grad():  # some weights are near zero and some units weak, so that thresholds have something to find
        for parameter in model.parameters():
            parameter.copy_(torch.where(torch.rand_like(parameter) < 0.2, parameter * 1e-3, parameter))
        getattr(model, reference.first).weight[1::3] *= 0.01
    x = torch.randn(24, *reference.shape)
    labels = torch.randint(0, CLASSES, (24,))
    batches = [(x[:10], labels[:10]), (x[10:], labels[10:])]
    data = gc.Data(train=batches, loss=gc.losses.cross_entropy)
    return Case(reference, model, numpy_parameters(model), x.numpy().astype(np.float64), labels.numpy(), data)


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def label_gradients(case: Case) -> dict[str, Array]:
    """Gradient of each example's cross entropy: softmax minus one-hot at the logits."""
    by_logits = softmax(case.reference.forward(case.parameters, case.x)) - np.eye(CLASSES)[case.labels]
    return case.reference.example_gradients(case.parameters, case.x, by_logits)


def compressed(case: Case, step: gc.Step, **settings: object) -> tuple[gc.Result, dict[str, Array]]:
    """The result of `compress`, and its parameters; the model given is as it was."""
    result = gc.compress(case.model, step, case.data, **settings)  # type: ignore[arg-type]
    for name, parameter in case.model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), case.parameters[name].astype(np.float32)), name
    return result, numpy_parameters(result.model)


def changed(case: Case, after: dict[str, Array]) -> bool:
    return any(a.shape != case.parameters[n].shape or (a != case.parameters[n]).any() for n, a in after.items())


def outputs(model: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(x).float()).numpy().astype(np.float64)


def lowest(scores: Array, count: int) -> npt.NDArray[np.bool_]:
    """True at the `count` lowest scores, which must stand clear of the others."""
    flat = scores.ravel()
    order = np.argsort(flat, kind="stable")
    last, first = flat[order[count - 1]], flat[order[count]]
    assert first - last > RTOL * first, "the choice would hang on rounding: use another seed"
    chosen = np.zeros(flat.size, dtype=bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)


def test_the_nets_in_numpy_are_the_nets_in_torch(case: Case):
    # The yardstick is checked itself: outputs, and gradients against autograd's.
    np.testing.assert_allclose(
        outputs(case.model, case.x), case.reference.forward(case.parameters, case.x), rtol=RTOL, atol=1e-6
    )
    loss = nn.functional.cross_entropy(case.model(torch.from_numpy(case.x).float()), torch.from_numpy(case.labels))
    loss.backward()
    gradients = label_gradients(case)
    for name, parameter in case.model.named_parameters():
        np.testing.assert_allclose(gradients[name].mean(axis=0), parameter.grad.numpy(), rtol=RTOL, atol=1e-7)


def test_fixed_point(case: Case):
    """Q(x) = round(x · Q) / Q, bit for bit."""
    result, _ = compressed(case, gc.Quantize(gc.FixedPoint(256), correct=False))
    happened = 0
    for name in case.weights:
        layer = result.model.get_submodule(name.removesuffix(".weight"))
        weight = case.parameters[name].astype(np.float32)
        expected = np.round(weight * np.float32(256)) / np.float32(256)  # a power of two: exact in float32
        assert np.array_equal(layer.decoded_weight().numpy(), expected)
        happened += int((expected != weight).sum())
    assert happened > 0
    rounded = case.parameters | {n: np.round(case.parameters[n] * 256) / 256 for n in case.weights}
    np.testing.assert_allclose(
        outputs(result.model, case.x), case.reference.forward(rounded, case.x), rtol=RTOL, atol=1e-6
    )


def test_weights_below_a_threshold(case: Case):
    """Model − {w : |w| < ε}: those are exactly zero, all others untouched."""
    _, after = compressed(case, gc.Prune(below=1e-3, correct=False))
    happened = 0
    for name, before in case.parameters.items():
        small = (np.abs(before.astype(np.float32)) < np.float32(1e-3)) & (name in case.weights)
        assert np.array_equal(after[name], np.where(small, 0.0, before)), name
        happened += int(small.sum())
    assert 0 < happened < sum(case.parameters[n].size for n in case.weights)


def fisher(gradients: Array) -> Array:
    return (gradients**2).mean(axis=0)


CRITERIA = {
    "gradient": (gc.Gradient(), lambda w, g: np.abs(w * g.mean(axis=0))),
    "hessian": (gc.Hessian(), lambda w, g: 0.5 * w**2 * fisher(g)),
    "taylor": (gc.Taylor(), lambda w, g: w**2 * fisher(g)),
}


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_scores_by_gradient_and_hessian(case: Case, name: str):
    criterion, formula = CRITERIA[name]
    gradients = label_gradients(case)
    model = copy.deepcopy(case.model)
    context = Context(data=case.data, original=model, teacher=model)
    scores = score_weights(model, list(case.weights), criterion, context, examples=256)
    for weight in case.weights:
        expected = formula(case.parameters[weight], gradients[weight])
        np.testing.assert_allclose(scores[weight].numpy(), expected, rtol=RTOL, atol=1e-7 * expected.max())


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_weights_by_gradient_and_hessian(case: Case, name: str):
    """A quarter of each layer, the lowest scores, is exactly zero; the rest is untouched."""
    criterion, formula = CRITERIA[name]
    gradients = label_gradients(case)
    result, after = compressed(case, gc.Prune(0.25, criterion=criterion, correct=False))
    for parameter, before in case.parameters.items():
        gone = np.zeros(before.shape, dtype=bool)
        if parameter in case.weights:
            gone = lowest(formula(before, gradients[parameter]), before.size // 4)
        assert np.array_equal(after[parameter], np.where(gone, 0.0, before)), parameter
    assert changed(case, after)
    assert result.report.steps[0].numbers["sparsity"] == 0.25


def without_units(case: Case, gone: npt.NDArray[np.bool_]) -> dict[str, Array]:
    """The parameters with these units of the first layer cut out of both layers."""
    first, second = case.weights
    bias = f"{case.reference.first}.bias"
    wide = case.parameters[second].reshape(CLASSES, len(gone), -1)
    return case.parameters | {
        first: case.parameters[first][~gone],
        bias: case.parameters[bias][~gone],
        second: wide[:, ~gone].reshape(CLASSES, -1),
    }


def check_cut(case: Case, gone: npt.NDArray[np.bool_], result: gc.Result, after: dict[str, Array]) -> None:
    assert 0 < gone.sum() < len(gone)
    expected = without_units(case, gone)
    for name in expected:
        assert np.array_equal(after[name], expected[name]), name
    np.testing.assert_allclose(
        outputs(result.model, case.x), case.reference.forward(expected, case.x), rtol=RTOL, atol=1e-6
    )


def test_neurons_below_a_threshold(case: Case):
    """Neurons whose incoming weights have a norm below ε are gone from both layers."""
    weight = case.parameters[case.weights[0]]
    norms = np.sqrt((weight.reshape(len(weight), -1) ** 2).sum(axis=1))
    threshold = 0.1 * float(norms.max())
    assert np.abs(norms / threshold - 1).min() > RTOL
    result, after = compressed(case, gc.Prune(below=threshold, pattern=gc.Channels(), correct=False))
    check_cut(case, norms < threshold, result, after)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_neurons_by_gradient_and_hessian(case: Case, name: str):
    """A neuron's score is the sum over the weights into it and out of it; the lowest quarter is cut."""
    criterion, formula = CRITERIA[name]
    gradients = label_gradients(case)
    first, second = (formula(case.parameters[n], gradients[n]) for n in case.weights)
    units = len(first)
    scores = first.reshape(units, -1).sum(axis=1) + second.reshape(CLASSES, units, -1).sum(axis=(0, 2))
    result, after = compressed(case, gc.Prune(0.25, criterion=criterion, pattern=gc.Channels(), correct=False))
    check_cut(case, lowest(scores, units // 4), result, after)


def soft_label_gradient(student: Array, teacher: Array, temperature: float) -> Array:
    """d/dlogits of τ² KL(softmax(t/τ) ‖ softmax(s/τ)) for each example: τ (softmax(s/τ) − softmax(t/τ))."""
    return temperature * (softmax(student / temperature) - softmax(teacher / temperature))


def hard_label_gradient(student: Array, teacher: Array) -> Array:
    """d/dlogits of −log softmax(s)[argmax t] for each example."""
    return softmax(student) - np.eye(CLASSES)[teacher.argmax(axis=1)]


DISTILLATION = {
    "soft": ((gc.SoftLabels(temperature=4),), 0.0, lambda s, t, y: soft_label_gradient(s, t, 4.0)),
    "hard": ((gc.HardLabels(),), 0.0, lambda s, t, y: hard_label_gradient(s, t)),
    "soft and true": (
        (gc.SoftLabels(temperature=2),),
        0.25,
        lambda s, t, y: 0.75 * soft_label_gradient(s, t, 2.0) + 0.25 * (softmax(s) - np.eye(CLASSES)[y]),
    ),
    "soft and hard": (
        (gc.SoftLabels(temperature=4), gc.HardLabels()),
        0.0,
        lambda s, t, y: soft_label_gradient(s, t, 4.0) + hard_label_gradient(s, t),
    ),
}


@pytest.mark.parametrize("name", sorted(DISTILLATION))
def test_distillation(case: Case, name: str):
    """Weights after four steps of plain gradient descent on one batch, with the documented learning rates."""
    losses, label_weight, gradient_of = DISTILLATION[name]
    torch.manual_seed(11)
    teacher = case.reference.build()
    batch = (torch.from_numpy(case.x).float(), torch.from_numpy(case.labels))
    data = gc.Data(train=[batch], loss=gc.losses.cross_entropy)
    step = gc.Distill(
        losses=losses,
        epochs=4,
        label_weight=label_weight,
        optimizer=SGD(learning_rate=0.3, momentum=0.0, weight_decay=0.0),
        held_out=0.0,
    )
    result = gc.compress(case.model, step, data, teacher=teacher)
    wanted = dict(case.parameters)
    teacher_logits = case.reference.forward(numpy_parameters(teacher), case.x)
    for done in range(4):
        progress = done / 4  # warm-up over the first 5 %, never below a thousandth, then a cosine to zero
        rate = 1e-3 if done == 0 else (1 + np.cos(np.pi * (progress - 0.05) / 0.95)) / 2
        by_logits = gradient_of(case.reference.forward(wanted, case.x), teacher_logits, case.labels)
        gradients = case.reference.example_gradients(wanted, case.x, by_logits)
        wanted = {n: w - 0.3 * rate * gradients[n].mean(axis=0) for n, w in wanted.items()}
    after = numpy_parameters(result.model)
    for parameter, value in wanted.items():
        moved = np.abs(value - case.parameters[parameter]).max()
        assert moved > 1e-3, f"{parameter} hardly moved, so agreement would mean nothing"
        np.testing.assert_allclose(after[parameter], value, atol=1e-3 * moved)  # of how far it went


def test_values_of_the_distillation_losses(case: Case):
    """τ² Σ p log(p / q) over softened probabilities, and −log q[argmax p]; the mean over examples."""
    student = case.reference.forward(case.parameters, case.x)
    teacher = 3 * np.random.default_rng(0).normal(size=student.shape)
    p, q = softmax(teacher / 4), softmax(student / 4)
    soft = 16 * (p * np.log(p / q)).sum(axis=1).mean()
    hard = -np.log(softmax(student)[np.arange(len(student)), teacher.argmax(axis=1)]).mean()
    pair = torch.from_numpy(student), torch.from_numpy(teacher)
    assert gc.SoftLabels(temperature=4)(*pair).item() == pytest.approx(soft, rel=RTOL)
    assert gc.HardLabels()(*pair).item() == pytest.approx(hard, rel=RTOL)


IDLE = {
    "threshold below every weight": lambda c: gc.Prune(below=1e-30),
    "threshold below every neuron": lambda c: gc.Prune(below=1e-30, pattern=gc.Channels()),
    "the same sparsity again": lambda c: gc.Recipe(gc.Prune(0.25, correct=False), gc.Prune(0.25, correct=False)),
    "quantized again": lambda c: gc.Recipe(
        gc.Quantize(gc.FixedPoint(256), correct=False), gc.Quantize(gc.FixedPoint(256), correct=False)
    ),
    "too few units to round to": lambda c: gc.Prune(0.1, pattern=gc.Channels(multiple_of=64)),
}


@pytest.mark.parametrize("name", sorted(IDLE))
def test_a_step_that_changes_nothing_is_an_error(case: Case, name: str):
    with torch.no_grad():  # no weight is zero by accident, or it would be below every threshold
        for parameter in case.model.parameters():
            parameter.copy_(torch.where(parameter == 0, torch.full_like(parameter, 0.1), parameter))
    before = {n: p.detach().clone() for n, p in case.model.state_dict().items()}
    with pytest.raises(gc.NothingChangedError):
        gc.compress(case.model, IDLE[name](case), case.data)
    assert all(torch.equal(p, before[n]) for n, p in case.model.state_dict().items())
