"""Names of test cases that are the same in every process, as those that share the tests need them."""

from __future__ import annotations

import re
from typing import Any


def label(value: Any) -> str:
    """str(value) without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
