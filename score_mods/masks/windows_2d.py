from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement
from score_mods.info import MaskInfo, MaskMod, describe
from score_mods.masks.raster import check_image, rows_meet


def windows_2d(height: int, width: int, size: int, shift: int = 0, causal: bool = False) -> MaskMod:
    """Keep keys of the same size x size window of the same image; windows tile the image and do not overlap.

    shift: rows and columns by which the tiling is moved, as every second layer of a shifted-window transformer does;
    windows at the border are then smaller. Every height * width tokens are an image (a frame) of their own.
    causal: of these keys, the ones up to the query in raster order. (arXiv 2103.14030)

    Raises ValueError for sizes < 1, a shift outside 0 ... size - 1, or anything but ints; causal must be a bool.
    """
    check_image(height, width, causal)
    check_whole_number("size", size, at_least=1, meaning="rows and columns of a window")
    check_whole_number("shift", shift, at_least=0, meaning="rows and columns by which the windows are moved")
    if shift >= size:
        raise ValueError(f"shift must be below size {size}, got {shift}")
    area = height * width

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_row, kv_row = q_idx % area // width, kv_idx % area // width
        q_column, kv_column = q_idx % width, kv_idx % width
        same = ((q_row + shift) // size == (kv_row + shift) // size) & (q_idx // area == kv_idx // area)
        same = same & ((q_column + shift) // size == (kv_column + shift) // size)
        return same & (kv_idx <= q_idx) if causal else same

    def blocks(pairs: BlockPairs) -> Judgement:
        return rows_meet(pairs, area, width, size - 1)

    args = (("height", height), ("width", width), ("size", size), ("shift", shift), ("causal", causal))
    return describe(keep, MaskInfo(name="windows_2d", args=args, causal=causal, blocks=blocks))
