"""Makes a trained PyTorch model smaller and faster on the runtime that will serve it, and proves what that cost."""

from __future__ import annotations

from gracile import allocate, criteria, equalize, formats, losses, metrics, patterns, ranges, solvers, targets
from gracile.artifact import load
from gracile.compress import compress
from gracile.context import Context, Progress
from gracile.criteria import Gradient, Hessian, Magnitude, Taylor
from gracile.data import Data
from gracile.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    GracileError,
    MissingExtraError,
    ModelError,
    NothingChangedError,
    RunError,
    TargetError,
)
from gracile.export import export
from gracile.formats import W2A2, W2A8, W3A3, W4A4, W4A8, W4A16, W8A8, W8A16, FixedPoint, Int, Scheme
from gracile.goal import Bytes, Goal, Latency, MACs, Parameters
from gracile.losses import HardLabels, SoftLabels
from gracile.optimize import optimize
from gracile.patterns import NM, Channels, Heads, Layers, Unstructured
from gracile.recipe import Recipe, Step, only
from gracile.report.model import Report
from gracile.result import Result
from gracile.select import Select
from gracile.steps import Distill, Factorize, Finetune, Gradual, Iterative, Prune, Quantize
from gracile.targets import OnnxRuntime, OpenVINO, PyTorch
from gracile.version import __version__

__all__ = [
    "NM",
    "W2A2",
    "W2A8",
    "W3A3",
    "W4A4",
    "W4A8",
    "W4A16",
    "W8A8",
    "W8A16",
    "ArtifactError",
    "Bytes",
    "Channels",
    "ConfigError",
    "Context",
    "Data",
    "DataError",
    "Distill",
    "Factorize",
    "Finetune",
    "FixedPoint",
    "Goal",
    "GracileError",
    "Gradient",
    "Gradual",
    "HardLabels",
    "Heads",
    "Hessian",
    "Int",
    "Iterative",
    "Latency",
    "Layers",
    "MACs",
    "Magnitude",
    "MissingExtraError",
    "ModelError",
    "NothingChangedError",
    "OnnxRuntime",
    "OpenVINO",
    "Parameters",
    "Progress",
    "Prune",
    "PyTorch",
    "Quantize",
    "Recipe",
    "Report",
    "Result",
    "RunError",
    "Scheme",
    "Select",
    "SoftLabels",
    "Step",
    "TargetError",
    "Taylor",
    "Unstructured",
    "__version__",
    "allocate",
    "compress",
    "criteria",
    "equalize",
    "export",
    "formats",
    "load",
    "losses",
    "metrics",
    "only",
    "optimize",
    "patterns",
    "ranges",
    "solvers",
    "targets",
]
