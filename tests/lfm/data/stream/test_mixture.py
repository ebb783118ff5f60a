"""A stream of several data sets: every sample comes from its source, with the mixture's class; sources must fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm.data.manifest import ClassRecord, Manifest, Member
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import LatentSource, Mixture, mix, single_source
from lfm.data.stream.mixture_order import Stage
from lfm.errors import ConfigError, DataError
from lfm.storage.cache import Cache
from lfm.types import LatentBatch
from lfm.world import World
from tests.support.latents import NUM_CLASSES, SCALE, SHIFT, TOTAL, Latents, samples_of

OPTIONS = StreamOptions(seed=3, window=2, global_batch=8, conditions=frozenset({"class"}))
NAMES = "dog", "cat", "fox", "owl"
SHARES = Fraction(5, 10), Fraction(2, 10), Fraction(3, 10)


def with_names(manifest: Manifest, *names: str) -> Manifest:
    classes = tuple(ClassRecord(index=index, name=name, count=1) for index, name in enumerate(names))
    return manifest.model_copy(update={"classes": classes})


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> list[Latents]:
    """Three data sets without noise: the second has no mirrored latents, the third has no classes."""
    root = tmp_path_factory.mktemp("latents")
    return [
        Latents(str(root / "one"), std=0.0, seed=1),
        Latents(str(root / "two"), std=0.0, seed=2, flips=False),
        Latents(str(root / "three"), std=0.0, seed=3, classes=False),
    ]


@pytest.fixture
def sources(latents: list[Latents]) -> list[LatentSource]:
    one, two, three = latents
    return [
        LatentSource(one.folder, with_names(one.manifest, *NAMES), "one"),
        LatentSource(two.folder, with_names(two.manifest, "cat", "ant", "dog", "bee"), "two"),
        LatentSource(three.folder, three.manifest, "three"),
    ]


def stream_of(mixture: Mixture, world: World | None = None, options: StreamOptions = OPTIONS) -> LatentStream:
    return LatentStream(mixture, options, world or World(), Cache(Path("/nowhere")))


def origins(latents: list[Latents], batch: LatentBatch) -> list[tuple[int, int, int, bool]]:
    """The source, shard, row and flip of each sample, by its latent."""
    known = {
        ((torch.from_numpy(posterior[:2]).float() - SHIFT) * SCALE).numpy().tobytes(): (source, *place)
        for source, each in enumerate(latents)
        for place, posterior in each.posterior.items()
    }
    return [known[latent.numpy().tobytes()] for latent in batch.latents]


def test_every_sample_is_of_its_source_and_has_the_merged_class(
    latents: list[Latents], sources: list[LatentSource]
) -> None:
    mixture = replace(mix(sources, {"class"}), stages=(Stage(0, SHARES),))
    assert [entry.name for entry in mixture.manifest.classes] == ["dog", "cat", "fox", "owl", "ant", "bee"]
    assert [entry.count for entry in mixture.manifest.classes] == [2, 2, 1, 1, 1, 1]
    stream, read = stream_of(mixture), Counter[tuple[int, int, int]]()
    for start in range(0, 10 * TOTAL // 8 * 8, 8):
        batch = stream.batch(start)
        assert batch.condition.class_index is not None
        for (source, shard, row, flip), merged in zip(
            origins(latents, batch), batch.condition.class_index.tolist(), strict=True
        ):
            read[source, shard, row] += 1
            own = latents[source].classes[shard, row]
            assert merged == (own, (1, 4, 0, 5)[own], 6)[source], "of the source without classes: the null class"
            assert source != 1 or not flip
    totals = [sum(count for place, count in read.items() if place[0] == source) for source in range(3)]
    for total, share in zip(totals, SHARES, strict=True):
        assert abs(total - 10 * TOTAL // 8 * 8 * share) < 1
    for source, total in enumerate(totals):
        counts = [count for place, count in read.items() if place[0] == source]
        assert len(counts) == TOTAL and set(counts) <= {total // TOTAL, -(-total // TOTAL)}


def test_samples_do_not_depend_on_the_world_or_on_resuming(sources: list[LatentSource]) -> None:
    mixture = replace(mix(sources, {"class"}), stages=(Stage(0, SHARES), Stage(21, SHARES[::-1])))
    whole = samples_of(*(stream_of(mixture).batch(start) for start in range(0, 48, 8)))
    for size in (2, 4):
        parts = [stream_of(mixture, World(rank, rank, size)) for rank in range(size)]
        assert samples_of(*(part.batch(start) for start in range(0, 48, 8) for part in parts)) == whole
    larger = stream_of(mixture, options=replace(OPTIONS, global_batch=16))
    assert samples_of(*(larger.batch(start) for start in range(0, 48, 16))) == whole


def test_mirrored_latents_can_be_left_out_of_one_source(latents: list[Latents], sources: list[LatentSource]) -> None:
    flips = []
    for source in (sources[0], replace(sources[0], flips=False)):
        stream = stream_of(mix([source, sources[1]], {"class"}))
        places = [place for start in range(0, 80, 8) for place in origins(latents, stream.batch(start))]
        flips.append(sum(place[3] for place in places))
    assert flips[0] > 5 and flips[1] == 0


def test_one_source_is_the_data_set_alone(latents: list[Latents], sources: list[LatentSource]) -> None:
    one, alone = mix(sources[:1], {"class"}), single_source(sources[0].folder, sources[0].manifest)
    assert one.digest == alone.digest == sources[0].manifest.digest
    for start in (0, 8, 8000):
        assert samples_of(stream_of(one).batch(start)) == samples_of(stream_of(alone).batch(start))


def test_classes_are_merged_by_a_map(sources: list[LatentSource]) -> None:
    mixture = mix(sources[:2], {"class"}, [{}, {"ant": "fox", "bee": "fox"}])
    assert [(entry.name, entry.count) for entry in mixture.manifest.classes] == [
        ("dog", 2),
        ("cat", 2),
        ("fox", 3),
        ("owl", 1),
    ]
    assert mixture.sources[0].class_map is None and mixture.sources[1].class_map == (1, 2, 0, 2)
    assert mixture.digest != mix(sources[:2], {"class"}).digest


def test_held_back_shards_are_the_last_of_each_source(sources: list[LatentSource]) -> None:
    sources[0] = replace(sources[0], skip_shards=("000005.tar", "000001.tar"))
    training, held_back = mix(sources, {"class"}).split(2)
    assert [len(source.manifest.shards) for source in training.sources] == [4, 4, 4]
    assert [source.manifest.shards[-1].name for source in held_back.sources] == ["000005.tar"] * 3
    assert training.sources[0].skip_shards == ("000001.tar",) and held_back.sources[0].skip_shards == ("000005.tar",)
    assert training.manifest.num_samples + held_back.manifest.num_samples == 3 * TOTAL
    with pytest.raises(DataError, match=f"^data.held_back 6: there are 6 shards in {sources[0].folder}"):
        mix(sources, {"class"}).split(6)


def autoencoder(**change: Any) -> Callable[[Manifest], dict[str, Any]]:
    return lambda manifest: {"autoencoder": manifest.autoencoder.model_copy(update=change)}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (autoencoder(content_hash="other"), "autoencoder is x and other"),
        (autoencoder(scale_factor=2.0), "scale factor is 0.5 and 2.0"),
        (autoencoder(shift=1.0), "shift is 0.25 and 1.0"),
        (lambda manifest: {"image_size": 20}, "image size is 10 and 20"),
        (lambda manifest: {"labels": {0: "sea"}}, "label 0 of their segmentations is sky and sea"),
        (
            lambda manifest: {"members": (Member(suffix="latent.npy", dtype="<f2", shape=(4, 3, 4), offset=512),)},
            r"latent.npy is \[4, 3, 5\] <f2 and \[4, 3, 4\] <f2",
        ),
    ],
)
def test_sources_that_do_not_fit_are_both_named(
    sources: list[LatentSource], change: Callable[[Manifest], dict[str, Any]], words: str
) -> None:
    one, two, _ = sources
    one = replace(one, manifest=one.manifest.model_copy(update={"labels": {0: "sky"}}))
    two = replace(two, manifest=two.manifest.model_copy(update=change(two.manifest)))
    with pytest.raises(DataError, match=f"^{one.folder} and {two.folder}: cannot be mixed, .*{words}; "):
        mix([one, two], {"class"})


def test_a_condition_that_one_source_lacks_names_both(sources: list[LatentSource]) -> None:
    one, two, _ = sources
    masks = tuple(Member(suffix=suffix, dtype="u1", shape=(), offset=512) for suffix in ("mask.npy", "masked.npy"))
    one = replace(one, manifest=one.manifest.model_copy(update={"members": (*one.manifest.members, *masks)}))
    with pytest.raises(
        DataError, match=f"^{two.folder}: its samples have no mask.npy, masked.npy, those of {one.folder} do"
    ):
        mix([one, two], {"inpaint"})


def test_classes_that_clash_or_are_unknown_are_one_line(sources: list[LatentSource]) -> None:
    one, two, _ = sources
    spelled = replace(two, manifest=with_names(two.manifest, "Cat", "ant", "dog", "bee"))
    with pytest.raises(
        DataError, match=r"^data\.sources one and two: their classes cat and Cat differ in spelling only"
    ):
        mix([one, spelled], {"class"})
    assert len(mix([one, spelled], {"class"}, [{}, {"Cat": "cat"}]).manifest.classes) == NUM_CLASSES + 2
    with pytest.raises(ConfigError, match=r"^data\.sources two: classes: .* has no class aunt; did you mean ant\?"):
        mix([one, two], {"class"}, [{}, {"aunt": "cat"}])


def test_an_empty_source_is_refused(sources: list[LatentSource]) -> None:
    empty = replace(sources[1], manifest=sources[1].manifest.model_copy(update={"shards": ()}))
    with pytest.raises(DataError, match=f"^{empty.folder}: holds no latents to train on$"):
        mix([sources[0], empty], {"class"})
