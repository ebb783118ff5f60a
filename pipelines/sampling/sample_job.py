"""What `lfm sample` is to make, and by what: the job that every rank does a part of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.errors import ConfigError
from lfm.inference import trained_model
from lfm.inference.trained_model import Guidance
from lfm.solvers import SOLVERS, Solving
from lfm.world import World
from pipelines.common import factory, image_files
from pipelines.common.number_lists import parse_indices, parse_numbers
from pipelines.sampling import read_conditions
from pipelines.sampling.sample_options import SampleConfig

NUM_IMAGES = 16
OWNED = r"(recipe|samples|timing)\.json|(grid|trajectory)\.(png|gif)"  # and the images, by the recipe's seeds


FREE = (
    "out",
    "batch_size",
    "trajectory",
    "time",
    "autoencoder",
    "cache",
    "overwrite",
    "dry_run",
    "num_gpus",
)  # they change no image
# What is shared out among the images, each of which has its own.
SHARED_OUT = ("seeds", "class_index", "image", "mask", "segmentation", "crop", "shards", "rows", "guidance_scale")


@dataclass
class PlannedImage:
    """One of the images to make."""

    number: int  # of its seed, counted from 0: its turn of what is told
    seed: int
    scale: float
    file: str
    nfe: int | None = None  # once it is made


class SampleJob:
    """What is to be made, and by what.

    Raises:
        ConfigError, CheckpointError, DataError: a flag, run or file that does not fit.
    """

    def __init__(self, config: SampleConfig, world: World) -> None:
        if config.seeds is None:
            num = len(parse_indices("--rows", config.rows)) if config.rows else NUM_IMAGES
            config = replace(config, seeds=f"0-{num - 1}")
        self.config, device = config, factory.device(world)
        self.solving = Solving(
            *(
                config.solver,
                config.num_steps,
                config.time_shift,
                None if config.times is None else parse_numbers("--times", config.times),
            ),
            *(config.atol, config.rtol),
        )
        seeds = parse_indices("--seeds", str(config.seeds))
        scales = parse_numbers("--guidance-scale", config.guidance_scale)
        if len({f"{scale:g}" for scale in scales}) != len(scales):
            raise ConfigError(f"--guidance-scale {config.guidance_scale}: names a scale twice")
        if config.trajectory not in (None, "png", "gif"):
            raise ConfigError(f"--trajectory {config.trajectory}: unknown; one of png, gif")
        if config.trajectory and not SOLVERS[config.solver].watchable:
            raise ConfigError(f"--trajectory: {config.solver} does not show its steps; choose another --solver")
        self.model = trained_model.load(config.run, autoencoder=config.autoencoder, device=device)
        weak = None
        if config.autoguidance:
            weak = trained_model.load(config.autoguidance, autoencoder=config.autoencoder, device=device)
        self.guidance = {scale: Guidance(scale, self._interval(scales), weak) for scale in scales}
        if weak and scales == (1,):
            raise ConfigError(
                f"--autoguidance {config.autoguidance}: does nothing at --guidance-scale 1; choose another"
            )
        self.conditions, self.names = read_conditions.read_conditions(config, self.model, len(seeds))
        if not config.composite and self.conditions.spatial is None:
            raise ConfigError("--no-composite: there are no known pixels; leave it out")
        for guidance in self.guidance.values():  # refused now, not after the first batch
            self.model.velocity(self.conditions.condition([0]).to(device), 1, guidance)
        self.images = [
            PlannedImage(number, seed, scale, _file(seed, scale, scales))
            for (number, seed), scale in product(enumerate(seeds), scales)
        ]
        header, size = self.model.header, self.model.header.image_size
        self.weights = {"samples_seen": header.samples_seen, "data": header.manifest_digest}
        if weak:
            self.weights["autoguidance_samples_seen"] = weak.header.samples_seen
        self.plan = (
            f"{len(self.images)} images of {size} x {size} pixels from {config.run} ({header.samples_seen:,} samples "
            f"seen), {self.solving}, guidance {config.guidance_scale} -> {config.out}"
        )

    def _interval(self, scales: tuple[float, ...]) -> tuple[float, float]:
        text = self.config.guidance_interval
        low, *high = (0.0, 1.0) if text is None else parse_numbers("--guidance-interval", text)
        if len(high) != 1 or not 0 <= low < high[0] <= 1:
            raise ConfigError(f"--guidance-interval {text}: must be two times between 0 and 1, as in 0.2,0.8")
        if text and scales == (1,):
            raise ConfigError(f"--guidance-interval {text}: does nothing at --guidance-scale 1; choose another scale")
        return low, high[0]

    def claim(self, world: World) -> None:
        """Begin or continue in the folder, and see which images are there already."""
        out, recipe = self.config.out, self.recipe
        path = storage.join(out, manifests.RECIPE)
        if world.is_main:
            before = storage.read_json(path) if storage.exists(path) else {"kind": "samples"}
            if not isinstance(before, dict) or before.get("kind") != "samples":
                raise ConfigError(f"{out}: holds something else than samples of lfm; choose another --out")
            overwrite = self.config.overwrite and before != recipe
            for name in storage.sizes(out).keys() & _files(before) if overwrite else ():
                storage.remove(storage.join(out, name))
            manifests.claim(out, recipe, overwrite=overwrite, owned=OWNED)
        else:
            factory.wait_for(path, recipe)
        self.look()

    def look(self) -> None:
        """See which images are there, made of what they should be made of."""
        there = storage.sizes(self.config.out)
        for image in self.images:
            if image.nfe is None and image.file in there:
                note = image_files.note(storage.join(self.config.out, image.file))
                if isinstance(note, dict) and note.get("digest") == self._digest(image):
                    image.nfe = int(note["nfe"])

    @property
    def recipe(self) -> dict[str, Any]:
        """What the folder is for: as JSON, so without tuples."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in FREE}
        return json.loads(json.dumps({"kind": "samples", **settings, **self.weights}))

    def _digest(self, image: PlannedImage) -> str:
        """Of all that decides this image, and of nothing else."""
        settings = {key: value for key, value in self.recipe.items() if key not in SHARED_OUT}
        own = self.conditions.of(image.number)
        condition = [None if value is None else np.asarray(value).tobytes().hex() for value in own]
        return manifests.digest([settings, image.seed, image.scale, condition])

    def batches(self, todo: list[PlannedImage]) -> Iterator[list[PlannedImage]]:
        """Images that can be made together: of one guidance scale."""
        for scale in self.guidance:
            alike = [image for image in todo if image.scale == scale]
            for first in range(0, len(alike), self.config.batch_size):
                yield alike[first : first + self.config.batch_size]

    def make(self, batch: list[PlannedImage]) -> float:
        """Make and publish these images; returns their mean cost."""
        numbers = [planned.number for planned in batch]
        result = self.model.solve(
            *([planned.seed for planned in batch], self.conditions.condition(numbers)),
            *(self.solving, self.guidance[batch[0].scale]),
        )
        images = self.model.decode(result.latents)
        if self.composites:
            images = self.conditions.composite(numbers, images)
        for planned, image, nfe in zip(batch, images, result.nfe.tolist(), strict=True):
            note = {"digest": self._digest(planned), "seed": planned.seed, "nfe": nfe}
            image_files.save(image, storage.join(self.config.out, planned.file), note=note)
            planned.nfe = nfe
        return float(result.nfe.double().mean())

    @property
    def composites(self) -> bool:
        """Whether known pixels are put back."""
        return self.conditions.masks is not None and self.config.composite


def _files(recipe: dict[str, Any]) -> set[str]:
    """The names of the images that a recipe of samples makes."""
    if "seeds" not in recipe:
        return set()
    scales = parse_numbers("--guidance-scale", recipe["guidance_scale"])
    return {_file(seed, scale, scales) for seed in parse_indices("--seeds", recipe["seeds"]) for scale in scales}


def _file(seed: int, scale: float, scales: tuple[float, ...]) -> str:
    return f"{seed:06d}{f'-{scale:g}' if len(scales) > 1 else ''}.png"
