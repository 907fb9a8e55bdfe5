"""Weights from elsewhere: CLIP's own files, open_clip, and the download of the official checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, tiny_weights, write_lightning, write_tiny
from safetensors.torch import save_file
from torch import Tensor

from lseg import checkpoint
from lseg.errors import UserError
from lseg.text import CLIPTextEncoder


def clip_files(state: dict[str, Tensor]) -> dict:
    """Ways in which a CLIP file may hold a text tower; `state` has a tiny one's tensors."""
    vision = {"visual.proj": torch.ones(3), "logit_scale": torch.tensor(4.6), "input_resolution": torch.tensor(224)}
    mask = {"attn_mask": torch.zeros(77, 77), "transformer.resblocks.0.attn_mask": torch.zeros(77, 77)}

    def script(path: Path) -> None:
        model = CLIPTextEncoder(tiny_config()[1])
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        torch.jit.trace(model.eval(), torch.ones(1, 77, dtype=torch.int64), check_trace=False).save(str(path))

    return {
        "torchscript": script,
        "state dict": lambda path: torch.save(state | vision | mask, path),
        "nested": lambda path: torch.save({"state_dict": state | vision, "epoch": 32}, path),
        "safetensors": lambda path: save_file(state | vision | mask, path),
        "half": lambda path: torch.save({name: tensor.half() for name, tensor in state.items()}, path),
    }


def tiny_text(seed: int) -> dict[str, Tensor]:
    return {
        name.removeprefix("clip_pretrained."): tensor.half().float()
        for name, tensor in tiny_weights(seed).items()
        if name.startswith("clip_pretrained.") and "visual" not in name and "logit" not in name
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", clip_files({}))
def test_clip_files(kind, tmp_path, seed):
    state = tiny_text(seed)
    path = tmp_path / "ViT-B-32.pt"
    clip_files(state)[kind](path)
    found, name, digest = checkpoint.clip_text_state_dict(path, tiny_config()[1])
    assert name == "ViT-B-32" and len(digest) == 64
    assert found.keys() == state.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[key]), key
    CLIPTextEncoder(tiny_config()[1]).load_state_dict(found)


def test_clip_from_open_clip(tmp_path, monkeypatch, seed):
    """open_clip fetches the file; the names of its own model are those that are expected here."""
    import open_clip

    model = open_clip.create_model("ViT-B-32-quickgelu", device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.empty(shape).normal_(generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "open_clip_model.safetensors"
    save_file(state, path)
    fetched = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: fetched.append(config) or str(path))
    found, name, _ = checkpoint.clip_text_state_dict("openai")
    assert name == "openai" and fetched == [open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")]
    assert fetched[0]["quick_gelu"]
    with torch.device("meta"):
        assert found.keys() == CLIPTextEncoder().state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())
    path.unlink()


def test_clip_that_cannot_be_had(tmp_path, monkeypatch, seed):
    import open_clip

    def offline(config):
        raise ConnectionError("name resolution\nfailed")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(
        UserError, match=r"could not fetch CLIP's weights 'openai' \(name resolution failed\): go online"
    ):
        checkpoint.clip_text_state_dict("openai")
    with pytest.raises(UserError, match="ViT-B-16.pt does not exist: give another copy of CLIP's ViT-B/32"):
        checkpoint.clip_text_state_dict(tmp_path / "ViT-B-16.pt")
    with pytest.raises(UserError, match="is a folder: give another copy of CLIP's ViT-B/32"):
        checkpoint.clip_text_state_dict(tmp_path)
    path = tmp_path / "other.pt"
    torch.save({"conv1.weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match="holds 1 tensors but no CLIP text encoder .it has conv1.weight; CLIP has"):
        checkpoint.clip_text_state_dict(path)
    torch.save(tiny_text(seed), path)
    with pytest.raises(UserError, match="does not fit CLIP ViT-B/32's text encoder: 120 missing: transformer.*extra"):
        checkpoint.clip_text_state_dict(path)


def lightning_bytes(path: Path, seed: int) -> bytes:
    write_lightning(path, {f"net.{name}": tensor for name, tensor in tiny_weights(seed).items()})
    return path.read_bytes()


DOWNLOADS = {
    "web page": (lambda path, seed: b"<!DOCTYPE html><html>quota exceeded</html>", "is a web page"),
    "cut short": (lambda path, seed: lightning_bytes(path, seed)[:-500], "is cut short"),
    "another model": (lambda path, seed: lightning_bytes(path, seed), "does not fit LSeg's image encoder"),
    "nothing": (lambda path, seed: None, "gdown brought no file"),
    "error": (lambda path, seed: RuntimeError("Too many\n\n users"), r"\(Too many users\)"),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_failed_download_leaves_nothing(name, tmp_path, monkeypatch, seed):
    make, reason = DOWNLOADS[name]
    content = make(tmp_path / "made", seed)
    destination = tmp_path / "models" / "demo_e200.ckpt"

    def fetch(id: str, output: str, quiet: bool) -> str:
        Path(f"{output}x1y2.part").write_bytes(b"gdown's own")
        if isinstance(content, Exception):
            raise content
        if content is not None:
            Path(output).write_bytes(content)

    monkeypatch.setattr("gdown.download", fetch)
    with pytest.raises(UserError, match=reason) as error:
        checkpoint.download(destination)
    message = str(error.value)
    assert message.startswith(f"{destination} was not downloaded and nothing was kept (") and "\n" not in message
    assert ".part" not in message
    assert message.endswith(f"open {checkpoint.OFFICIAL_URL} in a browser and save the file as {destination}")
    assert not list(destination.parent.iterdir())


def test_an_interrupted_download_leaves_the_old_file(tmp_path, monkeypatch):
    destination = tmp_path / "demo_e200.ckpt"
    destination.write_bytes(b"old")

    def fetch(id: str, output: str, quiet: bool) -> str:
        Path(output).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("gdown.download", fetch)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.download(destination)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("demo_e200.ckpt", b"old")]


def test_a_good_download(tmp_path, monkeypatch, seed):
    source = tmp_path / "source.safetensors"
    write_tiny(source, seed)
    calls = []

    def fetch(id: str, output: str, quiet: bool) -> str:
        calls.append((id, quiet))
        Path(output).write_bytes(source.read_bytes())
        return output

    monkeypatch.setattr("gdown.download", fetch)
    folder = tmp_path / "models"
    folder.mkdir()
    path = checkpoint.download(folder)
    assert path == folder / "demo_e200.ckpt" and path.read_bytes() == source.read_bytes()
    assert calls == [("1FTuHY1xPUkM-5gaDtMfgCl3D0gR89WV7", False)]  # gdown shows its progress
    assert list(folder.iterdir()) == [path]


def test_a_download_to_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .*: choose another folder"):
        checkpoint.download(tmp_path / "file" / "demo_e200.ckpt")
