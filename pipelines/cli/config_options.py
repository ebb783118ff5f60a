"""Options of `lfm config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pipelines.common.options import Argument, Flag, Pixels, stage_options


@stage_options
class ListConfig:
    """Options of `lfm config list`."""


@stage_options
class ShowConfig:
    """Options of `lfm config show`."""

    name: Annotated[str, Argument()]
    """Name of a shipped experiment, or a YAML file."""
    overrides: Annotated[tuple[str, ...], Flag("--set", metavar="KEY=VALUE")] = ()
    """Replace a value, as in train.num_steps=10; may be repeated."""


@stage_options
class NewConfig:
    """Options of `lfm config new`."""

    task: Literal["none", "class", "inpaint", "semantic", "class+inpaint", "class+semantic"] = "none"
    """Conditions of the model."""
    image_size: Pixels = 256
    """Height and width of the images in pixels."""
    size: Literal["small", "base", "large"] = "base"
    """Size of the network: of some thousand images, of tens or of hundreds of thousands."""


@stage_options
class SchemaConfig:
    """Options of `lfm config schema`."""
