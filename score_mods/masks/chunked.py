from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement, overlap
from score_mods.info import MaskInfo, MaskMod, describe


def chunked(chunk: int) -> MaskMod:
    """Keep j <= t with t // chunk == j // chunk: causal attention inside chunks, nothing across their borders.

    The first query of a chunk reads itself alone, the last one `chunk` keys. In packed rows chunks are counted from the
    start of each document. Also called block-local; the local layers of Llama 4 use chunks of 8192.

    Raises ValueError for chunk < 1 or no int.
    """
    check_whole_number("chunk", chunk, at_least=1, meaning="tokens of a chunk")

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx // chunk == kv_idx // chunk)

    def blocks(pairs: BlockPairs) -> Judgement:
        q_low, q_high = pairs.q_low // chunk, pairs.q_high // chunk
        kv_low, kv_high = pairs.kv_low // chunk, pairs.kv_high // chunk
        one_chunk = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
        return overlap(q_low, q_high, kv_low, kv_high), one_chunk & (pairs.gap_low >= 0)

    info = MaskInfo(name="chunked", args=(("chunk", chunk),), causal=True, window=chunk - 1, blocks=blocks)
    return describe(keep, info)
