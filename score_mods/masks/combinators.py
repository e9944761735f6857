from torch import Tensor

from score_mods.blocks import BlockPairs, Judgement, can_judge, judge, judge_all, judge_any
from score_mods.info import MaskInfo, MaskMod, check_takes_four, describe, mask_info
from score_mods.masks.document import document


def all_of(*masks: MaskMod) -> MaskMod:
    """Keep what every one of `masks` keeps. One mask alone is returned as it is.

    Raises ValueError without masks, or for something that is no mask.
    """
    first, rest = _check("all_of", masks)
    if not rest:
        return first

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kept = first(b, h, q_idx, kv_idx)
        for mask in rest:
            kept = kept & mask(b, h, q_idx, kv_idx)
        return kept

    infos = [mask_info(mask) for mask in masks]
    known = [info for info in infos if info is not None]
    windows = [info.window for info in known if info.window is not None]
    # A bound of one part bounds what all keep; the bounds are the law if they are each part's law.
    info = MaskInfo(
        name="all_of",
        causal=any(info.causal for info in known),
        window=min(windows, default=None),
        documents=_distinct([ids for info in known for ids in info.documents]),
        exact=all(info is not None and info.exact for info in infos),
        relative=all(info is not None and info.relative for info in infos),
        parts=masks,
        blocks=judge_all(masks),
    )
    return describe(keep, info)


def any_of(*masks: MaskMod) -> MaskMod:
    """Keep what at least one of `masks` keeps. One mask alone is returned as it is.

    Raises ValueError without masks, or for something that is no mask.
    """
    first, rest = _check("any_of", masks)
    if not rest:
        return first

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kept = first(b, h, q_idx, kv_idx)
        for mask in rest:
            kept = kept | mask(b, h, q_idx, kv_idx)
        return kept

    infos = [mask_info(mask) for mask in masks]
    windows = [info.window if info is not None else None for info in infos]
    bounded = [window for window in windows if window is not None]
    # Only a bound that every part has bounds the union. It says nothing about what is kept inside: never exact.
    info = MaskInfo(
        name="any_of",
        causal=all(info is not None and info.causal for info in infos),
        window=max(bounded) if len(bounded) == len(masks) else None,
        documents=_in_every([info.documents if info is not None else () for info in infos]),
        relative=all(info is not None and info.relative for info in infos),
        parts=masks,
        blocks=judge_any(masks),
    )
    return describe(keep, info)


def in_documents(mask: MaskMod, *, document_ids: Tensor, positions: Tensor) -> MaskMod:
    """Keep what `mask` keeps within one document, asked for positions in the document: mask(pos(t), pos(j)), same id.

    document_ids, positions: (B, T) integers of packed rows; positions restart at 0 with each document. A mask of t - j
    alone (its info says `relative`) is the same for indices in the row, and is asked for those: no table to read.

    Raises ValueError for document ids that are no integers of shape (B, T).
    """
    same = document(document_ids)
    info = mask_info(mask)
    if info is not None and info.relative:
        return all_of(mask, same)

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return same(b, h, q_idx, kv_idx) & mask(b, h, positions[b, q_idx], positions[b, kv_idx])

    def blocks(pairs: BlockPairs) -> Judgement:
        kept, full = judge(mask, pairs.at(positions))
        same_kept, same_full = judge(same, pairs)
        return kept & same_kept, full & same_full

    return describe(
        keep,
        MaskInfo(
            name="in_documents",
            causal=info is not None and info.causal,
            window=None if info is None else info.window,
            documents=(document_ids,),
            tensors=(positions,),
            parts=(mask,),
            blocks=blocks if can_judge(mask) else None,
        ),
    )


def _check(name: str, masks: tuple[MaskMod, ...]) -> tuple[MaskMod, tuple[MaskMod, ...]]:
    if not masks:
        raise ValueError(f"{name} needs at least one mask")
    for mask in masks:
        check_takes_four(mask, name)
    return masks[0], masks[1:]


# By identity: a tensor's own == compares elements.
def _distinct(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple({id(tensor): tensor for tensor in tensors}.values())


def _in_every(groups: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    common = set.intersection(*({id(tensor) for tensor in group} for group in groups))
    return _distinct([tensor for tensor in groups[0] if id(tensor) in common])
