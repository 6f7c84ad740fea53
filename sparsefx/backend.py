"""The torch.compile entry: reads options, rewrites the joint graph, has it compiled."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from sparsefx import compat, cost, pipeline
from sparsefx.capture import Compilation, name_inputs, remember
from sparsefx.config import SparseConfig
from sparsefx.errors import ConfigError, SparsefxError
from sparsefx.variants import Variants, config_of

_OPTIONS = ("config", "inductor")


def sparsefx(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with sparse products: ``torch.compile(model, backend="sparsefx")``.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        mode: as for Inductor.
        options: ``"config"``: a SparseConfig, a preset's name or a dict; ``"inductor"``: a dict of
            Inductor's own options.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
        PassError: under ``strict=True``.
    """
    with compat.shown_to_the_user(SparsefxError):
        wrapper = compat.compile_wrapper()
        config, patches = read_options(mode, options, wrapper)
        record = remember(gm, example_inputs, config)
        # filled last: what Dynamo gives up, to trace it anew, does not get here
        shelf = [] if wrapper is None else vars(wrapper).setdefault("_sparsefx", [])
        compiler = functools.partial(_compile, patches)
        if not config.schedules:
            compiled = compiler(gm, example_inputs, record)
            shelf.append(record)
            return compiled
        variants = Variants(gm, record, compiler)
        variants.start(example_inputs)
        variants.put_on(shelf)
        return variants


def _compile(
    patches: dict[str, Any], gm: GraphModule, inputs: Sequence[Any], record: Compilation
) -> Callable[..., Any]:
    """Compile a graph as its record says, and write into that what became of it."""

    def rewrite(joint: GraphModule) -> None:
        name_inputs(joint, record.inputs, record.held)
        record.outcome = pipeline.run(joint, record.config)

    if record.config.codegen == "aot_eager":
        return compat.compile_eagerly(gm, inputs, rewrite)
    identity = functools.partial(cache_identity, record, patches)
    return compat.compile_with_inductor(gm, inputs, rewrite, identity, patches)


def read_options(
    mode: str | None, options: Mapping[str, Any] | None, wrapper: Any = None
) -> tuple[SparseConfig, dict[str, Any]]:
    """Return the config and Inductor's options.

    Args:
        mode: as for Inductor.
        options: as for the backend.
        wrapper: the ``torch.compile`` call that they belong to.

    Raises:
        ConfigError: for an unknown key or a bad value.
    """
    for key in options or {}:
        if key not in _OPTIONS:
            raise ConfigError(
                f"options: unknown key {key!r} (value {options[key]!r}); "  # type: ignore[index]
                f"allowed: {', '.join(_OPTIONS)}"
            )
    config = config_of(wrapper, (options or {}).get("config"))
    patches = (options or {}).get("inductor", {})
    if not isinstance(patches, Mapping):
        raise ConfigError(f"options: inductor={patches!r} must be a dict of Inductor's options")
    known = compat.inductor_option_names()
    for key in patches:
        if key not in known:
            raise ConfigError(
                f"options: inductor: unknown key {key!r} (value {patches[key]!r}); allowed: the "
                "names of torch._inductor.config"
            )
    return config, {**compat.mode_options(mode), **patches}


# --- the cache contract


def cache_identity(record: Compilation, patches: Mapping[str, Any]) -> str | None:
    """Return what the compile caches must tell apart, or None to keep them out.

    Covers this package's sources, the versions, the config, the device and everything that rules
    can see of the graph and that the graph's own hash leaves out: names of layers and inputs.
    """
    config = _config_identity(record.config)
    if config is None:
        return None
    names = [
        [str(entry) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        for node in record.gm.graph.nodes
    ]
    facts = {
        "sources": _sources(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "config": config,
        # a factor that holds no zero is no mask: the one thing that values decide
        "inputs": [
            [i.name, i.kind, i.kind == "buffer" and i.density == 1]
            for i in (*record.inputs, *record.held.values())
        ],
        "names": names,
        "device": _device(),
        "calibration": cost.digest(),
        "inductor": {key: repr(value) for key, value in patches.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _config_identity(config: SparseConfig) -> Any:
    """Plain data that stands for the config; None where a function can't be known."""
    rules = config.effective_rules()
    functions = [*config.passes, *(r.match for r in rules if not isinstance(r.match, str | type))]
    known = [_function_identity(function) for function in functions]
    if None in known:
        return None
    return {
        "options": _plain(config),
        "rules": [_rule_identity(rule) for rule in rules],
        "functions": known,
    }


def _function_identity(function: Any) -> list[str] | None:
    """Source file and place in it: two lambdas share a name; None where state may hide."""
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return None  # a bound method, a callable object, a closure
    try:
        source = pathlib.Path(inspect.getsourcefile(function) or "").read_text("utf-8")
    except (TypeError, OSError):
        return None
    place = list(function.__code__.co_positions())
    defaults = function.__defaults__, function.__kwdefaults__
    return [function.__qualname__, source, repr(place), repr(defaults)]


def _rule_identity(rule: Any) -> list[str]:
    match = rule.match
    name = match if isinstance(match, str) else f"{match.__module__}:{match.__qualname__}"
    patterns = [repr(rule.forward), repr(rule.grad_input), repr(rule.grad_weight)]
    return [name, *patterns, repr(rule.lowering)]


def _plain(config: SparseConfig) -> dict[str, Any]:
    keys = ("keep_output_dense", "select", "strict", "codegen", "verify", "freeze")
    return {key: getattr(config, key) for key in keys}


@functools.cache
def _sources() -> str:
    """Hash of every file of this package: a changed pass or kernel must miss the caches."""
    root = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    folders = [root, root / "passes", root / "kernels"]  # rglob doesn't follow links
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    for path in sorted(files):
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"
