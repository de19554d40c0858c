"""Text: what a question asks for (TREC, 6 coarse classes), a small transformer encoder with its own vocabulary.

Run: python examples/text_trec.py [--data DIR]
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from common import Batches, accuracy, arguments, batches, fit, show, train_once
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc

SOURCE = "TREC question classification (Li and Roth 2002), one question a line after its class as a digit 0 to 5, "
NEEDS = {
    "text-classification/TREC.train.all": SOURCE + "5,452 lines, as in https://github.com/harvardnlp/sent-conv-torch",
    "text-classification/TREC.test.all": SOURCE + "500 lines, from the same place",
}
LENGTH, PAD, UNKNOWN = 24, 0, 1


class Attention(nn.Module):
    """Self-attention over [n, tokens, width]; `mask` [n, 1, 1, tokens] is true where there is a word."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = (f(x).view(n, tokens, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(attended.transpose(1, 2).reshape(n, tokens, -1))


class Layer(nn.Module):
    """Attention and then a feed-forward net, each with a layer norm before it and around both a residual path."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.outer(F.gelu(self.inner(self.norm2(x)))))


class QuestionEncoder(nn.Module):
    """Logits of the six classes from word numbers [n, tokens], 0 being padding: the encoded words' mean, classified."""

    def __init__(self, words: int, width: int = 128, heads: int = 4, inner: int = 512, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=PAD)
        self.positions = nn.Embedding(LENGTH, width)
        self.dropout = nn.Dropout(0.3)
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        present = tokens != PAD
        x = self.dropout(self.words(tokens) + self.positions.weight[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x, present[:, None, None, :])
        weights = present.unsqueeze(-1).float()
        return self.head(self.dropout((self.norm(x) * weights).sum(1) / weights.sum(1)))


def read(path: Path) -> list[tuple[str, int]]:
    """Questions and their classes, each question once."""
    lines = path.read_text(encoding="latin-1").splitlines()
    return list(dict.fromkeys((line[2:].strip().lower(), int(line[0])) for line in lines if line[1:2] == " "))


def words_of(question: str) -> list[str]:
    """Words with their numbers made alike ("1998" becomes "0000"), and punctuation."""
    return re.findall(r"[\w']+|[^\w\s]", re.sub(r"\d", "0", question))


def encode(questions: list[tuple[str, int]], vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Word numbers [n, LENGTH], cut or padded with 0, and classes [n]."""
    tokens = torch.full((len(questions), LENGTH), PAD)
    for row, (question, _) in enumerate(questions):
        numbers = [vocabulary.get(word, UNKNOWN) for word in words_of(question)][:LENGTH]
        tokens[row, : len(numbers)] = torch.tensor(numbers)
    return tokens, torch.tensor([label for _, label in questions])


def drop_words(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Training noise: one word in eight becomes unknown, so that the model learns to do without it.

    Padding beyond the longest question of the batch is cut off, which halves the time of training.
    """
    tokens = tokens[:, : int((tokens != PAD).sum(1).max())]
    hidden = torch.rand(tokens.shape, generator=generator) < 0.125
    return torch.where(hidden & (tokens != PAD), UNKNOWN, tokens)


def trained(options: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, Tensor], Batches, Batches]:
    """The encoder, and the training questions, those held out from them, and those of the official test set."""
    asked = read(options.data / "text-classification/TREC.test.all")
    questions = [q for q in read(options.data / "text-classification/TREC.train.all") if q not in set(asked)]
    order = np.random.default_rng(0).permutation(len(questions))
    held_out, fitted = ([questions[i] for i in part] for part in (order[:1000], order[1000:]))
    counts = Counter(word for question, _ in fitted for word in words_of(question))
    vocabulary = {word: number for number, (word, n) in enumerate(counts.most_common(), start=2) if n > 1}
    train, evaluation = encode(fitted, vocabulary), batches(*encode(held_out, vocabulary), 32)
    torch.manual_seed(0)
    model = train_once(
        QuestionEncoder(len(vocabulary) + 2),
        options.runs / "text_trec" / "model.safetensors",
        lambda model: fit(model, *train, epochs=20, lr=2e-3, batch_size=64, augment=drop_words),
    )
    print(f"Held out: accuracy {accuracy(model, evaluation):.4f}")
    return model, train, evaluation, batches(*encode(asked, vocabulary), 32)


def main() -> None:
    options = arguments(__doc__, NEEDS)
    model, train, evaluation, test = trained(options)
    run = options.runs / "text_trec"

    data = gc.Data(
        train=batches(*train, 32),
        evaluation=evaluation,
        metric=gc.metrics.accuracy,
        loss=gc.losses.cross_entropy,
    )
    goal = gc.Goal(target=gc.OnnxRuntime(), max_drop=0.02, objective="latency", minutes=2)
    result = gc.optimize(model, data, goal, run_dir=run / "optimize", on_progress=show)
    result.save(run / "slim")

    print(result.report)
    print(f"Report: {run / 'slim' / 'report.html'}")
    for name, net in (("original", model), ("compressed", result.model)):
        print(f"Official test set, {name}: accuracy {accuracy(net, test):.4f}")


if __name__ == "__main__":
    main()
