"""The command line: `gracile demo | inspect | optimize | compress | evaluate | export | bench | report | doctor`."""

from __future__ import annotations

from gracile.cli.app import main

__all__ = ["main"]
