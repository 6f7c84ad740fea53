"""One error base; every message carries the value that caused it and says what to do."""


class SparsefxError(Exception):
    """Base of every error that sparsefx raises on purpose."""


class ConfigError(SparsefxError, ValueError):
    """A configuration that makes no sense: the message names key, value and what is allowed.

    Attributes:
        steps: keys and places that lead to the refused value in the plain data of a config.
    """

    steps: tuple[str | int, ...] = ()


class MaskError(SparsefxError, ValueError):
    """A mask that can't be made or doesn't hold: the message names the shape, n, m or the tile."""


class PassError(SparsefxError, RuntimeError):
    """A pass failed under ``strict=True``: the message names pass, node and layer."""


class KernelError(SparsefxError, RuntimeError):
    """A kernel that was asked for by name can't run here: the message says why."""


class ExportError(SparsefxError, RuntimeError):
    """An export that failed its check: the message names the check and the worst error."""


class SparsifierError(SparsefxError, ValueError):
    """A model, rule or checkpoint that a sparsifier can't take: the message names the layer."""


class PackError(SparsefxError, RuntimeError):
    """A model that can't be packed, or a packed layer used as no packed layer can be."""


class SparsefxWarning(UserWarning):
    """Something stayed dense because a pass failed, or runs a slower way; the message says why."""


class PermutationError(SparsefxError, RuntimeError):
    """A permutation that would change the model's function: the message names the channels."""


class DiagnosticsError(SparsefxError, ValueError):
    """A model, batch or loss that can't be measured: the message says what to pass instead."""


class CompactError(SparsefxError, RuntimeError):
    """Channels that can't be removed from a model: the message names them or the value."""
