"""What the names of files and folders say: junk, splits, annotations, and how names are printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

# The first four stand in messages.
SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
SUFFIXES += (".jfif", ".jpe", ".j2k", ".jpx", ".pbm", ".avif", ".heic", ".heif", ".jxl")
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".zip")

SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing|dev|extra|unlabell?ed)(20\d\d)?", re.IGNORECASE)
# A folder that is a split by a part of its name, such as train_images or testA.
SPLIT_LIKE = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|train[_\-]?val|unlabell?ed)[_\-. ]?"
    r"(images?|imgs?|set|data|split|full|\d{1,2}|[AB])?",
    re.IGNORECASE,
)
# Folders in which programs keep files of their own, and small copies of images.
_JUNK_FOLDER = re.compile(r"__MACOSX|@eaDir|\.[^.].*|\$RECYCLE\.BIN|thumbs|thumbnails?(\d+x\d+)?", re.IGNORECASE)
_COPY_OF_PROGRAM = re.compile(r"(^|/)(\._[^/]*$|\.(ipynb_checkpoints|thumbnails|AppleDouble)/)")
_JUNK_FILE = re.compile(r"\..*|Thumbs\.db|desktop\.ini", re.IGNORECASE)

# A folder whose images are annotations of others, and one whose images they belong to.
_MASK_WORDS = r"masks?|holes|inpaint(ing)?_?masks?"
_MAP_WORDS = (
    r"annotations?|anno?s?|labels?|labelids|labelled\w*|labeled\w*|labelimages?|seg|segs|segments?|segmentations?"
    r"|segmentationclass\w*|segmentationobjects?|instances?|semantic\w*|gt|gts|gtfine|gtcoarse|ground[_\- ]?truths?"
    r"|stuffthingmaps|mask_?labels?"
)
ANNOTATION_FOLDER = re.compile(rf"(.*[_\- .])?({_MASK_WORDS}|{_MAP_WORDS})([_\- .].*)?|.*annot|.*masks?", re.IGNORECASE)
IMAGE_FOLDER = re.compile(
    r"((originals?|orig|raw|source|input|colou?r|rgb|jpeg|png)[_\- ]?)?(images?|imgs?|photos?|pics?)"
    r"|originals?|leftimg8bit|inputs?|rgbs?",
    re.IGNORECASE,
)
# The end of a stem that says that a file annotates the file of the stem before it.
ANNOTATION_SUFFIX = re.compile(
    r"(?P<end>[_\-. ]+(?:gt(?:Fine|Coarse)_)?(?:(?:inpaint(?:ing)?[_\-])?masks?|holes?|segs?|segmentations?|labels?|labelids?"
    r"|labeltrainids|trainids|annotations?|annot|gt|groundtruth|color|instanceids|matte|L)(?:[_\-]?\d{1,4})?)$",
    re.IGNORECASE,
)
ANNOTATION_PREFIX = re.compile(r"^(masks?|segs?|segmentations?|labels?|annotations?|gt)[_\-]+(?=.)", re.IGNORECASE)
IMAGE_PREFIX = re.compile(r"^(images?|img|rgb|photo|orig(inal)?|sat|input)[_\-]+(?=.)", re.IGNORECASE)
IMAGE_SUFFIX = re.compile(r"[_\-](leftImg8bit|image|img|rgb|photo|orig(inal)?|sat|input)$", re.IGNORECASE)
# Folders with another version of each image of the folder beside.
COMPANION_FOLDER = re.compile(
    r"(clean|noisy?|noise|blur(red|ry)?|sharp|lr|hr|lq|hq|low|high|depths?|disparity|normals?|edges?|flow|alpha|matte"
    r"|trimaps?|fg|bg|targets?|sources?|src|dst|before|after|a|b|rain|haze|hazy|clear|shadow|free|degraded|restored)"
    r"([_\-]?(images?|imgs?|x\d|\d+))?",
    re.IGNORECASE,
)
_LABEL_FILE = re.compile(
    r"(label|class|categor|annot|meta|target|attr|identity|dataset|list|caption|train|val|test|gt|solution)",
    re.IGNORECASE,
)
# A packed file that is no collection, such as Kaggle's train.csv.zip.
_PACKED_FILE = re.compile(r"\.(csv|tsv|jsonl?|txt|xml|xlsx?|pdf|md|html?|mat|npy|npz|pkl)\.\w+$", re.IGNORECASE)
_TABLE_SUFFIXES = (
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".parquet",
    ".xml",
    ".mat",
    ".npy",
    ".npz",
    ".pkl",
    ".yaml",
    ".yml",
)


def like_splits(folders: Iterable[str]) -> list[str]:
    """Return the folders whose names differ in the word of a split alone, such as cars_train and cars_test, sorted."""
    by_rest: dict[tuple[str | None, ...], list[str]] = {}
    for folder in sorted(folders):
        words = re.split(r"[_\-. ]", folder)
        rest = tuple(None if SPLIT.fullmatch(word) else word for word in words)
        if None in rest:
            by_rest.setdefault(rest, []).append(folder)
    return sorted(name for names in by_rest.values() if len(names) > 1 for name in names)


def first_split(splits: Iterable[str]) -> str:
    """Return the split to name as an example: one for training if there is one."""
    return min(splits, key=lambda split: ("train" not in split.lower(), split))


def is_junk(name: str) -> bool:
    """Return whether a path is a file of an operating system or an editor, or a small copy of an image."""
    *folders, file = name.split("/")
    return _JUNK_FILE.fullmatch(file) is not None or any(map(_JUNK_FOLDER.fullmatch, folders))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def hidden_images(names: Iterable[str]) -> list[str]:
    """Return the images that are junk by `is_junk` only because their names, or those of folders, begin with a dot."""
    hidden = (name for name in names if is_image(name) and _is_hidden(name))
    return [name for name in hidden if not _COPY_OF_PROGRAM.search(name)]


def notes_on_junk(names: Iterable[str]) -> list[str]:
    """Return what to say of files that are junk by `is_junk`, a sentence each."""
    names = list(names)
    shown = [name for name in names if not _is_hidden(name)]
    images = hidden_images(names)
    notes = []
    if shown:
        notes.append(f"{len(shown)} files of operating systems and small copies are skipped, such as {shown[0]}")
    if images:
        notes.append(
            f"{len(images)} images are left out because their names or folders begin with a dot, such as {images[0]}; "
            "rename them to use them"
        )
    return notes


def notes_on_empty(folders: Sequence[str]) -> list[str]:
    """Return the sentence that names folders without files, if there are any."""
    more = f" and {len(folders) - 8} more" if folders[8:] else ""
    return [f"folders without files: {', '.join(folders[:8])}{more}"] if folders else []


def empty_folders(folders: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the folders of an archive that hold none of its `names`, sorted, without hidden ones."""
    holders = {name.rstrip("/").rpartition("/")[0] for name in names}
    return sorted(name for name in {*folders} - holders if name not in ("", ".") and not _is_hidden(name))


def is_image(name: str) -> bool:
    """Return whether a file is an image by its suffix."""
    return name.lower().endswith(SUFFIXES)


def looks_like_labels(name: str) -> bool:
    """Return whether a file that is no image may hold labels."""
    path = PurePosixPath(name)
    if path.suffix.lower() in _TABLE_SUFFIXES or _PACKED_FILE.search(name):
        return True
    words = " ".join(part for part in path.parts if not SPLIT.fullmatch(part))
    return path.suffix.lower() in ("", ".txt") and _LABEL_FILE.search(words) is not None


def is_archive(name: str) -> bool:
    """Return whether a file may hold a collection: a tar or zip, compressed or not."""
    return name.lower().endswith((".tar", *ARCHIVES)) and _PACKED_FILE.search(name) is None


def plain_stem(stem_of_file: str) -> str:
    """Return a stem without the words that say that a file is an image: `0` for `0_image`."""
    return IMAGE_PREFIX.sub("", IMAGE_SUFFIX.sub("", stem_of_file))


def stem(name: str) -> str:
    """Return a name without its suffix."""
    before, _, suffix = name.rpartition("/")[2].rpartition(".")  # pathlib's takes ten times as long
    return name[: -len(suffix) - 1] if before and suffix else name


def storable(name: str) -> str:
    """Return a name as valid Unicode: bytes of a file name that are not UTF-8 become escapes such as \\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
