"""Speech: spoken digits (Free Spoken Digit Dataset), log-mel spectra through convolutions and a GRU.

Run: python examples/speech_digits.py [--data DIR]
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import accuracy, arguments, batches, fit, show, train_once
from scipy.signal import stft
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc

NEEDS = {
    "fsdd/fsdd.npz": "Free Spoken Digit Dataset (https://github.com/Jakobovski/free-spoken-digit-dataset), its 3,000 "
    "clips as one file: audio int16 end to end, offsets [3001], labels, speaker and index (number of the recording)"
}
RATE, WINDOW, HOP, MELS, SECONDS = 8000, 256, 128, 40, 1.0


class SpokenDigits(nn.Module):
    """Logits of the ten digits: two convolutions that halve the frames, a GRU in both directions, the mean over time.

    spectra: [n, mels, frames] -> [n, 10].
    """

    def __init__(self, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(MELS, width, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, 2 * width, 5, stride=2, padding=2, bias=False)
        self.norm2 = nn.BatchNorm1d(2 * width)
        self.gru = nn.GRU(2 * width, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * hidden, 10)

    def forward(self, spectra: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(spectra)))
        x = F.relu(self.norm2(self.conv2(x)))
        states, _ = self.gru(x.transpose(1, 2))
        return self.head(self.dropout(states.mean(dim=1)))


def mel_filters() -> np.ndarray:
    """Triangular filters [mels, bins], equally spaced on the mel scale from 0 to half the sampling rate."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[None]
    return np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))


def log_mel(clips: np.ndarray) -> np.ndarray:
    """log(1e-6 + mel energies) [n, mels, frames] of clips [n, samples] in [-1, 1]."""
    _, _, spectrum = stft(clips, RATE, nperseg=WINDOW, noverlap=WINDOW - HOP)
    return np.log(1e-6 + mel_filters() @ np.abs(spectrum) ** 2).astype(np.float32)


def read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-mel spectra of all clips, cut or filled with silence to one second; labels; numbers of the recordings."""
    with np.load(path, allow_pickle=False) as file:
        audio, offsets = file["audio"], file["offsets"]
        labels, index = file["labels"].astype(np.int64), file["index"]
    clips = np.zeros((len(labels), int(RATE * SECONDS)), dtype=np.float32)
    for row, (start, stop) in enumerate(pairwise(offsets)):
        clip = audio[start:stop][: clips.shape[1]]
        clips[row, : len(clip)] = clip / 32768
    return log_mel(clips), labels, index


def mask_and_shift(spectra: Tensor, generator: torch.Generator) -> Tensor:
    """Training noise: shift by up to eight frames, and blank a band of mels and a stretch of frames (SpecAugment)."""
    _, mels, frames = spectra.shape
    shift, mel, frame = (
        int(torch.randint(low, high, (), generator=generator))
        for low, high in ((-8, 9), (0, mels - 6), (0, frames - 8))
    )
    spectra = spectra.roll(shift, dims=2).clone()
    spectra[:, mel : mel + 6] = 0
    spectra[:, :, frame : frame + 8] = 0
    return spectra


def trained(options: argparse.Namespace) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """The network, and spectra and labels of the parts "train", "evaluation" and "test"."""
    spectra, labels, index = read(options.data / "fsdd/fsdd.npz")
    # The official test set is recordings 0 to 4 of each speaker and digit; 5 to 14 are held out from the rest.
    parts = {"test": index < 5, "evaluation": (index >= 5) & (index < 15), "train": index >= 15}
    mean, std = (f(spectra[parts["train"]], axis=(0, 2), keepdims=True) for f in (np.mean, np.std))
    split = {
        name: (torch.from_numpy((spectra[part] - mean) / std), torch.from_numpy(labels[part]))
        for name, part in parts.items()
    }
    torch.manual_seed(0)
    model = train_once(
        SpokenDigits(),
        options.runs / "speech_digits" / "model.safetensors",
        lambda model: fit(model, *split["train"], epochs=20, lr=3e-3, batch_size=32, augment=mask_and_shift),
    )
    print(f"Held out: accuracy {accuracy(model, batches(*split['evaluation'], 32)):.4f}")
    return model, split


def main() -> None:
    options = arguments(__doc__, NEEDS)
    model, split = trained(options)
    evaluation, test = batches(*split["evaluation"], 32), batches(*split["test"], 32)
    run = options.runs / "speech_digits"

    order = torch.randperm(len(split["train"][1]), generator=torch.Generator().manual_seed(0))
    data = gc.Data(
        train=batches(split["train"][0][order], split["train"][1][order], 32),
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
