"""Coupled noise and kept tokens are functions of the global batch alone, and change nothing else of the stream."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from lfm.data.random_draws import draw, draw_noise, kept_tokens
from lfm.data.stream.latent_stream import StreamOptions
from lfm.types import LatentBatch
from lfm.world import World
from tests.support.latents import OPTIONS, Latents
from tests.support.strategies import NUMBERS, SEEDS

GROUP = 4
WITH_BOTH = replace(OPTIONS, coupling_group=GROUP, num_tokens=9, num_kept_tokens=5)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    return Latents(str(tmp_path_factory.mktemp("latents")), classes=False)


def by_number(*batches: LatentBatch) -> LatentBatch:
    """All the rows, in the order of the samples' numbers."""
    assert all(batch.kept_tokens is not None for batch in batches)
    names = ("sample_numbers", "latents", "noise", "uniform", "kept_tokens")
    whole = replace(batches[0], **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in names})
    return whole.rows(whole.sample_numbers.argsort())


@pytest.mark.parametrize("options", [WITH_BOTH, replace(WITH_BOTH, coupling_group=1, num_noises=3)])
@pytest.mark.parametrize("start", [0, 24, 8_000_000])
def test_neither_depends_on_the_world(latents: Latents, start: int, options: StreamOptions) -> None:
    alone = by_number(latents.stream(options).batch(start))
    shared = by_number(*(latents.stream(options, World(rank, rank, 2)).batch(start) for rank in range(2)))
    for name in ("sample_numbers", "latents", "noise", "uniform", "kept_tokens"):
        assert torch.equal(getattr(alone, name), getattr(shared, name)), name


def test_only_the_pairing_of_noise_changes_and_only_within_a_group(latents: Latents) -> None:
    moved = 0
    for start in range(0, 80, 8):
        coupled = by_number(latents.stream(WITH_BOTH).batch(start))
        plain = latents.stream(replace(WITH_BOTH, num_kept_tokens=9)).batch(start)
        assert plain.kept_tokens is None
        plain = latents.stream(replace(WITH_BOTH, coupling_group=1)).batch(start)
        plain = plain.rows(plain.sample_numbers.argsort())
        for name in ("sample_numbers", "latents", "uniform", "kept_tokens"):
            assert torch.equal(getattr(coupled, name), getattr(plain, name)), name
        for rows in torch.arange(8).split(GROUP):
            pairs = (coupled.noise[rows][:, None] == plain.noise[rows][None]).flatten(2).all(2)
            assert torch.equal(pairs.sum(0), torch.ones(GROUP, dtype=torch.int64))
            assert torch.equal(pairs.sum(1), torch.ones(GROUP, dtype=torch.int64))
            moved += GROUP - int(pairs.diag().sum())
    assert moved > 20


def test_the_nearest_of_several_noises_changes_the_noise_alone(latents: Latents) -> None:
    plain, chosen = (
        by_number(latents.stream(replace(WITH_BOTH, coupling_group=1, num_noises=count)).batch(0)) for count in (1, 4)
    )
    for name in ("sample_numbers", "latents", "uniform", "kept_tokens"):
        assert torch.equal(getattr(chosen, name), getattr(plain, name)), name
    before, after = ((batch.latents - batch.noise).flatten(1).norm(dim=1) for batch in (plain, chosen))
    assert (after <= before).all() and (after < before).any()


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, numbers=NUMBERS)
def test_a_samples_tokens_do_not_depend_on_its_batch_and_are_different_ones(seed: int, numbers: list[int]) -> None:
    together = kept_tokens(seed, torch.tensor(numbers), 16, 6)
    assert together is not None and together.shape == (len(numbers), 6) and together.dtype == torch.int64
    for number, row in zip(numbers, together, strict=True):
        alone = kept_tokens(seed, torch.tensor([number]), 16, 6)
        assert alone is not None and torch.equal(alone[0], row)
        assert len(set(row.tolist())) == 6 and row.min() >= 0 and row.max() < 16


def test_every_token_is_as_likely_to_be_kept() -> None:
    kept = kept_tokens(1, torch.arange(4000), 16, 4)
    assert kept is not None
    assert (kept.flatten().bincount(minlength=16) - 1000).abs().max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 1500  # of 1,820


def test_the_other_draws_are_not_those_of_the_tokens() -> None:
    noise = torch.cat(draw_noise(1, torch.arange(2000), (1,)), 1)
    kept = kept_tokens(1, torch.arange(2000), 16, 1)
    assert kept is not None
    together = torch.cat([noise, draw(1, torch.arange(2000)).uniform[:, None], kept], 1)
    off_diagonal = torch.corrcoef(together.T) - torch.eye(4)
    assert off_diagonal.abs().max() < 5 / math.sqrt(2000)


def test_a_batch_splits_with_its_tokens(tmp_path: Path) -> None:
    batch = (
        Latents(str(tmp_path)).stream(replace(WITH_BOTH, conditions=frozenset({"class"}), coupling_group=1)).batch(0)
    )
    part = batch.rows(torch.tensor([2, 0]))
    assert part.kept_tokens is not None and batch.kept_tokens is not None and part.condition.class_index is not None
    assert torch.equal(part.kept_tokens, batch.kept_tokens[[2, 0]])
    assert torch.equal(part.condition.class_index, batch.condition.class_index[[2, 0]])
