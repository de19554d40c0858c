"""Tabular: who earns more than 50,000 dollars (Adult census), an MLP over embedded categories and binned numbers.

Run: python examples/tabular_adult.py [--data DIR]
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from common import accuracy, arguments, batches, fit, logits_of, show, train_once
from scipy.stats import rankdata
from torch import Tensor, nn

import gracile as gc

SOURCE = "UCI Machine Learning Repository, data set 'Adult' (https://doi.org/10.24432/C5XW20), "
NEEDS = {
    "adult/adult-train.csv": SOURCE + "its file adult.data",
    "adult/adult-test.csv": SOURCE + "its file adult.test",
}
COLUMNS = [
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
]  # fmt: skip
#: fnlwgt is the weight of the survey's sampling, and education-num repeats education.
LEFT_OUT = {"fnlwgt", "education-num", "income"}
NUMBERS = {"age", "capital-gain", "capital-loss", "hours-per-week"}
BINS = 32


class CensusMLP(nn.Module):
    """Logits of both classes: each column's code is embedded, the embeddings side by side go through three layers.

    codes: [n, columns] int64, each column counted from 0 -> [n, 2].
    """

    def __init__(self, sizes: list[int], width: int = 256) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, *sizes[:-1]]).cumsum(0))
        self.embedding = nn.Embedding(sum(sizes), 16)
        self.layers = nn.Sequential(
            nn.Linear(16 * len(sizes), width), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(width, width // 2), nn.ReLU(),
            nn.Linear(width // 2, 2),
        )  # fmt: skip

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(self.embedding(codes + self.offsets).flatten(1))


def read(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file as arrays of strings."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if len(row) == len(COLUMNS)]
    return dict(zip(COLUMNS, np.array(rows).T))


class Coder:
    """Codes of each column, learnt from training rows only: quantile bins of numbers; categories, 0 for unseen ones."""

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.edges, self.categories = {}, {}
        for name in COLUMNS:
            if name in NUMBERS:
                self.edges[name] = np.unique(np.quantile(rows[name].astype(float), np.arange(1, BINS) / BINS))
            elif name not in LEFT_OUT:
                self.categories[name] = {value: code for code, value in enumerate(np.unique(rows[name]), start=1)}

    @property
    def sizes(self) -> list[int]:
        """How many codes each column has."""
        return [len(e) + 1 for e in self.edges.values()] + [len(c) + 1 for c in self.categories.values()]

    def __call__(self, rows: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Codes [n, columns] and labels [n], 1 for more than 50,000 dollars."""
        numbers = [np.searchsorted(edges, rows[name].astype(float), "right") for name, edges in self.edges.items()]
        words = [np.array([codes.get(v, 0) for v in rows[name]]) for name, codes in self.categories.items()]
        labels = np.char.startswith(rows["income"], ">50K")  # the test file ends its labels with a dot
        return torch.from_numpy(np.stack(numbers + words, axis=1)), torch.from_numpy(labels).long()


def auc(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """Area under the ROC curve: the probability that a positive example scores above a negative one."""
    logits, labels = (t.numpy() for t in logits_of(model, data))
    positive = labels == 1
    ranks = rankdata(logits[:, 1] - logits[:, 0])
    n = positive.sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum()))


def main() -> None:
    options = arguments(__doc__, NEEDS)
    rows = read(options.data / "adult/adult-train.csv")
    order = np.random.default_rng(0).permutation(len(rows["income"]))
    held_out, fitted = ({name: v[part] for name, v in rows.items()} for part in (order[:6000], order[6000:]))
    coder = Coder(fitted)
    train, evaluation = coder(fitted), batches(*coder(held_out), 512)
    test = batches(*coder(read(options.data / "adult/adult-test.csv")), 512)

    torch.manual_seed(0)
    run = options.runs / "tabular_adult"
    model = train_once(
        CensusMLP(coder.sizes),
        run / "model.safetensors",
        lambda model: fit(model, *train, epochs=8, lr=2e-3, batch_size=256),
    )
    print(f"Held out: accuracy {accuracy(model, evaluation):.4f}, AUC {auc(model, evaluation):.4f}")

    data = gc.Data(
        train=batches(*train, 512),
        evaluation=evaluation,
        metric=gc.metrics.accuracy,
        loss=gc.losses.cross_entropy,
    )
    goal = gc.Goal(target=gc.OnnxRuntime(), max_drop=0.01, objective="latency")
    result = gc.optimize(model, data, goal, run_dir=run / "optimize", on_progress=show)
    result.save(run / "slim")

    print(result.report)
    print(f"Report: {run / 'slim' / 'report.html'}")
    for name, net in (("original", model), ("compressed", result.model)):
        print(f"Official test set, {name}: accuracy {accuracy(net, test):.4f}, AUC {auc(net, test):.4f}")


if __name__ == "__main__":
    main()
