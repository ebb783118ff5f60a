"""Options of `lfm status`."""

from __future__ import annotations

from typing import Annotated

from pipelines.common.options import Argument, Flag, Location, stage_options


@stage_options
class StatusConfig:
    """Options of `lfm status`."""

    run: Annotated[Location, Argument()]
    """Run folder or its URL, of a run that trains, was stopped, or is finished."""
    as_json: Annotated[bool, Flag("--json")] = False
    """Print JSON for other programs."""
