"""One model of every family (module) of timm: the one with the smallest name for its size."""

from __future__ import annotations

import functools

import torch
from torch import nn

from benchmarks.zoo.entry import Batch, CannotBuild, Entry, image, randomise

#: Smaller image for families that take any; the others keep the size they are made for.
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 331)
LARGEST = 100_000_000
#: Families whose smallest model is not known by its name.
NAMED = {"senet": "legacy_seresnet18", "mlp_mixer": "mixer_s32_224", "tresnet": "tresnet_m"}
#: Words for sizes in timm's names.
SMALL = [
    "test", "atto", "femto", "pico", "nano", "xxxt", "xxt", "xt", "n0", "m0", "t0", "b0", "s0", "s1", "x0", "0",
    "002", "003", "004", "005", "50", "xxs", "xs", "xxsmall", "xsmall", "t", "tiny", "mini", "lite", "10", "11",
    "14", "18", "19b", "21", "22", "26", "26ts", "xxs24", "s12", "s24", "s", "9m", "5m", "small", "tiny12", "h",
    "w18", "33", "39b", "41", "42", "42b", "121", "n", "16", "d", "n1", "ti", "b",
]  # fmt: skip


def entries() -> list[Entry]:
    from timm.models import list_modules

    return [Entry("timm", family, functools.partial(build, family)) for family in list_modules()]


def build(family: str) -> tuple[nn.Module, Batch]:
    """A small model of the family, at the smallest of the image sizes that it runs on."""
    import timm

    names = timm.list_models(module=family)
    if not names:
        raise CannotBuild("it registers no model")
    name = NAMED.get(family) or min(names, key=lambda n: (_rank(n), len(n), n))
    first: Exception | None = None
    for n in SIZES:
        for arguments in ({}, {"img_size": n}):
            try:
                torch.manual_seed(0)
                model = timm.create_model(name, pretrained=False, num_classes=10, **arguments).eval()
                if sum(p.numel() for p in model.parameters()) > LARGEST:
                    raise CannotBuild(f"{name} has more than {LARGEST:,} parameters")
                batch = image(n, model.default_cfg["input_size"][0])
                with torch.no_grad():
                    model(batch)
            except CannotBuild:
                raise
            except Exception as error:  # not a size for it
                first = first or error
                continue
            randomise(model)
            return model, batch
    raise CannotBuild(f"{name}: {type(first).__name__}: {first}")


def _rank(name: str) -> int:
    """Where the name's word for its size stands among `SMALL`, the smallest first."""
    parts = name.split("_")
    return next((i for i, word in enumerate(SMALL) if any(part == word for part in parts)), len(SMALL))
