"""Which versions of its data a training reads: those of its record, and from a resume on what the data sets have become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lfm import weights_file
from lfm.data.stream.data_history import continues, has_same_selection, state_of
from lfm.data.stream.mixture import LatentSource, Mixture
from lfm.data.versions import Join, Segment, at_version, digests
from lfm.errors import ConfigError, DataError
from lfm.training.run_folder import RunState
from pipelines.common import factory
from pipelines.common.experiment.config_schema import ExperimentConfig


def read_history(run: str) -> tuple[Segment, ...]:
    """Return the history of the data of a run, checkpoint or weights file, for `repeat_data`.

    Raises:
        ConfigError: it has none.
    """
    history = weights_file.load_file(run)[1].data_history
    if not history:
        raise ConfigError(f"`repeat_data` {run}: has no record of the versions of its data; leave it out")
    return history


def choose_history(
    config: ExperimentConfig,
    newest: Sequence[LatentSource],
    checkpoint: tuple[Path, RunState] | None,
    repeated: tuple[Segment, ...] = (),
) -> tuple[Segment, ...]:
    """Return the history of the data that training begins or resumes with.

    Args:
        config: the experiment; `data.new_samples` says how new versions are read.
        newest: of `factory.load_sources`.
        checkpoint: from which training resumes, with its state.
        repeated: the history of another run, which is read instead of what the data sets have become.

    Raises:
        DataError: the latents are others than those of the checkpoint, or have classes or labels that it does not have.
        ConfigError: the history to repeat is another one.
    """
    if repeated:
        _check_repeated(config, newest, checkpoint, repeated)
        return repeated
    if checkpoint is None:
        return (Segment(first_sample=0, sources=tuple(map(state_of, newest))),)
    path, state = checkpoint
    history = _recorded(config, newest, path, state)
    if not _select_the_same(newest, history):  # another training, which `check_continues` may refuse
        return (Segment(first_sample=0, sources=tuple(map(state_of, newest))),)
    past = [segment for segment in history if segment.first_sample < state.samples_seen or not segment.first_sample]
    keeps_versions = config.data.new_samples == "left_out"
    sources = []
    for source, before in zip(newest, past[-1].sources, strict=True):
        sources.append(state_of(source, before.digest if keeps_versions else None))
        _check_classes(config, source, before.digest, sources[-1].digest, path)
    if tuple(sources) != past[-1].sources:
        join: Join = "at_once" if config.data.new_samples == "at_once" else "next_pass"
        past.append(Segment(first_sample=state.samples_seen, join=join, sources=tuple(sources)))
    return tuple(past)


def selects_as_before(newest: Sequence[LatentSource], mixture: Mixture, state: RunState) -> bool:
    """Return whether `where` selects the samples that it did for a checkpoint of the same data.

    Args:
        newest: of `factory.load_sources`.
        mixture: that training resumes with.
        state: of the checkpoint.
    """
    if not state.data_history:
        return state.subsets_digest == mixture.subsets_digest
    return _select_the_same(newest, state.data_history)


def _select_the_same(newest: Sequence[LatentSource], history: Sequence[Segment]) -> bool:
    return all(map(has_same_selection, newest, history[-1].sources))


def _recorded(
    config: ExperimentConfig, newest: Sequence[LatentSource], path: Path, state: RunState
) -> tuple[Segment, ...]:
    """Return the history that a checkpoint records; of an older one, which has none, the version it was trained on."""
    history = state.data_history
    if not history and len(newest) == 1 and state.manifest_digest in digests(newest[0].manifest):
        history = (Segment(first_sample=0, sources=(state_of(newest[0], state.manifest_digest, ()),)),)
    elif not history:
        history = (Segment(first_sample=0, sources=tuple(state_of(source, drops=()) for source in newest)),)
    last = history[-1].sources
    if len(last) == len(newest) and all(map(continues, newest, last)):
        # The digest is also one of the way in which the classes of several data sets are merged.
        before = factory.mixture_of(config, newest, (Segment(first_sample=0, sources=last),))
        if before.digest == state.manifest_digest:
            return history
    names = ", ".join(source.folder for source in newest)
    raise DataError(f"{names}: other latents than {path} was trained on; name those, or another folder with run")


def _check_classes(config: ExperimentConfig, source: LatentSource, before: str, after: str, path: Path) -> None:
    """Refuse a version with other classes or labels than the network has."""
    old, new = (at_version(source.manifest, digest, source.folder) for digest in (before, after))
    other = ""
    if "class" in config.conditions and [each.name for each in old.classes] != [each.name for each in new.classes]:
        other = f"{len(new.classes)} classes, and {path} was trained with {len(old.classes)}"
    elif "semantic" in config.conditions and old.labels != new.labels:
        other = f"{len(new.labels)} labels of segmentations, and {path} was trained with {len(old.labels)}"
    if other:
        raise DataError(
            f"{source.folder}: has {other}; start another run with `initialize_from`, or set data.new_samples to left_out"
        )


def _check_repeated(
    config: ExperimentConfig,
    newest: Sequence[LatentSource],
    checkpoint: tuple[Path, RunState] | None,
    repeated: tuple[Segment, ...],
) -> None:
    """Refuse a history to repeat that is not of these data sets, or not what a checkpoint was trained on."""
    last = repeated[-1].sources
    if len(last) != len(newest) or not all(map(continues, newest, last)):
        names = ", ".join(source.folder for source in newest)
        raise DataError(f"{names}: other latents than those of `repeat_data`; name the latents that were trained on")
    if not _select_the_same(newest, repeated):
        raise ConfigError("`repeat_data`: data.where selects other samples than in that run; set it as it was")
    if checkpoint is None:
        return
    path, state = checkpoint
    recorded = _recorded(config, newest, path, state)

    def until_now(history: Sequence[Segment]) -> list[Segment]:
        return [segment for segment in history if segment.first_sample < max(1, state.samples_seen)]

    if until_now(recorded) != until_now(repeated):
        raise ConfigError(
            f"`repeat_data`: {path} was trained on other versions of the data until then; leave it out, or name another "
            "folder with run"
        )
