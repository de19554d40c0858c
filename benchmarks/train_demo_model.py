"""Make what the demo ships: divide scikit-learn's digits, train `gracile.demo.DigitsNet`, and save both.

Run from the checkout: python benchmarks/train_demo_model.py   (about a minute on two cores)
The training images alone are seen in training; the 700 evaluation images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from gracile.demo import EVALUATION, TRAIN, DigitsNet, load_split

ASSETS = Path(__file__).resolve().parents[1] / "gracile" / "demo" / "assets"


def divide(seed: int) -> dict[str, np.ndarray]:
    """The 1,797 digits, shuffled and divided with the same share of each class in both parts."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    train_x, eval_x, train_y, eval_y = train_test_split(
        images, labels, train_size=TRAIN, test_size=EVALUATION, random_state=seed, stratify=labels
    )
    return {"train_images": train_x, "train_labels": train_y, "evaluation_images": eval_x, "evaluation_labels": eval_y}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 10 %, and shifted by up to two of its 16 pixels."""
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(torch.pi / 15), 1 + uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([torch.stack([cos, -sin, uniform(0.25)], 1), torch.stack([sin, cos, uniform(0.25)], 1)], 1)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(model: DigitsNet, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Cross-entropy with label smoothing, SGD with a one-cycle learning rate."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(images), generator=generator)[: len(images) // 32 * 32].split(32):
            loss = F.cross_entropy(model(augment(images[index], generator)), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}/{epochs}: loss {total / (len(images) // 32):.4f}", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ASSETS.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(ASSETS / "digits.npz", **divide(options.seed))
    torch.manual_seed(options.seed)
    model, start = DigitsNet(), time.perf_counter()
    train(model, *load_split("train"), options.epochs, options.seed)
    save_file(model.state_dict(), ASSETS / "digits_cnn.safetensors")
    images, labels = load_split("evaluation")
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).sum().item()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.perf_counter() - start:.0f} s")
    print(f"evaluation accuracy {100 * right / len(labels):.2f} % ({right} of {len(labels)})")


if __name__ == "__main__":
    main()
