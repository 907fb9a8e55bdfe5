"""How each TensorRT engine's graph comes from the exported ONNX files, and the shapes it is built for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lseg.engine import EngineSpec, Profile
from lseg.errors import UserError
from lseg.onnx_file import IMAGE_ONNX, TEXT_ONNX
from lseg.tensorfile import sha256_once

if TYPE_CHECKING:
    import onnx

RECIPE = 6  # raise it when a graph below changes: engines of an older recipe are built again
MAX_BATCH = 8
LABELS_A_PASS = 256  # the largest number of labels that uint8 indices tell apart
USUAL_LABELS = 8
TOKEN_MULTIPLE = 8  # a ViT's tokens are padded to a multiple of this where the scores of attention lie in memory
# The image encoder's engines, by the images of a run.
IMAGE = {batch: f"images{batch}" if batch > 1 else "image" for batch in range(1, MAX_BATCH + 1)}


def check_batch(batch: int | None, matmul: str | None = None) -> None:
    """Raises UserError where no image engine takes so many images a run."""
    if batch is not None and not (isinstance(batch, int) and 1 <= batch <= MAX_BATCH):
        raise UserError(f"{batch!r} images a run cannot be: give 1 to {MAX_BATCH}")
    if matmul == "2d" and (batch or 1) > 1:
        raise UserError(f"MatMuls in 2-D take one image a run, not {batch}: leave --batch out, or choose --matmul 4d")


@dataclass(frozen=True)
class Recipe:
    """What the engines of one runner have in common.

    Attributes:
        folder: of the exported ONNX files.
        config: the image encoder's sizes, as the exported file's metadata has them.
        precision: "fp32", "tf32", "fp16" or "bf16".
        matmul: "4d", "3d" or "2d", of the image encoder; the text encoder has "4d" for "2d".
        batch: images a run of the image encoder, always; None: eight or one, as many as there are.
    """

    folder: Path
    config: dict
    precision: str
    matmul: str
    optimization_level: int = 3
    heads_per_product: int = 2
    batch: int | None = None

    @property
    def half(self) -> bool:
        """Whether it is in 16 bits."""
        return self.precision in ("fp16", "bf16")

    @property
    def fused(self) -> bool:
        """Whether TensorRT makes one kernel of an attention: in 16 bits, and not of the 2-D form."""
        return self.half and self.matmul != "2d"

    @property
    def token_multiple(self) -> int:
        """Fused attention writes no scores, so that their rows need no alignment; a mask would keep it from fusing."""
        return 1 if self.fused else TOKEN_MULTIPLE

    @property
    def side(self) -> int:
        """Height and width of z, the head's output: 120."""
        return 4 * self.config["image_size"] // self.config["patch_size"]

    @property
    def batches(self) -> tuple[int, ...]:
        """What the image encoder takes at a time, the largest first: the 2-D form one image, others eight as well."""
        if self.batch:
            return (self.batch,)
        return (1,) if self.matmul == "2d" else (MAX_BATCH, 1)

    def spec(self, name: str) -> EngineSpec:
        """The spec of an engine: "image" (one at a time), "images2" to "images8", "dots" or "text"."""
        file = TEXT_ONNX if name == "text" else IMAGE_ONNX
        extra: dict[str, object] = {"recipe": RECIPE, "token_multiple": self.token_multiple}
        if self.matmul == "2d" and name in IMAGE.values():
            extra["heads_per_product"] = self.heads_per_product
        return EngineSpec(
            name=name,
            onnx_sha256=sha256_once(self.folder / file),
            precision=self.text_precision if name == "text" else self.precision,
            matmul="4d" if name in ("text", "dots") and self.matmul == "2d" else self.matmul,
            profiles=self.profiles(name),
            recipe=extra,
            optimization_level=self.optimization_level,
        )

    @property
    def text_precision(self) -> str:
        """Texts are embedded once and kept: float32 costs nothing that matters."""
        return self.precision if self.precision == "tf32" else "fp32"

    def profiles(self, name: str) -> tuple[Profile, ...]:
        """Fixed shapes for the image encoder; up to 256 labels at a time for the others."""
        size, dimension = self.config["image_size"], self.config["embedding"]
        if name == "text":
            return ({"tokens": ((1, 77), (USUAL_LABELS, 77), (LABELS_A_PASS, 77))},)
        if name in IMAGE.values():
            shape = (self._batch(name), 3, size, size)
            return ({"image": (shape, shape, shape)},)
        texts = tuple((n, dimension) for n in (1, USUAL_LABELS, LABELS_A_PASS))
        shapes = [(batch, dimension, self.side, self.side) for batch in self.batches]
        return tuple({"z": (shape, shape, shape), "text": texts} for shape in shapes)

    def prepare(self, name: str) -> onnx.ModelProto:
        """The ONNX graph of an engine, in its precision and form; "labels", which is no engine, is for files."""
        import onnx

        from lseg import scoring
        from lseg.padding import pad_tokens
        from lseg.patches import patches_as_product
        from lseg.precision import accumulate_in_float32, to_bfloat16, to_float16
        from lseg.rewrite import rewrite_matmuls

        if name == "dots":
            types = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
            kind = types.get(self.precision, onnx.TensorProto.FLOAT)
            dots = scoring.dot_graph(kind, self.config["embedding"], self.side)
            return accumulate_in_float32(dots, every=True) if self.precision == "fp16" else dots
        if name == "text":
            return rewrite_matmuls(scoring.load_encoder(self.folder / TEXT_ONNX), self.spec("text").matmul)
        core = scoring.cut_head(scoring.load_encoder(self.folder / IMAGE_ONNX))
        if self.half:
            core = patches_as_product(core)
        if self.matmul == "2d":
            core = rewrite_matmuls(core, "2d", heads_per_product=self.heads_per_product, batch=1)
        else:
            core = pad_tokens(rewrite_matmuls(core, self.matmul, apart=self.fused), self.token_multiple)
        core = {"fp16": to_float16, "bf16": to_bfloat16}.get(self.precision, lambda same: same)(core)
        if name == "labels":
            return scoring.label_graph(core)
        if self.precision == "fp16":
            core = accumulate_in_float32(core)
        return scoring.fix_batch(core, self._batch(name))

    @staticmethod
    def _batch(name: str) -> int:
        return next(batch for batch, engine in IMAGE.items() if engine == name)
