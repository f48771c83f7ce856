"""What a check has to say of one thing that it looked at, and how grave that is."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WARNING, REFUSAL = "ok", "note", "warning", "refusal"


@dataclass(frozen=True)
class Remark:
    """One thing that was looked at: ``level`` is ok, note, warning or refusal."""

    topic: str
    level: str
    text: str
