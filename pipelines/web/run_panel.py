"""The controls of one run on the page, and the images that they make. Which controls there are follows its condition."""

from __future__ import annotations

import html
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from lfm.data.transforms import CROPS
from lfm.errors import LfmError
from lfm.precision import PRECISIONS, trained_precision
from lfm.solvers import DEFAULT_STEPS, SOLVERS, Solving
from lfm.weights_file import WeightsHeader
from pipelines.web import canvas, uploads
from pipelines.web.image_maker import ImageMaker, PageImages, PageRequest

CANVAS_CLASS = "lfm-canvas"
MASK_COLOUR = "#e6007e"  # rare in photographs
MOST_RADIO_BUTTONS = 24  # more labels get a list that can be searched
DEFAULT_NUM_CLASSES, DEFAULT_SEEDS = 4, "0-3"
MOST_STEPS, MOST_GUIDANCE = 250, 10
MOST_FOLDERS = 20  # of finished requests, whose images pages may still show
PROGRESS = gr.Progress()
# gradio lets go of the brush when its colour changes, and the next stroke would be lost
TAKE_BRUSH = """() => {
    const editor = document.querySelector("#CANVAS")
    const takeBrush = () => editor.querySelector("button[title=Brush]")?.click()
    editor.addEventListener("pointerenter", takeBrush, {once: true})
}"""


class ImageService:
    """Makes images for all pages that are open, each request in a folder of its own; the oldest ones are deleted.

    Args:
        maker: makes the images.
        folder: for the folders of the requests.
    """

    def __init__(self, maker: ImageMaker, folder: Path) -> None:
        self.maker, self.folder = maker, folder
        self._folders: deque[str] = deque()
        self._stopped: set[str | None] = set()  # sessions that have pressed Stop since their last request began

    def make(self, request: PageRequest, session: str | None, on_progress: Callable[[float], None]) -> PageImages:
        """Make the images of a request of a session; see `ImageMaker.make`.

        Raises:
            LfmError: the session was stopped.
        """
        self._stopped.discard(session)
        while len(self._folders) >= MOST_FOLDERS:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        self._folders.append(tempfile.mkdtemp(dir=self.folder, prefix="images-"))

        def report(share: float) -> None:
            if session in self._stopped:
                raise LfmError("stopped")
            on_progress(share)

        return self.maker.make(request, Path(self._folders[-1]), report)

    def stop(self, request: gr.Request) -> None:
        """End the request that the session has started, at the next step of its solver."""
        self._stopped.add(request.session_hash)


class RunPanel:
    """The controls of a run, created in the open context of gradio.

    Args:
        service: makes the images.
        run: path or URL of the run.
        header: the description of its weights.
        number: of the panel on the page.
    """

    def __init__(self, service: ImageService, run: str, header: WeightsHeader, number: int = 0) -> None:
        self.service, self.run, self.header, self.number = service, run, header, number
        self.colours = canvas.palette(header.labels)
        self.controls: dict[str, gr.components.Component] = {}
        gr.Markdown(html.escape(describe(run, header)))
        with gr.Row():
            with gr.Column():
                self._add_conditions()
                self._add_settings()
            with gr.Column():
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
                gallery = gr.Gallery(
                    label="Images", object_fit="contain", columns=4, height="auto", buttons=["download"]
                )
                summary = gr.Markdown()
                download = gr.DownloadButton("Download all, with a record", visible=False)
                trajectory = gr.Image(label="From noise to image", visible=False, format="png", buttons=["download"])
        start.click(
            self.generate,
            set(self.controls.values()),
            [gallery, summary, download, trajectory],
            concurrency_id="model",  # one request at a time, whatever run it is for
            api_visibility="private",
        )
        stop.click(service.stop, queue=False, api_visibility="private")

    def _add_conditions(self) -> None:
        model = self.header.model
        if model.num_classes is not None:
            names = [(record.name, record.index) for record in self.header.classes]
            self.controls["classes"] = gr.Dropdown(
                names,
                value=[index for _, index in names[:DEFAULT_NUM_CLASSES]],
                multiselect=True,
                label="Classes: one column each",
            )
        if model.condition_channels:
            self._add_inpainting()
        if model.num_labels is not None:
            self._add_segmentation()

    def _add_upload(self, label: str) -> tuple[gr.File, gr.Radio]:
        upload = gr.File(label=label, file_types=["image"], height=120)
        rule = gr.Radio(list(CROPS), value=self.header.crop or "centre", label="Bring it to the model's size by")
        self.controls |= {"upload": upload, "crop": rule}
        return upload, rule

    def _add_inpainting(self) -> None:
        upload, rule = self._add_upload("Image to fill")
        brush = gr.Brush(colors=[MASK_COLOUR], default_color=MASK_COLOUR, color_mode="fixed")
        editor = self._add_canvas("Paint over what is to be filled", brush, None)
        self.controls["composite"] = gr.Checkbox(True, label="Keep the known pixels as they are")
        gr.on([upload.change, rule.change], self.show_image, [upload, rule], editor, api_visibility="private")

    def _add_segmentation(self) -> None:
        labels = self.header.labels
        first = next(iter(labels))
        upload, rule = self._add_upload("Map of class ids, to begin with (optional)")
        choices = [(name, class_id) for class_id, name in labels.items()]
        choice = gr.Radio if len(choices) <= MOST_RADIO_BUTTONS else gr.Dropdown
        label = choice(choices, value=first, label="Label to paint with")
        gr.HTML(legend(labels, self.colours))
        fill = gr.Button("Fill the map with this label", size="sm")
        editor = self._add_canvas("Paint the map", self._brush(first), self._plain_map(first))
        label.change(
            lambda class_id: gr.ImageEditor(brush=self._brush(class_id)), label, editor, api_visibility="private"
        )
        label.change(None, js=TAKE_BRUSH.replace("CANVAS", str(editor.elem_id)), api_visibility="private")
        fill.click(lambda class_id: shown(self._plain_map(class_id)), label, editor, api_visibility="private")
        gr.on([upload.change, rule.change], self.show_map, [upload, rule], editor, api_visibility="private")

    def _add_canvas(self, label: str, brush: gr.Brush, image: np.ndarray | None) -> gr.ImageEditor:
        side = self.header.image_size * canvas.cell_size(self.header.image_size)
        editor = gr.ImageEditor(
            None if image is None else shown(image),
            label=label,
            brush=brush,
            sources=(),
            transforms=(),
            layers=gr.LayerOptions(disabled=True),
            format="png",  # the default is lossy
            canvas_size=(side, side),
            height=560,
            buttons=[],
            elem_id=f"canvas-{self.number}",
            elem_classes=CANVAS_CLASS,
        )
        self.controls["canvas"] = editor
        return editor

    def _add_settings(self) -> None:
        self.controls["seeds"] = gr.Textbox(DEFAULT_SEEDS, label="Seeds: one row each, such as 0-3 or 1,5,8")
        if self.header.model.has_null_condition:
            self.controls["guidance_scale"] = gr.Slider(
                0, MOST_GUIDANCE, 1, step=0.1, label="Guidance scale (1 is none, others take twice as long)"
            )
        with gr.Row():
            solver = gr.Dropdown(list(SOLVERS), value=Solving().solver, label="Solver")
            steps = gr.Slider(1, MOST_STEPS, DEFAULT_STEPS, step=1, label="Number of steps")
            as_trained = f"as in training ({trained_precision(self.header.config)})"
            precisions = [(as_trained, ""), *((name, name) for name in PRECISIONS)]
            precision = gr.Dropdown(precisions, value="", label="Precision")
        trajectory = gr.Checkbox(False, label="Show the trajectory of the first images")
        self.controls |= {"solver": solver, "num_steps": steps, "precision": precision, "trajectory": trajectory}
        solver.change(
            lambda name: gr.Slider(visible=not SOLVERS[name].is_adaptive), solver, steps, api_visibility="private"
        )

    def show_image(self, path: str | None, rule: str) -> Any:
        """Return the value of the canvas for an uploaded image."""
        if path is None:
            return None
        with errors_on_page():
            return shown(uploads.read_image(path, self.header.image_size, rule))

    def show_map(self, path: str | None, rule: str) -> Any:
        """Return the value of the canvas for an uploaded segmentation; without one it stays as it is."""
        if path is None:
            return gr.skip()
        with errors_on_page():
            ids = uploads.read_segmentation(path, self.header.labels, self.header.image_size, rule)
        return shown(canvas.draw_map(ids, self.colours))

    def generate(
        self, values: dict[gr.components.Component, Any], request: gr.Request, progress: gr.Progress = PROGRESS
    ) -> tuple[Any, ...]:
        """Return the values of gallery, summary, download button and trajectory."""
        progress(0, desc="loading the model")
        by_name = {name: values[control] for name, control in self.controls.items()}
        with errors_on_page():
            result = self.service.make(
                self.request(by_name), request.session_hash, lambda share: progress(share, desc="solving")
            )
        return (
            gr.Gallery(list(result.images), columns=result.num_columns or 4),
            result.summary,
            gr.DownloadButton(value=result.archive, visible=True),
            gr.Image(result.trajectory, visible=result.trajectory is not None),
        )

    def request(self, values: dict[str, Any]) -> PageRequest:
        """Return the request of the values of the controls.

        Raises:
            ConfigError: an input is missing, or cannot be read.
            LfmError: there is no image to fill.
        """
        header, drawn = self.header, values.get("canvas") or {"layers": [], "composite": None, "background": None}
        options: dict[str, Any] = {
            name: values[name]
            for name in ("seeds", "composite", "guidance_scale", "solver", "num_steps", "trajectory")
            if name in values
        }
        if "classes" in values:
            options["classes"] = tuple(values["classes"])
        if header.model.condition_channels:
            if values["upload"] is None:
                raise LfmError("upload an image to fill, and paint over what is to be filled")
            options["image"] = uploads.read_image(values["upload"], header.image_size, values["crop"])
            options["mask"] = canvas.read_mask(drawn["layers"], header.image_size)
            if not options["mask"].any():
                raise LfmError("paint over what is to be filled")
        if header.model.num_labels is not None:
            painted = drawn["background"] if drawn["composite"] is None else drawn["composite"]
            if painted is None:
                raise LfmError("paint a map, or fill it with a label")
            options["segmentation"] = canvas.read_map(painted, self.colours, header.image_size)
        return PageRequest(run=self.run, precision=values["precision"] or None, **options)

    def _brush(self, class_id: int) -> gr.Brush:
        colours = [hexadecimal(colour) for colour in self.colours.values()]
        return gr.Brush(colors=list(colours), default_color=hexadecimal(self.colours[class_id]), color_mode="fixed")

    def _plain_map(self, class_id: int) -> np.ndarray:
        side = self.header.image_size
        return np.broadcast_to(np.array(self.colours[class_id], np.uint8), (side, side, 3))


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show an error that the user can repair on the page, in one line."""
    try:
        yield
    except LfmError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def shown(image: np.ndarray) -> Any:
    """Return the value of a canvas on which nothing is drawn over an image, uint8 (H, W, 3) at the model's size."""
    return {"background": canvas.enlarged(image), "layers": [], "composite": None}


def describe(run: str, header: WeightsHeader) -> str:
    """Return one line on a run."""
    model = header.model
    parts = {
        "classes": model.num_classes is not None,
        "inpainting": model.condition_channels > 0,
        "segmentations": model.num_labels is not None,
    }
    condition = " and ".join(part for part, applies in parts.items() if applies) or "no condition"
    return f"{run}: {header.image_size} x {header.image_size} pixels, {condition}, {header.samples_seen:,} samples seen"


def legend(labels: dict[int, str], colours: dict[int, canvas.Colour]) -> str:
    """Return the names of the labels beside their colours, as HTML."""
    chips = [
        f'<span style="white-space: nowrap; margin-right: 1em"><span style="display: inline-block; width: 1em; '
        f'height: 1em; vertical-align: middle; border: 1px solid #888; background: {hexadecimal(colours[class_id])}">'
        f"</span> {html.escape(name)}</span>"
        for class_id, name in labels.items()
    ]
    return f"<div>{' '.join(chips)}</div>"


def hexadecimal(colour: canvas.Colour) -> str:
    """Return a colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
