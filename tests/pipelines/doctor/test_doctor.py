"""The check of an installation: each fault that it looks for is found, with its repair."""

from __future__ import annotations

import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from pipelines.doctor import doctor
from pipelines.doctor.doctor_options import DoctorConfig
from tests.support.commands import assert_one_line, lfm

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def room_on_every_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def problems(**options: object) -> dict[str, doctor.Check]:
    return {check.subject: check for check in doctor.run(DoctorConfig(**options)).problems}  # type: ignore[arg-type]


def test_the_environment_of_the_tests_is_sound(tmp_path: Path, free_port: int) -> None:
    result = lfm("doctor", "--folder", tmp_path, "--port", free_port)
    assert result.exit_code == 0, result.stdout
    for word in (torch.__version__, "deepspeed", "xformers", "GPU", f"port {free_port}", str(tmp_path)):
        assert word in result.stdout
    assert "repair" not in result.stdout


def test_a_port_in_use_is_found(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        result = lfm("doctor", "--folder", tmp_path, "--port", port)
    assert result.exit_code == 1
    assert f"! port {port}" in result.stdout and f"--master_port {port + 1}" in result.stdout


def test_a_missing_package_a_broken_one_and_a_full_disk_are_found(
    monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "a-package-that-does-not-exist"))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**9, 10**9))
    found = problems(port=free_port)
    assert set(found) == {"a-package-that-does-not-exist", "autoencoders", "disk of the folder", "disk of the cache"}
    assert "pip install" in str(found["a-package-that-does-not-exist"].repair)
    assert "diffusers" in found["autoencoders"].finding
    assert found["disk of the folder"].finding.startswith("1 GB free")


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a GPU that torch cannot use")
@pytest.mark.parametrize(("cuda", "repair"), [(None, "a torch for CUDA"), ("13.0", "NVIDIA driver")])
def test_a_gpu_that_torch_cannot_use_is_found(
    monkeypatch: pytest.MonkeyPatch, free_port: int, cuda: str | None, repair: str
) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert repair in str(problems(port=free_port)["GPU"].repair)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_described(tmp_path: Path, free_port: int) -> None:
    report = doctor.run(DoctorConfig(str(tmp_path), free_port)).report
    print(report)
    assert torch.cuda.get_device_name(0) in report and "xformers kernels" in report


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert_one_line(lfm("doctor", "--folder", tmp_path / "none"), "--folder", "none", "no such folder")
