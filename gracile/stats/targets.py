"""What layers gave in the original, at tokens or positions drawn once: what every refit of them aims at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data
from gracile.modes import eval_mode
from gracile.stats.replay import Replay
from gracile.stats.rows import rows_at
from gracile.stats.sums import Reached, WatchSums, stream_of

#: Tokens or positions behind the moments of one layer; neighbouring positions of an image say nearly the same.
ROWS = 65536
#: What the rows held may take, reckoned by the first batch: those of the layer asked for, however large, and of the
#: layers behind it up to the first that no longer fits.
HELD_BYTES = 1 << 29


@dataclass
class Target:
    """Rows of one layer in the original, by batch.

    counts: how many tokens or positions it had. chosen: indices into these. outputs: [n, out], without the bias.
    streams: [n, out], what the output is added to; empty where it is added to nothing.
    """

    counts: list[int] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in (self.chosen, self.outputs, self.streams) for t in part)


class Targets:
    """Targets of layers of the original; one forward of each batch gives those of the layer asked for and of more.

    The layers behind it come along as far as they may be held; what was held before is then dropped. Forwards start
    where the layer is and end behind the last of those that come along.

    original: runs in eval mode. layers: in the order of its forward, each called once. sums: layer -> the module whose
    output is added to a stream: the layer itself or the batch norm behind it. absorbed: such layers -> blocks behind
    the sum, whose change of the stream the layer is to make too; it counts as part of the stream.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[Batch],
        data: Data,
        layers: Sequence[str],
        generator: torch.Generator,
        sums: Mapping[str, str] | None = None,
        absorbed: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.original, self.batches, self.data = original, batches, data
        self.layers, self.sums = list(layers), dict(sums or {})
        self.absorbed = dict(absorbed or {})
        self._seed = int(torch.randint(2**31, (1,), generator=generator))
        self._held: dict[str, Target] = {}
        self._replay: Replay | None = None

    def of(self, layer: str) -> Target:
        """The layer's target; the same each time it is asked for."""
        if layer not in self._held:
            self._held = {}
            self._collect(self.layers[self.layers.index(layer) :])
        return self._held[layer]

    def held_with(self, layers: Collection[str]) -> list[str]:
        """The first of these layers in the order of the forward, and those of the others that are held beside it."""
        first = min(layers, key=self.layers.index)
        self.of(first)
        return [name for name in layers if name in self._held]

    @torch.no_grad()
    def _collect(self, layers: Sequence[str]) -> None:
        held = {name: Target() for name in layers}
        with eval_mode(self.original):
            if self._replay is None:  # the first time there is nothing to replay
                self._replay = Replay(self.original, self.data, self.batches)
            else:
                self._replay.seek(layers[0])
            for done in range(len(self.batches)):
                self._add(held, done)
                if not done:
                    total, fits = 0, dict[str, Target]()
                    for name, target in held.items():
                        total += target.nbytes * len(self.batches)
                        if fits and total > HELD_BYTES:
                            break
                        fits[name] = target
                    held = fits
        self._held = held

    def _add(self, held: Mapping[str, Target], batch: int) -> None:
        assert self._replay is not None
        wanted = max(1, ROWS // len(self.batches))
        watch = WatchSums()
        owners = {self.sums[name]: name for name in held if name in self.sums}
        handles = []
        streamed = [name for name in held if name in self.sums]
        left = len(held) + len(streamed) + sum(len(self.absorbed.get(name, ())) for name in streamed)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Reached

        def on_output(name: str, y: Tensor) -> None:
            layer: Any = self.original.get_submodule(name)
            target = held[name]
            rows = y.numel() // len(layer.weight)
            chosen = torch.arange(rows)
            if rows > wanted:
                place = self.layers.index(name) * len(self.batches) + len(target.chosen)
                chosen = torch.randint(rows, (wanted,), generator=torch.Generator().manual_seed(self._seed + place))
            target.counts.append(rows)
            target.chosen.append(chosen.to(y.device))
            bias = getattr(layer, "bias", None)
            bias = 0.0 if bias is None else bias
            target.outputs.append(rows_at(layer, y, target.chosen[-1]) - bias)
            one_less()

        def on_stream(name: str, stream: Tensor) -> None:
            target = held[name]
            target.streams.append(rows_at(self.original.get_submodule(name), stream, target.chosen[-1]))
            one_less()

        for name in held:
            for block in self.absorbed.get(name, ()) if name in self.sums else ():

                def on_block(_m: Any, args: Any, kwargs: Any, y: Any, name: str = name) -> None:
                    before, after = stream_of(args, kwargs, y)
                    target = held[name]
                    target.streams[-1] += rows_at(self.original.get_submodule(name), after - before, target.chosen[-1])
                    one_less()

                block_module = self.original.get_submodule(block)
                handles.append(block_module.register_forward_hook(on_block, with_kwargs=True))
            layer = self.original.get_submodule(name)
            handles.append(layer.register_forward_hook(lambda _m, _a, y, name=name: on_output(name, y)))
        for module, name in owners.items():
            handles.append(
                self.original.get_submodule(module).register_forward_hook(
                    lambda _m, _a, y, name=name: watch.wait(y, lambda stream: on_stream(name, stream))
                )
            )
        try:
            with watch:
                self._replay.run(batch)
        except Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
