"""The page in a real browser: Chromium, driven by Playwright, with no request to any other machine.

LSEG_SCREENSHOT=image/app.png pytest tests/test_page_browser.py    writes the README's picture as well
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from page_process import ROOT, Page, serve
from PIL import Image
from test_enginerun import LABELS, save

from lseg.labels import palette

api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: run './requirements.sh --dev true'"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed: 'apt-get install chromium' brings it")

LEGEND = "#viewer .legend button"
TOAST = '[data-testid="toast-body"]'


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory) -> Iterator[Page]:
    with serve(tmp_path_factory.mktemp("page"), demo.folder) as page:
        yield page
    assert page.attempts.read_text() == ""


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        # A container's root has no sandbox to put the browser in.
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


class Visitors:
    """Opens the page for one visitor after another, and remembers what their browsers asked of others."""

    def __init__(self, browser, server: Page):
        self.browser, self.server = browser, server
        self.remote: list[str] = []
        self.errors: list[str] = []

    def new(self, width: int = 1440, height: int = 900, scheme: str = "light"):
        phone = width < 600
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=phone, is_mobile=phone
        )
        context.route(re.compile(rf"^https?://(?!{self.server.address[7:]}/)"), self._refuse)
        tab = context.new_page()
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.on("console", self._console)
        tab.set_default_timeout(60_000)
        tab.goto(self.server.address)
        tab.wait_for_selector("#viewer .empty")
        return tab

    def _console(self, message) -> None:
        # An upload is removed while Gradio's own preview of it may still be loading.
        if message.type == "error" and "/gradio_api/file=" not in message.location.get("url", ""):
            self.errors.append(message.text)

    def _refuse(self, route) -> None:
        self.remote.append(route.request.url)
        route.abort()


@pytest.fixture
def visitors(browser, server) -> Iterator[Visitors]:
    visitors = Visitors(browser, server)
    yield visitors
    for context in browser.contexts:
        context.close()
    assert visitors.remote == []
    assert visitors.errors == []


def example(tab) -> None:
    tab.click("#example")
    tab.wait_for_selector(LEGEND)


def add(tab, words: str) -> None:
    tab.locator("#labels input").fill(words)
    tab.keyboard.press("Enter")


def legend(tab) -> dict[str, str]:
    """Of each label its colour, "rgb(r, g, b)"."""
    script = "all => all.map(b => [b.querySelector('.name').textContent, b.querySelector('i').style.background])"
    return dict(tab.eval_on_selector_all(LEGEND, script))


def shown_colour(tab, selector: str, x: float, y: float) -> list[int]:
    """What the screen shows at a share of an element's width and height."""
    png = tab.locator(selector).screenshot()
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return image[int(y * image.shape[0]), int(x * image.shape[1])].astype(int).tolist()


def save_picture(path: Path, png: bytes, colours: np.ndarray) -> None:
    """Saves a screenshot in 256 colours, those of the legend among them as they are."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    found = image.quantize(256 - len(colours)).getpalette()[: 3 * (256 - len(colours))]
    table = Image.new("P", (1, 1))
    table.putpalette([*found, *colours.ravel().tolist()])
    image.quantize(palette=table, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


class TestVisit:
    def test_example_labels_and_change_of_words(self, visitors, tmp_path):
        tab = visitors.new()
        example(tab)
        colours = dict(zip(LABELS, palette(LABELS), strict=True))
        assert legend(tab) == {name: f"rgb({r}, {g}, {b})" for name, (r, g, b) in colours.items()}
        # The screen's own rounding may differ by one.
        assert np.abs(shown_colour(tab, "#viewer .map", 0.8, 0.1) - colours["sky"].astype(int)).max() <= 1
        ran = tab.inner_text("#viewer .ran")
        assert re.match(r"ONNX Runtime .*\(CPU\), fp32; weights: demo; inference: whole\. Milliseconds: decode \d", ran)
        assert "kept" not in ran
        tab.click("#example")  # a second time, for the picture: the first run of anything is slow
        tab.wait_for_function("first => document.querySelector('#viewer .ran').textContent !== first", arg=ran)
        tab.hover("#viewer .large .stage", position={"x": 250, "y": 150})
        tab.wait_for_selector("#viewer .cosine")
        tab.wait_for_timeout(300)
        target = Path(os.environ.get("LSEG_SCREENSHOT") or tmp_path / "app.png")
        save_picture(target, tab.screenshot(full_page=True), palette(LABELS))
        assert target.stat().st_size < 400_000
        add(tab, "roof")
        tab.wait_for_selector(f"{LEGEND}:has-text('roof')")
        assert "embeddings were kept: the network did not run" in tab.inner_text("#viewer .ran")
        add(tab, "lake, boat")  # two chips at once
        tab.wait_for_selector(f"{LEGEND}:has-text('boat')")
        assert {"roof", "lake", "boat"} < set(legend(tab))
        tab.keyboard.press("Escape")
        tab.locator("#labels .token-remove").first.click()
        tab.wait_for_selector(f"{LEGEND}:has-text('sky')", state="detached")

    def test_pixel_heat_map_and_opacity(self, visitors):
        tab = visitors.new()
        example(tab)
        stage = tab.locator("#viewer .large .stage").bounding_box()
        tab.mouse.move(stage["x"] + 0.8 * stage["width"], stage["y"] + 0.1 * stage["height"])
        tab.wait_for_selector("#viewer .pixel:has-text('pixel 51')")
        words = tab.inner_text("#viewer .pixel").split("\n")
        assert words[1] == "sky" and float(words[2]) > float(words[4])
        tab.mouse.click(stage["x"] + 0.35 * stage["width"], stage["y"] + 0.6 * stage["height"])
        tab.wait_for_selector("#viewer .pixel:has-text('held')")
        assert tab.inner_text("#viewer .pixel").split("\n")[1] == "building"
        tab.mouse.move(stage["x"] + 5, stage["y"] + 5)
        tab.wait_for_timeout(200)
        assert "held" in tab.inner_text("#viewer .pixel")

        tab.click(f"{LEGEND}:has-text('tree')")
        tab.wait_for_selector("#viewer .caption:has-text('heat map of “tree”: cosine 0.')")
        tab.locator("#viewer .opacity input").fill("100")
        tab.wait_for_timeout(300)
        bright, dark = (sum(shown_colour(tab, "#viewer .large .stage", x, y)) for x, y in ((0.8, 0.85), (0.8, 0.1)))
        assert bright > dark + 150  # trees below, sky above
        assert tab.get_attribute(f"{LEGEND}:has-text('tree')", "aria-pressed") == "true"
        tab.click(f"{LEGEND}:has-text('tree')")
        tab.wait_for_selector("#viewer .caption:has-text('overlay')")
        tab.wait_for_timeout(300)
        at = "#viewer .large .stage", 0.8, 0.1
        assert shown_colour(tab, *at) == palette(LABELS)[0].tolist()
        tab.locator("#viewer .opacity input").fill("0")
        photo = cv2.imread(str(ROOT / "image" / "temple.jpg"))[43, 512, ::-1].astype(int)
        assert np.abs(np.array(shown_colour(tab, *at)) - photo).max() < 12

    def test_downloads(self, visitors, tmp_path):
        tab = visitors.new()
        example(tab)
        for kind, name in (
            ("picture", "temple_lseg.png"),
            ("labels", "temple_labels.png"),
            ("json", "temple_labels.json"),
        ):
            with tab.expect_download() as download:
                tab.click(f"#viewer [data-file={kind}]")
            assert download.value.suggested_filename == name
            download.value.save_as(tmp_path / name)
        meaning = json.loads((tmp_path / "temple_labels.json").read_text())
        labels = cv2.imread(str(tmp_path / "temple_labels.png"), cv2.IMREAD_UNCHANGED)
        assert [label["name"] for label in meaning["labels"]] == list(LABELS)
        assert labels.shape == (427, 640) and labels[43, 512] == 0
        assert cv2.imread(str(tmp_path / "temple_lseg.png")).shape[1] == 1280

    def test_other_backend_and_windows(self, visitors):
        tab = visitors.new()
        example(tab)
        tab.click("#inference label:has-text('window')")
        tab.wait_for_selector("#viewer .ran:has-text('In windows nothing is kept')")
        tab.click(LEGEND)
        tab.wait_for_selector("#viewer .pixel:has-text('heat maps are for photos seen whole')")
        tab.click("#inference label:has-text('whole')")
        tab.wait_for_selector("#viewer .ran:has-text('embeddings were kept')")
        tab.click("#backend input")
        tab.click("#backend [role=option]:has-text('PyTorch')")
        tab.wait_for_selector("#viewer .ran:has-text('PyTorch')")

    def test_by_keyboard(self, visitors):
        """From the example to a pixel's labels and a heat map without a mouse, the focus in sight."""
        tab = visitors.new()

        def tab_to(selector: str) -> None:
            for _ in range(60):
                if tab.evaluate("s => document.activeElement?.matches(s)", selector):
                    return
                tab.keyboard.press("Tab")
            raise AssertionError(f"{selector} cannot be reached with the tabulator")

        tab_to("#example")
        tab.keyboard.press("Enter")
        tab.wait_for_selector(LEGEND)
        tab_to("#labels input")
        tab.keyboard.type("roof")
        tab.keyboard.press("Enter")
        tab.wait_for_selector(f"{LEGEND}:has-text('roof')")
        tab.keyboard.press("Escape")
        tab_to("#viewer .stage")
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        for key in ("ArrowUp", "Shift+ArrowUp", "ArrowRight"):
            tab.keyboard.press(key)
        tab.wait_for_selector("#viewer .pixel:has-text('pixel 326, 166')")
        tab_to(LEGEND)
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#viewer .caption:has-text('heat map')")


class TestMistakes:
    def test_wrong_files_and_labels(self, visitors, server, tmp_path, seed):
        tab = visitors.new()
        tab.set_input_files("#photo input", {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"unique notes"})
        tab.wait_for_selector(f"{TOAST}:has-text('notes.jpg is not an image')")
        example(tab)
        before = legend(tab)
        add(tab, ", ".join(f"thing {i}" for i in range(5000)))
        tab.wait_for_selector(f"{TOAST}:has-text('5,008 labels are too many: give at most 256')")
        tab.locator("#labels .token-remove").last.click()  # all of them
        tab.wait_for_selector(f"{TOAST}:has-text('no label is given')")
        assert legend(tab) == before
        tab.keyboard.press("Escape")
        add(tab, "<img src=x onerror=alert(1)>, tree")
        tab.wait_for_selector(f"{LEGEND}:has-text('<img src=x')")  # words, not a picture
        upload = save(tmp_path / "unique.png", seed, (300, 200))
        tab.set_input_files("#photo input", upload)
        tab.wait_for_selector("#viewer .ran:has-text('Milliseconds')")
        tab.wait_for_function("document.querySelector('#viewer .large .stage').offsetWidth > 0")
        deadline = time.monotonic() + 10
        texts = {b"unique notes", upload.read_bytes()}
        while any(path.read_bytes() in texts for path in server.files()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not [path for path in server.files() if path.read_bytes() in texts]

    def test_two_visitors_and_a_closed_tab(self, visitors, tmp_path, seed):
        """Each sees their own photo and words; who leaves in mid-run harms nobody."""
        gone = visitors.new()
        gone.click("#inference label:has-text('window')")
        gone.click("#example")
        gone.wait_for_timeout(500)
        gone.close()
        first, second = visitors.new(), visitors.new()
        second.set_input_files("#photo input", save(tmp_path / "own.png", seed, (300, 200)))
        first.click("#example")
        for tab in (first, second):
            tab.wait_for_selector(LEGEND)
        add(first, "roof")
        add(second, "boat")
        first.wait_for_selector(f"{LEGEND}:has-text('roof')")
        second.wait_for_selector(f"{LEGEND}:has-text('boat')")
        assert "boat" not in legend(first) and "roof" not in legend(second)
        ratios = [
            box["width"] / box["height"]
            for box in (tab.locator("#viewer .large .stage").bounding_box() for tab in (first, second))
        ]
        assert ratios == pytest.approx([640 / 427, 1.5], abs=0.02)
        with second.expect_download() as download:
            second.click("#viewer [data-file=labels]")
        assert download.value.suggested_filename == "own_labels.png"


@pytest.mark.parametrize("width, scheme", [(1440, "dark"), (390, "light"), (390, "dark")])
def test_looks(visitors, width, scheme):
    """Nothing sticks out sideways, dark is dark, and every picture is in sight at its shape."""
    tab = visitors.new(width, 844 if width < 600 else 900, scheme)
    example(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    boxes = [stage.bounding_box() for stage in tab.locator("#viewer .stage").all()]
    for box in boxes:
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["width"] / box["height"] == pytest.approx(640 / 427, abs=0.03)
    assert boxes[0]["width"] > 1.5 * boxes[1]["width"]
    for button in tab.locator(f"{LEGEND}, #viewer .files button").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 24


def test_on_a_phone(visitors):
    """The answer, which is below all that can be chosen, comes into sight by itself; a tap reads a pixel."""
    tab = visitors.new(390, 844)
    example(tab)
    in_sight = "() => { const y = document.querySelector('#viewer .large .stage').getBoundingClientRect().y; "
    tab.wait_for_function(in_sight + "return y >= 0 && y < 400; }")
    assert "Tap the picture" in tab.inner_text("#viewer .pixel")
    tab.tap("#viewer .large .stage", position={"x": 260, "y": 20})
    tab.wait_for_selector("#viewer .pixel:has-text('pixel 5')")
    words = tab.inner_text("#viewer .pixel").split("\n")
    assert words[1] == "sky" and "click" not in words[0]
