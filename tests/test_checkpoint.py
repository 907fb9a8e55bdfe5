"""LSeg's checkpoints: the official format at full size, strictness, CLIP's sources, the download, and the function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import (
    official_shapes,
    official_state_dict,
    tiny_config,
    tiny_weights,
    write_lightning,
    write_tiny,
)
from reference import bilinear_positions, pixel_embeddings
from safetensors.torch import save_file
from torch import Tensor

from lseg import checkpoint
from lseg import weights as weights_module
from lseg.checkpoint import UNUSED, Weights
from lseg.errors import UserError
from lseg.model import LSegConfig, LSegImageEncoder
from lseg.text import CLIPTextEncoder

# One tensor of each kind: its official name, and its name in LSegImageEncoder.
PAIRS = {
    "pretrained.model.cls_token": "vit.cls_token",
    "pretrained.model.patch_embed.proj.weight": "vit.patch_embed.proj.weight",
    "pretrained.model.blocks.0.attn.qkv.bias": "vit.blocks.0.attn.qkv.bias",
    "pretrained.model.blocks.23.mlp.fc2.weight": "vit.blocks.23.mlp.fc2.weight",
    "pretrained.act_postprocess1.0.project.0.weight": "reassemble.0.readout.linear.weight",
    "pretrained.act_postprocess2.3.weight": "reassemble.1.project.weight",
    "pretrained.act_postprocess1.4.weight": "reassemble.0.resize.weight",
    "pretrained.act_postprocess4.4.bias": "reassemble.3.resize.bias",
    "scratch.layer3_rn.weight": "reassemble.2.out.weight",
    "scratch.refinenet1.out_conv.bias": "fusion.0.out_conv.bias",
    "scratch.refinenet3.resConfUnit1.conv2.weight": "fusion.2.skip_unit.conv2.weight",
    "scratch.refinenet4.resConfUnit2.bn1.running_var": "fusion.3.unit.bn1.running_var",
    "scratch.refinenet2.resConfUnit2.bn2.num_batches_tracked": "fusion.1.unit.bn2.num_batches_tracked",
    "scratch.head1.weight": "head.weight",
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def tiny(tensors: dict[str, Tensor]) -> Weights:
    image, text = tiny_config()
    return Weights("tiny", "", image, text, tensors, Path("tiny.ckpt"))


@pytest.fixture(
    params=[pytest.param(False, id="float32 CLIP", marks=pytest.mark.slow), pytest.param(True, id="float16 CLIP")]
)
def official(request, tmp_path, seed):
    """A full-size official checkpoint (2 GB) and the tensors in it."""
    state = official_state_dict(seed, half_clip=request.param)
    path = tmp_path / "demo_e200.ckpt"
    write_lightning(path, state)
    yield path, state
    path.unlink()


def test_official_checkpoint(official, request):
    path, state = official
    weights = checkpoint.load(path)
    assert (weights.name, weights.path, weights.image_config) == ("demo_e200", path, LSegConfig())
    assert set(weights.tensors) == {name.removeprefix("net.") for name in official_shapes()}

    encoder = checkpoint.load_image_encoder(weights)
    loaded = encoder.state_dict()
    assert not encoder.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in encoder.parameters())
    for official_name, name in PAIRS.items():
        assert torch.equal(loaded[name], state[f"net.{official_name}"]), name
    positions = state["net.pretrained.model.pos_embed"]
    assert positions.shape == (1, 577, 1024) and loaded["vit.pos_embed"].shape == (1, 901, 1024)
    # The official code too resizes in float32, where the coordinates themselves are off by about 1e-6.
    assert relative(loaded["vit.pos_embed"], bilinear_positions(positions, 30)) < 3e-6

    text = checkpoint.load_text_encoder(weights)
    clip = {name.removeprefix("net.clip_pretrained."): t for name, t in state.items() if ".clip_pretrained." in name}
    halves = sum(tensor.dtype == torch.float16 for tensor in clip.values())
    assert halves == (195 if "float16" in request.node.name else 0)
    for name, tensor in text.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, clip[name].float()), name

    if halves:  # once is enough: the image encoder has the same numbers in both files
        with torch.no_grad():
            embeddings = encoder(torch.rand(1, 3, 480, 480) * 2 - 1)
        assert embeddings.shape == (1, 512, 240, 240) and embeddings.dtype == torch.float32
        assert (embeddings.norm(dim=1) - 1).abs().max() < 1e-5
        assert embeddings.std(dim=(2, 3)).mean() > 1e-3


@pytest.mark.slow
def test_full_size_numbers(seed):
    """The ViT-L/16 at 480 x 480 against the reference in float64: half a minute."""
    tensors = {name.removeprefix("net."): tensor for name, tensor in official_state_dict(seed, half_clip=False).items()}
    weights = Weights("official", "0" * 64, LSegConfig(), None, tensors, Path("official"))
    images = torch.rand(1, 3, 480, 480, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        found = checkpoint.load_image_encoder(weights)(images)
    difference = relative(found, pixel_embeddings(tensors, LSegConfig(), images))
    print(f"relative difference {difference:.1e}")
    assert difference < 1e-5


def test_names_cover_the_official_table():
    with torch.device("meta"):
        models = LSegImageEncoder(), CLIPTextEncoder()
    names = checkpoint.to_official_names(*(model.state_dict() for model in models))
    table = {name.removeprefix("net.") for name in official_shapes()}
    assert set(names) <= table
    rest = table - set(names)
    assert all(name.startswith(UNUSED) for name in rest)
    assert not any(name.startswith(UNUSED) for name in names if not name.startswith("clip_pretrained."))
    assert {name.split(".")[1] for name in rest if name.startswith("clip_pretrained.")} == {"visual", "logit_scale"}
    with pytest.raises(KeyError):
        checkpoint.official_name("decoder.weight")


@pytest.mark.parametrize("positions, bound", [(4, 1e-12), (3, 1e-6), (6, 1e-6)])
def test_function_against_the_description(positions, bound, seed):
    """The model with a checkpoint's weights computes what the official code does with the same checkpoint.

    Resizing positions rounds to float32, which is why `bound`, for a model in float64, is larger with it.
    """
    tensors = tiny_weights(seed, positions)
    weights = tiny(tensors)
    model = checkpoint.load_image_encoder(weights)
    images = torch.empty(2, 3, 64, 64).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    expected = pixel_embeddings(tensors, weights.image_config, images)
    assert expected.std(dim=(2, 3)).mean() > 0.01  # pixels differ: the comparison means something
    with torch.no_grad():
        single = model(images)
        double = model.double()(images.double())
    print(f"relative difference: float32 {relative(single, expected):.1e}, float64 {relative(double, expected):.1e}")
    assert single.shape == (2, 24, 32, 32)
    assert relative(single, expected) <= 1e-5
    assert relative(double, expected) <= bound


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_that_stand_alone(prefix, nested, tmp_path, seed):
    tensors = tiny_weights(seed)
    state = {prefix + name: tensor for name, tensor in tensors.items()}
    path = tmp_path / "mine.pt"
    torch.save({"state_dict": state} if nested else state, path)
    weights = checkpoint.load(path)
    assert weights.name == "mine" and len(weights.sha256) == 64
    assert list(weights.tensors) == list(tensors)
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in tensors.items())


def test_prefix_is_cut_once_and_whole(tmp_path, seed):
    """str.lstrip would eat the first letters of names such as `ten`, and a second `net.`."""
    path = tmp_path / "names.pt"
    torch.save({f"net.{name}": torch.ones(1) for name in ("scratch.x", "ten.x", "net.x", "entente")}, path)
    assert list(checkpoint.load(path).tensors) == ["scratch.x", "ten.x", "net.x", "entente"]


def test_what_has_no_effect_may_be_absent(seed):
    tensors = tiny_weights(seed)
    lean = {name: t for name, t in tensors.items() if not name.startswith(UNUSED[:3]) and "visual" not in name}
    assert len(lean) == len(tensors) - 17
    for load in (checkpoint.image_state_dict, checkpoint.text_state_dict):
        full, found = load(tiny(tensors)), load(tiny(lean))
        assert full.keys() == found.keys() and all(torch.equal(full[name], found[name]) for name in full)


def test_misfits_are_listed_together(seed):
    tensors = tiny_weights(seed)
    head = tensors.pop("scratch.head1.weight")
    tensors["scratch.head2.weight"] = head
    tensors["scratch.layer1_rn.weight"] = torch.zeros(16, 9, 3, 3)
    tensors["pretrained.model.cls_token"] = torch.zeros(1, 1, 32, dtype=torch.int64)
    tensors["pretrained.model.pos_embed"] = torch.zeros(1, 15, 32)
    with pytest.raises(UserError) as error:
        checkpoint.image_state_dict(tiny(tensors))
    message = str(error.value)
    assert message.startswith(
        "tiny.ckpt does not fit LSeg's image encoder: 1 missing: scratch.head1.weight; 1 extra: scratch.head2.weight; "
        "3 mis-shaped: "
    )
    for part in (
        "scratch.layer1_rn.weight (expected 16x8x3x3, found 16x9x3x3)",
        "pretrained.model.cls_token (expected 1x1x32, found 1x1x32 of whole numbers)",
        "pretrained.model.pos_embed (expected 1x17x32, found 1x15x32)",
        "lseg_export.py --download",
    ):
        assert part in message
    assert "\n" not in message


def test_a_misfit_is_reported_as_it_is_in_the_file(seed):
    tensors = tiny_weights(seed) | {"pretrained.model.pos_embed": torch.zeros(1, 10, 31)}
    with pytest.raises(UserError, match=r"1 mis-shaped: pretrained.model.pos_embed .expected 1x17x32, found 1x10x31.;"):
        checkpoint.image_state_dict(tiny(tensors))


def test_long_lists_are_cut(seed):
    tensors = {name: tensor for name, tensor in tiny_weights(seed).items() if "blocks" not in name}
    with pytest.raises(UserError, match="72 missing: pretrained.model.blocks.0.norm1.weight, .* and 64 more; use"):
        checkpoint.image_state_dict(tiny(tensors))


def test_text_misfits(seed):
    tensors = tiny_weights(seed)
    del tensors["clip_pretrained.ln_final.bias"]
    tensors["clip_pretrained.transformer.resblocks.9.ln_1.bias"] = torch.zeros(16)
    with pytest.raises(
        UserError, match="does not fit CLIP's text encoder: 1 missing: clip_pretrained.ln_final.bias; 1 ex"
    ):
        checkpoint.text_state_dict(tiny(tensors))
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("clip_pretrained.")}
    with pytest.raises(UserError, match="holds no CLIP text encoder: export .*clip_onnx_export.py --weights openai"):
        checkpoint.text_state_dict(tiny(without))


def test_safetensors_round_trip(tmp_path, seed):
    tensors = tiny_weights(seed)
    weights = write_tiny(tmp_path / "small.safetensors", seed)
    assert (weights.image_config, weights.text_config) == tiny_config()
    assert weights.name == "small" and set(weights.tensors) == set(tensors)
    for name, tensor in weights.tensors.items():
        kind = torch.int64 if name.endswith("num_batches_tracked") else torch.float16
        assert tensor.dtype == kind and torch.equal(tensor, tensors[name].to(kind)), name
    assert [file.name for file in tmp_path.iterdir()] == ["small.safetensors"]

    image, text = checkpoint.load_image_encoder(weights), checkpoint.load_text_encoder(weights)
    official = checkpoint.to_official_names(image.state_dict(), text.state_dict())
    for name, tensor in official.items():
        assert tensor.dtype != torch.float16 and torch.equal(tensor, weights.tensors[name].to(tensor.dtype)), name
    tokens = torch.tensor([[49406, 320, 49407] + [0] * 74])
    assert (text(tokens).norm(dim=1) - 1).abs().max() < 1e-6
    assert not any(p.requires_grad for p in (*image.parameters(), *text.parameters()))


def test_safetensors_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save_safetensors(tmp_path / "none" / "a.safetensors", {"a": torch.ones(2)}, *tiny_config())
    with pytest.raises(ValueError, match="big has numbers that float16 cannot hold"):
        checkpoint.save_safetensors(tmp_path / "a.safetensors", {"big": torch.tensor([1e5])}, *tiny_config())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"depht": 3}',
        '{"heads": 3}',
        '{"depth": "six"}',
        '{"taps": [5, 11, 17, 24]}',
        '{"taps": [23, 17, 11, 5]}',
        '{"taps": [5, 11, 17]}',
        '{"reassemble": [256, 512]}',
    ],
)
def test_a_wrong_description_of_the_model(config, tmp_path, seed):
    path = tmp_path / "wrong.safetensors"
    save_file(tiny_weights(seed), path, {"format": "lseg", "image_config": config})
    with pytest.raises(UserError, match="wrong.safetensors (describes its model wrongly|does not fit)"):
        checkpoint.load_image_encoder(checkpoint.load(path))


@pytest.fixture
def demo_weights(tmp_path, monkeypatch) -> Path:
    """Where "demo" leads in this test."""
    path = tmp_path / "lseg_demo.safetensors"
    for module in (checkpoint, weights_module):
        monkeypatch.setattr(module, "DEMO_WEIGHTS", path)
    return path


def test_resolve(tmp_path, demo_weights):
    with pytest.raises(UserError, match="lseg_demo.safetensors is missing: restore it with 'git checkout"):
        checkpoint.resolve("demo")
    demo_weights.touch()
    assert checkpoint.resolve("demo") == demo_weights
    with pytest.raises(UserError, match="is a folder: give the checkpoint file"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(UserError, match="none.ckpt does not exist: .*python lseg_export.py --download"):
        checkpoint.resolve("none.ckpt")


def test_demo_weights_have_their_name(demo_weights, seed):
    write_tiny(demo_weights, seed)
    assert checkpoint.load("demo").name == checkpoint.load(demo_weights).name == "demo"


def test_an_unrelated_checkpoint(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save({f"layer{n}.0.conv1.weight": torch.ones(2, 2, 3, 3) for n in range(5)}, path)
    names = "layer0.0.conv1.weight, layer1.0.conv1.weight, layer2.0.conv1.weight and 2 more"
    with pytest.raises(UserError, match=f"resnet.pth holds 5 tensors but none of LSeg's .it has {names}; LSeg has"):
        checkpoint.load(path)
