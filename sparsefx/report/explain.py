"""``explain``: what the compiler does with a model, or did with a compiled one."""

from __future__ import annotations

from typing import Any

from sparsefx import compat
from sparsefx.capture import Compilation, record_graphs
from sparsefx.config import as_config
from sparsefx.errors import SparsefxError
from sparsefx.report.report import Report


def explain(model: Any, *, config: object = None) -> Any:
    """Say what becomes of every product of a model, and why.

        report = sfx.explain(model, config=cfg)(x)     # a model as it is; nothing is compiled
        report = sfx.explain(compiled)                 # a compiled model that has run

    Args:
        model: a module or a function, compiled or not.
        config: as for the backend: a SparseConfig, a preset's name, a dict, or None. With a
            compiled model, None asks for what ran, and anything else captures the model anew.

    Returns:
        A :class:`sparsefx.report.Report` for a compiled model; else a function of the model's
        inputs that returns one. That function runs the model once in eager mode, under the
        current grad mode and autocast, and puts its buffers and the seeds back.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
        SparsefxError: when a compiled model was compiled by another backend or hasn't run yet.
        PassError: under ``strict=True``, by the function that is returned.
    """
    if config is None and compat.is_compiled(model):
        return _report_of(model)
    asked = as_config(config)

    def run(*args: Any, **kwargs: Any) -> Report:
        now = asked.resolved()  # the ratios that schedules stand at
        with compat.as_written(model) as plain:
            return Report(record_graphs(plain, now, args, kwargs), now)

    return run


def _report_of(compiled: Any) -> Report:
    wrapper: Any = compat.wrapper_of(compiled)
    records: list[Compilation] = list(getattr(wrapper, "_sparsefx", ()))
    if records:
        return Report(records, records[0].config)
    what = type(compiled).__name__
    if getattr(getattr(wrapper, "compiler_fn", None), "__module__", "") != "sparsefx.backend":
        raise SparsefxError(
            f"this {what} was not compiled by sparsefx: torch.compile(model, "
            'backend="sparsefx"), or explain(model, config=...)(inputs) for a model as it is'
        )
    raise SparsefxError(
        f"nothing of this {what} was compiled yet: call it once, then explain it. (torch skips "
        "some, such as a plain nn.Sequential compiled by its own .compile(), and reuses the code "
        "of another instance compiled alike: explain(model, config=...)(inputs) works for both)"
    )
