"""Which tasks have shown themselves in a basis."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gemst.tuning.bases import without_bases
from gemst.tuning.route import Widths


def test_a_layer_without_room_for_a_task_says_nothing_about_it() -> None:
    """The first layer's null space has room for the shared subspace alone."""
    widths = [Widths(0, 1, 0), Widths(2, 4, 2)]
    layers = [SimpleNamespace(widths=own, basis=torch.zeros(8, own.total)) for own in widths]
    assert without_bases(layers) == {"rec", "src"}
    layers[1].basis[:, widths[1].columns("rec")] = torch.eye(8)[:, :2]
    assert without_bases(layers) == {"src"}
    assert without_bases(layers[:1]) == set()
