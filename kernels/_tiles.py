"""Which tile, and which of two ways: pure functions of shape, item size and chip.

Nothing here changes what an op computes; it decides only how. The constants are an H200's (two
ceilings measured, the rest from the data sheet or assumed) and no choice below has been timed on
a GPU yet: GPU.md lists the runs that settle them.
"""

import functools
from dataclasses import dataclass
from math import ceil

import torch

from sparsefx.ops.packed import code_bits

RATE = {2: 790e12, 4: 50e12}  # flop/s of a library GEMM by item size; 4 bytes: plain fp32, no tf32
BANDWIDTH = 4.3e12  # bytes/s of a copy
INTEGER_RATE = 17e12  # 32-bit integer operations/s off the tensor cores
LAUNCH = 2.5e-6  # seconds, one more kernel in the stream
MASK_SHARE = {2: 0.8, 4: 0.5}  # assumed: Triton's share of RATE where the mask costs nothing
ROWS_SHARE = {2: 0.6, 4: 0.5}  # assumed: the same with whole rows gathered (published: 0.5-0.65)
COLUMNS_SHARE = {2: 0.25, 4: 0.4}  # assumed: single elements gathered, 2 bytes a load at 16 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels here can add up


@dataclass(frozen=True)
class Chip:
    """What a tile choice needs to know of a device: bytes of shared memory, multiprocessors."""

    shared: int = 99 * 1024  # the smallest of the chips since Ampere
    processors: int = 132


@functools.cache
def chip(device: torch.device) -> Chip:
    """The chip behind a device; the smallest one we plan for where the device can't say."""
    if device.type != "cuda":
        return Chip()
    properties = torch.cuda.get_device_properties(device)
    shared = 64 * 1024 if torch.version.hip else properties.shared_memory_per_block_optin
    return Chip(shared, properties.multi_processor_count)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size`` (1 for 0)."""
    return 1 << max(size - 1, 0).bit_length()


def gemm(rows: int, cols: int, depth: int, itemsize: int, group: int, chip: Chip) -> dict[str, int]:
    """Tile of a GEMM whose right operand passes through registers on its way to the dot.

    Args:
        rows: M.
        cols: N.
        depth: K, the reduction.
        itemsize: Bytes of an element, 2 or 4.
        group: BN and BK are multiples of this power of two (at most 32).
        chip: The device.

    Returns:
        BM, BN, BK, GROUP (tile rows that share their columns in L2), num_warps, num_stages.
    """
    wide = 128 if itemsize == 2 else 64  # fp32 adds up in registers without tensor cores
    bm = min(wide, max(16, power_of_2(rows)))
    bn = min(wide if bm >= 64 else 64, max(16, group, power_of_2(cols)))
    while bn > 32 and ceil(rows / bm) * ceil(cols / bn) < chip.processors:
        bn //= 2
    bk = (128 if bm < 64 else 64) // (1 if itemsize == 2 else 4)  # few rows: more weight in flight
    bk = min(max(bk, group), max(16, group, power_of_2(depth)))
    warps = 8 if bm * bn >= wide * wide else 4
    stage, ranked = (bm + bn) * bk * itemsize, bn * bk * itemsize
    stages = next((s for s in (4, 3, 2) if s * stage + ranked <= chip.shared), 1)
    return {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "num_warps": warps, "num_stages": stages}


def mask_in_gemm(rows: int, cols: int, depth: int, itemsize: int, n: int, m: int) -> bool:
    """Rank the weights inside the GEMM (True), or write a masked copy for the library's GEMM.

    Inside, every tile row ranks all weights again, off the tensor cores; the copy costs one launch
    and two passes over the weight. So it is a matter of few rows or many.
    """
    dense = 2 * rows * cols * depth / RATE[itemsize]
    traffic = (rows * depth + depth * cols + rows * cols) * itemsize / BANDWIDTH
    ranking = cols * depth * (8 + 3 * min(n, m - n)) / INTEGER_RATE  # instructions, from the SASS
    copy = LAUNCH + max(ranking, 2 * cols * depth * itemsize / BANDWIDTH)
    inside = max(dense / MASK_SHARE[itemsize], traffic) + ceil(rows / 128) * ranking
    return inside <= max(dense, traffic) + copy


def columns_in_gemm(rows: int, cols: int, depth: int, itemsize: int) -> bool:
    """Gather x's columns and w's rows inside the GEMM (True), or copy both for the library's."""
    return _copies_cost_more(rows, cols, depth, itemsize, COLUMNS_SHARE, launches=2)


def rows_in_gemm(rows: int, cols: int, depth: int, itemsize: int, copies: int) -> bool:
    """Gather rows and scatter the result inside the GEMM (True), or by ``copies`` launches."""
    return _copies_cost_more(rows, cols, depth, itemsize, ROWS_SHARE, launches=copies)


def _copies_cost_more(
    rows: int, cols: int, depth: int, itemsize: int, share: dict[int, float], launches: int
) -> bool:
    """Copies move 2 * (rows + cols) * depth elements: large sides pay once, small ones never."""
    dense = 2 * rows * cols * depth / RATE[itemsize]
    copies = launches * LAUNCH + 2 * (rows + cols) * depth * itemsize / BANDWIDTH
    return dense / share[itemsize] <= dense + copies


def shared_chip(device: torch.device, batch: int = 1) -> Chip:
    """The share of a chip that each product of a batch has."""
    whole = chip(device)
    return Chip(whole.shared, ceil(whole.processors / max(batch, 1)))


SKIP_SHARE = 0.25  # assumed: what a list of occupied tiles may take of the product that it shortens


def stored_mask_in_gemm(rows: int, cols: int, depth: int, itemsize: int) -> bool:
    """Apply a stored mask inside the GEMM (True), or write a masked copy for the library's GEMM.

    How much the mask keeps isn't known on the host: every tile counts as occupied.
    """
    dense = 2 * rows * cols * depth / RATE[itemsize]
    traffic = (rows * depth + depth * cols + rows * cols) * itemsize
    inside = max(dense / MASK_SHARE[itemsize], (traffic + depth * cols) / BANDWIDTH)
    copy = LAUNCH + depth * cols * (2 * itemsize + 1) / BANDWIDTH  # the mask: a byte a weight
    return inside <= max(dense, traffic / BANDWIDTH) + copy


def stored_mask_gemm(rows: int, cols: int, depth: int, itemsize: int, chip: Chip) -> dict[str, int]:
    """Return :func:`gemm`'s tile, with room in each stage for the mask: a byte a weight."""
    tile = gemm(rows, cols, depth, itemsize, 1, chip)
    bm, bn, bk = tile["BM"], tile["BN"], tile["BK"]
    stage, masked = (bm + bn) * bk * itemsize + bn * bk, bn * bk * itemsize
    fitting = (s for s in range(tile["num_stages"], 1, -1) if s * stage + masked <= chip.shared)
    return tile | {"num_stages": next(fitting, 1)}


def empty_tiles_skipped(rows: int, cols: int, depth: int, itemsize: int) -> bool:
    """List the tiles that a stored mask occupies (two launches, one pass over it), or take all."""
    table = 2 * LAUNCH + depth * cols / BANDWIDTH
    return table <= SKIP_SHARE * 2 * rows * cols * depth / RATE[itemsize]


# --- packed weights (nm_packed/README.md)

PACKED_ROWS = 64  # one tile of x: beyond it each more would expand the weight again


def packed_in_gemm(rows: int, outputs: int, depth: int, itemsize: int, n: int, m: int) -> bool:
    """Expand a packed weight inside the GEMM (True), or unpack it for the library's GEMM.

    Inside, nothing of the dense size is moved; places are found off the tensor cores both ways.
    """
    dense = 2 * rows * outputs * depth / RATE[itemsize]
    ends = rows * (depth + outputs) * itemsize / BANDWIDTH
    weight = outputs * depth * itemsize / BANDWIDTH
    packed = outputs * depth * n / m * (itemsize + code_bits(m) / 8) / BANDWIDTH
    # instructions a weight, from the SASS: words are shifted, places compared, values stored
    shifted = itemsize == 2 and m <= 4
    expanding = outputs * depth * (4 + 3 * n if shifted else 6 + 4 * n) / INTEGER_RATE
    storing = outputs * depth * (4 + 3 * n if shifted else 6 + 16 * n / m) / INTEGER_RATE
    inside = max(dense / MASK_SHARE[itemsize], packed + ends, expanding)
    unpacking = LAUNCH + max(packed + weight, storing)
    return rows <= PACKED_ROWS and inside <= unpacking + max(dense, weight + ends)


def packed_gemm(
    rows: int, outputs: int, depth: int, itemsize: int, n: int, m: int, chip: Chip
) -> dict[str, int]:
    """Tile and splits of a GEMM that expands a packed weight.

    Args:
        rows: M.
        outputs: Rows of the weight.
        depth: K.
        itemsize: Bytes of an element, 2 or 4.
        n: Kept of every m.
        m: Group size, at most 32.
        chip: The device.

    Returns:
        BM, BN, BK (lanes: a group has a power of two), DOT (1, or 0: multiply and add), splits of
        the depth and the tiles that each takes, STAGES (loads in flight), num_warps.
    """
    dot = itemsize == 2 or rows > 4
    bm = min(PACKED_ROWS, max(16 if dot else 1, power_of_2(rows)))
    lanes = (128 if n == 1 else 64) if itemsize == 2 else 32
    bn, bk = _expanded_tile(64 if dot else 32, lanes, n, m)
    steps = ceil(depth / m / (bk // power_of_2(m)))
    programs = ceil(rows / bm) * ceil(outputs / bn)
    wanted = ceil(2 * chip.processors / max(programs, 1))
    # sums of a split are written and read in float32: together at most a quarter of the weight
    affordable = int(depth * n / m * itemsize / (4 * 8 * max(rows, 1)))
    each = max(ceil(steps / max(min(wanted, affordable, steps // 4), 1)), 1)
    tile = {"BM": bm, "BN": bn, "BK": bk, "DOT": int(dot)}
    splits = max(ceil(steps / each), 1)
    share = power_of_2(n) / power_of_2(m)
    stage = bk * ((bm + bn * share) * itemsize + bn * share * code_bits(m) / 8)
    stages = next(s for s in (4, 3, 2, 1) if s * stage + bn * bk * itemsize <= chip.shared)
    return tile | {"splits": splits, "each": each, "STAGES": stages, "num_warps": 4}


def unpack_tile(depth: int, m: int) -> dict[str, int]:
    """Rows A and groups G of a packed weight that a program unpacks."""
    wide = max(_chunk(m), min(256, power_of_2(depth)))
    return {"A": 4096 // wide, "G": wide // power_of_2(m), "num_warps": 4}


def pack_tile(rows: int, depth: int, n: int, m: int) -> dict[str, int]:
    """Rows A of a weight, and chunks C (whose codes are whole bytes), that a program packs."""
    chunks = max(128 // _chunk(m), 1)
    wide = ceil(depth / (8 // code_bits(m) * m))
    chunks = min(chunks, power_of_2(wide))
    most = 2048 // (chunks * _chunk(m))
    return {"A": min(most, power_of_2(rows)), "C": chunks, "num_warps": 4}


def pack_both_tile(n: int, m: int) -> dict[str, int]:
    """Chunks along rows and along columns that a program packs both ways."""
    chunks = 32 // _chunk(m)
    return {"CR": chunks, "CK": chunks, "num_warps": 4}


def _chunk(m: int) -> int:
    """Lanes of the fewest groups whose codes are whole bytes: 16 or 32 for m <= 32."""
    return 8 // code_bits(m) * power_of_2(m)


def _expanded_tile(rows: int, lanes: int, n: int, m: int) -> tuple[int, int]:
    """Shrink a tile until a thread of 4 warps compares at most 128 candidates of it."""
    lanes, most = max(lanes, _chunk(m)), 2**14 // power_of_2(n)
    while rows * lanes > most and lanes > max(32, _chunk(m)):
        lanes //= 2
    while rows * lanes > most and rows > 16:
        rows //= 2
    return rows, lanes


CONV_SHARE = {2: 0.6, 4: 0.5}  # assumed: the same of an implicit GEMM, which gathers pixels


def mask_in_conv(
    rows: int,
    cols: int,
    depth: int,
    image: int,
    groups: int,
    itemsize: int,
    pattern: tuple[int, int] | None,
) -> bool:
    """Mask the filters inside an implicit GEMM (True), or write a copy for the library's.

    Reasoned as mask_in_gemm is, and not measured.

    Args:
        rows: Pixels of the result, over all images.
        cols: Channels of the result in a group.
        depth: The reduction: taps times channels.
        image: Elements of what is gathered from.
        groups: Of the convolution.
        itemsize: Bytes of an element, 2 or 4.
        pattern: (n, m), or None for a stored mask, a byte a weight.
    """
    weights = groups * cols * depth
    work, bytes_of_mask = 0.0, weights
    if pattern is not None:
        (n, m), bytes_of_mask = pattern, 0
        work = weights * (8 + 3 * min(n, m - n)) / INTEGER_RATE
    dense = 2 * rows * weights / RATE[itemsize]
    traffic = (image + weights + rows * cols * groups) * itemsize
    inside = max(dense / CONV_SHARE[itemsize], (traffic + bytes_of_mask) / BANDWIDTH)
    copy = LAUNCH + max(work, (2 * weights * itemsize + bytes_of_mask) / BANDWIDTH)
    return inside + ceil(rows / 128) * work <= max(dense, traffic / BANDWIDTH) + copy


def gathers_in_conv(
    rows: int,
    cols: int,
    depth: int,
    groups: int,
    itemsize: int,
    moved: int,
    launches: int,
    share: dict[int, float],
) -> bool:
    """Gather inside an implicit GEMM (True), or copy ``moved`` elements in ``launches`` launches.

    Reasoned as rows_in_gemm is, and not measured; rows, cols, depth and groups as in mask_in_conv.
    """
    dense = 2 * rows * cols * depth * groups / RATE[itemsize]
    copies = launches * LAUNCH + 2 * moved * itemsize / BANDWIDTH
    return dense / share[itemsize] <= dense + copies


def conv_weight_splits(tiles: int, positions: int, step: int, chip: Chip) -> int:
    """Into how many sums a weight's gradient is split: two programs a processor, 8 steps each."""
    return max(1, min(ceil(2 * chip.processors / max(tiles, 1)), positions // (8 * step)))


def sums(rows: int, cols: int, depth: int, batch: int, chip: Chip) -> dict[str, int]:
    """Tile and splits of sums along ``depth`` of a matrix of rows and one of cols.

    Splits keep four programs on every processor, for loads in flight, and stay few: one program
    adds them up again.

    Returns:
        BR (results), BD (terms), splits, num_warps.
    """
    br = bd = 64  # of 16-bit elements whole lines of 128 bytes, whichever way they lie
    programs = max(ceil(rows / br) + ceil(cols / br), 1) * max(batch, 1)
    splits = max(1, min(8, ceil(4 * chip.processors / programs), ceil(depth / bd)))
    return {"BR": br, "BD": bd, "splits": splits, "num_warps": 4}


def choosing(depth: int) -> dict[str, int]:
    """BLOCK and num_warps of the one program that chooses from ``depth`` scores."""
    block = power_of_2(depth)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}
