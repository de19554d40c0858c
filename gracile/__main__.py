"""`python -m gracile` is the command `gracile`."""

from __future__ import annotations

from gracile.cli import main

if __name__ == "__main__":
    main(prog_name="gracile")
