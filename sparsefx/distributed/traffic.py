"""What was sent, beside what a dense all-reduce would have sent."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes that a rank gave to the engine; how often a link carries each is the engine's business.

    Attributes:
        steps: backward passes that were synchronised.
        bytes_sent: in total.
        bytes_dense: what whole buckets would have been, in total.
        last_sent: in the last step.
        last_dense: likewise.
        resent: buckets that were sent a second time, in full.
    """

    steps: int = 0
    bytes_sent: int = 0
    bytes_dense: int = 0
    last_sent: int = 0
    last_dense: int = 0
    resent: int = 0

    def begin_step(self) -> None:
        """Count from here on as a new step."""
        self.steps += 1
        self.last_sent = self.last_dense = 0

    def sent(self, size: int) -> None:
        """Count bytes that are sent."""
        self.bytes_sent += size
        self.last_sent += size

    def dense(self, size: int) -> None:
        """Count bytes that a dense all-reduce would send."""
        self.bytes_dense += size
        self.last_dense += size


@dataclass(frozen=True)
class AllreduceReport:
    """What travels, and how much it was; ``str(report)`` is a table.

    Attributes:
        traffic: bytes, by step and in total.
        sliced: what is sent of each parameter of which slices travel.
        whole: why each other parameter of two dimensions or more is sent in full.
    """

    traffic: Traffic
    sliced: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a table of bytes and one line a parameter."""
        t = self.traffic
        lines = [
            f"{t.steps} steps, {t.resent} buckets sent again in full",
            _line("last step", t.last_sent, t.last_dense),
            _line("in total", t.bytes_sent, t.bytes_dense),
        ]
        width = max(map(len, [*self.sliced, *self.whole]), default=0)
        rows = {**self.sliced, **{name: f"in full: {why}" for name, why in self.whole.items()}}
        return "\n".join([*lines, *(f"  {name:<{width}}  {what}" for name, what in rows.items())])


def _line(when: str, sent: int, dense: int) -> str:
    share = f" ({sent / dense:.1%})" if dense else ""
    return f"{when:<9}  {sent:,} bytes sent of {dense:,} dense{share}"
