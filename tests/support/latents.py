"""A data set of latent shards whose content is known, and the samples of batches read from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lfm import storage
from lfm.data.latent_shards import latent_layout, latent_members
from lfm.data.manifest import AutoencoderRecord, ClassRecord, Manifest, ShardRecord
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import single_source
from lfm.data.tar import sample_key, write_tar
from lfm.storage.cache import Cache
from lfm.types import LatentBatch, LatentSample
from lfm.world import World

SHAPE = (2, 3, 5)
SIZES = (5, 3, 0, 7, 4, 6)
TOTAL = sum(SIZES)
NUM_CLASSES = 4
SCALE, SHIFT = 0.5, 0.25
OPTIONS = StreamOptions(seed=3, window=2, global_batch=8)


class Latents:
    """A data set of 6 latent shards of random posteriors, which `posterior` and `classes` hold by shard and row."""

    def __init__(
        self, folder: str, *, classes: bool = True, flips: bool = True, std: float = 1.0, seed: int = 0
    ) -> None:
        random = np.random.default_rng(seed)
        self.folder = folder
        self.posterior: dict[tuple[int, int, bool], np.ndarray] = {}  # shard, row, flip
        self.classes: dict[tuple[int, int], int] = {}
        records = []
        for shard, size in enumerate(SIZES):
            samples = []
            for row in range(size):
                for flip in (False, True):
                    moments = random.standard_normal((2, *SHAPE)) * [[[[1.0]]], [[[std]]]]
                    moments[1] = abs(moments[1])
                    self.posterior[shard, row, flip] = moments.reshape(-1, *SHAPE[1:]).astype(np.float16)
                self.classes[shard, row] = int(random.integers(NUM_CLASSES))
                samples.append(
                    LatentSample(
                        sample_key(shard, row),
                        self.posterior[shard, row, False],
                        self.posterior[shard, row, True] if flips else None,
                        self.classes[shard, row] if classes else None,
                    )
                )
            name = f"{shard:06d}.tar"
            with storage.writing(storage.join(folder, name)) as temporary:
                write_tar(temporary, map(latent_members, samples))
                sums = storage.checksums(temporary)
            records.append(ShardRecord(name=name, samples=size, **vars(sums)))
        members, stride = latent_layout(samples[0])
        self.manifest = Manifest(
            kind="latents",
            image_size=10,
            classes=tuple(ClassRecord(index=i, name=str(i), count=1) for i in range(NUM_CLASSES)) if classes else (),
            recipe={},
            autoencoder=AutoencoderRecord(
                name="x", content_hash="x", downsample_factor=2, latent_channels=2, scale_factor=SCALE, shift=SHIFT
            ),
            members=members,
            stride=stride,
            shards=tuple(records),
        )

    def stream(
        self, options: StreamOptions = OPTIONS, world: World | None = None, cache: Path | None = None
    ) -> LatentStream:
        return LatentStream(
            single_source(self.folder, self.manifest), options, world or World(), Cache(cache or Path("/nowhere"))
        )


def samples_of(*batches: LatentBatch) -> dict[int, tuple[bytes, ...]]:
    """Return the bytes of every field of each sample by its number, and check that no number occurs twice."""
    found: dict[int, tuple[bytes, ...]] = {}
    for batch in batches:
        tensors = [batch.latents, batch.noise, batch.uniform]
        tensors += [] if batch.condition.class_index is None else [batch.condition.class_index]
        for row, number in enumerate(batch.sample_numbers.tolist()):
            assert number not in found
            found[number] = tuple(tensor[row].numpy().tobytes() for tensor in tensors)
    return found
