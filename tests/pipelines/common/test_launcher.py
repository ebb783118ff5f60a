"""A process's place among others, from the variables of its launcher."""

from __future__ import annotations

import pytest

from lfm.errors import ConfigError
from lfm.world import World
from pipelines.common import launcher

SRUN = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
TORCHRUN = {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in SRUN.keys() | TORCHRUN.keys():
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(2, 1, 4)),
        (SRUN, World(11, 3, 16)),
        (SRUN | TORCHRUN, World(2, 1, 4)),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}, World(1, 1, 2)),
    ],
)
def test_the_world_is_that_of_the_launcher(
    environment: pytest.MonkeyPatch, variables: dict[str, str], world: World
) -> None:
    set_all(environment, variables)
    assert launcher.world() == world
    assert launcher.is_launched() == (world.size > 1)


def test_a_batch_script_of_slurm_is_one_process(environment: pytest.MonkeyPatch) -> None:
    """`sbatch` sets the variables of 16 tasks, but only `srun` starts them."""
    set_all(environment, {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"})
    assert launcher.world() == World()
    assert not launcher.is_launched()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "1.5"},
        SRUN | {"SLURM_NTASKS": "11"},
    ],
)
def test_variables_that_contradict_each_other_are_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_all(environment, variables)
    with pytest.raises(ConfigError, match="unset"):
        launcher.world()
