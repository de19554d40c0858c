"""Recurrent nets: PyTorch's own layers in their variants, cells in loops, and cells written by hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Batch, Entry, randomise


class Tagger(nn.Module):
    """Embedding, recurrent layer, a class for every token."""

    def __init__(self, layer: type[nn.RNNBase], hidden: int = 48, **arguments: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.rnn = layer(32, hidden, batch_first=True, **arguments)
        width = (arguments.get("proj_size") or hidden) * (2 if arguments.get("bidirectional") else 1)
        self.fc = nn.Linear(width, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embed(tokens))[0])


class LanguageModel(nn.Module):
    """The output layer shares the embedding's weights."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(60, dim), nn.LSTM(dim, 64, batch_first=True), nn.Linear(64, dim)
        self.out = nn.Linear(dim, 60, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.fc(self.rnn(self.embed(tokens))[0]))


class Translator(nn.Module):
    """A bidirectional encoder, its state handed to a decoder that attends to the encoder's outputs."""

    def __init__(self, dim: int = 32, hidden: int = 40) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, dim), nn.Embedding(50, dim)
        self.encoder = nn.GRU(dim, hidden, bidirectional=True, batch_first=True)
        self.bridge, self.decoder = nn.Linear(2 * hidden, hidden), nn.GRU(dim, hidden, batch_first=True)
        self.score, self.out = nn.Linear(hidden, 2 * hidden), nn.Linear(3 * hidden, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(tokens))
        first = torch.tanh(self.bridge(torch.cat([state[0], state[1]], dim=-1))).unsqueeze(0)
        x, _ = self.decoder(self.target(tokens), first)
        weights = torch.softmax(self.score(x) @ memory.transpose(1, 2), dim=-1)
        return self.out(torch.cat([x, weights @ memory], dim=-1))


class CellLoop(nn.Module):
    """A cell of PyTorch's, stepped by hand."""

    def __init__(self, kind: str, hidden: int = 48) -> None:
        super().__init__()
        self.hidden_size, self.kind = hidden, kind
        self.cell = nn.LSTMCell(16, hidden) if kind == "lstm" else nn.GRUCell(16, hidden)
        self.fc = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.hidden_size)
        c = torch.zeros_like(h)
        for t in range(x.shape[1]):
            if self.kind == "lstm":
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
        return self.fc(h)


class ConvolutionalLSTM(nn.Module):
    """An LSTM whose products are convolutions over images."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.channels, self.gates = channels, nn.Conv2d(3 + channels, 4 * channels, 3, padding=1)
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.channels, *x.shape[-2:], dtype=x.dtype)
        c = torch.zeros_like(h)
        for t in range(x.shape[1]):
            i, f, o, g = torch.split(self.gates(torch.cat([x[:, t], h], dim=1)), self.channels, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class SimpleRecurrentUnit(nn.Module):
    """SRU: products for all steps at once, and a light recurrence with a highway."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, width), nn.Linear(width, 6)
        self.products, self.forget = nn.Linear(width, 3 * width), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        values, forget, reset = self.products(x).chunk(3, dim=-1)
        c, outputs = torch.zeros_like(values[:, 0]), []
        for t in range(x.shape[1]):
            f = torch.sigmoid(forget[:, t] + self.forget * c)
            c = f * c + (1 - f) * values[:, t]
            r = torch.sigmoid(reset[:, t])
            outputs.append(r * torch.tanh(c) + (1 - r) * x[:, t])
        return self.out(torch.stack(outputs, dim=1))


class LineReader(nn.Module):
    """CRNN: columns of a convolutional net's output, read in both directions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((1, 24), (24, 32), (32, 48)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d((2, 2))]
        self.conv, self.rnn = nn.Sequential(*layers), nn.LSTM(48 * 4, 40, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(80, 30)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (x := self.conv(x)).shape
        return self.fc(self.rnn(x.permute(0, 3, 1, 2).reshape(n, w, c * h))[0])


class PooledClassifier(nn.Module):
    """Bidirectional GRU, its outputs weighted by attention."""

    def __init__(self, hidden: int = 40) -> None:
        super().__init__()
        self.rnn = nn.GRU(16, hidden, bidirectional=True, batch_first=True)
        self.attend, self.vector, self.fc = (
            nn.Linear(2 * hidden, 32),
            nn.Parameter(torch.randn(32)),
            nn.Linear(2 * hidden, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        weights = torch.softmax(torch.tanh(self.attend(y)) @ self.vector, dim=1)
        return self.fc((y * weights.unsqueeze(-1)).sum(1))


def _tokens() -> Batch:
    return torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Any, Any]] = {
    "lstm": (functools.partial(Tagger, nn.LSTM), _tokens),
    "stacked-lstm": (functools.partial(Tagger, nn.LSTM, num_layers=3), _tokens),
    "bidirectional-lstm": (functools.partial(Tagger, nn.LSTM, num_layers=2, bidirectional=True), _tokens),
    "projected-lstm": (functools.partial(Tagger, nn.LSTM, proj_size=24), _tokens),
    "gru": (functools.partial(Tagger, nn.GRU, num_layers=2), _tokens),
    "bidirectional-gru": (functools.partial(Tagger, nn.GRU, bidirectional=True), _tokens),
    "elman": (functools.partial(Tagger, nn.RNN, num_layers=2), _tokens),
    "tied-language-model": (LanguageModel, _tokens),
    "translator": (Translator, _tokens),
    "lstm-cell": (functools.partial(CellLoop, "lstm"), lambda: _normal(3, 6, 16)),
    "gru-cell": (functools.partial(CellLoop, "gru"), lambda: _normal(3, 6, 16)),
    "conv-lstm": (ConvolutionalLSTM, lambda: _normal(2, 4, 3, 12, 12)),
    "sru": (SimpleRecurrentUnit, lambda: _normal(3, 6, 16)),
    "crnn": (LineReader, lambda: _normal(2, 1, 32, 64)),
    "gru-attention": (PooledClassifier, lambda: _normal(3, 8, 16)),
}


def entries() -> list[Entry]:
    return [Entry("recurrent", name, functools.partial(build, name)) for name in MODELS]


def build(name: str) -> tuple[nn.Module, Batch]:
    kind, batch = MODELS[name]
    torch.manual_seed(0)
    model = kind()
    randomise(model)
    return model.eval(), batch()
