"""The plan of `lfm shard`: what was understood of a collection, by its names and a sample of its images."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw

from lfm import storage
from lfm.data.columns.label_columns import label_columns
from lfm.data.masks import hide
from lfm.data.palettes import PALETTES, Colours
from lfm.data.sources import readers
from lfm.data.sources.layouts import LAYOUTS
from lfm.data.sources.map_rules import choose_rule, parse_palette
from lfm.data.sources.names import is_archive, is_image, looks_like_labels, stem, storable
from lfm.data.sources.source import UNLABELLED, Source
from lfm.data.transforms import Rejected, binary, crop, crop_ids
from lfm.errors import ConfigError, StorageError, printable
from lfm.types import SourceItem
from pipelines.common import image_files
from pipelines.data.data_options import ShardConfig

NUM_SURVEYED, NUM_SHOWN, NUM_ROWS = 32, 16, 3
TILE = 96  # pixels of an image on the sheet
MOST_FILES, MOST_COPIES = 100_000, 5_000  # that are compared to count links and copies


@dataclass(frozen=True)
class SurveyedItem:
    """An item of the sample as it will be packed, at the size of a tile."""

    item: SourceItem
    image: np.ndarray  # uint8 (TILE, TILE, 3)
    mask: np.ndarray | None  # uint8 (TILE, TILE), 1 = missing
    missing: float | None  # share of the pixels of the whole mask
    has_drawn_mask: bool  # of `lfm shard --masks`, and not of the source
    segmentation: np.ndarray | None  # class ids (TILE, TILE)
    ids: tuple[int, ...]  # in the whole map


@dataclass(frozen=True)
class Survey:
    """A sample of a source, evenly spaced over its items."""

    items: tuple[SurveyedItem, ...]
    rejected: dict[str, int]  # number of items by reason


def interpret_maps(source: Source, config: ShardConfig) -> Source:
    """Return a source with the rule by which its maps become class ids, and the names of the ids.

    Raises:
        ConfigError: the maps are coloured and no unique palette is known.
    """
    if config.ignore_label is not None and "segmentation" not in source.fields:
        raise ConfigError(f"`ignore_label` {config.ignore_label}: {source.root} has no segmentations; leave it out")
    paths = [item.segmentation for item in _spread(source.items) if isinstance(item.segmentation, str)]
    labels, colours, palette = source.labels, source.about.colours, config.palette
    if palette and not paths:
        raise ConfigError(f"`palette` {palette}: {source.root} has no segmentations of colours; leave it out")
    if palette and palette not in (*PALETTES, "indices"):
        colours, palette = _palette_file(palette), None
    if paths:
        contents = [content for path in paths if isinstance(content := _content(source, path), bytes)]
        rule, labels, reason = choose_rule(contents, labels, palette, colours, ignores_white=config.ignore_label == 255)
        source = replace(source, maps=rule)
        if reason:
            source.about.notes.append(f"segmentations: {reason}")
    if config.ignore_label is not None:
        labels = {**(labels or {label: str(label) for label in range(256)}), config.ignore_label: UNLABELLED}
    return replace(source, labels=labels)


def _palette_file(path: str) -> Colours:
    if not storage.exists(path):
        raise ConfigError(f"`palette` {path}: no such file; name one, or {', '.join(PALETTES)}, or indices")
    return parse_palette(storage.read_bytes(path).decode("utf-8-sig", "replace"), path)


def _content(source: Source, name: str) -> bytes | np.ndarray | None:
    try:
        return source.read(source.root, name)
    except StorageError:
        return None


def _spread(items: tuple[SourceItem, ...]) -> list[SourceItem]:
    return [items[place] for place in _places(len(items))]


def _places(num_items: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, num_items - 1, NUM_SURVEYED)}) if num_items else []


def survey(source: Source, rule: str, draw_mask: Callable[[int], np.ndarray | None]) -> Survey:
    """Decode a sample of a source's items and crop them by a rule of `CROPS`.

    Args:
        source: with its items.
        rule: of `CROPS`.
        draw_mask: return the mask that is generated for an item, by its place in the source, uint8 (size, size); None if none
            is.
    """
    surveyed, rejected = [], Counter[str]()
    for place in _places(len(source.items)):
        item = source.items[place]
        try:
            decoded = source.decode_item(item)
            size = decoded.image.size
            mask, ids, seen = None, None, ()
            if decoded.mask is not None:
                mask = binary(crop(decoded.mask, TILE, rule))
            if decoded.segmentation is not None:
                ids = crop_ids(decoded.segmentation, size, TILE, rule, source.unlabelled)
                seen = tuple(np.unique(decoded.segmentation).tolist())
            missing = None if decoded.mask is None else float(binary(np.asarray(decoded.mask)).mean())
            if (drawn := draw_mask(place)) is not None:
                mask = np.asarray(Image.fromarray(drawn).resize((TILE, TILE), Image.Resampling.NEAREST))
                missing = float(drawn.mean())
            image = crop(decoded.image, TILE, rule)
            surveyed.append(SurveyedItem(item, image, mask, missing, drawn is not None, ids, seen))
        except Rejected as error:
            rejected[error.reason] += 1
    return Survey(tuple(surveyed), dict(rejected))


def describe(source: Source, sample: Survey) -> str:
    """Return the plan as lines: classes, splits, masks, segmentations, files left aside, notes and examples."""
    lines = [("layout", f"{source.layout}, by {LAYOUTS[source.layout].sign}")]
    if source.about.splits:
        lines.append(("split", source.about.splits))
    lines.append(("classes", _classes(source)))
    if _has_masks(source, sample):
        lines.append(("masks", _masks(source, sample)))
    if "segmentation" in source.fields:
        lines.append(("maps", _maps(source, sample)))
    if sample.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sample.rejected.items())
        lines.append(
            ("unusable", f"{reasons}, of {len(sample.items) + sum(sample.rejected.values())} images looked at")
        )
    if columns := label_columns(item.columns for item in source.items):
        shown = [f"{name} ({column.type})" for name, column in columns.items()]
        lines.append(("columns", ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if shown[12:] else "")))
    if source.about.unused:
        lines.append(("left aside", _left_aside(source)))
    lines += [("note", note) for note in (*source.about.notes, *_links_and_copies(source))]
    lines += [("example", _example(source, surveyed)) for surveyed in sample.items[:NUM_ROWS]]
    return "\n".join(f"  {title:<11}{printable(text)}" for title, text in lines)


def _classes(source: Source) -> str:
    if not source.class_names:
        return "none"
    counts = Counter(item.class_index for item in source.items)
    named = [f"{index} {name} ({counts[index]:,})" for index, name in enumerate(source.class_names)]
    shown = ", ".join(named if len(named) <= 6 else [*named[:3], "...", *named[-2:]])
    without = f"; {counts[None]:,} images without a class are rejected" if counts[None] else ""
    return f"{len(named):,} from {source.about.labels_from or source.layout}: {shown}{without}"


def _has_masks(source: Source, sample: Survey) -> bool:
    return "mask" in source.fields or any(surveyed.has_drawn_mask for surveyed in sample.items)


def _masks(source: Source, sample: Survey) -> str:
    shares = [surveyed.missing for surveyed in sample.items if surveyed.missing is not None]
    if not shares:
        return "none could be read"
    spread = f"{min(shares):.0%} to {max(shares):.0%}"
    text = f"{np.mean(shares):.0%} of the pixels are missing ({spread} in {len(shares)} masks)"
    if "mask" in source.fields:
        return f"{text}; {source.mask_value} is missing"
    return f"{text}; drawn for each image, since the source has none"


def _maps(source: Source, sample: Survey) -> str:
    ids = sorted({label for surveyed in sample.items for label in surveyed.ids})
    colours = {label: f"#{colour:06x} " for colour, label in reversed(source.maps.colours.items())}
    shown = ", ".join(f"{label} {colours.get(label, '')}{source.labels.get(label, '')}".strip() for label in ids[:8])
    if not ids:
        return "none could be read"
    num_names = sum(name != UNLABELLED for name in source.labels.values())
    names = f"{num_names} names" if source.labels else "no names (put a labels.txt beside the images)"
    ignored = [str(label) for label, name in source.labels.items() if name == UNLABELLED]
    text = f"{len(ids)} ids seen: {shown}{', ...' if len(ids) > 8 else ''}; {names}; ignored: {', '.join(ignored) or 'none'}"
    if ids and ids[-1] in (255, 0xFFFF) and str(ids[-1]) not in ignored:
        text += f" (if {ids[-1]} stands for no class, choose `ignore_label` {ids[-1]})"
    return text


def _left_aside(source: Source) -> str:
    names, stems = source.about.unused, {stem(item.image) for item in source.items}
    kinds = Counter(_kind(name, source.about.other_splits) for name in names)
    text = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(8))
    labels = [name for name in names if looks_like_labels(name) or (name.endswith(".txt") and stem(name) in stems)]
    if labels:
        more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
        text += f"; not used although they may hold labels: {', '.join(labels[:4])}{more} (`labels` reads a table)"
    return text


def _kind(name: str, other_splits: set[str]) -> str:
    """Return the kind of a file that is left aside, which says why."""
    path = PurePosixPath(name)
    words = {word for part in path.parts[:-1] for word in (part, *re.split(r"[_\-. ]", part))}
    if is_image(name) and (splits := sorted(words & other_splits)):
        return f"{path.suffix.lower()} of the split {splits[0]}"
    if is_image(name):
        return f"{path.suffix.lower()} in {path.parent} (neither images nor annotations that are read)"
    if is_archive(name):
        return f"{path.suffix.lower()} (archives beside images)"
    return f"{path.suffix.lower()} (no images by their suffix)" if path.suffix else "without suffix"


def _example(source: Source, surveyed: SurveyedItem) -> str:
    item = surveyed.item
    parts = [readers.inner_name(item.image)]
    if item.class_index is not None:
        parts.append(f"class {source.class_names[item.class_index]}")
    if item.mask is not None:
        parts.append(f"mask {readers.inner_name(item.mask)} ({surveyed.missing:.0%} missing)")
    if surveyed.has_drawn_mask:
        parts.append(f"a drawn mask ({surveyed.missing:.0%} missing)")
    if item.segmentation is not None:
        name = readers.inner_name(item.segmentation) if isinstance(item.segmentation, str) else "of its parts"
        parts.append(
            f"map {name} (ids {', '.join(map(str, surveyed.ids[:6]))}{', ...' if len(surveyed.ids) > 6 else ''})"
        )
    return ", ".join(parts)


def _links_and_copies(source: Source) -> list[str]:
    """Count symbolic links and images of equal content in a local folder, among the first files."""
    if source.read is not readers.read_file or not storage.is_local(source.root):
        return []
    paths = [Path(source.root, item.image) for item in source.items[:MOST_FILES]]
    notes = []
    if links := sum(path.is_symlink() for path in paths):
        notes.append(f"{links:,} images are symbolic links")
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        if path.is_file():  # a broken link is rejected later
            by_size[path.stat().st_size].append(path)
    same_size = [path for group in by_size.values() if len(group) > 1 for path in group][:MOST_COPIES]
    contents = Counter((path.stat().st_size, zlib.crc32(path.read_bytes())) for path in same_size)
    if copies := sum(count - 1 for count in contents.values()):
        notes.append(f"{copies:,} images are copies of others")
    return notes


def save_sheet(source: Source, sample: Survey, path: str) -> None:
    """Write a sheet of the first images of a sample, each with its class, its mask and its map."""
    if not sample.items:
        raise ConfigError(f"`sheet` {path}: none of the images could be read")
    has_masks = _has_masks(source, sample)
    tiles = np.stack([_tile(source, surveyed, has_masks) for surveyed in sample.items[:NUM_SHOWN]])
    image_files.save(image_files.grid(tiles), path)


def _tile(source: Source, surveyed: SurveyedItem, has_masks: bool) -> np.ndarray:
    """Return an image, its mask and its map side by side over the name of its class: uint8 (H, W, 3)."""
    parts = [surveyed.image]
    if has_masks:
        parts.append(surveyed.image * 0 if surveyed.mask is None else hide(surveyed.image, surveyed.mask))
    if "segmentation" in source.fields:
        ids = surveyed.segmentation
        parts.append(surveyed.image * 0 if ids is None else image_files.colours(ids).astype(np.uint8))
    index = surveyed.item.class_index
    caption = Image.new("RGB", (TILE * len(parts), 14), (255, 255, 255))
    name = source.class_names[index] if index is not None else readers.inner_name(surveyed.item.image)
    text = printable(storable(name)).encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
    ImageDraw.Draw(caption).text((1, 1), text, fill=(0, 0, 0))
    return np.concatenate([np.concatenate(parts, 1), np.asarray(caption)], 0)
