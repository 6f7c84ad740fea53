"""Every private torch import, in one room: what to look at when torch moves."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import platform
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from sparsefx.errors import KernelError

__all__ = [
    "OpOverload",
    "build_cpp",
    "compile_eagerly",
    "compile_with_inductor",
    "convolution_format",
    "decompositions",
    "get_proxy_mode",
    "has_kernel",
    "holds_values",
    "input_source",
    "outside_graphs",
    "retrace",
    "shown_to_the_user",
    "trace_reference",
]

Function = TypeVar("Function", bound=Callable[..., Any])
Rewrite = Callable[[GraphModule], None]
Observe = Callable[[str, GraphModule, int], None]


def has_kernel(op: str, key: str) -> bool:
    """Whether the dispatcher has a kernel of ``op`` (with namespace) under a dispatch key.

    A device whose key has another name, such as "meta", has none of ours.
    """
    known = hasattr(torch._C.DispatchKey, key)
    return known and bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, key))


def convolution_format(x: Tensor, w: Tensor, *rest: Any) -> torch.memory_format:
    """Return the layout of ``aten.convolution(x, w, *rest)``, which fake tensors tell a graph."""
    chosen = torch._C._select_conv_backend(x, w, *rest)
    layout: torch.memory_format = torch._C._conv_determine_backend_memory_format(x, w, chosen)
    return layout


def holds_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that Python may look at: neither fake nor traced by make_fx.

    Dynamo leaves its graph where such code begins, so it counts as yes.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if torch.compiler.is_compiling():
        return True
    return get_proxy_mode() is None and not isinstance(tensor, FakeTensor)


def outside_graphs(function: Function) -> Function:
    """Mark a function whose steps depend on values: Dynamo leaves its graph there and calls it."""
    why = "its steps depend on values"
    return cast(Function, torch.compiler.disable(function, reason=why))  # type: ignore[no-untyped-call]


class _Decompositions(dict[Any, Callable[..., Any]]):
    """A table whose functions need no pickling: without that, Inductor's caches stay unused.

    What it holds follows from this package's sources and torch's version, which are in the key.
    """

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return decompositions, ()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decompositions that a joint graph is traced with: Inductor's, products apart.

    On CPU Inductor turns a product of one row into pointwise arithmetic before any pass could see
    it: what a layer computes would depend on the batch and the device.
    """
    import torch._inductor.lowering  # max_pool2d's decomposition takes it as already imported
    from torch._inductor.decomposition import select_decomp_table

    table = _Decompositions(select_decomp_table())
    for product in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
        table.pop(product.default, None)
    return table


def trace_reference(function: Callable[..., Any], args: Sequence[Any]) -> GraphModule:
    """Trace ``function`` on fake tensors to a graph of post-decomposition ATen operators."""
    table = decompositions()
    with torch.no_grad():
        return make_fx(function, decomposition_table=table, tracing_mode="fake")(*args)


def input_source(placeholder: Node) -> str:
    """Return how the user's code reaches an input: ``L['self']._modules['fc']...``."""
    name = getattr(getattr(placeholder, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def input_position(placeholder: Node, order: int) -> int:
    """Return which input of the Dynamo graph a placeholder of the joint graph is."""
    described = getattr(placeholder.meta.get("desc"), "idx", None)
    return described if isinstance(described, int) else order


def held_name(placeholder: Node) -> str:
    """Return which attribute of Dynamo's graph a placeholder of the joint graph is; "" if none.

    Under Inductor's freezing the graph holds its parameters instead of being given them.
    """
    return str(getattr(placeholder.meta.get("desc"), "target", ""))


def held_sources(gm: GraphModule) -> dict[str, str]:
    """Return how the user's code reaches what Dynamo's graph holds, by the attribute's name."""
    named = getattr(gm, "_param_name_to_source", None) or {}
    texts = {key: getattr(source, "name", "") for key, source in named.items()}
    return {key: str(text() if callable(text) else text) for key, text in texts.items()}


def lazy_graph_module(root: GraphModule, graph: torch.fx.Graph) -> GraphModule:
    """Return a module that generates its code when it first runs; passes edit, they don't run."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


# --- Inductor


def compile_with_inductor(
    gm: GraphModule,
    inputs: Sequence[Any],
    rewrite: Rewrite,
    identity: Callable[[], str | None],
    patches: dict[str, Any],
) -> Callable[..., Any]:
    """Compile with Inductor, rewriting the joint (or inference) graph first.

    Args:
        gm: as Dynamo gave it.
        inputs: likewise.
        rewrite: edits the graph in place.
        identity: what the compile caches must tell apart; None keeps them out.
        patches: further Inductor options.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    _lower_to_first(torch.ops.sparsefx.after.default)
    before = patches.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)
    mine = _joint_pass(rewrite, identity, before)
    compiled: Any = compile_fx(
        gm,
        list(inputs),
        config_patches={**patches, "joint_custom_pre_pass": mine},
        decompositions=decompositions(),
    )
    return compiled  # type: ignore[no-any-return]


def _lower_to_first(op: OpOverload) -> None:
    """Have Inductor generate no code for ``op``: its result is its first argument."""
    from torch._inductor.lowering import lowerings, register_lowering

    if op not in lowerings:
        register_lowering(op, type_promotion_kind=None)(lambda x, *_: x)


_HARDLY_ANY = 1e-9


def _heed_marks(joint: GraphModule) -> None:
    """Have the partitioner heed MUST_SAVE where the activation memory budget is 0.

    At exactly 0 it saves nothing but inputs, whatever is marked, and draws random numbers anew in
    the backward; a budget next to nothing recomputes as much, and heeds the marks.
    """
    from torch._functorch import config
    from torch.fx import traceback
    from torch.utils.checkpoint import CheckpointPolicy

    nodes = list(joint.graph.nodes)
    marked = [n for n in nodes if n.meta.get("recompute") == CheckpointPolicy.MUST_SAVE]
    if not marked:
        return
    for node in marked:  # a policy that saves everything marks tuples, which can't be saved
        if not isinstance(node.meta.get("val"), Tensor):
            del node.meta["recompute"]
    key = getattr(traceback, "MEMORY_BUDGET_ANNOTATION_KEY", None)  # regions came after 2.11
    for node in nodes:
        if node.meta.get("memory_budget") == 0:
            node.meta["memory_budget"] = _HARDLY_ANY
        custom = node.meta.get("custom")
        if isinstance(custom, dict) and custom.get(key) == 0:
            node.meta["custom"] = {**custom, key: _HARDLY_ANY}
    if config.activation_memory_budget == 0:
        nodes[0].meta.setdefault("memory_budget", _HARDLY_ANY)


def _joint_pass(rewrite: Rewrite, identity: Callable[[], str | None], before: Any) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    # 2.11 takes one pass only, so the ones that the user set run inside ours
    earlier = () if before is None else before if isinstance(before, list | tuple) else (before,)

    class RewriteJointGraph(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            gm = graph.owning_module
            assert gm is not None
            for other in earlier:
                other(gm.graph)
            rewrite(gm)
            _heed_marks(gm)

        def uuid(self) -> str | None:
            own, others = identity(), [getattr(p, "uuid", lambda: None)() for p in earlier]
            return None if own is None or None in others else f"{own} after {others!r}"

    return RewriteJointGraph()


def mode_options(mode: str | None) -> dict[str, Any]:
    """Return the Inductor options that ``torch.compile(mode=...)`` stands for."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode else {}


def inductor_option_names() -> list[str]:
    """Return the names of Inductor's own options."""
    from torch._inductor import config as inductor_config

    return list(inductor_config.get_config_copy())


@functools.cache
def instructions() -> str:
    """A digest of what the processor can do: all that ``-march=native`` may use."""
    try:
        lines = Path("/proc", "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    named = " ".join(sorted(flags.partition(":")[2].split())) or platform.processor()
    told = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {named}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def build_cpp(source: str) -> ctypes.CDLL:
    """Compile C++ with Inductor's own flags and load it; kept on disk among what Inductor compiled.

    These flags ask for the instructions of the machine at hand without naming them, so what the
    machine has is made part of the source: a cache that machines share holds a library for each
    kind, and none is loaded whose instructions this one lacks.

    Args:
        source: self-contained; its functions are extern "C". OpenMP is on where Inductor has it.

    Raises:
        KernelError: there is no compiler, it refuses the source, or the result can't be loaded.
    """
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(f"// for {instructions()}\n{source}")
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KernelError(
            f"C++ can't be built here: {type(error).__name__}: {reason}; install a C++ compiler, "
            "or name one in the environment variable CXX"
        ) from error
    if not isinstance(library, ctypes.CDLL):
        raise KernelError(f"C++ was built, but came back as a {type(library).__name__}")
    return library


# --- without Inductor


def compile_eagerly(
    gm: GraphModule,
    inputs: Sequence[Any],
    rewrite: Rewrite,
    observe: Observe | None = None,
    execute: Callable[[GraphModule], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Trace, rewrite, partition and run the graphs operator by operator.

    Args:
        gm: as Dynamo gave it.
        inputs: likewise, real or fake.
        rewrite: edits the joint (or inference) graph in place.
        observe: told ("forward" | "backward" | "inference", graph, number of results).
        execute: makes of each graph the function that runs it; None is its own code.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    results = 0

    def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        nonlocal results
        results = kwargs["num_fwd_outputs"]
        rewrite(joint)
        _heed_marks(joint)
        return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

    def run(kind: str) -> Callable[..., Any]:
        def compiler(graph: GraphModule, _: Any) -> Callable[..., Any]:
            if kind == "inference":
                rewrite(graph)
            if observe is not None:
                observe(kind, graph, results)
            return make_boxed_func(graph.forward if execute is None else execute(graph))

        return compiler

    return aot_autograd(
        fw_compiler=run("forward"),
        bw_compiler=run("backward"),
        inference_compiler=run("inference"),
        partition_fn=partition,
        decompositions=decompositions(),
        keep_inference_input_mutations=True,
    )(gm, list(inputs))


def partition(joint: GraphModule, results: int) -> tuple[GraphModule, GraphModule]:
    """Split a joint graph into (forward, backward) as Inductor would."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    inputs = [n.meta["val"] for n in joint.graph.nodes if n.op == "placeholder"]
    return min_cut_rematerialization_partition(
        joint, inputs, num_fwd_outputs=results, static_lifetime_input_indices=[]
    )


@contextmanager
def retrace(gm: GraphModule) -> Iterator[list[Any]]:
    """Reopen the tracing context of a Dynamo graph; yields its fake inputs."""
    inputs = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    modes = [value.fake_mode for value in inputs if hasattr(value, "fake_mode")]
    if not modes:
        yield inputs
        return
    with tracing(TracingContext(modes[0])), modes[0]:
        yield inputs


# --- compiling a graph again, long after Dynamo gave it


def has_symbols(gm: GraphModule) -> bool:
    """Whether a Dynamo graph has sizes, strides or numbers that are not known when compiling."""
    symbols = torch.SymInt | torch.SymFloat | torch.SymBool
    for node in gm.graph.nodes:
        if node.meta.get("unbacked_bindings"):
            return True
        found = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(found, symbols):
            return True
        if node.op == "placeholder" and isinstance(found, Tensor):
            numbers = [*found.shape]
            if found.layout == torch.strided:
                numbers += [*found.stride(), found.storage_offset()]
            if any(isinstance(number, symbols) for number in numbers):
                return True
    return False


def copy_sources(gm: GraphModule, copied: GraphModule) -> None:
    """Tell a copy of a Dynamo graph where its inputs come from: which of them stay in place."""
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source


@contextmanager
def compiling_later(args: Sequence[Any]) -> Iterator[list[Any]]:
    """Open what Dynamo opens around a backend, for inputs whose sizes are all fixed.

    Yields fake inputs: a program is compiled for any values, and none is computed with.

    Args:
        args: inputs of a call, which the guards let pass.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._guards import CompileContext, compile_context
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._python_dispatch import _disable_current_modes

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    numbers = random.getstate()
    with compile_lock, _disable_current_modes(), torch.random.fork_rng(devices):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = [
            mode.from_tensor(arg, static_shapes=True) if isinstance(arg, Tensor) else arg
            for arg in args
        ]
        with tracing(TracingContext(mode)), compile_context(CompileContext(None)):
            try:
                yield inputs
            finally:
                random.setstate(numbers)


# --- errors


@contextmanager
def shown_to_the_user(kind: type[Exception]) -> Iterator[None]:
    """Let errors of a backend leave Dynamo as they are, instead of as BackendCompilerFailed.

    Args:
        kind: class of the errors that are meant for the user.
    """
    from torch._dynamo.exc import ShortenTraceback

    class Carrier(ShortenTraceback):
        """Dynamo passes these on, and asks them what to raise in the end."""

        def __init__(self, error: Exception) -> None:
            super().__init__(str(error), first_useful_frame=None)
            self.error = error

        def remove_dynamo_frames(self) -> Any:
            return self.error

    try:
        yield
    except kind as error:
        raise Carrier(error) from error


# --- who is being compiled

_COMPILED: list[weakref.ref[Any]] = []  # wrappers have no hash


def compile_wrapper() -> Any:
    """Return the object behind the running ``torch.compile`` call, or None."""
    frame = sys._getframe(1)
    for _ in range(40):
        found = frame.f_locals.get("self")
        if isinstance(found, torch._TorchCompileWrapper):
            if not any(known() is found for known in _COMPILED):
                _COMPILED.append(weakref.ref(found))
            return found
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def wrappers_like(wrapper: Any) -> list[Any]:
    """Return what was compiled alike: Dynamo runs the code of one for another, equal, instance."""
    _COMPILED[:] = [known for known in _COMPILED if known() is not None]
    return [found for known in _COMPILED if (found := known()) is not None and found == wrapper]


def wrapper_of(compiled: Any) -> Any:
    """Return the object behind a compiled module or function, or None."""
    candidates = [getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)]
    for holder in (compiled, getattr(compiled, "_compiled_call_impl", None)):
        for cell in getattr(holder, "__closure__", None) or ():
            content = cell.cell_contents
            candidates += [content, getattr(content, "callback", None)]
    for found in candidates:
        for _ in range(8):
            if found is None or isinstance(found, torch._TorchCompileWrapper):
                break
            found = getattr(found, "_torchdynamo_orig_backend", None)
        if isinstance(found, torch._TorchCompileWrapper):
            return found
    return None


def made_by(wrapper: Any, module: str) -> bool:
    """Whether the backend of a ``torch.compile`` call is defined in a module."""
    return getattr(getattr(wrapper, "compiler_fn", None), "__module__", "") == module


def options_of(wrapper: Any) -> dict[str, Any]:
    """Return the options of a ``torch.compile`` call."""
    return dict(wrapper.kwargs.get("options") or {})


def tell_apart(wrapper: Any, marks: Sequence[object]) -> None:
    """Keep Dynamo from running what this ``torch.compile`` call compiled for another one.

    It would for a call whose backend and options are equal. The backend gets ``marks``, too.
    """
    wrapper.kwargs = {**wrapper.kwargs, "marks": marks}


def is_compiled(thing: Any) -> bool:
    """Whether ``torch.compile`` or ``module.compile()`` made this, for whichever backend."""
    return (
        isinstance(thing, torch._dynamo.OptimizedModule)
        or hasattr(thing, "_torchdynamo_orig_callable")
        or getattr(thing, "_compiled_call_impl", None) is not None
    )


@contextmanager
def as_written(thing: Any) -> Iterator[Any]:
    """Yield the module or function that was compiled, so that it can be captured anew."""
    if isinstance(thing, torch._dynamo.OptimizedModule):
        thing = thing._orig_mod
    thing = getattr(thing, "_torchdynamo_orig_callable", thing)
    compiled = getattr(thing, "_compiled_call_impl", None)
    if compiled is None:
        yield thing
        return
    thing._compiled_call_impl = None
    try:
        yield thing
    finally:
        thing._compiled_call_impl = compiled


def trace_function(function: Callable[..., Any], args: Sequence[Any]) -> GraphModule:
    """Trace a function of real tensors to a graph of ATen operators with fake values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
    with mode:
        gm = trace_reference(function, fakes)
    # constants are no inputs: make_fx gives them placeholders all the same
    for node in list(gm.graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


@contextmanager
def many_recompiles() -> Iterator[None]:
    """Let a capture trace a function anew, alike however often it was compiled before.

    Dynamo would turn a size or number that differs from an earlier call's into a symbol.
    """
    with torch._dynamo.config.patch(
        recompile_limit=2**16,
        accumulated_recompile_limit=2**16,
        automatic_dynamic_shapes=False,
        specialize_float=True,
    ):
        yield


def compile_apart(
    model: Any,
    backend: str | Callable[..., Any],
    dynamic: bool | None = False,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compile so that it doesn't count towards the user's own recompile limit.

    Args:
        model: what ``torch.compile`` takes.
        backend: a compiler function, or its name.
        dynamic: whether sizes are symbolic, as for ``torch.compile``.
        options: as for ``torch.compile``.
    """
    known = inspect.signature(torch.compile).parameters  # isolate_recompiles came after 2.11
    apart: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(model, backend=backend, dynamic=dynamic, options=options, **apart)


def settled(size: Any) -> Any:
    """Return the int that a symbolic size was guarded to be, or the size itself."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if known is None else known


def size_hint(size: Any) -> int:
    """Return a size, or the example's where it is symbolic; ``int()`` would add a guard."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def has_size(size: Any) -> bool:
    """Whether a size is a number or has an example's; a size that depends on data has neither."""
    return not isinstance(size, torch.SymInt) or bool(size.node.has_hint())


def freezing() -> bool:
    """Whether Inductor computes what depends on parameters alone as it compiles."""
    import torch._inductor.config as inductor

    return bool(inductor.freezing)


def size_expr(size: Any) -> Any:
    """Return a size as a sympy expression of its graph's symbols."""
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def symbol_hints(sizes: Sequence[Any]) -> dict[Any, int]:
    """Return the example's value of every symbol in some sizes, where it has one."""
    found: dict[Any, int] = {}
    for size in sizes:
        if isinstance(size, torch.SymInt):
            env = size.node.shape_env
            name = "backed_var_to_val" if hasattr(env, "backed_var_to_val") else "var_to_val"
            values = getattr(env, name)  # the second is what older versions call it
            symbols = size.node.expr.free_symbols
            found.update({s: int(values[s]) for s in symbols if s in values})
    return found


def known_backends() -> list[str]:
    """Return the names of all torch.compile backends, entry points included."""
    from torch._dynamo.backends.registry import list_backends

    return list(list_backends(exclude_tags=()))


def register_backend(name: str, compiler: Callable[..., Any]) -> None:
    """Register a torch.compile backend by hand."""
    from torch._dynamo.backends.registry import register_backend as register

    register(compiler, name)


def leaves(tree: Any) -> list[Any]:
    """Return what nested containers hold, in the order in which torch.export flattens them."""
    from torch.utils._pytree import tree_leaves

    return list(tree_leaves(tree))


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to all that nested containers hold."""
    from torch.utils._pytree import tree_map

    return tree_map(function, tree)


# --- parametrizations under FSDP2


def reshard(model: torch.nn.Module) -> None:
    """Let modules under FSDP2 show their sharded parameters, also after a forward alone."""
    for module in _fsdp_modules(model):
        module.reshard()


def remove_parametrization(model: torch.nn.Module, module: torch.nn.Module, name: str) -> None:
    """Give ``module`` the original of a parametrized tensor back; FSDP2 follows.

    torch's own function takes the parametrized class off the module, and FSDP2 may have put a class
    of its own above; FSDP2 also remembers which module holds a parameter.

    Args:
        model: in which FSDP2 modules are looked for.
        module: the owner of the parametrized tensor.
        name: of the tensor.
    """
    from torch.nn.utils import parametrize

    holder: Any = getattr(module, "parametrizations")[name]  # noqa: B009  # typed as a Tensor
    wrapper = type(module)
    wrapped = module in list(_fsdp_modules(module))
    if wrapped:
        module.__class__ = wrapper.__bases__[-1]
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    if wrapped:
        bases = (*wrapper.__bases__[:-1], type(module))
        title = wrapper.__name__.replace(wrapper.__bases__[-1].__name__, type(module).__name__)
        module.__class__ = type(title, bases, {"__deepcopy__": wrapper.__dict__["__deepcopy__"]})
    for parent in _fsdp_modules(model):
        _follow(parent, holder, module, name)


def _follow(parent: Any, holder: Any, module: torch.nn.Module, name: str) -> None:
    """Tell FSDP2 that a parameter now lives in ``module``, and no longer in ``holder``."""
    state = parent._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for parameter in [p for group in groups if group is not None for p in group.fsdp_params]:
        info = parameter._module_info
        if info.module is holder:
            info.module, info.param_name = module, name


def _fsdp_modules(model: torch.nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # not imported, so not in use
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def trace_into(module: str) -> None:
    """Let Dynamo trace the functions of a module of torch that it would skip.

    Args:
        module: its full name; it need not be imported yet.
    """
    from torch._dynamo import trace_rules

    traced: Any = trace_rules.MOD_INLINELIST  # a list in its file, then made a set
    traced.add(module)
    trace_rules.get_mod_inlinelist.cache_clear()


def on_values() -> Any:
    """Return a context in which real tensors can be computed with, inside a tracing one too."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


# --- 2:4 products of the vendor's libraries

_CUTLASS_HOLDS = (8, 9)  # major capabilities for which torch builds CUTLASS's 2:4 products
_CUSPARSELT_SINCE = {8: 400, 9: 600, 10: 700, 12: 700}  # by major capability, of the library


def semi_structured_library(device: torch.device) -> str:
    """Return what multiplies 2:4 weights on a device: "cusparselt", "cutlass" or "" for nothing."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _semi_structured_library(index)


@functools.lru_cache(64)
def _semi_structured_library(index: int) -> str:
    found = torch.backends.cusparselt
    version = found.version() if found.is_available() else 0
    return semi_structured_choice(torch.cuda.get_device_capability(index)[0], version or 0)


def semi_structured_choice(major: int, cusparselt: int) -> str:
    """Return the library for a capability's major number and cuSPARSELt's version, 0 for none."""
    if cusparselt and cusparselt >= _CUSPARSELT_SINCE.get(major, sys.maxsize):
        return "cusparselt"
    return "cutlass" if major in _CUTLASS_HOLDS else ""


# Both sides of a weight: torch's own classes ask cuSPARSELt for 16, of which 32 is a safe multiple
# for rows and columns alike; CUTLASS for 32 rows and 64 columns, and each side is both.
SEMI_STRUCTURED_STEP = {"cusparselt": 32, "cutlass": 64}


def semi_structured_step() -> int:
    """Return what both sides of a weight are multiples of on the current device, 0 if none fit."""
    library = semi_structured_library(torch.device("cuda"))
    return SEMI_STRUCTURED_STEP.get(library, 0)


def semi_structured_version() -> str:
    """Return what an algorithm's number and speed hold for: torch and its cuSPARSELt."""
    return f"torch {torch.__version__}, cuSPARSELt {torch.backends.cusparselt.version()}"


def semi_structured_algorithms() -> int:
    """Return how many algorithm ids are worth a try; an id that isn't there raises RuntimeError."""
    known = torch.backends.cusparselt.get_max_alg_id()  # torch knows it of few versions
    return 70 if known is None else known + 1


def semi_structured_compress(library: str, kept: Tensor) -> Tensor:
    """Compress a contiguous weight [R, K] that holds 2 of every 4 along K, into [R, K*9/16]."""
    rows, cols = kept.shape
    if library == "cusparselt":
        return torch._cslt_compress(kept).view(rows, -1)
    from torch.sparse import _semi_structured_conversions as conversions

    values, places = conversions.sparse_semi_structured_from_dense_cutlass(kept)  # type: ignore[no-untyped-call]
    flat = torch.cat([values.reshape(-1), places.reshape(-1).view(kept.dtype)])
    return flat.view(rows, cols // 16 * 9)  # rows of a flat buffer, not of the weight


def semi_structured_mm(
    library: str, packed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int
) -> Tensor:
    """Multiply contiguous x [M, K] by the transpose of a compressed weight [N, K].

    Args:
        library: which compressed it.
        packed: [N, K*9/16].
        x: M is a multiple of 16.
        bias: [N] or None.
        algorithm: an id of cuSPARSELt's; CUTLASS has one algorithm.

    Returns:
        [M, N], contiguous.
    """
    if library == "cusparselt":
        return torch._cslt_sparse_mm(
            packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm
        )
    (rows, depth), flat = (len(packed), x.shape[1]), packed.reshape(-1)
    kept = rows * depth // 2
    values, places = flat[:kept].view(rows, -1), flat[kept:].view(torch.int16).view(rows, -1)
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, places, x.t())
    else:
        y = torch._sparse_semi_structured_addmm(bias, values, places, x.t())
    return y.t().contiguous()


def semi_structured_suggested(packed: Tensor, x: Tensor, bias: Tensor | None) -> int:
    """Return the algorithm id that cuSPARSELt's own search finds for a product."""
    return int(torch._cslt_sparse_mm_search(packed, x.t(), bias=bias, transpose_result=True))


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: nothing may wait for the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
