"""`lfm push`: publish a model on the Hugging Face Hub, with a model card made from its run.

weights.safetensors   EMA weights, complete, with the autoencoder's record and all that sampling needs in the header
config.json           the experiment
README.md             the model card, with samples.png and loss.png
report.json           of `lfm evaluate`
diffusers/            the same network as a pipeline of diffusers, where diffusers can express it
"""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lfm import autoencoder as autoencoders
from lfm import storage, weights_file
from lfm.conversion.to_diffusers import build_pipeline
from lfm.errors import ConfigError, LfmError, hide_credentials, on_one_line
from lfm.inference import trained_model
from lfm.weights_file import WEIGHTS, WeightsHeader
from pipelines.common import image_files
from pipelines.exchange.exchange_options import PushConfig
from pipelines.exchange.import_export import save_pipeline
from pipelines.exchange.model_card import CardContent, model_card

CARD, CONFIG, LOG, LOSS, SAMPLES, REPORT = (
    "README.md",
    "config.json",
    "log.jsonl",
    "loss.png",
    "samples.png",
    "report.json",
)
SOLVING: dict[str, Any] = {"solver": "heun", "num_steps": 12}
GUIDANCE_SCALE = 2.0  # of the samples, where the model has a null condition


def run(config: PushConfig) -> str:
    """Make the files of the repository and push them; return a description of the result.

    Raises:
        CheckpointError: there are no weights.
        ConfigError: `out` exists, or the autoencoder is not that of the latents.
        LfmError: the Hub refuses, or cannot be reached.
    """
    if config.out and storage.exists(config.out):
        raise ConfigError(f"{config.out}: exists already; choose another `out`")
    weights, header = weights_file.load_weights(config.run)
    licence = config.licence or header.licence
    plan = (
        f"weights of {config.run} at {header.samples_seen:,} samples seen, licence {licence or 'not stated'} -> "
        f"{config.out or f'https://huggingface.co/{config.repository}'}"
    )
    if config.dry_run:
        return hide_credentials(plan)
    with nullcontext(config.out) if config.out else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        problem = _write_files(folder, config, weights, header, licence)
        if not config.out:
            _upload(folder, config)
    notes = [] if problem is None else [f"without a pipeline of diffusers: {problem}"]
    if licence is None:
        notes.append("the card states no licence; set `licence`")
    return hide_credentials("\n".join([plan, *notes]))


def _write_files(
    folder: Path, config: PushConfig, weights: dict[str, Any], header: WeightsHeader, licence: str | None
) -> str | None:
    """Write the files of the repository, and return why there is no pipeline of diffusers; None if there is one."""
    weights_file.save_weights(str(folder / WEIGHTS), weights, header)
    if header.config:
        storage.write_json(str(folder / CONFIG), header.config)
    codec = autoencoders.load_recorded(header.autoencoder, config.autoencoder, "cpu", config.run)
    problem = None
    try:
        save_pipeline(build_pipeline(weights, header, codec), header, folder / "diffusers")
    except ConfigError as error:
        problem = str(error)
    files = []
    if config.num_samples and (sheet := _samples(config, header)):
        image_files.save(sheet, folder / SAMPLES)
        files.append(SAMPLES)
    run_folder = config.run.removesuffix(f"/{WEIGHTS}")
    if storage.exists(loss := storage.join(run_folder, LOSS)):
        (folder / LOSS).write_bytes(storage.read_bytes(loss))
        files.append(LOSS)
    report, text = None, ""
    if config.report:
        report = storage.read_json(storage.join(config.report, REPORT))
        text = storage.read_bytes(storage.join(config.report, "report.txt")).decode(errors="replace")
        storage.write_json(str(folder / REPORT), report)
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    log = _read_log(storage.join(run_folder, LOG))
    content = CardContent(config.repository, header, licence, num_parameters, log, report, text, files, problem)
    (folder / CARD).write_text(model_card(content), encoding="utf-8")
    return problem


def _samples(config: PushConfig, header: WeightsHeader) -> Image.Image | None:
    """Return a grid of generated images, or the run's newest preview of a model whose conditions are images."""
    model = header.model
    if model.condition_channels or model.num_labels:
        if not storage.is_local(config.run):
            return None
        previews = sorted(Path(config.run.removesuffix(f"/{WEIGHTS}")).glob("previews/*.png"))
        return Image.open(previews[-1]).convert("RGB") if previews else None
    trained = trained_model.load(config.run, autoencoder=config.autoencoder)
    options: dict[str, Any] = dict(SOLVING)
    if model.num_classes:
        options["class_index"] = [number % model.num_classes for number in range(config.num_samples)]
        options["guidance_scale"] = GUIDANCE_SCALE if model.has_null_condition else 1.0
    images: np.ndarray = trained.sample(range(config.num_samples), **options).images
    return image_files.grid(images, enlarge=max(1, 64 // images.shape[1]))


def _read_log(path: str) -> list[dict[str, Any]]:
    """Return the lines of a run's log; empty without one."""
    if not storage.exists(path):
        return []
    lines = []
    for line in storage.read_bytes(path).decode(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed, or trains
            break
    return [line for line in lines if isinstance(line, dict) and "samples_seen" in line]


def _upload(folder: Path, config: PushConfig) -> None:
    """Create the repository if it does not exist, and upload the folder as one commit.

    Raises:
        LfmError: the Hub refuses, or cannot be reached; names the repair.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi(library_name="lfm")
    try:
        api.create_repo(config.repository, private=config.private, exist_ok=True)
        api.upload_folder(
            repo_id=config.repository,
            folder_path=folder,
            revision=config.revision,
            commit_message="Publish weights and model card",
        )
    except errors.RevisionNotFoundError as error:
        raise LfmError(
            f"{config.repository}: has no branch {config.revision}; create it, or leave out `revision`"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        repair = (
            "sign in with `hf auth login`, with a token that may write" if status in (None, 401, 403) else "try again"
        )
        raise LfmError(f"{config.repository}: {on_one_line(error)}; {repair}") from error
    except Exception as error:  # the Hub's client raises the types of its HTTP library, too
        raise LfmError(f"{config.repository}: cannot be pushed ({on_one_line(error)})") from error
