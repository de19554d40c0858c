"""What the demo ships: real digits, honestly divided, and a network that reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.data import Data
from gracile.demo import EVALUATION, TRAIN, asset, load_data, load_model, load_split


def originals(split: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(asset("digits.npz"), allow_pickle=False) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def test_the_two_parts_together_are_scikit_learns_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    (train_x, train_y), (eval_x, eval_y) = originals("train"), originals("evaluation")
    assert (len(train_x), len(eval_x)) == (TRAIN, EVALUATION)
    shipped = sorted((x.tobytes(), int(y)) for x, y in zip([*train_x, *eval_x], [*train_y, *eval_y]))
    assert shipped == sorted((x.astype(np.uint8).tobytes(), int(y)) for x, y in zip(digits.images, digits.target))


def test_no_evaluation_image_is_in_the_training_part():
    train = {image.tobytes() for image in originals("train")[0]}
    assert train.isdisjoint(image.tobytes() for image in originals("evaluation")[0])


def test_both_parts_have_the_same_share_of_each_digit():
    train, evaluation = (np.bincount(originals(split)[1], minlength=10) for split in ("train", "evaluation"))
    # Whole digits cannot be divided: each part may be off by one of a class.
    assert np.abs(train / TRAIN - evaluation / EVALUATION).max() < 1 / EVALUATION + 1 / TRAIN


def test_images_are_the_originals_at_twice_the_size():
    images, labels = load_split("evaluation")
    assert images.shape == (EVALUATION, 1, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.min() >= 0
    assert images.max() <= 1
    # Pixel (6, 6) lies at 2.75 of the original, a quarter before pixel 3, in both directions.
    pixel = originals("evaluation")[0][0].astype(float) / 16
    by_hand = 0.75 * 0.75 * pixel[3, 3] + 0.75 * 0.25 * (pixel[2, 3] + pixel[3, 2]) + 0.25 * 0.25 * pixel[2, 2]
    assert images[0, 0, 6, 6].item() == pytest.approx(by_hand, abs=1e-6)  # float32 against float64


def test_the_shipped_network_reads_the_held_out_digits():
    model, (images, labels) = load_model(), load_split("evaluation")
    assert not model.training
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).sum().item()
    assert right >= 0.985 * EVALUATION


def test_data_is_the_same_at_every_call_and_can_be_read_twice():
    data = load_data(batch_size=50)
    assert isinstance(data, Data)
    first, again = list(data.train), list(load_data(batch_size=50).train)
    assert [len(images) for images, _ in first] == [50] * 21 + [47]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again))
    assert all(isinstance(batch, torch.Tensor) for batch in data.calibration)
    assert torch.equal(torch.cat(list(data.calibration)), torch.cat([images for images, _ in first])[:256])
    assert sum(len(labels) for _, labels in data.evaluation) == EVALUATION
    outputs = load_model()(first[0][0])
    assert data.metric(outputs, first[0]).shape == (50,)
    assert data.loss(outputs, first[0]).ndim == 0


def test_what_is_shipped_is_small():
    assert sum(asset(name).stat().st_size for name in ("digits.npz", "digits_cnn.safetensors")) < 1_000_000
