"""Every kernel compiles for a GPU that isn't here: Triton's compiler and ptxas need none.

Run by itself, without the interpreter, this file compiles; pytest runs it as a process.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys

import pytest

CAPABILITIES = {80: "mma.sync", 90: "wgmma"}  # and their tensor-core instruction
SIZES = {
    "count", "down", "across", "rows", "cols", "depth", "images", "high", "wide", "tall", "broad"
, "among", "full", "channels", "steps"}  # fmt: skip
POINTERS = {  # to no element
    "index": "*i64", "mask": "*u8", "used": "*i8", "order": "*i32", "counts": "*i32"
}  # fmt: skip
TAPS = dict.fromkeys(["KH", "KW"], 3) | dict.fromkeys(["PH", "PW", "DH", "DW"], 1)
PATCH = TAPS | dict.fromkeys(["SH", "SW", "JH", "JW"], 1)  # 3 x 3 of a convolution
PATCH |= {"BACK": False, "DIM": 0, "N": 0, "M": 1, "MP": 1}  # a stored mask
BACK = TAPS | dict.fromkeys(["SH", "SW", "JH", "JW"], 2)  # its grad_input, at stride 2
BACK |= {"BACK": True, "DIM": 1, "N": 2, "M": 4, "MP": 4, "mask": None, "bias": None}
PACKED = {"N": 2, "NP": 2, "M": 4, "MP": 4, "BITS": 2}
PACKED |= {"BM": 16, "BN": 64, "BK": 64, "DOT": 1, "STAGES": 4, "CR": 2, "CK": 2}
SIZES |= {"groups", "width", "width_t", "each"}
POINTERS |= {"codes": "*u8", "codes_t": "*u8"}
FEW = PATCH | {"COLUMNS": False}
SUMS = {name: PATCH[name] for name in ("KW", "SH", "SW", "PH", "PW", "DH", "DW")}
SUMS |= {"GATHERED": False, "columns": None}
SIZES |= {"a_depth", "b_depth", "k"}
POINTERS |= {"scale": "*fp32", "parts": "*fp32"}
PLAIN = {"GATHER": False, "scale": None}
NORMS = {"SQUARE": False, "BR": 64, "BD": 64}
CASES = {  # module, kernel, element, strides of 1, constants; tiles of a 1024^3 product
    "nm_mm-2:4": ("nm_mm", "_nm_mm_kernel", "bf16", "sxk swk sb syj", (2, 4, 0)),
    "nm_mm-16:32": ("nm_mm", "_nm_mm_kernel", "fp32", "sxk swj sb syj", (16, 32, 1)),
    "nm_mm-4:6": ("nm_mm", "_nm_mm_kernel", "fp16", "sxk swk sb syj", (4, 6, 0)),
    "nm_mm-columns": ("nm_mm", "_nm_mm_kernel", "bf16", "sxk swk sb syj", (2, 4, 1)),
    "nm_mm-gelu": ("nm_mm", "_nm_mm_kernel", "fp16", "sxk swk sb syj", (2, 4, 0, "gelu")),
    "stored-mask": ("masked_mm", "_masked_mm_kernel", "bf16", "sxk swk smk sb syj", None),
    "masked-occupied": ("masked_mm", "_occupied_kernel", "bf16", "smk", None),
    "masked-list": ("masked_mm", "_list_kernel", "bf16", "", 64),
    "masked-2:4": ("nm_mm", "_masked_weight_kernel", "bf16", "swk syk", (2, 4, 0)),
    "sampled": ("sampled_mm", "_sampled_mm_kernel", "bf16", "sxk swk st sb sc syj", True),
    "gather-scatter": ("sampled_mm", "_scattered_mm_kernel", "bf16", "sak sbk st sc syj", True),
    "stored-conv": ("nm_conv", "_masked_conv_kernel", "bf16", "sxk swk smk sb syj", PATCH),
    "nm_conv-back": ("nm_conv", "_masked_conv_kernel", "fp16", "sxk swk syj", BACK),
    "masked-tiles-2:4": (
        *("transposable_mask.triton.small", "_small_kernel", "bf16", "swj smj"),
        {"N": 2, "T": 128},
    ),
    "masked-tiles-8:16": (
        *("transposable_mask.triton.exact", "_exact_kernel", "fp32", "swj smj"),
        {"N": 8, "LOG": 4, "T": 1},
    ),
    "packed-2:4": (
        "nm_packed.triton.product",
        "_packed_mm_kernel",
        "bf16",
        "sxk svk sck sb",
        PACKED,
    ),
    "masked-both-2:4": ("nm_packed.triton.packing", "_pack_both_kernel", "bf16", "sk smk", PACKED),
    "sampled-conv": (
        *("sampled_conv.triton.products", "_sampled_conv_kernel", "bf16", "sxk swk stk sb syj"),
        FEW,
    ),
    "conv-weight": (
        *("sampled_conv.triton.weights", "_conv_weight_kernel", "bf16", "sgi sxc st scc syc"),
        SUMS,
    ),
    "scatter": ("sampled_mm", "_scattered_mm_kernel", "bf16", "sai sbj st syi", PLAIN),
    "copies": ("sampled_mm", "_taken_kernel", "bf16", "sxk st sc syk", {"BR": 64, "BT": 64}),
    "largest-sums": ("scores", "_sums_kernel", "bf16", "sai sbi sw", NORMS),
    "largest": ("scores", "_topk_of_parts_kernel", "i64", "", {"BOTH": True, "BLOCK": 8192}),
}

# every kernel for the newest chip, some for the oldest: a compilation takes a second
BUILT = [(case, 90) for case in CASES]
BUILT += [
    (case, 80) for case in ("nm_mm-2:4", "sampled", "stored-mask", "stored-conv", "packed-2:4")
]


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
    reason="needs triton and its ptxas",
)


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """What main() prints: for every capability and case, shared memory and instructions."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-P", __file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize(("case", "capability"), BUILT)
def test_compiles(case, capability, built):
    shared, tensor_core = built[f"{case} {capability}"]
    assert shared <= 99 * 1024  # fits the smallest chip that the tiles are for
    copies = case.startswith(("masked", "largest", "copies"))
    without = copies or case == "nm_mm-16:32"  # no dot; fp32's ieee dot
    assert tensor_core == ([] if without else [CAPABILITIES[capability]])


def compile_for(case: str, capability: int) -> tuple[int, list[str]]:
    """Compile one case; return its shared memory and the tensor-core instructions it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparsefx.kernels import _tiles

    module, name, element, ones, constants = CASES[case]
    file = module if "." in module else f"{module}.triton"
    kernel = getattr(importlib.import_module(f"sparsefx.kernels.{file}"), name)
    tile = _tiles.gemm(1024, 1024, 1024, 4 if element == "fp32" else 2, 32, _tiles.Chip())
    options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    values = tile | dict.fromkeys(ones.split(), 1)
    if module == "nm_mm":
        n, m, dim, *activation = constants
        values |= {"N": n, "M": m, "MP": _tiles.power_of_2(m), "DIM": dim}
        values["ACT"] = activation[0] if activation else "none"
    elif isinstance(constants, dict):
        values |= constants
    elif constants is not None:
        values |= {"GATHER": constants, "ALL": constants}
    values = {key: value for key, value in values.items() if key in kernel.arg_names}

    def kind(argument):
        if argument in values:
            return "constexpr"
        if argument in POINTERS:
            return POINTERS[argument]
        return "i32" if argument in SIZES or argument.startswith("s") else f"*{element}"

    place = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature={argument: kind(argument) for argument in kernel.arg_names},
        constexprs={(place(key),): value for key, value in values.items()},
        attrs={(place(a),): [["tt.divisibility", 16]] for a in kernel.arg_names if a not in values},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = [i for i in CAPABILITIES.values() if f"{i}." in compiled.asm["ptx"]]
    return compiled.metadata.shared, used


if __name__ == "__main__":
    print(json.dumps({f"{i} {c}": compile_for(i, c) for i, c in BUILT}))
