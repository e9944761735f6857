from torch import Tensor

from score_mods.arguments import check_token_ids
from score_mods.info import MaskInfo, MaskMod, describe


def document(document_ids: Tensor) -> MaskMod:
    """Keep pairs within one document: document_ids[b, t] == document_ids[b, j]. Not causal by itself.

    document_ids: (B, T) integers, any values. Packed sequences have ids that never decrease along T: for them the block
    mask is the tightest; for other ids it is still right, and may compute some blocks that keep nothing.

    Raises ValueError for anything but an integer tensor of shape (B, T).
    """
    check_token_ids("document_ids", document_ids)

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return document_ids[b, q_idx] == document_ids[b, kv_idx]

    return describe(keep, MaskInfo(name="document", documents=(document_ids,), exact=True))
