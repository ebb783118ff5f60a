"""The layouts of image collections: classes, databases, tars, tables and pairs, and the errors for unreadable ones."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.sources import readers
from lfm.data.sources.layouts import LAYOUTS, read
from lfm.data.sources.segmentation_layouts import FACE_PARTS, FACE_PARTS_OFFICIAL
from lfm.data.sources.source import Choices, Layout, Source, Tree, read_text
from lfm.data.transforms import Rejected
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem
from tests.support.commands import assert_one_line, lfm
from tests.support.images import folder_contents, image_bytes, random_pixels, save_image

# --- published collections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "names"), [("celebamask-hq", FACE_PARTS), ("celebamask-hq-official", FACE_PARTS_OFFICIAL)]
)
def test_every_part_of_a_face_has_its_id_and_later_parts_cover_earlier_ones(
    tmp_path: Path, layout: str, names: tuple[str, ...]
) -> None:
    save_image(tmp_path / "CelebA-HQ-img" / "2000.jpg", random_pixels(36, 36, 3))
    for index, name in enumerate(names):
        part = np.zeros((18, 18, 3), np.uint8)
        part[index:] = 255
        save_image(tmp_path / "CelebAMask-HQ-mask-anno" / "1" / f"02000_{name}.png", part)
    source = read(str(tmp_path), layout)
    ids = source.decode_item(source.items[0]).segmentation
    assert ids is not None and ids[:, 0].tolist() == list(range(1, 19))
    assert len(names) == 18 and set(names) == set(FACE_PARTS)


def test_imagenet_as_torchvision_unpacks_it_and_without_labels(tmp_path: Path) -> None:
    for name in ("train/n00000002/a.JPEG", "train/n00000001/b.JPEG", "val/n00000002/c.JPEG"):
        save_image(tmp_path / name, random_pixels(8, 8, 3), format="JPEG")
    val = read(str(tmp_path), split="val")
    assert (val.layout, val.class_names) == ("imagenet", ("n00000001", "n00000002"))
    assert [item.class_index for item in val.items] == [1]
    save_image(tmp_path / "val" / "x.JPEG", random_pixels(8, 8, 3), format="JPEG")
    with pytest.raises(DataError, match=r"val: has no class folders; put Kaggle's LOC_val_solution.csv"):
        read(str(tmp_path), split="val")


def test_imagenets_only_split_is_the_default_unless_class_folders_lie_beside_it(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "n00000001" / "a.JPEG", random_pixels(8, 8, 3), format="JPEG")
    assert [item.image for item in read(str(tmp_path)).items] == ["n00000001/a.JPEG"]
    save_image(tmp_path / "n00000002" / "b.JPEG", random_pixels(8, 8, 3), format="JPEG")
    with pytest.raises(DataError, match=r"train/n00000001/a.JPEG: its class is not known"):
        read(str(tmp_path))


# --- databases --------------------------------------------------------------------------------------------------


def write_lmdb(path: Path, values: dict[str, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return path


def test_raw_and_encoded_values_are_distinguished_by_content_in_cursor_order(tmp_path: Path) -> None:
    raw, image = random_pixels(16, 16, 3), random_pixels(9, 7, 3)
    jpeg_like = raw.copy()
    jpeg_like[0, 0] = (0xFF, 0xD8, 0xFF)
    png = image_bytes(image)
    png += bytes(3 * 20 * 20 - len(png))  # as long as a raw image of 20 x 20
    values = {"0": raw.tobytes(), "1": png, "2": jpeg_like.tobytes(), "10": image_bytes(image)}
    source = read(str(write_lmdb(tmp_path / "train.lmdb", values)))
    assert [item.image for item in source.items] == ["0", "1", "10", "2"]
    decoded = [np.asarray(source.decode_item(item).image) for item in source.items]
    for pixels, expected in zip(decoded, (raw, image, image, jpeg_like), strict=True):
        assert np.array_equal(pixels, expected)
    assert pickle.loads(pickle.dumps(source)) == source


@pytest.mark.parametrize("keep", [0, 5000, 10_000])
def test_a_cut_off_lmdb_is_refused_before_it_can_kill_the_process(tmp_path: Path, keep: int) -> None:
    root = write_lmdb(tmp_path / "a.lmdb", {str(n): image_bytes(random_pixels(40, 40 + n, 3)) for n in range(30)})
    path = root / "data.mdb"
    path.write_bytes(path.read_bytes()[:keep])
    assert_one_line(lfm("shard", root, tmp_path / "raw"), root, "copy or download it again")


def test_a_pickled_cache_beside_an_lmdb_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("unpickled",))

    root = write_lmdb(tmp_path / "church_train_lmdb", {"ab" * 20: image_bytes(random_pixels(8, 8, 3), format="WEBP")})
    (root / "_cache_church").write_bytes(pickle.dumps(Trap()))
    source = read(str(tmp_path))
    assert (source.layout, len(source.items)) == ("lsun", 1)
    source.decode_item(source.items[0])


def test_torchtoolboxs_lmdb_and_the_full_ade20k_are_refused(tmp_path: Path) -> None:
    toolbox = write_lmdb(tmp_path / "imagenet.lmdb", {"0": b"x", "__len__": b"1", "__keys__": b"0"})
    with pytest.raises(DataError, match=r"imagenet.lmdb: is an LMDB of torchtoolbox, .*; give lfm the images"):
        read(str(toolbox))
    save_image(
        tmp_path / "ade" / "images" / "training" / "a" / "abbey" / "ADE_train_00000001_seg.png", random_pixels(8, 8, 3)
    )
    with pytest.raises(DataError, match=r"is the full ADE20K, .*; download ADEChallengeData2016"):
        read(str(tmp_path / "ade"))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_tars_of_other_programs_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    image, ids = random_pixels(9, 9, 3), random_pixels(9, 9)
    members = {f"cat/{n}.PNG": image_bytes(image) for n in "ab"} | {
        "cat/b.cls": b"2\n",
        "cat/b.seg.png": image_bytes(ids),
    }
    write_tar(tmp_path / "train-000.tar", {"__meta__": b"x", "cat/a.txt": b"a cat", **members})
    write_tar(tmp_path / "val-000.tar", {"0.jpg": image_bytes(image, format="JPEG")})
    source = read(str(tmp_path), split="train")
    assert (source.layout, len(source.items), source.class_names) == ("webdataset", 2, ("2",))
    item = source.decode_item(source.items[1])
    assert np.array_equal(item.image, image) and np.array_equal(item.segmentation, ids)
    assert [item.class_index for item in source.items] == [None, 0]


@pytest.mark.parametrize(
    ("labels", "names", "note"),
    [
        ((1, 17, 999), ("1", "17", "999"), "label 999 is class 2"),
        ((1, 2, 3), ("1", "2", "3"), "label 3 is class 2"),
        ((0, 1, 3), ("0", "1", "2", "3"), "1 of 4 classes have no image, such as 2"),
        ((0, 1, 2), ("0", "1", "2"), None),
    ],
)
def test_indices_of_a_tar_are_made_dense_unless_a_few_are_not_used(
    labels: tuple[int, ...], names: tuple[str, ...], note: str | None, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", {f"{n}.png": b"x" for n in labels} | {f"{n}.cls": str(n).encode() for n in labels})
    source = read(str(tmp_path))
    assert source.class_names == names
    assert [names[item.class_index] for item in source.items if item.class_index is not None] == list(map(str, labels))
    assert (note in " ".join(source.about.notes)) if note else source.about.notes == []


def test_a_metadata_table_of_another_program_is_not_used(tmp_path: Path) -> None:
    for folder in ("ferry", "train"):
        save_image(tmp_path / folder / "a_01.png", random_pixels(9, 9, 3))
    (tmp_path / "metadata.csv").write_text("id,make\nb,Audi\n")
    source = read(str(tmp_path), choices=Choices(classes="folders"))
    assert source.layout == "folder" and source.about.unused == ["metadata.csv"]


def test_names_with_numbers_after_dots_are_images_of_their_own(tmp_path: Path) -> None:
    names = ("cat.1.jpg", "cat.2.jpg", "dog.1.jpg", "dog.2.jpg")
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    assert len(read(str(tmp_path)).items) == 4


def test_a_metadata_table_of_some_images_names_the_option_to_go_on(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        save_image(tmp_path / name, random_pixels(9, 9, 3))
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/a.png,x\n")
    with pytest.raises(
        DataError, match=r"2 images without a label, .* or choose `layout` folder or annotated to leave"
    ):
        read(str(tmp_path))
    assert read(str(tmp_path), "folder").class_names == ("cat", "dog")


def test_numbered_parts_of_a_collection_are_no_classes(tmp_path: Path) -> None:
    for folder in ("HAM_images_part_1", "HAM_images_part_2"):
        save_image(tmp_path / folder / "a.png", random_pixels(9, 9, 3))
    with pytest.raises(
        ConfigError, match="parts of one list of images, by their names, or classes; choose `classes` none or"
    ):
        read(str(tmp_path))
    assert read(str(tmp_path), choices=Choices(classes="none")).class_names == ()


@pytest.mark.parametrize(
    ("images", "annotations", "others"),
    [
        ("Kvasir-SEG/images", "Kvasir-SEG/masks", ()),
        ("ade/images/training", "ade/annotations/training", ("ade/objectInfo150.txt",)),
        ("CamVid/train", "CamVid/train_labels", ("CamVid/class_dict.csv",)),
    ],
)
def test_a_folder_around_images_and_annotations_is_looked_through(
    images: str, annotations: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    for number in range(3):
        save_image(tmp_path / images / f"{number}.png", random_pixels(9, 9, 3))
        save_image(tmp_path / annotations / f"{number}.png", np.full((9, 9), 255 * (number % 2), np.uint8))
    for name in others:
        (tmp_path / name).write_text("name,r,g,b\nsky,0,0,0\ncar,255,255,255\n")
    source = read(str(tmp_path))
    assert len(source.items) == 3 and source.class_names == ()
    assert all(item.mask or item.segmentation for item in source.items)
    assert any(note.startswith("looked through the folder") for note in source.about.notes)


@pytest.mark.parametrize("others", [{"0.cls": b"1"}, {"1.left.png": b"x", "1.right.png": b"x"}])
def test_samples_of_several_images_without_a_plain_one_are_refused(others: dict[str, bytes], tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.left.png": b"x", "0.right.png": b"x", **others})
    with pytest.raises(
        DataError, match=r"no sample has a member .png, .jpg or the like, only .left.png, .right.png; rename"
    ):
        read(str(tmp_path))


def test_classes_of_a_tar_may_be_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": b"x", "0.cls": b"dog\n", "1.png": b"x", "1.cls.txt": b"cat"})
    source = read(str(tmp_path))
    assert source.class_names == ("cat", "dog") and [item.class_index for item in source.items] == [1, 0]


def test_a_sample_without_an_image_is_rejected_and_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": image_bytes(random_pixels(9, 9, 3)), "1.txt": b"x", "2.data.jpg": b"x"})
    assert lfm("shard", tmp_path, tmp_path / "raw", "--image-size", 8, "--max-rejected", 1).exit_code == 0
    rejects = manifests.load(str(tmp_path / "raw"), "raw").rejects
    assert sorted(reject.source for reject in rejects) == ["a.tar#-#1", "a.tar#-#2"]
    assert all("the sample has no image" in reject.detail for reject in rejects)


@pytest.mark.parametrize("damage", ["cut between samples", "cut in an image", "header", "twice", "gzip"])
def test_a_damaged_tar_is_refused_instead_of_read_in_part(tmp_path: Path, damage: str) -> None:
    images = {f"{n}.png": image_bytes(random_pixels(20, 20, 3)) for n in range(4)}
    path = write_tar(tmp_path / "a.tar", images)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    if damage.startswith("cut"):
        content = content[: third + (0 if "between" in damage else 700)]
    elif damage == "header":
        content[third + 20] ^= 1
    elif damage == "gzip":
        content = bytearray(b"\x1f\x8b" + bytes(600))
    path.write_bytes(content)
    if damage == "twice":
        with tarfile.open(path, "a") as tar:
            tar.addfile(tarfile.TarInfo("3.png"))
    with pytest.raises(DataError) as error:
        read(str(tmp_path), "webdataset")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_parquet_files_and_a_saved_data_set(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    images = [random_pixels(8, 8 + n, 3) for n in range(5)]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = arrow.table(
        {"image": [{"bytes": image_bytes(image), "path": "x"} for image in images], "label": [0, 1, 1, 0, 1]}
    ).replace_schema_metadata({"huggingface": json.dumps(features)})
    (tmp_path / "p" / "data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "p" / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    parquet.write_table(table.slice(0, 1), tmp_path / "p" / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "s" / "train").mkdir(parents=True)
    (tmp_path / "s" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with (
        arrow.OSFile(str(tmp_path / "s" / "train" / "data-00000-of-00001.arrow"), "wb") as file,
        arrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    for root in ("p", "s"):
        source = read(str(tmp_path / root), split="train")
        assert (source.layout, source.class_names) == ("hf", ("cat", "dog"))
        assert [item.class_index for item in source.items] == [0, 1, 1, 0, 1]
        for item, image in zip(source.items, images, strict=True):
            assert np.array_equal(source.decode_item(item).image, image)
    assert len(read(str(tmp_path / "p"), split="test").items) == 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as a table"):
        read(str(tmp_path / "bad"))


@pytest.mark.parametrize(("library", "name"), [("lmdb", "data.mdb"), ("pyarrow", "a.parquet")])
def test_a_missing_library_is_one_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, name: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    for module in (library, f"{library}.ipc", f"{library}.parquet"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    assert_one_line(lfm("shard", tmp_path, tmp_path / "raw"), tmp_path, "pip install lfm[")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lmdb", "webdataset", "hf"])
def test_worker_processes_reopen_the_source_and_write_the_same_bytes(tmp_path: Path, kind: str) -> None:
    contents = {str(n): image_bytes(random_pixels(20, 20 + n, 3)) for n in range(12)}
    if kind == "lmdb":
        write_lmdb(tmp_path / "source", contents)
    elif kind == "webdataset":
        write_tar(tmp_path / "source" / "a.tar", {f"{name}.png": content for name, content in contents.items()})
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        (tmp_path / "source").mkdir()
        parquet.write_table(arrow.table({"image": list(contents.values())}), tmp_path / "source" / "a.parquet")
    for workers in (1, 2):
        result = lfm(
            "shard",
            tmp_path / "source",
            tmp_path / str(workers),
            "--image-size",
            16,
            "--workers",
            workers,
            "--samples-per-shard",
            4,
        )
        assert result.exit_code == 0 and f"{kind}: 12 images" in result.stdout, result.stderr
    assert folder_contents(tmp_path / "1") == folder_contents(tmp_path / "2")


@pytest.mark.parametrize("name", ["a#b.tar", "#.tar", "a.tar#1+2.tar", "a#3+4#.tar"])
def test_the_name_of_a_tar_may_hold_the_separator(tmp_path: Path, name: str) -> None:
    pixels = random_pixels(9, 9, 3)
    write_tar(
        tmp_path / name, {"x#1+2#y.png": image_bytes(pixels), "z#.png": image_bytes(pixels), "t.txt": b"no image"}
    )
    source = read(str(tmp_path))
    assert len(source.items) == 3
    for item in source.items:
        if readers.NOWHERE not in item.image:
            assert np.array_equal(np.asarray(source.decode_item(item).image), pixels)
            assert storage.read_bytes(str(tmp_path / name)).count(source.read(source.root, item.image)) == 2
        else:
            with pytest.raises(Rejected, match="has no image"):
                source.decode_item(item)


def test_a_layout_is_one_entry_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new layout is recognized and read without changing anything else."""

    def read_lines(tree: Tree, split: str | None) -> Source:
        return Source(tree.root, tuple(SourceItem(line) for line in (read_text(tree, "list.txt") or "").split()))

    layout = Layout(read_lines, lambda tree: tree.has_name("^list.txt$"), instead_of=("folder",))
    monkeypatch.setitem(LAYOUTS, "list", layout)
    save_image(tmp_path / "b.png", random_pixels(8, 8, 3))
    save_image(tmp_path / "a.png", random_pixels(8, 8, 3))
    assert read(str(tmp_path)).layout == "folder"
    (tmp_path / "list.txt").write_text("b.png\n")
    source = read(str(tmp_path))
    assert (source.layout, [item.image for item in source.items]) == ("list", ["b.png"])


def test_tars_and_pairs_are_read_from_a_url() -> None:
    root, image, ids = f"memory://{uuid.uuid4()}", image_bytes(random_pixels(9, 9, 3)), image_bytes(random_pixels(9, 9))
    for name in "ab":
        storage.write_bytes(f"{root}/pairs/images/{name}.png", image)
        storage.write_bytes(f"{root}/pairs/annotations/{name}.png", ids)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("0.png", image), ("0.seg.png", ids)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    storage.write_bytes(f"{root}/tars/a.tar", buffer.getvalue())
    for folder, layout, count in (("pairs", "paired", 2), ("tars", "webdataset", 1)):
        source = read(f"{root}/{folder}")
        assert (source.layout, len(source.items)) == (layout, count)
        item = source.decode_item(source.items[0])
        assert np.array_equal(item.image, random_pixels(9, 9, 3))
        assert np.array_equal(item.segmentation, random_pixels(9, 9))


# --- pairs -------------------------------------------------------------------------------------------------------


def pairs(root: Path, images: str, maps: str, count: int = 3) -> None:
    for index in range(count):
        save_image(root / images / f"{index}.jpg", random_pixels(12, 10, 3))
        save_image(root / maps / f"{index}.png", random_pixels(12, 10, high=5))


@pytest.mark.parametrize(
    ("images", "maps", "split"),
    [
        ("images", "labels", None),
        ("images/val", "annotations/val", "val"),
        ("train", "trainannot", "train"),
        ("train2017", "stuffthingmaps/train2017", "train2017"),
    ],
)
def test_pairs_are_found_by_name_in_folders_of_known_names(
    tmp_path: Path, images: str, maps: str, split: str | None
) -> None:
    pairs(tmp_path, images, maps)
    source = read(str(tmp_path), "paired", split)
    assert [(item.image, item.segmentation) for item in source.items] == [
        (f"{images}/{index}.jpg", f"{maps}/{index}.png") for index in range(3)
    ]
    assert source.class_names == ()
    item = source.decode_item(source.items[1])
    assert np.array_equal(item.segmentation, random_pixels(12, 10, high=5))


@pytest.mark.parametrize(("images", "maps"), [("train", "trainannot"), ("images/train", "annotations/train")])
def test_the_only_split_of_pairs_is_the_default(tmp_path: Path, images: str, maps: str) -> None:
    pairs(tmp_path, images, maps)
    source = read(str(tmp_path), "paired")
    assert [item.image for item in source.items] == [f"{images}/{index}.jpg" for index in range(3)]
    assert source.class_names == ()


def test_pascal_vocs_palettes_are_indices_and_its_lists_are_the_splits(tmp_path: Path) -> None:
    pairs(tmp_path, "JPEGImages", "SegmentationClass", 2)
    ids = random_pixels(12, 10, high=21)
    ids[0] = 255
    palette = Image.frombytes("P", (10, 12), ids.tobytes())
    palette.putpalette(random_pixels(256, 3).tobytes())
    save_image(tmp_path / "SegmentationClass" / "1.png", palette)
    save_image(tmp_path / "JPEGImages" / "unlisted.jpg", random_pixels(12, 10, 3))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("1\ngone\n")
    (lists / "val.txt").write_text("0\n")
    with pytest.raises(ConfigError, match="holds the splits train, val"):
        read(str(tmp_path))
    source = read(str(tmp_path), split="train")
    assert (source.layout, [item.image for item in source.items]) == (
        "paired",
        ["JPEGImages/1.jpg", "JPEGImages/gone.jpg"],
    )
    assert np.array_equal(source.decode_item(source.items[0]).segmentation, ids)
    (lists / "val.txt").unlink()
    assert read(str(tmp_path)).items == source.items
    with pytest.raises(ConfigError, match="holds the splits train; choose one"):
        read(str(tmp_path), split="val")


def test_drawn_scenes_have_classes_maps_and_masks(tmp_path: Path) -> None:
    assert lfm("scenes", tmp_path / "scenes", "--num", 9, "--image-size", 16).exit_code == 0
    source = read(str(tmp_path / "scenes"))
    assert source.layout == "paired" and len(source.class_names) > 1
    for item in source.items:
        decoded = source.decode_item(item)
        assert item.class_index is not None and decoded.mask is not None and decoded.segmentation is not None


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("0\tnull\n3\thair net\n", {0: "null", 3: "hair net", 255: "unlabelled"}),
        ("0: sky\n255: unlabelled\n", {0: "sky", 255: "unlabelled"}),
        ("sky\ntree\n", {0: "sky", 1: "tree", 255: "unlabelled"}),
    ],
)
def test_labels_are_read_in_any_usual_format(tmp_path: Path, text: str, labels: dict) -> None:
    pairs(tmp_path, "images", "labels")
    (tmp_path / "labels.txt").write_text(text)
    source: Source = read(str(tmp_path))
    assert source.labels == labels and source.unlabelled == 255


def test_an_unknown_layout_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match=f"`layout` voc: unknown; one of auto, {', '.join(LAYOUTS)}"):
        read(str(tmp_path), "voc")
