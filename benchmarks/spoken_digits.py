"""The Free Spoken Digit Dataset as log-mel frames, and a recurrent classifier of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.models import SHARED

RATE, WINDOW, HOP, MELS = 8000, 256, 128, 40
STACKED = 2  # frames that make one time step, as recognizers do to halve their steps
STEPS, FEATURES = RATE // HOP // STACKED, MELS * STACKED
#: Numbers of the recordings, of each speaker and digit. 0 to 4 are the official test set; no training sees the first
#: two parts, and no test the third, which choices are made on.
PARTS = {"test": (0, 5), "further_test": (5, 15), "validation": (15, 20), "train": (20, 50)}


class SpokenDigits(nn.Module):
    """Logits of the ten digits: a recurrent net over the frames, the mean of its outputs, a linear layer.

    layer: nn.GRU or nn.LSTM. frames: [n, steps, features] -> [n, 10].
    """

    def __init__(self, layer: type[nn.RNNBase], hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.rnn = layer(FEATURES, hidden, layers, batch_first=True, dropout=0.2)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(hidden, 10)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.dropout(self.rnn(frames)[0].mean(dim=1)))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Clips shifted by up to 4 steps, with a band of mels and a stretch of steps blanked (SpecAugment), batchwise."""

    def __init__(self, frames: Tensor, labels: Tensor) -> None:
        self.frames, self.labels = frames, labels

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        frames, labels = self.__getitems__([index])
        return frames[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return augment(self.frames[chosen]), self.labels[chosen]


def augment(frames: Tensor) -> Tensor:
    """Each clip [n, steps, features] shifted in time, and 6 mels and 4 steps of it set to the mean, which is 0."""
    n = len(frames)
    steps, mels = torch.arange(STEPS), torch.arange(FEATURES) % MELS
    shifted = frames[torch.arange(n)[:, None], (steps + torch.randint(-4, 5, (n, 1))) % STEPS]
    first_step, first_mel = torch.randint(STEPS - 4, (n, 1)), torch.randint(MELS - 6, (n, 1))
    blank_steps = (steps >= first_step) & (steps < first_step + 4)
    blank_mels = (mels >= first_mel) & (mels < first_mel + 6)
    return shifted.masked_fill(blank_steps[:, :, None] | blank_mels[:, None, :], 0)


def augmented_loader(frames: Tensor, labels: Tensor, size: int = 32) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled, augmented training batches."""
    return DataLoader(Augmented(frames, labels), batch_size=size, shuffle=True, collate_fn=_whole)


def spoken_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Frames [n, steps, features] float32, normalised by the training part, and labels [n] int64 of each of PARTS."""
    with np.load(SHARED / "fsdd" / "fsdd.npz", allow_pickle=False) as file:
        audio, offsets = torch.from_numpy(file["audio"]), file["offsets"]
        labels, index = torch.from_numpy(file["labels"].astype(np.int64)), torch.from_numpy(file["index"])
    clips = torch.zeros(len(labels), RATE)  # one second, cut or filled with silence
    for row, (start, stop) in enumerate(pairwise(offsets)):
        clip = audio[start:stop][:RATE].float() / 32768
        clips[row, : len(clip)] = clip
    frames = log_mel(clips)[:, : STEPS * STACKED]
    members = {name: (index >= first) & (index < end) for name, (first, end) in PARTS.items()}
    mean, std = (f(frames[members["train"]], dim=(0, 1)) for f in (torch.mean, torch.std))
    stacked = ((frames - mean) / std).reshape(len(labels), STEPS, FEATURES)
    return {name: (stacked[chosen], labels[chosen]) for name, chosen in members.items()}


def log_mel(clips: Tensor) -> Tensor:
    """log(1e-6 + mel energies) [n, frames, mels] of clips [n, samples] in [-1, 1]."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(clips, WINDOW, HOP, window=window, return_complex=True).abs() / window.sum()
    return torch.log(1e-6 + mel_filters() @ spectrum.square()).transpose(1, 2)


def mel_filters() -> Tensor:
    """Triangular filters [mels, bins], equally spaced on the mel scale from 0 to half the sampling rate."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[None]
    filters = np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))
    return torch.from_numpy(filters).float()


def _whole(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
