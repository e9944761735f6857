from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement
from score_mods.info import MaskInfo, MaskMod, describe
from score_mods.masks.raster import check_image, rows_meet


def neighborhood_2d(height: int, width: int, radius: int, causal: bool = False) -> MaskMod:
    """Keep keys at most `radius` rows and `radius` columns away, in the same image: a (2 radius + 1)^2 square.

    The square is cut off at the image's border: corner queries read (radius + 1)^2 keys. Every height * width tokens
    are an image (a frame) of their own. causal: of these keys, the ones up to the query in raster order.
    (arXiv 2204.07143, which moves the square inwards at the border instead)

    Raises ValueError for sizes < 1, a negative radius, or anything but ints; causal must be a bool.
    """
    check_image(height, width, causal)
    check_whole_number("radius", radius, at_least=0, meaning="rows and columns that a query sees to each side")
    area = height * width

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # Counted over all images: rows of two images are told apart by the image.
        rows_apart = q_idx // width - kv_idx // width
        columns_apart = q_idx % width - kv_idx % width
        near = (rows_apart.abs() <= radius) & (columns_apart.abs() <= radius) & (q_idx // area == kv_idx // area)
        return near & (kv_idx <= q_idx) if causal else near

    def blocks(pairs: BlockPairs) -> Judgement:
        return rows_meet(pairs, area, width, radius)

    args = (("height", height), ("width", width), ("radius", radius), ("causal", causal))
    return describe(keep, MaskInfo(name="neighborhood_2d", args=args, causal=causal, blocks=blocks))
