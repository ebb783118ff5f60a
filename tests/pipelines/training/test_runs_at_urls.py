"""Trainings whose run is a URL of a real object store: another machine continues them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

import lfm as library
from lfm import storage
from lfm.training.run_folder import STATE
from tests.support.commands import lfm
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.object_store import BUCKET, ObjectStore, requires_object_store
from tests.support.training_runs import assert_same_weights, losses, plan, start, train

pytestmark = [pytest.mark.slow, requires_object_store, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    server = ObjectStore(tmp_path_factory.mktemp("store") / "weed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server
    server.close()


def copied(url: str, path: Path) -> Path:
    """Return a local copy of a run at a URL."""
    fsspec.filesystem("s3").get(url, str(path), recursive=True)
    return path


def machine(tmp_path: Path, name: str) -> str:
    """Return the setting of a machine: a cache of its own."""
    return f"data.cache={tmp_path / name}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_is_continued_by_another_machine(
    store: ObjectStore, experiment: Path, tmp_path: Path, ranks: int
) -> None:
    url = f"s3://{BUCKET}/killed-{ranks}"
    settings = (f"run={url}", "train.num_steps=400", "train.checkpoint_every=20", "train.log_every=20")
    processes = start(experiment, *settings, machine(tmp_path, "first"), ranks=ranks)
    while not (storage.exists(url) and any(name.endswith(STATE) for name in storage.find(url))):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    result = train(experiment, *settings, machine(tmp_path, "second"), ranks=ranks)
    assert result.returncode == 0 and ", from samples-" in result.stdout, result.stderr
    assert f"lfm sample {url} --out DIR" in result.stdout
    local = (f"run={tmp_path / 'whole'}", *settings[1:])
    assert train(experiment, *local, ranks=ranks).returncode == 0
    carried = copied(url, tmp_path / "carried")
    assert_same_weights(carried, tmp_path / "whole")
    assert losses(carried) == losses(tmp_path / "whole")
    for path in (tmp_path / "whole" / "checkpoints").rglob("master-*.safetensors"):
        assert path.read_bytes() == (carried / path.relative_to(tmp_path / "whole")).read_bytes()
    assert json.loads((carried / "config.json").read_text())["run"] == url


def test_commands_read_a_run_at_a_url(store: ObjectStore, experiment: Path, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/read"
    assert train(experiment, f"run={url}", machine(tmp_path, "first")).returncode == 0
    status = lfm("status", url)
    assert status.exit_code == 0 and "160 of 160 samples" in status.output
    assert library.load(url).sample([0]).images.shape == (1, 16, 16, 3)
    again = plan(experiment, f"run={url}", machine(tmp_path, "second"))
    assert again.exit_code == 0 and "from samples-000000000160" in again.output


def test_an_unreachable_store_delays_no_step_and_loses_nothing(
    store: ObjectStore, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All uploads of the first run fail, by an answer that is final; the same command carries the run afterwards."""
    url = f"s3://{BUCKET}/refused"
    settings = (f"run={url}", machine(tmp_path, "first"))
    with FaultProxy(store.port, lambda method, path: method == "PUT", always=Fault("status", 403)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        result = train(experiment, *settings)
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(error) == 1 and error[0].startswith(f"error: {url}: "), result.stderr
    assert "could not be carried there" in error[0] and "run the same command on this machine" in error[0]
    assert "the run is not carried there" in result.stderr
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    s3fs.S3FileSystem.clear_instance_cache()
    assert train(experiment, *settings).returncode == 0
    assert train(experiment, f"run={tmp_path / 'whole'}").returncode == 0
    assert_same_weights(copied(url, tmp_path / "carried"), tmp_path / "whole")


def test_broken_uploads_are_repeated(
    store: ObjectStore, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/broken"
    faults = [fault for fault in (Fault("drop"), Fault("status", 503), Fault("lost")) for _ in range(2)]
    with FaultProxy(store.port, lambda method, path: method == "PUT", plan=[*faults]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        result = train(experiment, f"run={url}", machine(tmp_path, "first"))
        assert result.returncode == 0, result.stderr
        assert not proxy.plan
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    s3fs.S3FileSystem.clear_instance_cache()
    assert train(experiment, f"run={tmp_path / 'whole'}").returncode == 0
    assert_same_weights(copied(url, tmp_path / "carried"), tmp_path / "whole")
