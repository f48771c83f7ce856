"""Reports as JSON."""

from __future__ import annotations

import json
import math


def json_text(data: object, indent: int | None = 1) -> str:
    """``data`` as JSON that any parser takes: null for NaN and infinity, ASCII only."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data):
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
