"""How the pixels of a source's segmentations become class ids: as they are, through a palette, or from black and white.

Which rule holds is chosen from the first maps of a source; files that break it are rejected.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from lfm.data.palettes import PALETTES, Colours
from lfm.data.transforms import ID_MODES, Rejected, decode_colours, decode_ids, load_map
from lfm.errors import ConfigError, DataError

LEAST_GAP_OF_SHADES = 16


@dataclass(frozen=True)
class MapRule:
    """How the pixels of a map become class ids.

    Attributes:
        colours: class id of each colour 0xRRGGBB; empty if pixels are ids.
        is_binary: pixels are 0 or 255, and become 0 and 1.
    """

    colours: dict[int, int] = field(default_factory=dict)
    is_binary: bool = False

    def __hash__(self) -> int:
        return hash((tuple(self.colours.items()), self.is_binary))

    def decode(self, content: bytes) -> np.ndarray:
        """Return the class ids of a map, uint8 or uint16 (H, W).

        Raises:
            Rejected: it is no map, or has colours or levels that the rule does not know.
        """
        if self.colours:
            pixels = decode_colours(content)
            values, inverse = np.unique(pixels, return_inverse=True)
            unknown = [f"#{value:06x}" for value in values.tolist() if value not in self.colours]
            if unknown:
                raise Rejected("with unknown colours", ", ".join(unknown[:5]))
            ids = np.array([self.colours[value] for value in values.tolist()])
            return ids[inverse].reshape(pixels.shape).astype(np.uint8 if ids.max() < 256 else np.uint16)
        ids = decode_ids(content)
        if self.is_binary:
            if levels := sorted(set(np.unique(ids).tolist()) - {0, 255}):
                raise Rejected("with unknown ids", f"{levels[:5]}; other maps hold 0 and 255 only")
            return ids // 255
        return ids


def choose_rule(
    contents: Sequence[bytes],
    labels: dict[int, str],
    palette: str | None,
    palette_file: Colours | None,
    *,
    ignores_white: bool = False,
) -> tuple[MapRule, dict[int, str], str]:
    """Return the rule that reads the maps `contents`, the names of their ids, and a sentence about both.

    Args:
        labels: names of the ids by the source's own list; empty if there is none.
        palette: a name of PALETTES, or `indices` for pixels that are ids although they have colours.
        palette_file: colours of a file of the source.
        ignores_white: the user has decided that 255 stands for no label.

    Raises:
        ConfigError: the maps are coloured and their palette is not known, or not unique.
    """
    pixels = _Pixels.of(contents)
    if palette and palette != "indices":
        return _by_palette(PALETTES[palette], f"colours of {palette}")
    is_coloured = 2 * pixels.num_coloured > pixels.num_maps  # a few are rejected as damaged
    if is_coloured and palette == "indices":
        raise ConfigError("`palette` indices: the maps are RGB images, which have no indices")
    if is_coloured and palette_file:
        return _by_palette(palette_file, "colours of the source's palette file")
    if is_coloured:
        fitting = [name for name, colours in PALETTES.items() if pixels.colours <= set(colours)]
        if len(fitting) == 1:
            return _by_palette(PALETTES[fitting[0]], f"all colours are those of {fitting[0]}")
        seen = ", ".join(f"#{colour:06x}" for colour in sorted(pixels.colours)[:4])
        reading = " or ".join(f"`palette` {name}" for name in fitting) or f"`palette` {', '.join(PALETTES)}"
        raise ConfigError(
            f"the maps have {len(pixels.colours)} colours ({seen}, ...), which no unique palette explains; choose "
            f"{reading}, or list them in class_dict.csv beside the images, a line each: name,r,g,b"
        )
    if pixels.indices_differ and palette != "indices":
        raise ConfigError(
            "the maps are palette images whose palettes differ, so one index has several colours; choose `palette` "
            f"{', '.join(PALETTES)} if the colours mean the class, or `palette` indices if the indices do"
        )
    if pixels.are_shades and not (labels or palette or ignores_white):
        levels = ", ".join(map(str, sorted(pixels.ids)[:6]))
        raise ConfigError(
            f"the maps hold the grey levels {levels}, which may be shades of a soft mask, or ids; choose `palette` indices if "
            "they are ids, or `map_files` none"
        )
    names = {label for label, name in labels.items() if name != "unlabelled"}
    if pixels.ids == {0, 255} and (not labels or names == {0, 1}):
        binary = {0: labels.get(0, "background"), 1: labels.get(1, "foreground")}
        return MapRule(is_binary=True), binary, "all pixels are 0 or 255: two labels"
    if pixels.ids == {0, 255} and not ignores_white:
        raise ConfigError(
            f"the maps hold 0 and 255 alone, and labels.txt names {len(names)} ids: 255 may be the second label or no label; "
            "list two names, or choose `ignore_label` 255"
        )
    return MapRule(), labels, ""


def _by_palette(colours: Colours, reason: str) -> tuple[MapRule, dict[int, str], str]:
    return MapRule({colour: label for colour, (label, _) in colours.items()}), dict(colours.values()), reason


@dataclass
class _Pixels:
    """The ids and colours of some maps."""

    ids: set[int] = field(default_factory=set)
    colours: set[int] = field(default_factory=set)  # of RGB maps whose channels differ
    colour_of_index: dict[int, int] = field(default_factory=dict)
    num_maps: int = 0
    num_coloured: int = 0
    indices_differ: bool = False

    @property
    def are_shades(self) -> bool:
        """Whether the levels are few, lie far apart and reach from black to white: no ids that anyone would choose."""
        levels = sorted(self.ids)
        if self.colour_of_index or levels[:1] != [0] or levels[-1:] != [255]:
            return False
        if len(levels) == 3:
            return levels[1] in (127, 128)
        return len(levels) > 3 and min(after - before for before, after in pairwise(levels)) >= LEAST_GAP_OF_SHADES

    @classmethod
    def of(cls, contents: Sequence[bytes]) -> _Pixels:
        """Return what the pixels of these image files have in common; files that cannot be decoded are left out."""
        pixels = cls()
        for content in contents:
            try:
                pixels._add(content)
            except Rejected:  # the stage counts it
                continue
        return pixels

    def _add(self, content: bytes) -> None:
        image = load_map(content)
        colours = decode_colours(content)
        self.num_maps += 1
        if image.mode not in ID_MODES:
            values = np.unique(colours)
            self.colours |= set(values.tolist())
            if (values != (values & 0xFF) * 0x10101).any():
                self.num_coloured += 1
                return
        ids = decode_ids(content)
        values, first = np.unique(ids, return_index=True)
        self.ids |= set(values.tolist())
        if image.mode == "P":
            for value, colour in zip(values.tolist(), colours.reshape(-1)[first].tolist(), strict=True):
                self.indices_differ |= self.colour_of_index.setdefault(value, colour) != colour


def parse_palette(text: str, path: str) -> Colours:
    """Return the colours of a palette file.

    Lines are `name,r,g,b` (class_dict.csv), `r g b name` (label_colors.txt) or `name:r,g,b::` (labelmap.txt); a label's id
    is the number of its line.

    Raises:
        DataError: a line is none of these.
    """
    colours: Colours = {}
    rows = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in rows:
        match = re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)", line)
        if match:
            *channels, name = match.groups()
        elif re.fullmatch(r"[^:]+:\d+,\d+,\d+:.*", line):
            name, values = line.split(":")[:2]
            channels = values.split(",")
        else:
            name, *channels = next(csv.reader(io.StringIO(line)))
            if not colours and len(channels) >= 3 and not channels[0].strip().isdecimal():
                continue  # the head
        numbers = [int(channel) for channel in channels[:3] if channel.strip().isdecimal()]
        if len(numbers) != 3 or max(numbers) > 255:
            raise DataError(f"{path}: {line[:60]!r} is no colour; write name,r,g,b")
        colours.setdefault(numbers[0] << 16 | numbers[1] << 8 | numbers[2], (len(colours), name.strip()))
    return colours
