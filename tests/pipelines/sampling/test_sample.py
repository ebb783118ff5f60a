"""Tests of `lfm sample` for every task: conditions, ranks, solvers, guidance, precision, resuming and errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lfm as library
from lfm.data.raw_shards import read_raw
from lfm.data.transforms import crop, crop_ids
from lfm.inference.trained_model import TrainedModel
from lfm.models.dit import DiT
from lfm.synthetic.scenes import CLASS_NAMES
from lfm.weights_file import WEIGHTS, load_weights, save_weights
from pipelines.common import factory, image_files
from pipelines.data import encode
from tests.support.commands import ALONE, SmallSet, Tasks, assert_one_line, lfm

STEPS = ("--num-steps", 2)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files(tasks: Tasks, number: int = 0) -> tuple[Path, Path, Path]:
    """Return the image, mask and segmentation of one row of the shards."""
    with (tasks.raw / f"{number // 8:06d}.tar").open("rb") as stream:
        sample = list(read_raw(stream, ""))[number % 8]
    name = Path(sample.metadata["source"]).relative_to("images")
    return tuple(tasks.scenes / kind / name for kind in ("images", "masks", "segmentations"))  # type: ignore[return-value]


@pytest.mark.parametrize("task", ["none", "class", "inpaint", "semantic", "both"])
def test_images_are_the_same_for_every_batch_size_and_number_of_processes(
    tasks: Tasks, tmp_path: Path, task: str
) -> None:
    common: tuple[object, ...] = ("sample", tasks.runs / task, "--seeds", "0-63", *STEPS)
    common += ("--shards", tasks.raw) if task not in ("none", "class") else ()
    for size in (1, 7, 64):
        assert lfm(*common, "--out", tmp_path / str(size), "--batch-size", size).exit_code == 0
    for rank in ("0", "1"):
        env = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        assert lfm(*common, "--out", tmp_path / "ranks", env=env).exit_code == 0
        assert (tmp_path / "ranks" / "samples.json").exists() == (rank == "1")
    names = [f"{seed:06d}.png" for seed in range(64)]
    expected = {name: pixels_of(tmp_path / "64" / name).astype(int) for name in names}
    for other in ("1", "7", "ranks"):
        assert {path.name for path in (tmp_path / other).iterdir()} == {
            *names,
            "grid.png",
            "recipe.json",
            "samples.json",
        }
        for name in names:  # kernels for other batch sizes may round a level the other way
            assert abs(pixels_of(tmp_path / other / name) - expected[name]).max() <= 1
            assert image_files.note(str(tmp_path / other / name)) == image_files.note(str(tmp_path / "64" / name))
        for name in ("samples.json", "recipe.json"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "64" / name).read_bytes()
    assert len({value.tobytes() for value in expected.values()}) == 64


@pytest.mark.slow
def test_processes_that_it_starts_make_the_same_images(tasks: Tasks, tmp_path: Path) -> None:
    common = ("sample", tasks.runs / "class", "--seeds", "0-5", *STEPS)
    for count in (1, 2):
        result = lfm(*common, "--out", tmp_path / str(count), "--num-gpus", count)
        assert result.exit_code == 0 and "grid.png" in result.stdout, result.output
    for path in (tmp_path / "1").iterdir():
        assert (tmp_path / "2" / path.name).read_bytes() == path.read_bytes()


def test_each_seed_fills_a_mask_differently_and_known_pixels_stay(tasks: Tasks, tmp_path: Path) -> None:
    image, mask, _ = files(tasks)
    common = ("sample", tasks.runs / "inpaint", "--image", image, "--mask", mask, "--seeds", "0-3", *STEPS)
    assert lfm(*common, "--out", tmp_path / "a").exit_code == 0
    assert lfm(*common, "--out", tmp_path / "b", "--no-composite").exit_code == 0
    known, original = pixels_of(mask) < 128, pixels_of(image)
    images = [pixels_of(tmp_path / "a" / f"00000{seed}.png") for seed in range(4)]
    for number, one in enumerate(images):
        assert np.array_equal(one[known], original[known])
        plain = pixels_of(tmp_path / "b" / f"00000{number}.png")
        assert np.array_equal(one[~known], plain[~known]) and not np.array_equal(plain[known], original[known])
        assert not any(np.array_equal(one, other) for other in images[:number])
    records = {name: json.loads((tmp_path / name / "samples.json").read_text()) for name in "ab"}
    assert [records[name]["known_pixels"] for name in "ab"] == ["put back", "as the model made them"]
    assert records["a"]["pictures"][0]["condition"] == image.name


def test_pixels_under_the_mask_have_no_influence(tasks: Tasks) -> None:
    model = library.load(str(tasks.runs / "inpaint"))
    image, mask, _ = (pixels_of(path) for path in files(tasks))
    changed = np.where(mask[..., None] > 0, 255 - image, image)
    one, other = (
        model.sample([0], images=pixels, masks=mask, num_steps=2, composite=False).images for pixels in (image, changed)
    )
    assert np.array_equal(one, other)
    known = np.where(mask[..., None] > 0, image, 255 - image)
    assert not np.array_equal(model.sample([0], images=known, masks=mask, num_steps=2, composite=False).images, one)


@pytest.mark.parametrize("rule", ["centre", "pad", "squash"])
def test_files_of_any_size_are_cropped_as_shards_are(tasks: Tasks, tmp_path: Path, rule: str) -> None:
    """The files are enlarged by whole numbers, so that nearest neighbour restores the centre of a segmentation."""
    from pipelines.common.sample_jobs.read_conditions import read_conditions
    from pipelines.common.sample_jobs.sample_options import SampleConfig

    paths = tuple(tmp_path / f"{name}.png" for name in ("image", "mask", "ids"))
    for path, source in zip(paths, files(tasks), strict=True):
        wide = np.pad(pixels_of(source), ((0, 0), (8, 8), (0, 0))[: pixels_of(source).ndim], mode="edge")
        Image.fromarray(wide.repeat(3, 0).repeat(3, 1)).save(path)
    image, mask, ids = map(str, paths)
    config = SampleConfig("run", "out", image=(image,), mask=(mask,), crop=rule)
    inpaint, _ = read_conditions(config, library.load(str(tasks.runs / "inpaint")), 1)
    assert inpaint.images is not None and inpaint.masks is not None
    assert np.array_equal(inpaint.images[0], crop(Image.open(image), 16, rule))
    assert np.array_equal(inpaint.masks[0], crop(Image.open(mask).convert("L"), 16, rule) >= 128)
    config = SampleConfig("run", "out", segmentation=(ids,), crop=rule)
    semantic, _ = read_conditions(config, library.load(str(tasks.runs / "semantic")), 1)
    assert semantic.segmentation is not None
    assert np.array_equal(semantic.segmentation[0], pixels_of(files(tasks)[2])) == (rule == "centre")
    assert np.array_equal(semantic.segmentation[0], crop_ids(pixels_of(paths[2]), (96, 48), 16, rule, 255))


@pytest.mark.parametrize("task", ["inpaint", "semantic", "both"])
def test_conditions_of_shards_and_of_files_are_equal(tasks: Tasks, tmp_path: Path, task: str) -> None:
    image, mask, ids = files(tasks)
    inputs = ("--segmentation", ids) if task == "semantic" else ("--image", image, "--mask", mask)
    classes = ("--class-index", CLASS_NAMES.index(image.parent.name)) if task == "both" else ()
    rest = () if task == "semantic" else ("--no-composite",)
    common = ("sample", tasks.runs / task, "--seeds", "0-1", *STEPS, *rest)
    assert lfm(*common, *inputs, *classes, "--out", tmp_path / "files").exit_code == 0
    for kind in (tasks.raw, tasks.latents):
        out = tmp_path / kind.name
        result = lfm(*common, "--shards", kind, "--rows", 0, "--out", out)
        assert result.exit_code == 0, result.stderr
        for seed in range(2):
            one, other = (pixels_of(folder / f"00000{seed}.png").astype(int) for folder in (out, tmp_path / "files"))
            assert abs(one - other).max() <= (1 if kind == tasks.latents else 0)  # latents are stored as float16


def test_there_is_one_seed_for_each_row_by_default(tasks: Tasks, tmp_path: Path) -> None:
    common = ("sample", tasks.runs / "semantic", "--out", tmp_path / "out", "--shards", tasks.raw, "--dry-run")
    assert "4 images of 16 x 16" in lfm(*common, "--rows", "17,3,8-9").stdout
    assert "16 images of 16 x 16" in lfm(*common).stdout
    assert "2 images of 16 x 16" in lfm(*common, "--rows", "17,3,8-9", "--seeds", "5,7").stdout
    assert_one_line(lfm(*common, "--seeds", ""), "--seeds")


def test_the_chosen_rows_of_shards_are_read(tasks: Tasks) -> None:
    from pipelines.common.sample_jobs.read_conditions import read_conditions
    from pipelines.common.sample_jobs.sample_options import SampleConfig

    model = library.load(str(tasks.runs / "semantic"))
    everything = [pixels_of(files(tasks, row)[2]) for row in range(20)]
    for folder in (tasks.raw, tasks.latents):
        config = SampleConfig("run", "out", shards=str(folder), rows="17,3,8-9")
        conditions, names = read_conditions(config, model, 1)
        assert conditions.segmentation is not None and len(names) == 4
        for row, ids in zip((17, 3, 8, 9), conditions.segmentation, strict=True):
            assert np.array_equal(ids, everything[row])


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("inpaint", ("--image", "{image}", "--mask", "{black}"), "mask of scene.png: nothing is missing"),
        ("inpaint", ("--image", "{image}", "--mask", "{white}"), "mask of scene.png: everything is missing"),
        (
            "inpaint",
            ("--image", "{large}", "--mask", "{large}"),
            "large.png: is 24 x 20 pixels, the model makes 16 x 16; scale it first, or set --crop",
        ),
        ("inpaint", ("--shards", "{raw}", "--crop", "pad"), "cannot be combined with --crop"),
        ("class", ("--crop", "pad"), "--crop pad: there is no --image"),
        (
            "inpaint",
            ("--image", "{image}", "--mask", "{large}", "--crop", "pad"),
            "large.png: is 24 x 20 pixels, but its image 16 x 16",
        ),
        ("semantic", ("--segmentation", "{large}"), "large.png: is 24 x 20 pixels, the model makes 16 x 16"),
        ("inpaint", ("--image", "{image}", "--mask", "{image}", "--crop", "middle"), "--crop middle: unknown"),
        ("inpaint", ("--image", "{image}"), "set --image and --mask, or --shards"),
        ("inpaint", (), "was trained to inpaint: set --image and --mask, or --shards"),
        ("inpaint", ("--image", "{image}", "--mask", "{nothing}"), "nothing.png"),
        ("inpaint", ("--shards", "{latents}"), "latents have no pixels to put back"),
        ("inpaint", ("--shards", "{flat}"), "its samples have no mask"),
        ("inpaint", ("--shards", "{raw}", "--rows", "20"), "--rows 20: out of range"),
        ("inpaint", ("--shards", "{raw}", "--image", "{image}"), "cannot be combined with --image"),
        ("undropped", ("--shards", "{raw}", "--guidance-scale", "2"), "condition_dropout 0; set it to 1"),
        ("semantic", ("--segmentation", "{grey}"), "class id 200: the model knows 11 labels: 0 sky, 1 ground, "),
        ("semantic", ("--segmentation", "{image}"), "class ids are grey levels"),
        ("semantic", (), "was trained on segmentation maps: set --segmentation"),
        ("semantic", ("--class-index", "1", "--shards", "{raw}"), "trained without classes"),
        ("semantic", ("--shards", "{raw}", "--no-composite"), "--no-composite: there are no known pixels"),
        ("class", ("--image", "{image}", "--mask", "{image}"), "not trained to inpaint; leave them out"),
        ("class", ("--shards", "{raw}"), "takes no masks or segmentations"),
        ("class", ("--rows", "1"), "--rows 1: selects rows of --shards"),
        ("class", ("--guidance-scale", "1,2,2"), "names a scale twice"),
        ("class", ("--guidance-scale", "2", "--guidance-interval", "0.8,0.2"), "two times between 0 and 1"),
        ("class", ("--guidance-interval", "0.2,0.8"), "has no effect at --guidance-scale 1"),
        ("class", ("--autoguidance", "{runs}/class"), "has no effect at --guidance-scale 1"),
        ("class", ("--autoguidance", "{runs}/both", "--guidance-scale", "2"), "its condition_channels is 5"),
        ("class", ("--trajectory", "jpg"), "--trajectory jpg: unknown"),
        ("class", ("--trajectory", "png", "--solver", "torchdiffeq-dopri5"), "does not show its steps"),
        ("class", ("--times", "1,0.5"), "must decrease from 1 to 0"),
        ("none", ("--guidance-scale", "2"), "guidance needs a conditional model"),
        ("none", ("--class", "star"), "--class star: the model was trained without classes"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    tasks: Tasks, small_set: SmallSet, tmp_path: Path, task: str, arguments: tuple[str, ...], message: str
) -> None:
    places = {"raw": tasks.raw, "latents": tasks.latents, "runs": tasks.runs, "flat": small_set.raw}
    for name, pixels in {
        "scene": pixels_of(files(tasks)[0]),
        "black": np.zeros((16, 16), np.uint8),
        "white": np.full((16, 16), 255, np.uint8),
        "grey": np.full((16, 16), 200, np.uint8),
        "large": np.zeros((20, 24), np.uint8),
    }.items():
        places[name] = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(places[name])
    places |= {"image": places["scene"], "nothing": tmp_path / "nothing.png"}
    values = [argument.format(**places) for argument in arguments]
    assert_one_line(lfm("sample", tasks.runs / task, "--out", tmp_path / "out", *values), message)
    assert not (tmp_path / "out").exists()


def test_the_shards_of_another_autoencoder_are_refused(tasks: Tasks, tmp_path: Path) -> None:
    from tests.support.commands import make_autoencoder

    other = make_autoencoder(tmp_path / "other", seed=5)
    encode.run(encode.EncodeConfig(str(tasks.raw), str(tmp_path / "latents"), str(other)), ALONE)
    result = lfm("sample", tasks.runs / "inpaint", "--out", tmp_path / "out", "--shards", tmp_path / "latents")
    assert_one_line(result, tmp_path / "latents", "another autoencoder")


def test_several_scales_make_a_sheet(tasks: Tasks, tmp_path: Path) -> None:
    common = ("sample", tasks.runs / "class", "--seeds", "4,6", "--class-index", 3, *STEPS)
    assert lfm(*common, "--guidance-scale", "1,2.5,4", "--out", tmp_path / "sheet").exit_code == 0
    assert lfm(*common, "--guidance-scale", 2.5, "--out", tmp_path / "one").exit_code == 0
    for seed in (4, 6):
        names = tmp_path / "sheet" / f"00000{seed}-2.5.png", tmp_path / "one" / f"00000{seed}.png"
        assert names[0].read_bytes() == names[1].read_bytes()
    assert pixels_of(tmp_path / "sheet" / "grid.png").shape == (8 * 34, 8 * 52, 3)  # two seeds, three scales
    record = json.loads((tmp_path / "sheet" / "samples.json").read_text())
    assert [entry["nfe"] for entry in record["pictures"]] == [4, 8, 8] * 2
    assert record["nfe"] == {"mean": 20 / 3, "min": 4, "max": 8}


def test_a_weaker_model_and_an_interval_guide(tasks: Tasks, tmp_path: Path) -> None:
    common = ("sample", tasks.runs / "class", "--seeds", "0-1", "--solver", "euler", "--num-steps", 4)
    variants: dict[str, tuple[object, ...]] = {
        "plain": (),
        "self": ("--guidance-scale", 3, "--autoguidance", tasks.runs / "class"),
        "null": ("--guidance-scale", 3),
        "interval": ("--guidance-scale", 3, "--guidance-interval", "0.3,0.8"),
    }
    nfe = {}
    for name, flags in variants.items():
        assert lfm(*common, *flags, "--out", tmp_path / name).exit_code == 0
        nfe[name] = json.loads((tmp_path / name / "samples.json").read_text())["nfe"]["mean"]
    assert nfe == {"plain": 4, "self": 8, "null": 8, "interval": 6}  # times 1, 0.75, 0.5, 0.25
    first = {name: pixels_of(tmp_path / name / "000000.png") for name in variants}
    assert np.array_equal(first["self"], first["plain"])  # guided away from itself
    assert not np.array_equal(first["null"], first["plain"])
    assert not np.array_equal(first["interval"], first["null"])


@pytest.mark.parametrize("solver", ["heun", "sde", "bosh3"])
def test_a_trajectory_ends_in_the_images(tasks: Tasks, tmp_path: Path, solver: str) -> None:
    steps = ("--atol", 0.1, "--rtol", 0.1) if solver == "bosh3" else STEPS
    common = ("sample", tasks.runs / "class", "--seeds", "0-2", "--solver", solver, "--time", *steps)
    result = lfm(*common, "--trajectory", "png", "--out", tmp_path / "png")
    assert result.exit_code == 0, result.stderr
    strip = pixels_of(tmp_path / "png" / "trajectory.png")
    assert strip.shape == (4 * 52, 4 * (10 * 18 - 2), 3)
    for row in range(3):
        last = strip[row * 72 : row * 72 + 64 : 4, -64::4]
        assert np.array_equal(last, pixels_of(tmp_path / "png" / f"00000{row}.png"))
    timing = json.loads((tmp_path / "png" / "timing.json").read_text())
    assert {"solver, batch 1", "decoder, batch 1", "solver, batch 3", "decoder, batch 3"} < timing.keys()
    assert "images/s" in result.stdout
    assert lfm(*common, "--trajectory", "gif", "--out", tmp_path / "png").exit_code == 0
    with Image.open(tmp_path / "png" / "trajectory.gif") as film:
        assert film.n_frames > 1 and film.size == (4 * 52, 64)


def test_a_killed_command_resumes_and_computes_no_image_twice(tasks: Tasks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("sample", tasks.runs / "semantic", "--shards", tasks.raw, "--seeds", "0-3", "--out", out, *STEPS)
    command = (*command, "--batch-size", 1)
    assert lfm(*command).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    written_at = (out / "000001.png").stat().st_mtime_ns
    (out / "samples.json").unlink()
    (out / "000000.png").unlink()
    (out / "000002.png").write_bytes((out / "000003.png").read_bytes())  # the image of another seed
    (out / "000003.png").write_bytes(before["000003.png"][:-50] + b"?" + before["000003.png"][-49:])  # of its pixels
    assert lfm(*command).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert (out / "000001.png").stat().st_mtime_ns == written_at


def test_a_folder_whose_recipe_was_removed_is_finished(tasks: Tasks, tmp_path: Path) -> None:
    command = ("sample", tasks.runs / "class", "--out", tmp_path / "out", "--seeds", "0-3", *STEPS)
    assert lfm(*command).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "recipe.json").unlink()
    (tmp_path / "out" / "000001.png").unlink()
    assert lfm(*command).exit_code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "recipe.json").unlink()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert_one_line(lfm(*command), "out: holds something else than files of lfm")


def test_the_python_interface_makes_the_same_images(tasks: Tasks, tmp_path: Path) -> None:
    model = library.load(str(tasks.runs / "both"))
    image, mask, _ = files(tasks)
    with Image.open(image) as one, Image.open(mask) as hole:
        samples = model.sample(range(3), class_index=[2, 5], images=one, masks=hole, num_steps=2, guidance_scale=2)
    assert samples.images.shape == (3, 16, 16, 3) and samples.images.dtype == np.uint8
    assert samples.latents.shape == (3, 4, 8, 8) and samples.nfe.tolist() == [8] * 3
    assert samples.pil_images[1].size == (16, 16) and samples.seeds == (0, 1, 2)
    flags = ("--image", image, "--mask", mask, "--class-index", "2,5", "--guidance-scale", 2)
    assert lfm("sample", tasks.runs / "both", *flags, "--seeds", "0-2", *STEPS, "--out", tmp_path).exit_code == 0
    for seed, pixels in enumerate(samples.images):
        assert np.array_equal(pixels_of(tmp_path / f"00000{seed}.png"), pixels)


def test_the_precision_is_that_of_training_unless_chosen_and_is_recorded(tasks: Tasks, tmp_path: Path) -> None:
    tensors, header = load_weights(str(tasks.runs / "class"))
    run = tmp_path / "run"
    run.mkdir()
    header = dataclasses.replace(header, config={"train": {"precision": "bf16"}})
    save_weights(str(run / WEIGHTS), tensors, header)
    common = ("sample", run, "--seeds", "0-1", *STEPS)
    for name, flags in {"default": (), "bf16": ("--precision", "bf16"), "fp32": ("--precision", "fp32")}.items():
        assert lfm(*common, *flags, "--out", tmp_path / name).exit_code == 0
    records = {name: json.loads((tmp_path / name / "samples.json").read_text()) for name in ("default", "bf16", "fp32")}
    assert [record["precision"] for record in records.values()] == ["bf16", "bf16", "fp32"]
    assert records["default"] == records["bf16"]
    images = {name: (tmp_path / name / "000000.png").read_bytes() for name in records}
    assert images["default"] == images["bf16"] != images["fp32"]
    refusal = lfm(*common, "--precision", "fp32", "--out", tmp_path / "bf16")
    assert_one_line(refusal, 'precision ("bf16", now null)', "--overwrite")
    assert_one_line(lfm(*common, "--precision", "fp8", "--out", tmp_path / "fp8"), "--precision fp8: unknown")


@pytest.mark.parametrize("flags", [(), ("--precision", "fp32"), ("--precision", "tf32")])
def test_a_folder_without_a_precision_is_one_of_fp32(tasks: Tasks, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Recipes of before the option have no key; without a GPU, tf32 is fp32."""
    common = ("sample", tasks.runs / "class", "--seeds", "0-1", *STEPS, "--out", tmp_path)
    assert lfm(*common).exit_code == 0
    assert "precision" not in json.loads((tmp_path / "recipe.json").read_text())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    assert lfm(*common, *flags).exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")} == before
    assert_one_line(lfm(*common, "--precision", "bf16"), "made with different settings: precision")


def test_on_a_gpu_blocks_are_compiled_where_the_network_is_evaluated_often(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether images exist already makes no difference; the images are those of blocks that are not compiled."""
    compiled: list[int] = []

    def compile_eagerly(network: DiT, **options: object) -> None:
        compiled.append(1)
        compile_blocks(network, backend="eager")

    compile_blocks = DiT.compile_blocks
    monkeypatch.setattr(DiT, "compile_blocks", compile_eagerly)
    monkeypatch.setattr(factory, "can_compile_on_gpu", lambda: True)
    common = ("sample", tasks.runs / "class", "--seeds", "0-9", "--batch-size", 1, "--solver", "euler")
    for name, flags, times in (
        ("few", ("--num-steps", 19), 0),
        ("many", ("--num-steps", 20), 1),
        ("guided", ("--num-steps", 10, "--guidance-scale", 2), 1),
        ("off", ("--num-steps", 20, "--no-compile"), 0),
    ):
        compiled.clear()
        assert lfm(*common, *flags, "--out", tmp_path / name).exit_code == 0
        assert len(compiled) == times, name
    (tmp_path / "many" / "000003.png").unlink()
    compiled.clear()
    assert lfm(*common, "--num-steps", 20, "--out", tmp_path / "many").exit_code == 0
    assert compiled == [1]
    for path in (tmp_path / "off").glob("0*.png"):
        assert (pixels_of(path) == pixels_of(tmp_path / "many" / path.name)).all(), path.name


def test_on_a_gpu_every_batch_is_filled_up(tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of a resumed command, of several guidance scales and of a trajectory; the images stay the same."""
    sizes: set[int] = set()

    def count_rows(network: torch.nn.Module, state: torch.Tensor, *inputs: object) -> torch.Tensor:
        sizes.add(len(state))
        return forward(network, state, *inputs)

    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", count_rows)
    common = ("sample", tasks.runs / "class", "--seeds", "0-6", "--batch-size", 4, *STEPS)
    common = (*common, "--guidance-scale", "1,2", "--trajectory", "png")
    assert lfm(*common, "--out", tmp_path / "plain").exit_code == 0
    assert sizes == {3, 4}
    sizes.clear()
    monkeypatch.setattr(TrainedModel, "fills_batches", True)
    assert lfm(*common, "--out", tmp_path / "filled").exit_code == 0
    (tmp_path / "filled" / "000005-2.png").unlink()
    assert lfm(*common, "--out", tmp_path / "filled").exit_code == 0
    assert sizes == {4}
    for path in (tmp_path / "plain").glob("*.png"):
        difference = pixels_of(path).astype(int) - pixels_of(tmp_path / "filled" / path.name)
        assert abs(difference).max() <= 1, path.name
    plain, filled = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("plain", "filled"))
    assert plain == filled
