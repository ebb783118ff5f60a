"""`lfm ui`: a page in the browser that makes images with trained models.

It is served to this machine alone unless another address is chosen. Nothing is sent anywhere: gradio's statistics, its check
for new versions and its public links are off, and the page loads nothing from other hosts.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lfm import storage, weights_file
from lfm.errors import ConfigError
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.web.image_maker import ImageMaker
from pipelines.web.web_options import UiConfig

PRIVACY = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
SECONDS_TO_CLOSE = 10
MOST_UPLOAD = 200_000_000  # bytes of a file
CSS = ".lfm-canvas, .lfm-canvas * {user-select: none}"  # else a stroke selects text, and the next one drags it


def run(config: UiConfig, announce: Callable[[str], None]) -> NoReturn:
    """Serve the page until the process is interrupted, and end the process.

    Args:
        config: the options.
        announce: called with one line as soon as the page can be opened.

    Raises:
        ConfigError: gradio is missing, or the address is in use or not of this machine.
        CheckpointError: a run has no weights, or they cannot be read; the weights of the first run are loaded at once.
    """
    code = 0
    with serving(config) as address:
        announce(f"{address} makes images with {', '.join(config.runs)}; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except SystemExit as stop:  # by SIGTERM
            code = int(stop.code or 0)
        limit = threading.Timer(SECONDS_TO_CLOSE, storage.exit_at_once, (code,))
        limit.daemon = True
        limit.start()
    # Threads of the server that make images, or wait for a browser, would keep the process alive.
    sys.stdout.flush()
    sys.stderr.flush()
    storage.exit_at_once(code)


@contextmanager
def serving(config: UiConfig) -> Iterator[str]:
    """Serve the page in the block, and provide its address; raises as `run` does."""
    headers = {path: weights_file.load_header(path) for path in config.runs}
    _check_address(config.host, config.port)
    os.environ.update(PRIVACY)
    with tempfile.TemporaryDirectory(prefix="lfm-ui-") as folder:
        previous = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads and of images that pages show
        try:
            page = _build_page(headers, config, Path(folder))
            page.launch(
                server_name=config.host,
                server_port=config.port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                max_file_size=MOST_UPLOAD,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                css=CSS,
            )
            try:
                host = f"[{config.host}]" if ":" in config.host else config.host
                yield f"http://{host}:{config.port}"
            finally:
                page.close(verbose=False)
        finally:
            if previous is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = previous


def _build_page(headers: Mapping[str, WeightsHeader], config: UiConfig, folder: Path) -> Any:
    """Return the page, a `gradio.Blocks`."""
    try:
        import gradio
    except ImportError as error:
        raise ConfigError("the page needs gradio: `pip install lfm[ui]`") from error
    from pipelines.web.run_panel import ImageService, RunPanel

    maker = ImageMaker(factory.device(World()), config.batch_size, config.autoencoder)
    maker.prepare(config.runs[0])
    service = ImageService(maker, folder)
    with gradio.Blocks(title="lfm", analytics_enabled=False, fill_width=True) as page, gradio.Tabs():
        for number, (path, header) in enumerate(headers.items()):
            with gradio.Tab(_tab_name(path, headers)):
                RunPanel(service, path, header, number)
    return page


def _tab_name(path: str, paths: Mapping[str, object]) -> str:
    """Return the last part of a path, or all of it where another one ends the same."""
    names = [other.rstrip("/").rpartition("/")[2] for other in paths]
    own = path.rstrip("/").rpartition("/")[2]
    return own if names.count(own) == 1 else path


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on: gradio would wait for it, or choose another one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except socket.gaierror as error:
        raise ConfigError(f"`host` {host}: no such address ({error.strerror}); choose one of this machine") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"`port` {port}: is in use; end the program that has it, or choose another") from error
        raise ConfigError(
            f"`host` {host}, `port` {port}: cannot be listened on ({error.strerror}); choose others"
        ) from error
