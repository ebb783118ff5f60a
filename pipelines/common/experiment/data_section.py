"""The `data:` section of an experiment: its latents, how sources are mixed, and the stages of a mixture."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
PositiveInt = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Power = Annotated[float, Field(ge=0, le=1)]


class ConfigSection(BaseModel):
    """A section of the YAML file: frozen, without unknown keys, and with its docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class SourceConfig(ConfigSection):
    """One data set of a mixture."""

    shards: Name
    """Folder or URL of the latent shards."""
    name: str = ""
    """Name in the plan, in stages and in messages; by default the last part of `shards`."""
    weight: PositiveFloat | None = None
    """Share of the samples, relative to the other sources; if one has a weight, all must."""
    repeat: PositiveFloat | None = None
    """How often the source is read while a source of `repeat` 1 is read once; by default 1."""
    num_samples: Count | None = None
    """Samples to read while a source of `repeat` 1 is read once."""
    where: Name | None = None
    """Condition on the columns of samples, such as score > 0.5; samples that it does not hold for are not read."""
    balance: Power = 0.0
    """How far classes are balanced within the source, from 0, as they are, to 1, all alike; shares are count^(1 - balance)."""
    classes: dict[str, str] = {}
    """The mixture's names of this source's classes; classes of one name are one class, others keep their name."""
    flips: bool = True
    """Whether mirrored latents are used, where the shards have them."""
    skip_shards: tuple[str, ...] = ()
    """Names of damaged shards to leave out."""

    @model_validator(mode="after")
    def _set_name(self) -> SourceConfig:
        if not self.name:
            object.__setattr__(self, "name", self.shards.rstrip("/").rpartition("/")[2])
        return self


class StageConfig(ConfigSection):
    """A later stage of a mixture."""

    samples_seen: Count
    """Samples seen at which the stage begins."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """New weights of sources by name; 0 leaves a source out, and others keep the weight that they have."""


class DataConfig(ConfigSection):
    """The training data, and how it is shuffled."""

    shards: Name | None = None
    """Folder or URL of the latent shards."""
    where: Name | None = None
    """Condition on the columns of the samples in `shards`; samples that it does not hold for are not read."""
    balance: Power = 0.0
    """How far classes in `shards` are balanced, from 0, as they are, to 1, all alike; shares are count^(1 - balance)."""
    sources: tuple[SourceConfig, ...] = ()
    """Several data sets that are mixed, instead of `shards`."""
    stages: tuple[StageConfig, ...] = ()
    """Weights of the sources that change during training."""
    warn_passes: PositiveFloat = 100.0
    """Warn of a source of a mixture, or a balanced class, that is read more often than this."""
    window: Count = 8
    """Number of shards that are shuffled together."""
    cache: str | None = None
    """Folder for copies of remote shards; by default ~/.cache/lfm."""
    cache_gigabytes: PositiveFloat | None = None
    """Largest size of the cache in 10^9 bytes; by default unlimited."""
    skip_shards: tuple[str, ...] = ()
    """Names of damaged shards to leave out."""
    held_back: int = Field(default=0, ge=0)
    """Number of shards at the end of each source that are used for the validation loss and not for training."""
    allow_leaks: bool = False
    """Train although the latents of a held-back shard are also those of a shard that is trained on, in another source."""

    new_samples: Literal["next_pass", "at_once", "left_out"] = "next_pass"
    """How a run that resumes reads samples that its latents have gained: in every pass from the next one on, at once, mixed
    with the rest of the pass that has begun, or not at all."""

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of all latent shards."""
        return (self.shards,) if self.shards is not None else tuple(source.shards for source in self.sources)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        """Refuse keys that contradict each other; the message follows `data: `."""
        if (self.shards is None) == (not self.sources):
            raise ValueError("set either shards, the latents of one folder, or sources, a list of several")
        if self.sources and self.skip_shards:
            raise ValueError("skip_shards: name them in the source that holds them")
        if self.sources and self.where is not None:
            raise ValueError("where: write it into the source whose samples it chooses")
        if self.sources and self.balance:
            raise ValueError("balance: write it into the source whose classes it balances")
        if self.stages and not (self.sources and all(source.weight for source in self.sources)):
            raise ValueError("stages: give every source a weight, which they change")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are called {name}; give each a name of its own")
        for source in self.sources:
            of_kind = [key for key in ("weight", "repeat", "num_samples") if getattr(source, key) is not None]
            if len(of_kind) > 1:
                raise ValueError(f"sources: {source.name} has {' and '.join(of_kind)}; set one of them")
            if (source.weight is None) != (self.sources[0].weight is None):
                raise ValueError(f"sources: {names[0]} or {source.name} has no weight; give every source one, or none")
        starts = [0, *(stage.samples_seen for stage in self.stages)]
        if any(second <= first for first, second in itertools.pairwise(starts)):
            raise ValueError("stages: each must begin at more samples_seen than the one before it")
        weights = {source.name: source.weight for source in self.sources}
        for stage in self.stages:
            for name in stage.weights:
                if name not in weights:
                    raise ValueError(f"stages: no source is called {name}; one of {', '.join(names)}")
            weights |= stage.weights
            if not any(weights.values()):
                raise ValueError(f"stages: at samples_seen {stage.samples_seen} every weight is 0; raise one")
        return self
