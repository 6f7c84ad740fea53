"""The best transposable mask of each tile, by the way that suits its size and device.

All ways lead to a mask of the largest total. Those of a tile with a side above 4, flow.py and its
twin in C++, lead to the same one of several, too; smaller tiles have a way of their own everywhere.
So the mask depends on the weight alone, never on the machine.
"""

from torch import Tensor

from sparsefx.masks import flow, native, patterns


def solve(tiles: Tensor, n: int) -> Tensor:
    """Mark the entries of largest total |w| within the limits, as many as these allow.

    Args:
        tiles: [tiles, a, b] with a, b <= 64; may be traced up to 4 x 4.
        n: the limit per row and column.

    Returns:
        bool [tiles, a, b].
    """
    if max(tiles.shape[1:]) <= patterns.LARGEST:
        return patterns.solve(tiles, n)
    if tiles.device.type == "cpu" and type(tiles) is Tensor:  # others hold no memory of their own
        mask = native.solve(tiles, n)
        if mask is not None:
            return mask
    return flow.solve(tiles, n)
