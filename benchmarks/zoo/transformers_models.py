"""Every architecture that transformers' `AutoModel` knows, as a tiny model with random weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Batch, CannotBuild, Entry, randomise
from benchmarks.zoo.transformers_configs import tiny

Inputs = dict[str, Any]
LENGTH = 12
#: Models of more than this many numbers are not tiny: some size has not been found.
LARGEST = 30_000_000


def entries() -> list[Entry]:
    """One entry per model type, in the order of the library."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return [Entry("transformers", name, functools.partial(build, name)) for name in MODEL_MAPPING_NAMES]


def build(model_type: str) -> tuple[nn.Module, Batch]:
    """The model and keyword arguments for its forward; CannotBuild where this benchmark finds none."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    try:
        config = tiny(CONFIG_MAPPING[model_type])
        with torch.device("meta"):
            numbers = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    except Exception as error:  # whatever a library's constructor raises
        raise CannotBuild(f"no tiny configuration: {_say(error)}") from error
    if numbers > LARGEST:
        raise CannotBuild(f"{numbers:,} parameters at the smallest sizes found")
    try:
        model = AutoModel.from_config(config).eval()
    except Exception as error:  # the same
        raise CannotBuild(f"no tiny configuration: {_say(error)}") from error
    randomise(model)
    first = None
    for inputs in candidates(model):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # not what this model eats
            first = first or error
            continue
        return model, inputs
    raise CannotBuild(f"no input found that it runs on: {_say(first) if first else 'none to try'}")


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first: those of the forward's arguments that we can make."""
    accepted = inspect.signature(model.forward).parameters
    required = [n for n, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", "")
    makers = {name: make for name, make in MAKERS.items() if name in accepted and (name in required or name == main)}
    for name in MODALITIES:
        if name in accepted:
            makers[name] = MAKERS[name]
    for tokens in (0, 1, 4, 8, 16):
        for variants in _variants(model, makers):
            if tokens and "input_ids" in variants:
                token = next((t for n in IMAGE_TOKENS if (t := _find(model.config, n)) is not None), None)
                if token is None:
                    continue
                row = torch.full((2, tokens), int(token))
                variants = variants | {"input_ids": torch.cat([variants["input_ids"], row], 1)}
            elif tokens:
                continue
            yield variants


def _variants(model: nn.Module, makers: dict[str, Callable[[Any], list[Any]]]) -> Iterator[Inputs]:
    made = {name: make(model.config) for name, make in makers.items()}
    for i in range(max((len(options) for options in made.values()), default=0)):
        yield {name: options[min(i, len(options) - 1)] for name, options in made.items()}


def _find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the configuration or a part of it has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for sub in getattr(config, "sub_configs", {}) or {}:
        held = getattr(config, sub, None)
        value = _find(held, *names) if held is not None else None
        if value is not None:
            return value
    return default


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _ids(config: Any) -> list[Tensor]:
    vocabulary = _find(config, "vocab_size", default=120)
    high = max(min(int(vocabulary) if isinstance(vocabulary, int) else 100, 100), 12)
    return [torch.randint(10, high, (2, n), generator=_generator()) for n in (LENGTH, 16, 32, 64)]


def _pixels(config: Any) -> list[Tensor]:
    n = _find(config, "image_size", "img_size", "input_size", default=64)
    n = max(n) if isinstance(n, (list, tuple)) else n
    n = n if isinstance(n, int) else max(v for v in n.values()) if isinstance(n, dict) else 64
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = _find(config, "num_frames", default=2)
    channels = channels if isinstance(channels, int) else 3
    sizes = [(2, channels, n, n), (2, frames, channels, n, n), (2, channels, 64, 64), (2, channels, 128, 128)]
    sizes += [(2, 1, channels, n, n), (2, 3, n, n), (2, channels, 224, 224)]
    return [torch.randn(size, generator=_generator()) for size in sizes]


def _spectra(config: Any) -> list[Tensor]:
    bins = _find(
        config, "num_mel_bins", "num_mel_channels", "n_mels", "feature_size", "input_feat_per_channel", default=80
    )
    bins = bins if isinstance(bins, int) else 80
    shapes = [(2, bins, 128), (2, 64, bins), (2, bins, 64), (2, 128, bins), (2, bins, 3000), (2, 1, 1001, bins)]
    return [torch.randn(shape, generator=_generator()) for shape in shapes]


def _sound(config: Any) -> list[Tensor]:
    shapes = [
        (2, 3200),
        (2, 1, 3200),
        (2, 64, _find(config, "num_mel_bins", "num_mel_channels", default=80)),
        (2, 16000),
    ]
    return [torch.randn(shape, generator=_generator()) for shape in shapes]


def _boxes(config: Any) -> list[Tensor]:
    corners = torch.randint(0, 20, (2, LENGTH, 2), generator=_generator())
    return [torch.cat([corners, corners + 10], -1)]


def _series(config: Any) -> list[Tensor]:
    context = _find(config, "context_length", default=32)
    lags = max(_find(config, "lags_sequence", default=[0]) or [0])
    channels = _find(config, "num_input_channels", default=None)
    shape = (2, context + lags) if channels is None else (2, context, channels)
    return [torch.rand(shape, generator=_generator()), torch.rand((2, context), generator=_generator())]


def _time_features(config: Any, length: int) -> list[Tensor]:
    return [torch.rand((2, length, _find(config, "num_time_features", default=1)), generator=_generator())]


MAKERS: dict[str, Callable[[Any], list[Any]]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "video_values": _pixels,
    "input_features": _spectra,
    "input_values": _sound,
    "bbox": _boxes,
    "past_values": _series,
}
#: Inputs that a model is given whenever its forward takes them: those of every part of it.
MODALITIES = ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids", "bbox")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "speech_token_id")
