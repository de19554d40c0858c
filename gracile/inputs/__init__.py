"""Inputs: how a model and its data are named, and brought in."""

from __future__ import annotations

from gracile.inputs.named import load_data, load_model

__all__ = ["load_data", "load_model"]
