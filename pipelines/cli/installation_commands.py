"""The commands that check the installation."""

from __future__ import annotations

import sys

from pipelines.cli.stage_command import echo, stage_command
from pipelines.doctor.doctor_options import DoctorConfig


@stage_command(DoctorConfig)
def doctor(config: DoctorConfig) -> None:
    """Check the installation, the GPUs, the port and the free disk space, and print the repair of what is missing.

    Exits with 1 if something needs a repair.
    """
    from pipelines.doctor.doctor import run

    diagnosis = run(config)
    echo(diagnosis.report)
    if diagnosis.problems:
        echo(f"{len(diagnosis.problems)} of these lines need a repair")
        sys.exit(1)
