"""The fit of the output rows: it finds what generalises, and leaves alone what it cannot judge."""

from __future__ import annotations

import torch

from gemst.tuning.head import fit, whitening

TOKENS, KINDS, WIDTH, TARGETS = 60, 6, 24, 3000


def world(targets: int = TARGETS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start rows, features, states and labels: a token's chance depends on its features and the state alone.

    States share a large mean, as a language model's do.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(TOKENS, KINDS, generator=generator)
    truth = torch.randn(KINDS, WIDTH, generator=generator) / 2
    states = torch.randn(targets, WIDTH, generator=generator) + 8
    labels = torch.multinomial(((states - 8) @ (features @ truth).T).softmax(1), 1, generator=generator)[:, 0]
    return torch.zeros(TOKENS, WIDTH), features, states, labels


def test_held_out_targets_gain_and_new_states_too() -> None:
    rows, features, states, labels = world()
    half = TARGETS // 2
    found = fit(rows, features, states[:half], labels[:half], whitening(states[:half]), seed=0)
    assert found.after < found.before - 0.5
    with torch.no_grad():
        unseen = torch.nn.functional.cross_entropy(states[half:] @ found.rows.T, labels[half:])
    assert abs(float(unseen) - found.after) < 0.3


def test_the_same_seed_gives_the_same_rows() -> None:
    rows, features, states, labels = world(600)
    first, again = (fit(rows, features, states, labels, whitening(states), seed=3).rows for _ in range(2))
    assert torch.equal(first, again)


def test_features_that_tell_nothing_change_nothing_that_counts() -> None:
    """Labels without a pattern: the fit ends at once instead of learning them by heart."""
    rows, features, states, _ = world(600)
    labels = torch.randint(TOKENS, (600,), generator=torch.Generator().manual_seed(1))
    found = fit(rows, features, states, labels, whitening(states), seed=0)
    assert found.after <= found.before
    assert found.epochs < 20


def test_too_few_targets_leave_the_rows_as_they_are() -> None:
    rows, features, states, labels = world(9)
    assert torch.equal(fit(rows + 1, features, states, labels, whitening(states), seed=0).rows, rows + 1)
