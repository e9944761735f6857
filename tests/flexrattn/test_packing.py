"""Positions -> document ids, and back from lengths to positions."""

import pytest
import torch

from flexrattn.packing import document_ids_from_positions, positions_from_lengths, rows_are_whole


def test_ids_count_the_starts():
    positions_BT = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    ids_BT = document_ids_from_positions(positions_BT)
    assert ids_BT.dtype == torch.int32
    assert ids_BT.tolist() == [[1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1]]
    assert torch.equal(document_ids_from_positions(positions_BT[0]), ids_BT[0])


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [3, 1, 4]], ids=str)
def test_lengths_survive_the_round_trip(lengths):
    positions_T = positions_from_lengths(lengths)
    assert positions_T.dtype == torch.int64
    assert positions_T[0] == 0
    assert torch.bincount(document_ids_from_positions(positions_T))[1:].tolist() == lengths


def test_whole_rows_have_one_start_at_their_first_token():
    whole = torch.arange(6).expand(2, 6)
    assert rows_are_whole(whole)
    for row, token, position in ((1, 5, 0), (0, 1, 0), (1, 0, 3)):
        other = whole.clone()
        other[row, token] = position
        assert not rows_are_whole(other), (row, token)


def test_ids_trace_without_a_graph_break():
    # The eager backend runs what was traced: fullgraph would raise at a host sync.
    compiled = torch.compile(document_ids_from_positions, fullgraph=True, backend="eager")
    positions_BT = torch.tensor([[0, 1, 0, 1]])
    assert torch.equal(compiled(positions_BT), document_ids_from_positions(positions_BT))
