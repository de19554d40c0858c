"""torchvision's models for classification, segmentation, detection and video: the smallest of each family."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entry import Batch, Entry, image, randomise

#: Builder -> size of the image, and what it is built with.
CLASSIFICATION: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (96, {}),
    "convnext_tiny": (64, {}),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (128, {"aux_logits": False, "init_weights": False}),
    "maxvit_t": (224, {}),
    "mnasnet0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "regnet_x_400mf": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "resnext50_32x4d": (64, {}),
    "wide_resnet50_2": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vgg11_bn": (32, {}),
    "vit_b_16": (32, {"image_size": 32}),
}
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
VIDEO = ("mc3_18", "mvit_v1_b", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")


def entries() -> list[Entry]:
    found = [Entry("torchvision", n, functools.partial(classifier, n, *how)) for n, how in CLASSIFICATION.items()]
    found += [Entry("torchvision", n, functools.partial(segmenter, n)) for n in SEGMENTATION]
    found += [Entry("torchvision", n, functools.partial(detector, n)) for n in DETECTION]
    return found + [Entry("torchvision", n, functools.partial(video, n)) for n in VIDEO]


def classifier(name: str, size: int, arguments: dict[str, Any]) -> tuple[nn.Module, Batch]:
    return _finished(_made("torchvision.models", name, num_classes=10, **arguments), image(size))


def segmenter(name: str) -> tuple[nn.Module, Batch]:
    made = _made("torchvision.models.segmentation", name, weights=None, weights_backbone=None, num_classes=5)
    return _finished(made, image(64))


def detector(name: str) -> tuple[nn.Module, Batch]:
    """Detectors take lists of images; one list is their one argument."""
    arguments: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    if "rcnn" in name:  # an untrained net proposes regions everywhere
        arguments |= {"rpn_pre_nms_top_n_test": 32, "rpn_post_nms_top_n_test": 16, "box_detections_per_img": 4}
    made = _made("torchvision.models.detection", name, weights=None, weights_backbone=None, num_classes=5, **arguments)
    return _finished(made, {"images": list(image(96))})


def video(name: str) -> tuple[nn.Module, Batch]:
    frames, size = {"mvit_v1_b": (16, 224), "s3d": (14, 224)}.get(name, (8, 64))
    clip = torch.randn(1, 3, frames, size, size, generator=torch.Generator().manual_seed(1))
    return _finished(_made("torchvision.models.video", name, num_classes=10), clip)


def _made(module: str, name: str, **arguments: Any) -> nn.Module:
    import importlib

    torch.manual_seed(0)
    made: nn.Module = getattr(importlib.import_module(module), name)(**arguments)
    return made


def _finished(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    randomise(model)
    return model.eval(), batch
