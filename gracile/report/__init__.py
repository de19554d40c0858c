"""The evidence of a compression: data, a terminal table, JSON, and one self-contained HTML page."""

from gracile.report.model import Candidate, LayerRow, Measurement, Report, StepRecord

__all__ = ["Candidate", "LayerRow", "Measurement", "Report", "StepRecord"]
