"""What became of every layer that could have been packed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackedLayer:
    """One layer.

    Attributes:
        name: qualified.
        pattern: "2:4"; "" where the layer stays dense.
        before: bytes of its weight.
        after: bytes of what stands in the weight's place; of a weight that was packed with another
            one, 0.
        reason: why it stays dense; "" where it is packed.
        note: what else there is to know, such as that the forward unpacks.
    """

    name: str
    pattern: str
    before: int
    after: int
    reason: str = ""
    note: str = ""

    def __str__(self) -> str:
        """Return one line."""
        if not self.pattern:
            return f"{self.name}: dense: {self.reason}"
        share = f"{self.before} -> {self.after} bytes"
        return f"{self.name}: {self.pattern}, {share}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class PackReport:
    """What :func:`sparsefx.pack` did; ``print`` it.

    Attributes:
        layers: every linear and convolution layer, in the model's order.
    """

    layers: tuple[PackedLayer, ...]

    @property
    def packed(self) -> dict[str, PackedLayer]:
        """The packed layers, by name."""
        return {layer.name: layer for layer in self.layers if layer.pattern}

    @property
    def skipped(self) -> dict[str, str]:
        """Why the others stay dense, by name."""
        return {layer.name: layer.reason for layer in self.layers if not layer.pattern}

    @property
    def before(self) -> int:
        """Bytes of the packed layers' weights before; a tied weight counts once."""
        return sum(layer.before for layer in self.packed.values() if layer.after)

    @property
    def after(self) -> int:
        """Bytes of what stands in their place."""
        return sum(layer.after for layer in self.packed.values())

    def __str__(self) -> str:
        """Return a line for each layer, and one for all."""
        total = (
            f"{len(self.packed)} of {len(self.layers)} layers packed: {self.before} -> "
            f"{self.after} bytes ({100 * self.after / max(self.before, 1):.0f}%)"
        )
        return "\n".join([*map(str, self.layers), total])
