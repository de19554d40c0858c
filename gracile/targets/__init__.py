"""Runtimes that serve a model: export, load, run, and what each can execute."""

from __future__ import annotations

from gracile.targets.base import Capabilities, Outputs, Runner, Target
from gracile.targets.onnxruntime import OnnxRuntime
from gracile.targets.openvino import OpenVINO
from gracile.targets.torch import PyTorch

__all__ = ["Capabilities", "OnnxRuntime", "OpenVINO", "Outputs", "PyTorch", "Runner", "Target"]
