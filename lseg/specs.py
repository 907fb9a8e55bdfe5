"""What each exported file holds: its module, named example inputs, free axes and metadata."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lseg.checkpoint import Weights, load_image_encoder
from lseg.clip import VISUAL
from lseg.export import ExportSpec, FullResolution
from lseg.image import normalise, read_image, to_pixels
from lseg.similarity import Similarity
from lseg.tokenizer import Tokenizer

CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # RGB in [0, 1]
PHOTO = Path(__file__).resolve().parent.parent / "image" / "temple.jpg"


def text_spec(module: nn.Module, metadata: dict[str, object]) -> ExportSpec:
    """`tokens` int32 [N, 77] to `text` float32 [N, D], unit length; N free."""
    tokenize = Tokenizer()
    words = torch.from_numpy(tokenize(["sky", "a photo of a temple.", "tree", "other"]))
    return ExportSpec(
        kind="clip_textual",
        module=module.eval(),
        inputs={"tokens": words},
        outputs=("text",),
        dynamic={"tokens": {0: "N"}, "text": {0: "N"}},
        metadata=metadata,
        checks=({"tokens": words[:1]}, {"tokens": random_tokens(9)}),
    )


def random_tokens(count: int) -> Tensor:
    """Rows of random ids between CLIP's start and end tokens, of random lengths, zero-padded: int32 [count, 77]."""
    tokens = torch.randint(1, 49406, (count, 77), dtype=torch.int32)
    ends = torch.randint(1, 77, (count, 1))
    at = torch.arange(77)[None]
    tokens = torch.where(at < ends, tokens, torch.where(at == ends, 49407, 0)).int()
    tokens[:, 0] = 49406
    return tokens


def image_spec(
    weights: Weights, batch: int | None = None, full_resolution: bool = False, photo: Path = PHOTO
) -> ExportSpec:
    """`image` float32 [B, 3, S, S] to `embeddings` float32 [B, D, S / 2, S / 2], unit length.

    Args:
        weights: the checkpoint.
        batch: a fixed B, or None for a free one.
        full_resolution: the first port's output instead: times 1 / 0.07 and upsampled to S x S.
        photo: the real image to compare on.
    """
    encoder = load_image_encoder(weights)
    for block in encoder.vit.blocks:
        block.attn.fused_attn = False  # q * scale, q k^T, softmax, p v as single operations: what engines recognise
    size = encoder.config.image_size
    real = torch.from_numpy(normalise(to_pixels(read_image(photo), size)[None]))
    axes = {0: "B"} if batch is None else {}
    others = torch.rand((batch or 2) - 1, 3, size, size) * 2 - 1  # no two images of a batch are the same
    check = others if full_resolution and batch is None else torch.cat([others, real.flip(3)])  # 472 MB an image there
    return ExportSpec(
        kind="lseg_full_resolution" if full_resolution else "lseg",
        module=FullResolution(encoder).eval() if full_resolution else encoder,
        inputs={"image": torch.cat([real, others]) if batch else real},
        outputs=("embeddings",),
        dynamic={"image": axes, "embeddings": axes},
        metadata=weights_metadata(weights),
        checks=({"image": check},),
    )


def similarity_spec(weights: Weights, photo: Path = PHOTO) -> ExportSpec:
    """`embeddings` and `text` [N, D] to `labels` int32, `best` float32 and `scores` float32 [B, N, S, S]; B, N free."""
    config = weights.image_config
    side = 8 * config.grid
    encoder = load_image_encoder(weights)
    with torch.no_grad():
        real = encoder(torch.from_numpy(normalise(to_pixels(read_image(photo), config.image_size)[None])))
    embeddings = torch.nn.functional.normalize(torch.randn(1, config.embedding, side, side), dim=1)
    text = torch.nn.functional.normalize(torch.randn(3, config.embedding), dim=1)
    return ExportSpec(
        kind="similarity",
        module=Similarity().eval(),
        inputs={"embeddings": embeddings, "text": text},
        outputs=("labels", "best", "scores"),
        dynamic={
            "embeddings": {0: "B"},
            "text": {0: "N"},
            "labels": {0: "B"},
            "best": {0: "B"},
            "scores": {0: "B", 1: "N"},
        },
        metadata=weights_metadata(weights),
        bounds={"labels": 1e-3},  # the share of pixels: rounding decides where two scores are as good as equal
        checks=({"embeddings": torch.cat([embeddings, real]), "text": text.roll(1, 0)[:2]},),
    )


def visual_spec(module: nn.Module, metadata: dict[str, object], photo: Path = PHOTO) -> ExportSpec:
    """`image` float32 [B, 3, 224, 224], CLIP-normalised, to `embedding` [B, D], unit length; B free."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_DEVIATION))
    values = torch.from_numpy(to_pixels(read_image(photo), 224)).permute(2, 0, 1) / 255  # [3, 224, 224]
    real = ((values - mean) / deviation)[None]
    return ExportSpec(
        kind="clip_visual",
        module=module.eval(),
        inputs={"image": torch.cat([real, torch.randn(1, 3, 224, 224)])},
        outputs=("embedding",),
        dynamic={"image": {0: "B"}, "embedding": {0: "B"}},
        metadata=metadata | {"visual_config": VISUAL},
        checks=({"image": torch.randn(1, 3, 224, 224)},),
    )


def weights_metadata(weights: Weights) -> dict[str, object]:
    return {
        "weights": weights.name,
        "weights_sha256": weights.sha256,
        "image_config": weights.image_config.to_dict(),
        "text_config": weights.text_config.to_dict() if weights.text_config else None,
    }
