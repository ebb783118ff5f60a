"""The model card of a run: what the model is, on what and how it was trained, how good it is, and how to use and repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lfm.errors import hide_credentials
from lfm.models import registry
from lfm.weights_file import WeightsHeader
from pipelines.common.sample_jobs.sample_command import sample_command

MOST_CLASSES = 40  # that are listed
MEASURED = ("validation_loss", "recognised", "fd-", "kid-", "fid")  # names, or their beginnings, in the log
TASKS = {"inpaint": "inpainting", "semantic": "semantic synthesis", "class": "class-conditional"}


@dataclass(frozen=True)
class CardContent:
    """What a model card is made from.

    Attributes:
        repository: USER/NAME on the Hub.
        header: of the weights.
        licence: identifier of the Hub, or None.
        num_parameters: of the network.
        log: lines of the run's log; empty without one.
        report: content of report.json of `lfm evaluate`, or None.
        report_text: its table.
        files: names of the images in the repository: samples.png, loss.png.
        pipeline_problem: why there is no folder for diffusers; None if there is one.
    """

    repository: str
    header: WeightsHeader
    licence: str | None
    num_parameters: int
    log: Sequence[dict[str, Any]]
    report: dict[str, Any] | None
    report_text: str
    files: Sequence[str]
    pipeline_problem: str | None


def model_card(content: CardContent) -> str:
    """Return the card as Markdown with a head of metadata in YAML, without credentials."""
    from huggingface_hub import ModelCardData

    header = content.header
    conditions = _conditions(header)
    tasks = [TASKS[name] for name in conditions if name in TASKS] or ["unconditional"]
    metadata = ModelCardData(
        license=content.licence,
        library_name="lfm",
        pipeline_tag="image-to-image" if {"inpaint", "semantic"} & {*conditions} else "unconditional-image-generation",
        tags=["flow-matching", "latent-flow-matching", registry.backbone_name(header.model), *tasks],
        base_model=_hub_name(header),
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {content.repository.rpartition('/')[2]}\n",
        f"A {' and '.join(tasks)} model of images of {header.image_size} x {header.image_size} pixels, trained by flow "
        "matching in latent space with lfm (Dao, Phung, Nguyen, Tran 2023).\n",
        *(["![samples](samples.png)\n"] if "samples.png" in content.files else []),
        _use(content, conditions),
        _model(content),
        _data(header),
        _training(content),
        _evaluation(content),
        _origin(content),
    ]
    return hide_credentials("\n".join(section for section in sections if section))


def _conditions(header: WeightsHeader) -> list[str]:
    """Return class, inpaint, semantic, as far as the model takes them, by its network where it was imported."""
    if "condition" in header.config:
        return str(header.config["condition"]).split("+")
    model = header.model
    present = {
        "class": bool(model.num_classes),
        "inpaint": bool(model.condition_channels),
        "semantic": bool(model.num_labels),
    }
    return [name for name, is_present in present.items() if is_present]


def _hub_name(header: WeightsHeader) -> str | None:
    """Return the repository of the weights that the run started from, if they were on the Hub."""
    source = header.initialized_from
    if source is None or not source.name.startswith("hf://"):
        return None
    return "/".join(source.name.removeprefix("hf://").split("@")[0].split("/")[:2])


def _use(content: CardContent, conditions: Sequence[str]) -> str:
    url = f"hf://{content.repository}"
    command = sample_command(url, content.header, "samples")
    lines = ["## Use\n", f"    {command}\n", "or in Python\n"]
    inputs = {
        "inpaint": "images=images, masks=masks",
        "semantic": "segmentations=segmentations",
        "class": "class_index=0",
    }
    arguments = "".join(f", {inputs[name]}" for name in conditions if name in inputs)
    lines.append(f'    import lfm\n\n    samples = lfm.load("{url}").sample([0, 1, 2, 3]{arguments})\n')
    if content.pipeline_problem is None:
        lines.append(
            "The folder `diffusers` holds the same network for diffusers: download it, and "
            '`DiffusionPipeline.from_pretrained("diffusers")`.\n'
        )
    else:
        lines.append(f"There is no folder for diffusers: {content.pipeline_problem}\n")
    return "\n".join(lines)


def _model(content: CardContent) -> str:
    header = content.header
    autoencoder = header.autoencoder
    precision = header.config.get("train", {}).get("precision")
    rows = {
        "network": f"{registry.backbone_name(header.model)}, {content.num_parameters:,} parameters",
        "latents": " x ".join(map(str, header.model.latent_shape)),
        "autoencoder": f"{autoencoder.name}, sha256 {autoencoder.content_hash[:16]}",
        "output": header.prediction,
        "precision of training": precision or "not recorded",
        "weights": "`weights.safetensors`, the exponential moving average in float32",
    }
    return "## Model\n\n" + _table(rows)


def _data(header: WeightsHeader) -> str:
    rows = {"digest of the latents": f"`{header.manifest_digest}`", **_versions(header)}
    if header.crop:
        rows["crop"] = header.crop
    if header.classes:
        counts = [f"{entry.name} ({entry.count:,})" for entry in header.classes[:MOST_CLASSES]]
        rest = len(header.classes) - len(counts)
        rows["samples"] = f"{sum(entry.count for entry in header.classes):,}"
        rows["classes"] = f"{len(header.classes)}: {', '.join(counts)}" + (f", and {rest} more" if rest else "")
    if header.labels:
        rows["labels of segmentations"] = ", ".join(f"{index} {name}" for index, name in sorted(header.labels.items()))
    return "## Data\n\n" + _table(rows)


def _versions(header: WeightsHeader) -> dict[str, str]:
    """Return which versions of the data were read for which samples, if there were several or samples were dropped."""
    history = [segment for segment in header.data_history if segment.first_sample < max(1, header.samples_seen)]
    if len(history) < 2 and not any(state.num_drops for segment in history for state in segment.sources):
        return {}
    data = header.config.get("data", {})
    names = [source["name"] for source in data.get("sources", ())] or ["latents"]
    ends = [*(segment.first_sample for segment in history[1:]), header.samples_seen]
    rows = {}
    for segment, end in zip(history, ends, strict=True):
        states = [
            f"{name} `{state.digest[:12]}`, {state.num_samples:,} samples"
            + (", some withdrawn" if state.num_drops else "")
            for name, state in zip(names, segment.sources, strict=False)
        ]
        rows[f"versions for samples seen {segment.first_sample:,} to {end:,}"] = "; ".join(states)
    return rows


def _training(content: CardContent) -> str:
    header = content.header
    rows = {"samples seen": f"{header.samples_seen:,}", "version of lfm": header.code_version}
    if train := header.config.get("train"):
        rows["batch"] = f"{train['global_batch']:,}"
        rows["optimizer"] = f"{train['optimizer']}, learning rate {train['learning_rate']:g}, {train['schedule']}"
        rows["EMA decay"] = f"{train['ema_decay']:g}"
        if train.get("trainable", ["all"]) != ["all"]:
            rows["trained part"] = ", ".join(train["trainable"])
    if content.log:
        rows["loss at the end"] = (
            f"{content.log[-1]['loss']:.4f}" if content.log[-1].get("loss") is not None else "none"
        )
    text = "## Training\n\n" + _table(rows)
    if "loss.png" in content.files:
        text += "\n![loss over samples seen](loss.png)\n"
    if header.config:
        text += (
            "\n`config.json` is the configuration with all keys. To repeat the training, on latents with the digest above:\n\n"
            "    lfm train --config config.json --set run=RUN --set data.shards=LATENTS"
            f"{' --repeat-data weights.safetensors' if _versions(header) else ''}\n"
        )
    return text


def _evaluation(content: CardContent) -> str:
    newest: dict[str, str] = {}
    for line in content.log:
        for name, value in line.items():
            if name.startswith(MEASURED) and value is not None:
                newest[name] = f"{value:.4g} at {line['samples_seen']:,} samples seen"
    text = "## Evaluation\n\n"
    if content.report is None and not newest:
        return text + "Not evaluated.\n"
    if newest:
        text += "During the training, on images of the moving average:\n\n" + _table(newest)
    if content.report is not None:
        references = content.report.get("settings", {}).get("references", [])
        digests = [f"`{entry['data_digest']}` ({entry['network']})" for entry in references]
        text += "\nBy `lfm evaluate`, with the reference " + ", ".join(digests) if digests else "\nBy `lfm evaluate`"
        text += ":\n\n" + "".join(f"    {line}\n" for line in content.report_text.splitlines())
    return text


def _origin(content: CardContent) -> str:
    source, text = content.header.initialized_from, ""
    if source is not None:
        text = (
            f"## Started from\n\nThe weights `{source.name}`, sha256 of their tensors `{source.digest}`, after "
            f"{source.samples_seen:,} samples seen. Their licence: {source.licence or 'not recorded'}.\n\n"
        )
    return text + f"## Licence\n\n{content.licence or 'Not stated.'}\n"


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |".replace("\n", " ") for name, value in rows.items()]
    return "| | |\n| --- | --- |\n" + "\n".join(lines) + "\n"
