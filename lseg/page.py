"""The page's layout, and what its parts call. Gradio is imported here and in `lseg.page_server` alone."""

from __future__ import annotations

import base64
import html
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from lseg.errors import UserError
from lseg.kept_photos import How
from lseg.page_work import BACKENDS, Desk, Upload

VIEWER = Path(__file__).with_name("viewer")
TITLE = "LSeg: segment a photo by words"
PHOTOS_AT_ONCE, CHANGES_AT_ONCE = 2, 8  # photos take memory while they are decoded
FONTS = ["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]  # the visitor's own: nothing is fetched
MONO = ["ui-monospace", "Consolas", "monospace"]
CSS = """
.gradio-container { max-width: 1480px !important; margin: 0 auto; }
#head h1 { font-size: 1.5rem; margin: 0.2rem 0 0; }
#head p { margin: 0.1rem 0 0.4rem; }
#viewer .html-container { padding: 0; }
footer .divider { display: none !important; }
"""
HEAD = """# Segment a photo by words
Each pixel takes the nearest of your labels. Change the words and the answer comes at once."""
DEMO_HINT = "The demo weights know street scenes: sky, building, road, tree, car and the like."


def photo_input() -> gr.Image:
    """Takes a photo and gives it to what it is an input of as an `Upload`, with no file left.

    Gradio would open the file with Pillow first, and fail there without a word on what is wrong with it.
    """
    photo = gr.Image(
        label="Photo",
        type="filepath",
        sources=["upload", "webcam", "clipboard"],
        height=190,
        buttons=[],
        elem_id="photo",
    )

    def preprocess(payload: Any) -> Upload | None:
        if payload is None or payload.path is None:
            return None
        path = Path(payload.path)
        if not path.resolve().is_relative_to(Path(photo.GRADIO_CACHE).resolve()):
            raise gr.Error("the photo was not uploaded here: open it again")
        try:
            return Upload(Path(payload.orig_name or path.name).name, path.read_bytes())
        except OSError:
            raise gr.Error("the upload is gone: open the photo again") from None
        finally:
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()

    # On the object: for a class of its own Gradio would write a file of type hints beside this one.
    photo.preprocess = preprocess
    # For the API's description; Gradio's own is an address, which is not fetched here.
    photo.example_payload = photo.example_value = lambda: {"path": "photo.jpg", "meta": {"_type": "gradio.FileData"}}
    return photo


def build_page(desk: Desk, words: Sequence[str], more_words: Sequence[str], example: Path) -> gr.Blocks:
    """The page.

    Args:
        desk: answers.
        words: labels to begin with.
        more_words: labels to choose beside these.
        example: a photo to try.
    """
    usual, example_upload = desk.usual, Upload(example.name, example.read_bytes())
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        key = gr.State("", delete_callback=desk.kept.drop)
        gr.Markdown(HEAD, elem_id="head")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo = photo_input()
                try_example = gr.Button("Try the example photo", elem_id="example")
                chips = gr.Dropdown(
                    [*words, *(word for word in more_words if word not in words)],
                    value=list(words),
                    multiselect=True,
                    allow_custom_value=True,
                    label="Labels",
                    info="Type a word and press Enter. " + (DEMO_HINT if "demo" in desk.weights else ""),
                    elem_id="labels",
                )
                inference = gr.Radio(
                    ["whole", "window", "multiscale"],
                    value=usual.inference,
                    label="Inference",
                    info="window: more detail, slower; multiscale: as the official figures are taken, slowest",
                    elem_id="inference",
                )
                weights = gr.Dropdown(list(desk.weights), value=usual.weights, label="Weights", elem_id="weights")
                backends = [(BACKENDS.get(name, name), name) for name in desk.backends]
                backend = gr.Dropdown(backends, value=usual.backend, label="Backend", elem_id="backend")
            with gr.Column(scale=3, min_width=320):
                viewer = gr.HTML(
                    None,
                    html_template=(VIEWER / "viewer.html").read_text(encoding="utf-8"),
                    css_template=(VIEWER / "viewer.css").read_text(encoding="utf-8"),
                    js_on_load=(VIEWER / "viewer.js").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    server_functions=_viewer_functions(desk),
                    elem_id="viewer",
                )

        def open_photo(upload: Upload | None, old: str, words: list[str] | None, *how: str) -> tuple:
            if upload is None:
                return gr.skip(), gr.skip(), gr.skip(), gr.skip()
            try:
                new, found = desk.open_photo(upload, words or [], How(*how))
            except UserError as error:
                gr.Warning(html.escape(str(error)), duration=12)
                return None, gr.skip(), gr.skip(), gr.skip()
            desk.kept.drop(old)
            return None, new, changed(found, words), found

        def open_example(*rest: Any) -> tuple:
            return open_photo(example_upload, *rest)

        def change(old: str, words: list[str] | None, *how: str) -> tuple:
            try:
                if not old or desk.is_answered(old, words or [], How(*how)):
                    return gr.skip(), gr.skip()
                found = desk.answer(old, words or [], How(*how))
            except UserError as error:
                gr.Warning(html.escape(str(error)), duration=12)
                return gr.skip(), gr.skip()
            return changed(found, words), found

        def changed(found: dict[str, Any], words: list[str] | None) -> Any:
            """The chips, where the labels are others than these: a comma makes two of one."""
            names = [label["name"] for label in found["labels"]]
            return names if names != words else gr.skip()

        how = [chips, inference, weights, backend]
        opened = [photo, key, chips, viewer]
        options: dict[str, Any] = {"api_visibility": "private", "show_progress_on": viewer}
        opens = {**options, "concurrency_id": "photos", "concurrency_limit": PHOTOS_AT_ONCE}
        photo.input(open_photo, [photo, key, *how], opened, **opens)
        try_example.click(open_example, [key, *how], opened, **opens)
        changes = {**options, "concurrency_id": "words", "concurrency_limit": CHANGES_AT_ONCE}
        changes |= {"trigger_mode": "always_last", "show_progress": "minimal"}
        chips.change(change, [key, *how], [chips, viewer], **changes)  # Enter is no "input"
        for part in (inference, weights, backend):
            part.input(change, [key, *how], [chips, viewer], **changes)
        _add_api(desk, photo, how)
    return page


def _add_api(desk: Desk, photo: gr.Image, how: list[gr.components.Component]) -> None:
    """/segment, for programs: a JSON and the label map as a file."""
    line, label_map = gr.JSON(visible=False, label="result"), gr.File(visible=False, label="label map")

    def segment(photo: Upload | None, labels: list[str], inference: str, weights: str, backend: str) -> tuple:
        """Segments one photo by words: each label's share and confidence, and the label map as a PNG of indices."""
        folder = Path(line.GRADIO_CACHE) / secrets.token_hex(16)
        try:
            if photo is None:
                raise UserError("no photo is given")
            found, path = desk.segment(photo, labels, How(inference, weights, backend), folder)
        except UserError as error:
            raise gr.Error(html.escape(str(error), quote=False)) from None
        return found, str(path)

    button = gr.Button(visible=False)
    button.click(segment, [photo, *how], [line, label_map], api_name="segment", concurrency_id="photos")


def _viewer_functions(desk: Desk) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """What viewer.js calls past the queue, each with one object: errors come back as {"error": sentence}."""

    def safely(work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        try:
            return work()
        except UserError as error:
            return {"error": str(error)}
        except (KeyError, TypeError, ValueError, OverflowError):
            return {"error": "the request is malformed: load the page again"}

    def photo(request: dict) -> dict:
        # Not in the viewer's value: Gradio remembers that for as long as the visitor's session lasts.
        return safely(lambda: {"url": desk.picture(request["key"])})

    def pixel(request: dict) -> dict:
        return safely(lambda: desk.pixel(request["key"], int(request["x"]), int(request["y"])))

    def heat(request: dict) -> dict:
        return safely(lambda: desk.heat(request["key"], int(request["index"])))

    def download(request: dict) -> dict:
        def work() -> dict:
            opacity = min(1.0, max(0.0, float(request["opacity"])))
            name, data = desk.download(request["key"], request["kind"], opacity)
            kind = "application/json" if name.endswith(".json") else "image/png"
            return {"name": name, "url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}

        return safely(work)

    return [photo, pixel, heat, download]


def theme() -> gr.themes.Base:
    """Gradio's own, in fonts that are there, and with remarks dark enough to be read."""
    usual = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)
    grey = {"body_text_color_subdued": "*neutral_500", "body_text_color_subdued_dark": "*neutral_400"}
    return usual.set(**grey, block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")


def own_uploads() -> None:
    """Gives each upload a folder of its own, and removes what came of one that broke off.

    Gradio names folders by what the file holds, so two visitors with the same photo would share one, and the first to
    be answered would remove the other's. Of a visitor who goes away in the middle it keeps the half file, and prints
    a traceback.
    """
    from gradio.route_utils import GradioMultiPartParser, GradioUploadFile

    usual, usual_parser = GradioUploadFile.__init__, GradioMultiPartParser.__init__

    def begin(self: GradioUploadFile, *given: Any, **more: Any) -> None:
        usual(self, *given, **more)
        self.sha.update(secrets.token_bytes(16))  # the folder's name

    def begin_parser(self: GradioMultiPartParser, *given: Any, **more: Any) -> None:
        usual_parser(self, *given, **more)
        self.stream = _refuse_broken_off(self.stream)

    GradioUploadFile.__init__, GradioMultiPartParser.__init__ = begin, begin_parser


async def _refuse_broken_off(stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The stream, whose early end is the error on which the parser removes its files."""
    from starlette.formparsers import MultiPartException
    from starlette.requests import ClientDisconnect

    try:
        async for part in stream:
            yield part
    except ClientDisconnect:
        raise MultiPartException("the upload broke off: send it again") from None


def quiet_refusals() -> None:
    """Keeps what is a sentence for the visitor out of the server's log, where Gradio prints a traceback of each."""
    usual = gr.Error.__init__

    def begin(self: gr.Error, *given: Any, **more: Any) -> None:
        usual(self, *given, **more)
        self.print_exception = False

    gr.Error.__init__ = begin


def no_network() -> None:
    """Turns off what Gradio would fetch: its news, usage counts, and files that a visitor names by address."""
    from gradio import processing_utils

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    def refuse(*_: object, **__: object) -> None:
        raise gr.Error("addresses are not fetched here: send the file itself")

    async def refuse_later(*_: object, **__: object) -> None:
        refuse()

    processing_utils.save_url_to_cache = processing_utils.ssrf_protected_download = refuse
    processing_utils.async_ssrf_protected_download = refuse_later
