"""Options of `lfm ui`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.common.options import Argument, Count, Flag, Location, MovedAutoencoder, stage_options


@stage_options
class UiConfig:
    """Options of `lfm ui`."""

    runs: Annotated[tuple[Location, ...], Argument()]
    """Run folders, checkpoints or weights files, by path or URL; the page has a tab for each."""
    host: Annotated[Location, Flag(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on: by default this machine alone can open the page; 0.0.0.0 is every network, without a password."""
    port: Annotated[int, Field(ge=1, le=65535)] = 7860
    """Port to listen on."""
    batch_size: Count = 32
    """Images per forward pass, as in `lfm sample`; on a GPU a smaller number makes few images sooner."""
    autoencoder: MovedAutoencoder = None
