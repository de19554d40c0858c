"""The package knows structures, not architectures: no name of one occurs in its code."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gracile"
NAMES = [
    "bert", "albert", "roberta", "electra", "deberta", "gpt", "gpt2", "llama", "mistral", "mixtral", "qwen",
    "gemma", "opt", "bloom", "falcon", "phi", "t5", "bart", "whisper", "wav2vec", "hubert", "conformer", "siglip",
    "vit", "deit", "beit", "swin", "convnext", "resnet", "resnext", "densenet", "efficientnet", "mobilenet",
    "shufflenet", "squeezenet", "vgg", "alexnet", "inception", "regnet", "mamba", "rwkv", "hyena", "unet", "yolo",
    "detr", "segformer", "sam", "dino", "maxvit", "coatnet",
]  # fmt: skip
#: A name as a word or as a part of an identifier: "is_bert", "BertLayer", "llama3".
NAMED = re.compile(rf"(?<![a-z])({'|'.join(NAMES)})(?![a-z])", re.IGNORECASE)
#: The demo ships one net, and says which.
ALLOWED = {"demo"}


def code_of(path: Path) -> list[tuple[int, str]]:
    """Names and strings of the code with their lines; comments and docstrings are prose and left out."""
    tokens = list(tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline))
    found, previous = [], tokenize.NEWLINE
    for token in tokens:
        starts_statement = previous in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
        docstring = token.type == tokenize.STRING and starts_statement
        if token.type in (tokenize.NAME, tokenize.STRING) and not docstring:
            found.append((token.start[0], re.sub(r"(?<=[a-z])(?=[A-Z])", "_", token.string)))
        if token.type != tokenize.COMMENT:
            previous = token.type
    return found


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in ALLOWED]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_architecture_is_named(path: Path) -> None:
    named = [(line, text) for line, text in code_of(path) if NAMED.search(text)]
    assert not named, f"{path.name} names architectures: {named}"


def test_names_are_found_in_code_and_not_in_prose(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text('"""Bert in prose."""\n# llama in a comment\nif kind == "gpt2":\n    BertLayer()\n    option = 1\n')
    assert [line for line, text in code_of(path) if NAMED.search(text)] == [3, 4]
