"""Options of the command that checks an installation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.common.options import stage_options


@stage_options
class DoctorConfig:
    """Options of `lfm doctor`."""

    folder: str = "."
    """Folder that data and runs will be written to; the free space of its disk is checked."""
    port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """Port on which rank 0 of a training will listen."""
