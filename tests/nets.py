"""A zoo of small nets with awkward structure: `ZOO[name]()` builds one, `example_for(model)` gives it a batch.

Weights and batch-norm statistics are random, seeded, and not degenerate. No net here has a constant baked in that a cut
could not mend, unless its name says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = Tensor | tuple[Tensor, ...]


class Net(nn.Module):
    """A net that knows what it eats."""

    shape: tuple[int, ...] = (3, 12, 12)

    def example(self) -> Example:
        """A seeded batch of three."""
        return torch.randn(3, *self.shape, generator=torch.Generator().manual_seed(7))


class TokenNet(Net):
    """A net over sequences of tokens."""

    vocabulary, length, dim = 23, 7, 24

    def example(self) -> Example:
        return torch.randint(0, self.vocabulary, (3, self.length), generator=torch.Generator().manual_seed(7))


class SequenceNet(Net):
    """A net over sequences of vectors."""

    shape = (9, 6)


class MLP(Net):
    shape = (10,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(10, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(torch.sigmoid(self.fc1(x)))))


class PlainConv(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class FlattenConv(Net):
    """Flatten after convolution: one channel is nine inputs of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(4), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(72, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class PadBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride = stride
        self.shortcut = (
            (lambda x: x)
            if stride == 1
            else (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, outputs // 4, outputs // 4), "constant", 0))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class PadShortcut(Net):
    """Residual net with option-A shortcuts: strided slice and zero-padded channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(PadBlock(8, 8, 1), PadBlock(8, 16, 2), PadBlock(16, 16, 1), PadBlock(16, 32, 2))
        self.linear = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        x = F.avg_pool2d(x, x.size(3))
        return self.linear(x.view(x.size(0), -1))


class ConvShortcut(Net):
    """Residual net with projection shortcuts and a bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.reduce, self.mid, self.grow = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 20, 1)
        self.bn = nn.BatchNorm2d(20)
        self.project = nn.Sequential(nn.Conv2d(12, 20, 1, 2), nn.BatchNorm2d(20))
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.bn(self.grow(F.relu(self.mid(F.relu(self.reduce(x))))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(y + self.project(x)), 1).flatten(1))


class ConcatInput(Net):
    """Features concatenated with the raw input, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(19, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv1(x))
        b = F.relu(self.conv2(torch.cat([x, a], 1)))
        return self.fc(torch.relu(self.conv3(torch.cat([a, x, b], 1))).mean((-1, -2)))


class Dense(Net):
    """Dense connectivity: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(torch.cat(features, 1).amax((2, 3)))


class Grouped(Net):
    """A grouped convolution inside a bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, 1, 1, groups=4)
        self.conv3 = nn.Conv2d(32, 12, 1)
        self.bn = nn.BatchNorm2d(32)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv2(F.relu(self.conv1(x)))))
        return self.fc(F.relu(self.conv3(x)).mean((2, 3)))


class Depthwise(Net):
    """Inverted residual: expand, depthwise, squeeze-excite, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand, self.depth = nn.Conv2d(8, 24, 1, bias=False), nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Conv2d(24, 8, 1, bias=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.silu(self.bn2(self.depth(F.silu(self.bn1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.bn3(self.project(y))
        return self.fc(x.mean((2, 3)))


class DepthMultiplier(Net):
    """A depthwise convolution that gives two outputs per input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.point(F.relu(self.depth(F.relu(self.stem(x)))))).mean((2, 3)))


class SqueezeExcite(Net):
    """Squeeze-excite with linear layers and a view back to [n, c, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.down, self.up = nn.Linear(16, 6), nn.Linear(6, 16)
        self.out = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        b, c, _, _ = x.size()
        weights = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3)).view(b, c))))).view(b, c, 1, 1)
        return self.out(x * weights.expand_as(x)).mean((2, 3))


class Shuffle(Net):
    """Half of the channels pass, half are worked on, then both are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.mix = nn.Conv2d(16, 10, 1)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(F.relu(self.mix(x)).mean((2, 3)))


class UNet(Net):
    """Down, up by transposed convolution, skip by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.merge, self.out = nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        return self.out(F.relu(self.merge(torch.cat([a, self.up(b)], dim=1))))


class GroupedTransposed(Net):
    """A grouped transposed convolution and bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=2)
        self.bn = nn.BatchNorm2d(12)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn(self.up(F.relu(self.stem(x)))), 0.1)
        return self.out(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


class GroupNormNet(Net):
    """Group norm over a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gn1 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.conv1, self.gn2, self.conv2 = nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(8, 24), nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn1(self.stem(x)))
        x = x + self.conv2(F.relu(self.gn2(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class InstanceNormNet(Net):
    """Instance norm: exact per channel, though written as a batch norm over examples × channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.elu(self.norm(self.conv1(x)))).mean((2, 3))


class ChunkGate(Net):
    """A convolution whose output is half value and half gate, and pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 24, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv1(x).chunk(2, dim=1)
        return self.out(self.shuffle(self.conv2(torch.tanh(value) * torch.sigmoid(gate))))


class GluConv1d(SequenceNet):
    """Gated causal one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(6, 16, 3), nn.Conv1d(8, 10, 3, dilation=2)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.conv1(F.pad(x.transpose(1, 2), (2, 0))), dim=1)
        return self.fc(F.relu(self.conv2(F.pad(x, (4, 0)))).max(dim=2).values)


class Shared(Net):
    """One block applied twice, so that its input and output channels are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.bn(self.block(x)))
        return self.fc(x.mean((2, 3)))


class Branches(Net):
    """Parallel kernels of several sizes, concatenated, in place and out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, n, k, padding=k // 2) for n, k in ((4, 1), (6, 3), (8, 5)))
        self.bn, self.out = nn.BatchNorm2d(18), nn.Conv2d(18, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([conv(x) for conv in self.convs], dim=1)
        return self.fc(self.out(self.bn(x).relu_()).clamp_(min=0).flatten(2).mean(-1))


class MultiplyAdd(Net):
    """Two streams that are multiplied, added and selected from by a condition."""

    shape = (10,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a(x), self.b(x), self.c(x)
        y = torch.where(a > 0, a * b, c.exp().log1p())
        return self.out(torch.stack([y, a * self.scale, torch.maximum(b, c)]).sum(0))


class SelfAttention(nn.Module):
    """Separate projections, heads by view and transpose, products written out, a float scale."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.q, self.k, self.v = (nn.Linear(dim, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return x.view(b, n, self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.split_heads(self.q(x)), self.split_heads(self.k(x)), self.split_heads(self.v(x))
        weights = F.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, self.heads * self.head_dim))


class AttentionEncoder(TokenNet):
    """Token and position embeddings, pre-norm attention and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(self.vocabulary, self.dim), nn.Embedding(16, self.dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(self.dim) for _ in range(3))
        self.attention = SelfAttention(self.dim, 4, 6)
        self.fc1, self.fc2 = nn.Linear(self.dim, 40), nn.Linear(40, self.dim)
        self.head = nn.Linear(self.dim, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


class PackedQKV(TokenNet):
    """One projection for q, k and v, reshaped to [3, heads, dim], and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, self.dim)
        self.token = nn.Parameter(torch.randn(1, 1, self.dim))
        self.heads, self.head_dim = 4, 5
        self.qkv, self.out = nn.Linear(self.dim, 3 * 20), nn.Linear(20, self.dim)
        self.head = nn.Linear(self.dim, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(ids.shape[0], -1, -1), self.embed(ids)], dim=1)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y))[:, 0])


class GroupedQuery(TokenNet):
    """Packed projection, more query heads than key heads, RMS norm written out, gated MLP, causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, self.dim)
        self.heads, self.kv_heads, self.head_dim = 4, 2, 6
        self.qkv = nn.Linear(self.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, self.dim, bias=False)
        self.weight = nn.Parameter(torch.ones(self.dim))
        self.gate, self.up, self.down = nn.Linear(self.dim, 32), nn.Linear(self.dim, 32), nn.Linear(32, self.dim)
        self.head = nn.Linear(self.dim, 4)

    def norm(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n, _ = x.shape
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = self.qkv(self.norm(x)).split(sizes, dim=-1)
        q = q.view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, -1))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x.mean(1))


class TiedEmbedding(TokenNet):
    """The output layer is the embedding matrix itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, self.dim)
        self.fc1, self.fc2 = nn.Linear(self.dim, 30), nn.Linear(30, self.dim)
        self.decoder = nn.Linear(self.dim, self.vocabulary, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.decoder(x + self.fc2(torch.tanh(self.fc1(x))))


class NanoGPT(TokenNet):
    """Head size computed as width // heads from the input's shape: heads cannot be cut, and must be found so."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(self.vocabulary, self.dim)
        self.n_head, self.n_embd = 4, self.dim
        self.c_attn, self.c_proj = nn.Linear(self.dim, 3 * self.dim), nn.Linear(self.dim, self.dim)
        self.c_fc, self.c_out = nn.Linear(self.dim, 36), nn.Linear(36, self.dim)
        self.ln = nn.LayerNorm(self.dim)
        self.head = nn.Linear(self.dim, self.vocabulary, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (z.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        y = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(b, t, c)
        x = x + self.c_proj(y)
        return self.head(self.ln(x + self.c_out(F.gelu(self.c_fc(x)))))


class CrossAttention(Net):
    """Two inputs of different width; one attends to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.kv, self.out = nn.Linear(8, 12), nn.Linear(6, 24), nn.Linear(12, 8)
        self.head = nn.Linear(8, 2)

    def example(self) -> Example:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(3, 4, 8, generator=generator), torch.randn(3, 5, 6, generator=generator)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).chunk(2, dim=-1)
        k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (k, v))
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        y = torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


class PatchMixer(Net):
    """Patches as tokens, mixing over tokens and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token1, self.token2 = nn.Linear(9, 12), nn.Linear(12, 9)
        self.channel1, self.channel2 = nn.Linear(16, 28), nn.Linear(28, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.token2(F.gelu(self.token1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.channel2(F.gelu(self.channel1(self.norm(x))))
        return self.head(x.mean(1))


class TabularEmbeddings(Net):
    """Embeddings of categories concatenated with numbers, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, d) for n, d in ((5, 4), (7, 6)))
        self.norm = nn.BatchNorm1d(3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(13, 20), nn.Linear(20, 12), nn.Linear(12, 2)

    def example(self) -> Example:
        generator = torch.Generator().manual_seed(7)
        return torch.randint(0, 5, (3, 2), generator=generator), torch.randn(3, 3, generator=generator)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        columns = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        x = torch.cat([*columns, self.norm(numbers)], dim=1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class BiLSTM(SequenceNet):
    """Two layers, both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 10)
        self.lstm = nn.LSTM(10, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(F.relu(self.proj(x)))
        return self.fc(out[:, -1])


class BiGRU(SequenceNet):
    """Two layers, both directions; last states of both directions joined."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.gru(x)
        return self.fc(torch.cat([h[-2], h[-1]], dim=-1))


class ConvGRU(SequenceNet):
    """Convolution over time feeding a recurrent layer, with attention pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(6, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.gru = nn.GRU(12, 10, batch_first=True)
        self.score, self.fc = nn.Linear(10, 1), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        out, _ = self.gru(x)
        weights = torch.softmax(self.score(out), dim=1)
        return self.fc((weights * out).sum(1))


class OwnCell(SequenceNet):
    """A recurrent cell written by hand, unrolled over time."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 10
        self.input, self.state, self.fc = nn.Linear(6, 20), nn.Linear(10, 20, bias=False), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.hidden, dtype=x.dtype)
        for t in range(x.shape[1]):
            z, candidate = (self.input(x[:, t]) + self.state(h)).chunk(2, dim=1)
            z = torch.sigmoid(z)
            h = z * h + (1 - z) * torch.tanh(candidate)
        return self.fc(h)


class Literals(Net):
    """Sizes written into the forward as numbers: what depends on them must be found frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(72, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv(x), 4)).view(-1, 72)
        return self.fc2(F.relu(self.fc1(x)))


_CLASSES: tuple[type[Net], ...] = (
    MLP, PlainConv, FlattenConv, PadShortcut, ConvShortcut, ConcatInput, Dense, Grouped, Depthwise, DepthMultiplier,
    SqueezeExcite, Shuffle, UNet, GroupedTransposed, GroupNormNet, InstanceNormNet, ChunkGate, GluConv1d, Shared,
    Branches, MultiplyAdd, AttentionEncoder, PackedQKV, GroupedQuery, TiedEmbedding, NanoGPT, CrossAttention,
    PatchMixer, TabularEmbeddings, BiLSTM, BiGRU, ConvGRU, OwnCell, Literals,
)  # fmt: skip


def _builder(kind: type[Net]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, kind.__name__)))
            model = kind()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 1.5)
                elif name.endswith("running_mean"):
                    tensor.normal_(0.0, 0.3)
                elif tensor.ndim == 1 and tensor.is_floating_point() and tensor.requires_grad:
                    tensor.data.add_(torch.randn_like(tensor), alpha=0.2)
        return model.eval()

    return build


#: Name -> a function that builds the net, always with the same weights.
ZOO: dict[str, Callable[[], nn.Module]] = {kind.__name__: _builder(kind) for kind in _CLASSES}


def example_for(model: nn.Module) -> Example:
    """A batch for a net of the zoo: one tensor, or a tuple of inputs."""
    assert isinstance(model, Net)
    return model.example()
