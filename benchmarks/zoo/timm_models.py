"""One model of every family (module) of timm: the one with the fewest parameters."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entry import Batch, CannotBuild, Entry, image, randomise

#: Smaller image for families that take any; the others keep the size they are made for.
SIZES = (64, 96, 128, 160, 192, 224, 256)
LARGEST = 120_000_000


def entries() -> list[Entry]:
    from timm.models import list_modules

    return [Entry("timm", family, functools.partial(build, family)) for family in list_modules()]


def build(family: str) -> tuple[nn.Module, Batch]:
    """The family's smallest model, at the smallest of the image sizes that it runs on."""
    import timm

    names = timm.list_models(module=family)
    if not names:
        raise CannotBuild("it registers no model")
    sizes = {name: _numbers(timm, name) for name in names}
    name = min(sizes, key=lambda n: sizes[n])
    if sizes[name] > LARGEST:
        raise CannotBuild(f"its smallest model has {sizes[name]} parameters")
    own = timm.create_model(name, pretrained=False, num_classes=10).default_cfg["input_size"]
    first: Exception | None = None
    for n in [s for s in SIZES if s < own[-1]] + [own[-1]]:
        for arguments in ({}, {"img_size": n}):
            try:
                torch.manual_seed(0)
                model = timm.create_model(name, pretrained=False, num_classes=10, **arguments).eval()
                batch = image(n, own[0])
                with torch.no_grad():
                    model(batch)
            except Exception as error:  # not a size for it
                first = first or error
                continue
            randomise(model)
            return model, batch
    raise CannotBuild(f"{name}: {type(first).__name__}: {first}")


def _numbers(timm: Any, name: str) -> int:
    """How many parameters, found without allocating any; many where it cannot be built."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, pretrained=False, num_classes=10).parameters())
    except Exception:  # not buildable so
        return 10**12
