"""The page's server: its HTTP API, its files, and that it reaches nobody."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from page_process import ROOT, Page, serve
from test_enginerun import LABELS, save

from lseg import Segmenter
from lseg.page_server import OldFiles

sys.path.append(str(ROOT / "tests" / "bench"))
from page_visitor import Server  # noqa: E402

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed: run './requirements.sh'")


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    with serve(folder, tiny.folder, "--weights", tiny.weights, "--max-megapixels", "0.5") as page:
        yield page
    said = page.process.stdout.read().decode()
    assert page.process.returncode == 0 and "ASGI" not in said, said
    # What is a sentence for the visitor is no traceback in the log. Paths that were not uploaded Gradio refuses itself.
    assert not re.findall(r"^gradio\.exceptions\.Error|^TypeError|^AttributeError|ClientDisconnect", said, re.M), said
    assert page.files() == []  # they went with the server


@pytest.fixture(scope="module")
def client(page):
    return gradio_client.Client(page.address, verbose=False)


def call(client, photo: object, labels: list[str], inference: str = "whole") -> tuple[dict, str]:
    return client.predict(photo=photo, labels=labels, inference=inference, api_name="/segment")


def post(page: Page, *data: object) -> str:
    """What the API says to a call that no client would make."""
    address = f"{page.address}/gradio_api/call/segment"
    request = urllib.request.Request(address, json.dumps({"data": data}).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}") as reply:
        return reply.read().decode()


class TestApi:
    def test_a_photo(self, client, tiny, tmp_path, seed):
        photo = save(tmp_path / "street.png", seed)
        line, label_map = call(client, gradio_client.handle_file(str(photo)), list(LABELS))
        with Segmenter(tiny.weights, "onnxruntime", onnx=tiny.folder) as lseg:
            wanted = lseg.segment(photo, LABELS).labels
        assert np.array_equal(cv2.imread(label_map, cv2.IMREAD_UNCHANGED), wanted)
        assert Path(label_map).name == "street_labels.png"
        assert line["photo"] == "street.png" and line["size"] == [90, 70]
        assert sum(label["share"] for label in line["labels"]) == pytest.approx(1, abs=1e-5)
        assert line["ran"].startswith("ONNX Runtime") and line["milliseconds"]["encode_image"] > 0

    def test_its_mistakes_are_told(self, client, tmp_path, seed):
        good = gradio_client.handle_file(str(save(tmp_path / "good.png", seed)))
        (tmp_path / "notes.jpg").write_text("notes")
        notes = gradio_client.handle_file(str(tmp_path / "notes.jpg"))
        large = gradio_client.handle_file(str(save(tmp_path / "large.png", seed, (1000, 600))))
        for photo, labels, inference, message in (
            (notes, ["cat", "dog"], "whole", "notes.jpg is not an image"),
            (large, ["cat", "dog"], "whole", "1 megapixels \\(1000 x 600\\): scale it down to 0.5"),
            (None, ["cat", "dog"], "whole", "no photo is given"),
            (good, [], "whole", "no label is given"),
            (good, [f"thing {i}" for i in range(5000)], "whole", "5,000 labels are too many: give at most 256"),
            (good, [1, None], "whole", "the labels are no texts"),
            (good, ["cat", "dog"], "wide", "wide"),
        ):
            with pytest.raises(gradio_client.exceptions.AppError, match=message):
                call(client, photo, labels, inference)
        assert call(client, good, ["cat", "dog"])[0]["size"] == [90, 70]  # the server goes on

    def test_labels_as_one_text(self, client, tmp_path, seed):
        """Words with commas between them, not letters."""
        line, _ = call(client, gradio_client.handle_file(str(save(tmp_path / "a.png", seed))), "cat, dog")
        assert {label["name"] for label in line["labels"]} <= {"cat", "dog"}

    def test_only_one_endpoint(self, client):
        """What the page itself calls is not for programs, and the description names no other machine."""
        described = client.view_api(return_format="dict", print_info=False)
        assert list(described["named_endpoints"]) == ["/segment"] and "http" not in json.dumps(described)

    def test_addresses_are_not_fetched(self, client, page):
        address = "http://203.0.113.7/photo.jpg"
        with pytest.raises(gradio_client.exceptions.AppError, match="send the file itself"):
            call(client, {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}, ["cat", "dog"])
        assert page.attempts.read_text() == ""

    def test_files_of_the_server_stay_there(self, client, page, tmp_path):
        """A path that was not uploaded is neither read nor removed."""
        secret = save(tmp_path / "secret.png", 1)
        photo = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        usual = [parameter["parameter_default"] for parameter in self.parameters(client)[2:]]
        reply = post(page, photo, ["cat", "dog"], *usual)
        assert "event: error" in reply and "confidence" not in reply
        assert secret.exists()

    @staticmethod
    def parameters(client) -> list[dict]:
        return client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/segment"]["parameters"]


class TestServer:
    def test_the_same_photo_of_many_at_once(self, page, tmp_path, seed):
        """Each visitor's upload is a file of its own: the first answer does not take it from the others.

        Each has a client of its own: one that threads share may take the end of a stream for an answer's.
        """
        photo = save(tmp_path / "same.png", seed)
        visitors = [gradio_client.Client(page.address, verbose=False) for _ in range(8)]

        def ask(visitor: gradio_client.Client) -> set[bytes]:
            answers = [call(visitor, gradio_client.handle_file(str(photo)), ["cat", "dog"]) for _ in range(3)]
            return {Path(answer[1]).read_bytes() for answer in answers}

        with ThreadPoolExecutor(8) as pool:
            maps = set().union(*pool.map(ask, visitors))
        assert len(maps) == 1

    def test_uploads_are_removed(self, client, page, tmp_path, seed):
        photo = save(tmp_path / "unique-name.png", seed)
        (tmp_path / "unique-notes.jpg").write_text("notes")
        call(client, gradio_client.handle_file(str(photo)), ["cat", "dog"])
        with pytest.raises(gradio_client.exceptions.AppError):
            call(client, gradio_client.handle_file(str(tmp_path / "unique-notes.jpg")), ["cat", "dog"])
        data = {photo.read_bytes(), b"notes"}
        assert not [path for path in page.files() if path.read_bytes() in data]

    def test_uploads_that_break_off(self, client, page, seed):
        """Nothing is left of them, at once; that nothing is printed the fixture sees at the end."""
        server, data = Server(page.address), np.random.default_rng(seed).bytes(300_000)
        before = set(page.files())
        for _ in range(5):
            server.upload_half("half.jpg", data)
        server.fetch("GET", "/config")  # by now the server has taken those before
        for _ in range(60):
            time.sleep(0.5)
            if not (left := set(page.files()) - before):
                break
        assert not left

    def test_nobody_is_reached(self, client, page):
        """From start to here no connection and no look-up left the machine."""
        time.sleep(1)  # Gradio looks for news in a thread
        assert page.attempts.read_text() == ""

    def test_nothing_remote_in_the_page(self, page):
        """The browser is told to load from here alone, and the page names no script, style or font of others."""
        with urllib.request.urlopen(page.address) as reply:
            text, policy = reply.read().decode(), reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'") and "http" not in policy and "*" not in policy
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag.replace(page.address, "")), tag
        config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", text)[1])
        assert config["analytics_enabled"] is False and not config.get("stylesheets")

    def test_another_address_taken(self, page, tmp_path):
        """A port in use is told in a sentence."""
        import app
        from lseg.errors import UserError

        with pytest.raises(UserError, match="Address already in use.*: choose another --host or --port"):
            app.main(app.parse_args(["--port", page.address.rsplit(":", 1)[1], "--onnx", str(tmp_path)]))


def test_old_files_are_removed(tmp_path, seed):
    """Files and empty folders go when they have been seen for longer than the age, whatever their own times say."""
    rng, now, age = np.random.default_rng(seed), 1e6, 100.0
    old = OldFiles(str(tmp_path), age, lambda: now)
    expected: dict[Path, float] = {}  # and when they were made
    for number in range(60):
        now += rng.uniform(1, 20)
        path = tmp_path / f"{number % 4}" / f"{number}"
        path.mkdir(parents=True)
        if rng.random() < 0.7:
            path /= "labels.json"
            path.write_text("{}")
        os.utime(path, (rng.uniform(0, 4e9),) * 2)
        expected[path] = now
        old.sweep()
        expected = {path: made for path, made in expected.items() if now - made <= age}
        files = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {path for path in expected if path.suffix} and all(path.exists() for path in expected)
    now += 2 * age
    for _ in range(3):  # a folder is empty once what was in it is gone
        old.sweep()
    assert not list(tmp_path.iterdir())


def test_the_readmes_example(page, monkeypatch):
    """Runs as it stands, but for the address."""
    parts = [part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```python\n")[1:]]
    (text,) = (part for part in parts if "gradio_client" in part)
    monkeypatch.chdir(ROOT)
    found: dict = {}
    exec(text.replace("http://127.0.0.1:7860", page.address), found)
    assert found["line"]["labels"] and Path(found["label_map"]).is_file()
