"""Speech models after the architectures that torchaudio and its peers ship, written small.

torchaudio has no build beside this PyTorch; transformers' speech models (Wav2Vec2, HuBERT, Whisper …) are in that
collection.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Batch, Entry, randomise


class Separator(nn.Module):
    """Conv-TasNet: an encoder of samples, masks from dilated depthwise blocks, a transposed decoder."""

    def __init__(self, filters: int = 64, width: int = 48, hidden: int = 96, speakers: int = 2) -> None:
        super().__init__()
        self.speakers, self.filters = speakers, filters
        self.encoder = nn.Conv1d(1, filters, 16, 8, bias=False)
        self.norm, self.bottleneck = nn.GroupNorm(1, filters), nn.Conv1d(filters, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden),
                nn.Conv1d(hidden, hidden, 3, padding=2**i, dilation=2**i, groups=hidden), nn.PReLU(),
                nn.GroupNorm(1, hidden), nn.Conv1d(hidden, 2 * width, 1),
            )
            for i in range(3)
        )  # fmt: skip
        self.masks, self.decoder = (
            nn.Conv1d(width, filters * speakers, 1),
            nn.ConvTranspose1d(filters, 1, 16, 8, bias=False),
        )

    def forward(self, wave: Tensor) -> Tensor:
        features = self.encoder(wave)
        x, total = self.bottleneck(self.norm(features)), torch.zeros(())
        for block in self.blocks:
            residual, skip = block(x).chunk(2, dim=1)
            x, total = x + residual, total + skip
        masks = torch.sigmoid(self.masks(total)).view(wave.shape[0], self.speakers, self.filters, -1)
        separated = masks * features.unsqueeze(1)
        return self.decoder(separated.view(wave.shape[0] * self.speakers, self.filters, -1)).view(
            wave.shape[0], self.speakers, -1
        )


class Conformer(nn.Module):
    """Two Conformer blocks behind a subsampling convolution: half feed-forwards, attention, gated convolution."""

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.SiLU(), nn.Linear(3 * dim, dim))
            self.norm, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 4, batch_first=True)
            self.before, self.into, self.depth = (
                nn.LayerNorm(dim),
                nn.Conv1d(dim, 2 * dim, 1),
                nn.Conv1d(dim, dim, 7, padding=3, groups=dim),
            )
            self.batch_norm, self.out = nn.BatchNorm1d(dim), nn.Conv1d(dim, dim, 1)
            self.last = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.SiLU(), nn.Linear(3 * dim, dim))
            self.final = nn.LayerNorm(dim)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.5 * self.first(x)
            normed = self.norm(x)
            x = x + self.attention(normed, normed, normed, need_weights=False)[0]
            y = F.glu(self.into(self.before(x).transpose(1, 2)), dim=1)
            x = x + self.out(F.silu(self.batch_norm(self.depth(y)))).transpose(1, 2)
            return self.final(x + 0.5 * self.last(x))

    def __init__(self, bins: int = 40, dim: int = 64, classes: int = 30) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, 2), nn.ReLU())
        self.project = nn.Linear(32 * 9, dim)
        self.blocks, self.head = nn.ModuleList(self.Block(dim) for _ in range(2)), nn.Linear(dim, classes)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.subsample(mel.unsqueeze(1))
        x = self.project(x.permute(0, 2, 1, 3).flatten(2))
        for block in self.blocks:
            x = block(x)
        return self.head(x).log_softmax(-1)


class DeepSpeech2(nn.Module):
    """Convolutions over a spectrogram, bidirectional recurrence, batch norm over time, a classifier per frame."""

    def __init__(self, bins: int = 40, hidden: int = 64, classes: int = 30) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 32, (11, 5), (2, 2), (5, 2)), nn.BatchNorm2d(32), nn.Hardtanh(0, 20),
            nn.Conv2d(32, 32, (11, 5), (2, 1), (5, 2)), nn.BatchNorm2d(32), nn.Hardtanh(0, 20),
        )  # fmt: skip
        self.rnn, self.norm = nn.GRU(320, hidden, 2, bidirectional=True, batch_first=True), nn.BatchNorm1d(2 * hidden)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv(mel.transpose(1, 2).unsqueeze(1))
        n, c, f, t = x.shape
        x, _ = self.rnn(x.view(n, c * f, t).transpose(1, 2))
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Wav2Letter(nn.Sequential):
    """Nothing but one-dimensional convolutions."""

    def __init__(self, bins: int = 40, classes: int = 30) -> None:
        widths = [64, 64, 64, 96]
        layers: list[nn.Module] = [nn.Conv1d(bins, 64, 11, 2, 5), nn.ReLU()]
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv1d(a, b, 7, 1, 3), nn.ReLU()]
        super().__init__(*layers, nn.Conv1d(96, classes, 1), nn.LogSoftmax(1))


class RawAudioNet(nn.Module):
    """M5: a few strided convolutions on samples, and a mean over time."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, width, 80, 4), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(4),
            nn.Conv1d(width, width, 3), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(4),
            nn.Conv1d(width, 2 * width, 3), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.MaxPool1d(4),
        )  # fmt: skip
        self.fc = nn.Linear(2 * width, 12)

    def forward(self, wave: Tensor) -> Tensor:
        x = self.body(wave)
        return self.fc(F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)).log_softmax(-1)


class KeywordNet(nn.Module):
    """DS-CNN: depthwise-separable convolutions over a spectrogram."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, width, (10, 4), 2, (4, 1), bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(width, 12)

    def forward(self, mel: Tensor) -> Tensor:
        return self.fc(self.body(mel.unsqueeze(1)).mean((2, 3)))


class SpeakerNet(nn.Module):
    """ECAPA-TDNN: Res2Net blocks with squeeze-excitation, and statistics pooled with attention."""

    class Block(nn.Module):
        def __init__(self, width: int, scale: int = 4) -> None:
            super().__init__()
            self.scale, part = scale, width // scale
            self.into, self.out = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)
            self.norm = nn.BatchNorm1d(width)
            self.parts = nn.ModuleList(nn.Conv1d(part, part, 3, 1, 2, 2) for _ in range(scale - 1))
            self.down, self.up = nn.Conv1d(width, 24, 1), nn.Conv1d(24, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            pieces = list(torch.chunk(F.relu(self.into(x)), self.scale, dim=1))
            for i, conv in enumerate(self.parts, 1):
                pieces[i] = F.relu(conv(pieces[i] + pieces[i - 1] if i > 1 else pieces[i]))
            y = self.norm(self.out(torch.cat(pieces, dim=1)))
            return x + y * torch.sigmoid(self.up(F.relu(self.down(y.mean(2, keepdim=True)))))

    def __init__(self, bins: int = 40, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv1d(bins, width, 5, 1, 2)
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(3))
        self.merge = nn.Conv1d(3 * width, 96, 1)
        self.attend = nn.Sequential(nn.Conv1d(3 * 96, 32, 1), nn.Tanh(), nn.Conv1d(32, 96, 1), nn.Softmax(2))
        self.norm, self.fc = nn.BatchNorm1d(192), nn.Linear(192, 32)

    def forward(self, mel: Tensor) -> Tensor:
        x, outputs = F.relu(self.stem(mel)), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        x = F.relu(self.merge(torch.cat(outputs, dim=1)))
        mean, deviation = x.mean(2, keepdim=True), x.var(2, keepdim=True).clamp(min=1e-5).sqrt()
        weight = self.attend(torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1))
        mu = (x * weight).sum(2)
        sigma = ((x.square() * weight).sum(2) - mu.square()).clamp(min=1e-5).sqrt()
        return self.fc(self.norm(torch.cat([mu, sigma], dim=1)))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residual and skip paths."""

    def __init__(self, width: int = 32, skip: int = 48) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(4))
        self.outs = nn.ModuleList(nn.Conv1d(width, width + skip, 1) for _ in range(4))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 64, 1), nn.ReLU(), nn.Conv1d(64, 64, 1))

    def forward(self, wave: Tensor) -> Tensor:
        x, total = self.stem(wave), torch.zeros(())
        for i, (gate, out) in enumerate(zip(self.gates, self.outs)):
            y = gate(F.pad(x, (2**i, 0)))
            y = out(torch.tanh(y[:, : self.width]) * torch.sigmoid(y[:, self.width :]))
            x, total = x + y[:, : self.width], total + y[:, self.width :]
        return self.end(total)


class Vocoder(nn.Module):
    """HiFi-GAN's generator: transposed convolutions, and several kernel sizes summed."""

    def __init__(self, bins: int = 40, width: int = 64) -> None:
        super().__init__()
        self.pre = nn.utils.parametrizations.weight_norm(nn.Conv1d(bins, width, 7, 1, 3))
        self.ups, self.resolutions = nn.ModuleList(), nn.ModuleList()
        for i in range(2):
            a, b = width // 2**i, width // 2 ** (i + 1)
            self.ups.append(nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(a, b, 8, 4, 2)))
            self.resolutions.append(nn.ModuleList(nn.Conv1d(b, b, k, 1, k // 2) for k in (3, 7)))
        self.post = nn.Conv1d(width // 4, 1, 7, 1, 3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.pre(mel)
        for up, kernels in zip(self.ups, self.resolutions):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(x + conv(F.leaky_relu(x, 0.1)) for conv in kernels) / len(kernels)
        return torch.tanh(self.post(F.leaky_relu(x)))


class Denoiser(nn.Module):
    """Demucs: a U-Net on samples with gated convolutions and a recurrent bottleneck."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        channels = [1, width, 2 * width]
        for a, b in itertools.pairwise(channels):
            self.downs.append(nn.Sequential(nn.Conv1d(a, b, 8, 4, 2), nn.ReLU(), nn.Conv1d(b, 2 * b, 1), nn.GLU(1)))
            up = [nn.Conv1d(b, 2 * b, 1), nn.GLU(1), nn.ConvTranspose1d(b, a, 8, 4, 2)]
            self.ups.insert(0, nn.Sequential(*up, *([nn.ReLU()] if a > 1 else [])))
        self.rnn, self.mix = (
            nn.LSTM(2 * width, 2 * width, 1, bidirectional=True, batch_first=True),
            nn.Linear(4 * width, 2 * width),
        )

    def forward(self, wave: Tensor) -> Tensor:
        x, skips = wave, []
        for down in self.downs:
            x = down(x)
            skips.append(x)
        x = self.mix(self.rnn(x.transpose(1, 2))[0]).transpose(1, 2)
        for up in self.ups:
            x = up(x + skips.pop())
        return x


class Transducer(nn.Module):
    """RNN-T: an encoder of frames, a predictor of tokens, and a joint network over every pair."""

    def __init__(self, bins: int = 40, hidden: int = 64, classes: int = 30) -> None:
        super().__init__()
        self.encoder, self.embed = nn.LSTM(bins, hidden, 2, batch_first=True), nn.Embedding(classes, 32)
        self.predictor = nn.LSTM(32, hidden, batch_first=True)
        self.left, self.right, self.joint = nn.Linear(hidden, 72), nn.Linear(hidden, 72), nn.Linear(72, classes)

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        frames = self.left(self.encoder(mel)[0])
        labels = self.right(self.predictor(self.embed(tokens))[0])
        return self.joint(torch.tanh(frames.unsqueeze(2) + labels.unsqueeze(1))).log_softmax(-1)


class MelTagger(nn.Module):
    """A VGG over spectrograms with a flattened head, as audio taggers have."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((1, 24), (24, 32), (32, 48)):
            layers += [nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body, self.head = (
            nn.Sequential(*layers),
            nn.Sequential(nn.Linear(48 * 5 * 8, 64), nn.ReLU(), nn.Linear(64, 20)),
        )

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(self.body(mel.unsqueeze(1)).flatten(1))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _transduced() -> Batch:
    return {"mel": _normal(2, 20, 40), "tokens": torch.arange(12).view(2, 6)}


MODELS = {
    "conv-tasnet": (Separator, lambda: _normal(2, 1, 640)),
    "conformer": (Conformer, lambda: _normal(2, 48, 40)),
    "deepspeech2": (DeepSpeech2, lambda: _normal(2, 40, 40)),
    "wav2letter": (Wav2Letter, lambda: _normal(2, 40, 64)),
    "m5": (RawAudioNet, lambda: _normal(2, 1, 4000)),
    "ds-cnn": (KeywordNet, lambda: _normal(2, 40, 64)),
    "ecapa-tdnn": (SpeakerNet, lambda: _normal(2, 40, 48)),
    "wavenet": (WaveNet, lambda: _normal(2, 1, 400)),
    "hifi-gan": (Vocoder, lambda: _normal(2, 40, 20)),
    "demucs": (Denoiser, lambda: _normal(2, 1, 512)),
    "rnn-transducer": (Transducer, _transduced),
    "vgg-tagger": (MelTagger, lambda: _normal(2, 40, 64)),
}


def entries() -> list[Entry]:
    return [Entry("speech", name, functools.partial(build, name)) for name in MODELS]


def build(name: str) -> tuple[nn.Module, Batch]:
    kind, batch = MODELS[name]
    torch.manual_seed(0)
    model = kind()
    randomise(model)
    return model.eval(), batch()
