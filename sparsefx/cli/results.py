"""What a command hands back, and how it refuses what was typed."""

from dataclasses import dataclass
from typing import Any

from sparsefx.errors import SparsefxError


class UsageError(SparsefxError, ValueError):
    """Something that was typed makes no sense: the message says what to type instead."""


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        text: for people.
        data: the same as plain data, for ``--json``.
        code: the exit code: 0, or 1 where what was asked about doesn't work.
    """

    text: str
    data: dict[str, Any]
    code: int = 0
