"""Every benchmark in its smallest size: it runs to the end and prints its table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import REPOSITORY, SmallSet

pytestmark = pytest.mark.slow
BENCHMARKS = REPOSITORY / "benchmarks"


def run_here(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run a benchmark in this process, which saves the seconds of a start."""
    path = BENCHMARKS / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments), "--dry-run"])
    module.main()


def run_apart(name: str, *arguments: object) -> str:
    """Run a benchmark that trains in a process of its own, and return its output."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *arguments, "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_each_benchmark_is_tested() -> None:
    tested = Path(__file__).read_text()
    for path in BENCHMARKS.glob("*.py"):
        assert f'("{path.stem}"' in tested, path


def test_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        Image.new("RGB", (300, 280), (80 * number, 20, 200)).save(tmp_path / f"{number}.jpg")
    run_here("shard", monkeypatch, tmp_path)
    assert "lfm shard / ShardWriter" in capsys.readouterr().out


def test_encode(small_set: SmallSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here("encode", monkeypatch, small_set.raw)
    assert "rate of the stage / bare network" in capsys.readouterr().out


def test_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here("stream", monkeypatch)
    assert "CPU of webdataset / stream" in capsys.readouterr().out


def test_columns() -> None:
    assert "a pattern of sources" in run_apart("columns")


def test_evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    run_here("evaluate", monkeypatch)
    assert "peak memory of 1,000 x 2,048 features" in capsys.readouterr().out


def test_train() -> None:
    assert "(c) ours / plain PyTorch" in run_apart("train", "--backbone", "unet")


def test_gpu(tmp_path: Path) -> None:
    output = run_apart("gpu", "--out", tmp_path / "gpu.json")
    assert "## checkpoint" in output and "| error |" not in output
    assert len(json.loads((tmp_path / "gpu.json").read_text())["zero"]) == 3


def test_ablation(tmp_path: Path) -> None:
    assert "FLOPs/sample" in run_apart("ablation", tmp_path)


def test_tasks(tmp_path: Path) -> None:
    assert "with another scene's segmentation" in run_apart("tasks", tmp_path, "--backbone", "unet")


def test_placebo(tmp_path: Path) -> None:
    """Two steps of two configurations."""
    assert "not paired: train.seed differs" in run_apart("placebo", tmp_path)
    assert list(json.loads((tmp_path / "placebo.json").read_text())["configurations"]) == ["recipe", "placebo"]


def test_width(tmp_path: Path) -> None:
    assert "| reference_width 64 | 64 |" in run_apart("width", tmp_path)


def test_record(tmp_path: Path) -> None:
    """Two steps and two seeds of the recipe and of one entry."""
    assert "samples to the loss" in run_apart("record", tmp_path)
    lines = (tmp_path / "record.jsonl").read_text()
    assert "| paper | 2 |" in (tmp_path / "record.md").read_text() and len(lines.splitlines()) == 2


def test_record_on_photographs(small_set: SmallSet, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    images = small_set.images
    assert "samples to the fd-lite" in run_apart("record", tmp_path, "--images", images, "--test", images)
    assert "| paper | 2 |" in (tmp_path / "photographs" / "record_photographs.md").read_text()


def test_backbones(tmp_path: Path) -> None:
    assert "| unet | 4 |" in run_apart("backbones", tmp_path)
    backbones = json.loads((tmp_path / "backbones.json").read_text())["backbones"]
    assert all(0 <= line["recognised"]["final"][0] <= 1 for line in backbones.values())


def test_demo(tmp_path: Path) -> None:
    assert "| demo_quick | 8 |" in run_apart("demo", tmp_path)


def test_mixtures(tmp_path: Path) -> None:
    assert "| replay | all |" in run_apart("mixtures", tmp_path, "--uses", "replay")


def test_finetune(tmp_path: Path) -> None:
    """Two steps of each method, from a source of two steps."""
    output = run_apart("finetune", tmp_path, "--targets", "classes")
    assert "| DiffFit |" in output
    methods = json.loads((tmp_path / "finetune.json").read_text())["classes"]["methods"]
    assert methods["LoRA"]["parameters"] < 0.1 * methods["full"]["parameters"]


def test_memorisation(tmp_path: Path) -> None:
    """Two steps on 4 and on 8 scenes; the second time, everything exists."""
    pytest.importorskip("efficientnet_lite_pytorch")
    first = run_apart("memorisation", tmp_path)
    assert "| 4 | features |" in first and "| 8 | latents |" in first
    assert run_apart("memorisation", tmp_path).splitlines()[-4:] == first.splitlines()[-4:]
    with Image.open(tmp_path / "few" / "report" / "nearest.png") as image:
        assert image.width > 3 * 64


def test_forecast(tmp_path: Path) -> None:
    """One network at one stage."""
    assert "disk: 2 of 2 within 5%" in run_apart("forecast", "--out", tmp_path / "forecast.json")
    comparisons = json.loads((tmp_path / "forecast.json").read_text())["comparisons"]
    assert [each["quantity"] for each in comparisons] == 2 * ["memory", "disk", "time"]
    assert all(abs(each["error"]) < 0.25 for each in comparisons if each["quantity"] == "memory")
