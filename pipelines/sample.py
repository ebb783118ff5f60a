"""`lfm sample`: noise -> latents by an ODE solver over the EMA weights -> pictures.

A picture depends on its seed, its class and the solver alone. The record beside the pictures says all that made them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lfm import checkpoint, storage
from lfm.autoencoder import Autoencoder
from lfm.checkpoint import WeightsHeader
from lfm.conditioning import check_class_index, class_condition, null_condition
from lfm.data.draws import picture_noise
from lfm.errors import CheckpointError, ConfigError
from lfm.guidance import CountedVelocity, Guided, NetworkVelocity
from lfm.models.dit import DiT
from lfm.solvers import Solving
from lfm.types import Condition, ImageBatch, SolverResult
from lfm.world import World
from pipelines import factory, pictures
from pipelines.progress import Progress

GRID = "grid.png"
RECORD = "samples.json"
MOST_PICTURES = 1_000_000
WIDEST_GRID = 20


@dataclass(frozen=True)
class SampleConfig:
    """What `lfm sample` is told."""

    run: str
    out: str
    seeds: str = "0-15"
    class_index: str | None = None  # such as 3 or 0-9 or 1,4; seeds take turns; by default all classes take turns
    guidance_scale: float = 1.0
    solver: str = "heun"
    num_steps: int | None = None
    atol: float | None = None
    rtol: float | None = None
    batch_size: int = 32
    autoencoder: str | None = None  # where the one of the weights is now, if it has moved
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class SampleResult:
    """Where the pictures are, and what they cost; the grid is None after a dry run."""

    plan: str
    grid: str | None
    classes: tuple[int, ...]
    mean_nfe: float


def run(config: SampleConfig, world: World) -> SampleResult:
    """Make a picture per seed, and a grid of them.

    Raises:
        ConfigError, CheckpointError: before anything is computed.
    """
    weights, header = checkpoint.load_weights(config.run)
    seeds = numbers("--seeds", config.seeds)
    solving = Solving(config.solver, config.num_steps, atol=config.atol, rtol=config.rtol)
    classes = _classes(config, header, len(seeds))
    if config.guidance_scale != 1:
        null_condition(
            _condition(classes[:1], header), header.model.class_dropout, num_classes=header.model.num_classes
        )
    autoencoder = factory.matching_autoencoder(header.autoencoder, config.autoencoder, world, config.run)
    plan = (
        f"{len(seeds)} pictures of {header.image_size} x {header.image_size} pixels from {config.run} "
        f"({header.samples_seen:,} samples seen), {solving}, "
        f"guidance {config.guidance_scale:g} -> {config.out}"
    )
    if config.dry_run:
        return SampleResult(plan, None, classes, 0.0)
    settings = _settings(config, header)
    model = DiT(header.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{config.run}: its weights do not fit its header; take another checkpoint") from error
    _claim(config, settings, seeds)
    sampler = Sampler(model.to(factory.device(world)).eval(), header, autoencoder, config, solving)
    finished, nfe = [], []
    with Progress("sample", len(seeds), "pictures") as bar:
        for start in range(0, len(seeds), config.batch_size):
            part = slice(start, start + config.batch_size)
            images, result = sampler.sample(seeds[part], classes[part])
            for seed, image in zip(seeds[part], images.images.permute(0, 2, 3, 1).numpy(), strict=True):
                pictures.save(image, storage.join(config.out, _file(seed)))
                finished.append(image)
            nfe += result.nfe.tolist()
            bar.advance(len(seeds[part]), nfe=f"{np.mean(nfe):.0f}")
    grid = storage.join(config.out, GRID)
    columns = len(set(classes)) if 1 < len(set(classes)) <= WIDEST_GRID else None  # a column for each class
    pictures.save(pictures.grid(np.stack(finished), columns=columns, enlarge=max(1, 128 // header.image_size)), grid)
    storage.write_json(storage.join(config.out, RECORD), _record(settings, header, seeds, classes, nfe))
    return SampleResult(plan, grid, classes, float(np.mean(nfe)))


class Sampler:
    """Pictures of seeds and classes by one model, solver and guidance."""

    def __init__(
        self, model: DiT, header: WeightsHeader, autoencoder: Autoencoder, config: SampleConfig, solving: Solving
    ) -> None:
        self.model, self.header, self.autoencoder, self.config = model, header, autoencoder, config
        self.solving = solving

    def sample(self, seeds: list[int], classes: tuple[int, ...]) -> tuple[ImageBatch, SolverResult]:
        """The pictures of these seeds, on the CPU; `classes` as long as `seeds`, or empty for a model without."""
        result = self.solve(seeds, classes)
        images = self.autoencoder.decode(result.latents).cpu()
        return ImageBatch(images, torch.tensor(seeds)), result

    def solve(self, seeds: list[int], classes: tuple[int, ...]) -> SolverResult:
        """The latents of these seeds."""
        shape = (self.header.model.latent_channels, *[self.header.model.latent_size] * 2)
        device = self.model.position.device
        noise = torch.from_numpy(picture_noise(seeds, shape)).to(device)
        velocity = self._velocity(_condition(classes, self.header).to(device), len(seeds))
        return SolverResult(self.solving(velocity, noise), velocity.nfe.cpu())

    def _velocity(self, condition: Condition, count: int) -> CountedVelocity:
        conditional = NetworkVelocity(self.model, condition, count)
        if self.config.guidance_scale == 1:
            return conditional
        null = null_condition(condition, self.header.model.class_dropout, num_classes=self.header.model.num_classes)
        return Guided(conditional, NetworkVelocity(self.model, null, count), self.config.guidance_scale)


def numbers(flag: str, text: str) -> list[int]:
    """The numbers of a list such as 0-15 or 3,5,8-9.

    Raises:
        ConfigError: it is no such list, or names a number twice.
    """
    result: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"{flag} {text}: must be numbers and ranges, as in 0-15 or 3,5,8-9, below {10**18:.0e}")
        named = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(result) + len(named) > MOST_PICTURES:
            raise ConfigError(f"{flag} {text}: more than {MOST_PICTURES:,} at once; give them in parts")
        result += named
    if len(set(result)) != len(result):
        raise ConfigError(f"{flag} {text}: names a number twice")
    return result


def _classes(config: SampleConfig, header: WeightsHeader, count: int) -> tuple[int, ...]:
    """The class of each picture; empty for a model without classes."""
    if config.class_index is None:
        return tuple(index % len(header.classes) for index in range(count)) if header.model.num_classes else ()
    wanted = numbers("--class-index", config.class_index)
    if header.model.num_classes is None:
        raise ConfigError(f"--class-index {config.class_index}: the model was trained without classes; leave it out")
    check_class_index(torch.tensor(wanted), header.model.num_classes)
    return tuple(wanted[index % len(wanted)] for index in range(count))


def _condition(classes: tuple[int, ...], header: WeightsHeader) -> Condition:
    return class_condition(classes, header.model.num_classes) if classes else Condition()


def _settings(config: SampleConfig, header: WeightsHeader) -> dict:
    """All that decides the pictures: what `out` may hold and be written again."""
    free = ("out", "autoencoder", "batch_size", "overwrite", "dry_run")
    settings = {key: value for key, value in asdict(config).items() if key not in free}
    return settings | {"samples_seen": header.samples_seen, "data": header.manifest_digest}


def _claim(config: SampleConfig, settings: dict, seeds: list[int]) -> None:
    """Begin or repeat the samples of these settings in `out`; nothing else that is there is touched."""
    names, path = storage.sizes(config.out), storage.join(config.out, RECORD)
    if RECORD in names:
        before = storage.read_json(path)
        if not isinstance(before, dict) or not isinstance(before.get("settings"), dict) or "files" not in before:
            raise ConfigError(f"{path}: is no record of lfm; choose another --out")
        changed = ", ".join(sorted(key for key in settings if settings[key] != before["settings"].get(key)))
        if changed and not config.overwrite:
            raise ConfigError(f"{config.out}: holds samples of another {changed}; choose another --out, or --overwrite")
        for name in before["files"] if changed else ():
            storage.remove(storage.join(config.out, str(name).rsplit("/", 1)[-1]))
    elif names:
        raise ConfigError(f"{config.out}: holds something else than samples of lfm; choose another --out")
    storage.write_json(path, {"settings": settings, "files": [*map(_file, seeds), GRID]})


def _record(
    settings: dict, header: WeightsHeader, seeds: list[int], classes: tuple[int, ...], nfe: list[int]
) -> dict[str, Any]:
    labels = [header.classes[index] for index in classes] if classes else [None] * len(seeds)
    return {
        "settings": settings,
        "files": [*map(_file, seeds), GRID],
        "nfe": {"mean": float(np.mean(nfe)), "min": min(nfe), "max": max(nfe)},
        "autoencoder": header.autoencoder.model_dump(),
        "trained_by": header.code_version,
        "sampled_by": factory.code_version(),
        "pictures": [
            {
                "file": _file(seed),
                "seed": seed,
                "class_index": label and label.index,
                "class_name": label and label.name,
                "nfe": evaluations,
            }
            for seed, label, evaluations in zip(seeds, labels, nfe, strict=True)
        ],
    }


def _file(seed: int) -> str:
    return f"{seed:06d}.png"
