"""The CIFAR ResNets whose checkpoints the compression literature starts from, with their published weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SHARED = Path(os.environ.get("GRACILE_SHARED", "../shared/data"))

#: Mean and standard deviation that each checkpoint was trained with, by name.
NORMALISATION = {
    "akamaster": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "woodfisher": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "apot": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


class PadShortcut(nn.Module):
    """Option A of He et al. (2016): every second pixel, and zero channels added on both sides; no parameters."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module
        if stride == 1 and inputs == outputs:
            self.downsample = nn.Identity()
        elif projection:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        else:
            self.downsample = PadShortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2, widths 16-32-64; the classifier is called `head` as its checkpoint calls it."""

    def __init__(self, blocks: int, *, projection: bool, head: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, projection)
        self.layer2 = _stage(16, 32, blocks, 2, projection)
        self.layer3 = _stage(32, 64, blocks, 2, projection)
        self.head = head
        setattr(self, head, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int, projection: bool) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, projection)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, projection) for _ in range(blocks - 1)))


def _load(model: ResNet, checkpoint: str) -> ResNet:
    state = load_file(SHARED / "cifar10" / f"{checkpoint}.safetensors")
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{checkpoint}: missing {missing}, unexpected {unexpected}")
    return model.eval()


def resnet20_akamaster(*, pretrained: bool = True) -> ResNet:
    """ResNet-20 with padded shortcuts; 91.48 % on test5k with the 'akamaster' normalisation."""
    model = ResNet(3, projection=False, head="linear")
    return _load(model, "resnet20_akamaster") if pretrained else model.eval()


def resnet32_akamaster(*, pretrained: bool = True) -> ResNet:
    """ResNet-32 with padded shortcuts; 92.34 % on test5k with the 'akamaster' normalisation."""
    model = ResNet(5, projection=False, head="linear")
    return _load(model, "resnet32_akamaster") if pretrained else model.eval()


def resnet20_projection(checkpoint: str = "woodfisher_resnet20") -> ResNet:
    """ResNet-20 with projection shortcuts: 'woodfisher_resnet20' or 'apot_res20_32bit', each with its normalisation."""
    return _load(ResNet(3, projection=True, head="fc"), checkpoint)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of images classified correctly, in percent."""
    with torch.inference_mode():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch)))
    return 100.0 * correct / len(labels)
