"""What keeps `lfm ui` from starting is one line."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.support.commands import Tasks, assert_one_line, free_port, lfm


def test_a_run_that_does_not_exist(tasks: Tasks, tmp_path: Path) -> None:
    result = lfm("ui", tasks.runs / "none", tmp_path / "nowhere")
    assert_one_line(result, f"{tmp_path / 'nowhere'}: no such file or folder")
    assert lfm("ui").exit_code == 2


def test_a_port_in_use(tasks: Tasks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert_one_line(lfm("ui", tasks.runs / "none", "--port", port), f"--port {port}: is in use")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine(tasks: Tasks, host: str) -> None:
    assert_one_line(lfm("ui", tasks.runs / "none", "--host", host, "--port", free_port()), f"--host {host}")


def test_without_gradio_the_error_names_the_extra(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it fails
    assert_one_line(lfm("ui", tasks.runs / "none", "--port", free_port()), "pip install lfm[ui]")
