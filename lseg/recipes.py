"""How each TensorRT engine's graph comes from the exported ONNX files, and the shapes it is built for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lseg.engine import EngineSpec, Profile
from lseg.onnx_file import IMAGE_ONNX, TEXT_ONNX
from lseg.tensorfile import sha256

if TYPE_CHECKING:
    import onnx

RECIPE = 2  # raise it when a graph below changes: engines of an older recipe are built again
MAX_BATCH = 8
LABELS_A_PASS = 256  # the largest number of labels that uint8 indices tell apart
LABELS_IN_BATCH = LABELS_A_PASS // MAX_BATCH  # scores of a batch then take no more memory: 300 MB
USUAL_LABELS = 8
TOKEN_MULTIPLE = 8  # a ViT's tokens are padded to a multiple of this


@dataclass(frozen=True)
class Recipe:
    """What the engines of one runner have in common.

    Attributes:
        folder: of the exported ONNX files.
        config: the image encoder's sizes, as the exported file's metadata has them.
        precision: "fp32", "tf32", "fp16" or "bf16".
        matmul: "4d", "3d" or "2d", of the image encoder; the text encoder has "4d" for "2d".
    """

    folder: Path
    config: dict
    precision: str
    matmul: str
    optimization_level: int = 3
    heads_per_product: int = 2

    @property
    def side(self) -> int:
        """Height and width of z, the head's output: 120."""
        return 4 * self.config["image_size"] // self.config["patch_size"]

    def spec(self, name: str) -> EngineSpec:
        """The spec of the engine `name`: "labels", "embeddings", "scores", "pass" or "text"."""
        file = TEXT_ONNX if name == "text" else IMAGE_ONNX
        extra: dict[str, object] = {"recipe": RECIPE, "token_multiple": TOKEN_MULTIPLE}
        if self.matmul == "2d" and name in ("labels", "embeddings", "scores"):
            extra["heads_per_product"] = self.heads_per_product
        return EngineSpec(
            name=name,
            onnx_sha256=sha256(self.folder / file),
            precision=self.text_precision if name == "text" else self.precision,
            matmul="4d" if name == "text" and self.matmul == "2d" else self.matmul,
            profiles=self.profiles(name),
            recipe=extra,
            optimization_level=self.optimization_level,
        )

    @property
    def text_precision(self) -> str:
        """Texts are embedded once and kept: float32 costs nothing that matters."""
        return self.precision if self.precision == "tf32" else "fp32"

    def profiles(self, name: str) -> tuple[Profile, ...]:
        """One profile for a single image, tuned to it, and one for batches."""
        size, dimension = self.config["image_size"], self.config["embedding"]
        if name == "text":
            return ({"tokens": ((1, 77), (USUAL_LABELS, 77), (LABELS_A_PASS, 77))},)
        batches = ((1, 1, 1),) if self.matmul == "2d" else ((1, 1, 1), (2, MAX_BATCH, MAX_BATCH))
        profiles = []
        for batch in batches[:1] if name in ("pass", "scores") else batches:
            most = LABELS_A_PASS if batch[2] == 1 else LABELS_IN_BATCH
            text = tuple((n, dimension) for n in (1, USUAL_LABELS, most))
            pixels = tuple((b, size, size, 3) for b in batch)
            full = tuple((b, size, size) for b in batch)
            wide = tuple((b, dimension, 2 * self.side, 2 * self.side) for b in batch)
            profiles.append(
                {
                    "labels": {"pixels": pixels, "text": text},
                    "embeddings": {"pixels": pixels},
                    "scores": {"image": tuple((b, 3, size, size) for b in batch), "text": text},
                    "pass": {
                        "embeddings": wide,
                        "text": text,
                        "offset": ((1,), (1,), (1,)),
                        "best_before": full,
                        "labels_before": full,
                    },
                }[name]
            )
        return tuple(profiles)

    def prepare(self, name: str) -> onnx.ModelProto:
        """The ONNX graph of the engine `name`, in its precision and form."""
        import onnx

        from lseg import scoring
        from lseg.padding import pad_tokens
        from lseg.precision import to_bfloat16, to_float16
        from lseg.rewrite import rewrite_matmuls

        types = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
        if name == "pass":
            kind = types.get(self.precision, onnx.TensorProto.FLOAT)
            return scoring.pass_graph(kind, self.config["embedding"], self.side)
        if name == "text":
            return rewrite_matmuls(scoring.load_encoder(self.folder / TEXT_ONNX), self.spec("text").matmul)
        core = scoring.cut_head(scoring.load_encoder(self.folder / IMAGE_ONNX))
        if self.matmul == "2d":
            core = rewrite_matmuls(core, "2d", heads_per_product=self.heads_per_product, batch=1)
        else:
            core = pad_tokens(rewrite_matmuls(core, self.matmul), TOKEN_MULTIPLE)
        core = {"fp16": to_float16, "bf16": to_bfloat16}.get(self.precision, lambda same: same)(core)
        return {
            "labels": scoring.label_graph,
            "embeddings": scoring.embedding_graph,
            "scores": scoring.score_graph,
        }[name](core)
