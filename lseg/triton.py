"""A model repository for NVIDIA Triton: the text encoder, the label maps, and both as an ensemble, from ONNX files.

Triton puts requests of several clients into one batch. So all tensors have a batch axis here, that of the texts too:
each image of a batch brings its own. An ensemble's step hands over what the text encoder gives, a few kilobytes; the
pixel embeddings, 118 MB an image, stay inside the label-map graph.

The models are ONNX files with TensorRT as ONNX Runtime's accelerator: this project's own engines end before the labels,
in kernels that Triton does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lseg.errors import UserError
from lseg.files import write_files
from lseg.onnx_file import TEXT_ONNX, checked_image, checked_text, write_onnx
from lseg.recipes import LABELS_A_PASS, MAX_BATCH, USUAL_LABELS, Recipe
from lseg.scoring import load_encoder

if TYPE_CHECKING:
    import onnx

TEXT, LABELS, ENSEMBLE = "lseg_text", "lseg_labels", "lseg"  # the models
TOKENS = 77
DELAY = 2000  # microseconds that a request waits for others
WORKSPACE = 4 << 30  # bytes that TensorRT may use
BOUND = 1e-4  # of the cosines, between the graph with a batch axis for texts and the files it comes from

Tensor = tuple[str, str, Sequence[int]]  # a name, a type without TYPE_, and the axes after the batch's


def batched_text_graph(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """The text encoder with a batch axis: `tokens` int32 [B, N, 77] to `text` float32 [B, N, D]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = encoder.graph
    ends = [*graph.input, *graph.output]
    if len(graph.input) != 1 or len(graph.output) != 1 or any(len(e.type.tensor_type.shape.dim) != 2 for e in ends):
        raise UserError(f"{TEXT_ONNX} is no text encoder, tokens [N, 77] to vectors [N, D]: export it again")
    inner, outer = graph.input[0].name, graph.output[0].name
    dimension = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    kind = graph.input[0].type.tensor_type.elem_type
    ints = {"triton/rows": [-1, TOKENS], "triton/start": [0], "triton/end": [2], "triton/width": [dimension]}
    before = [
        helper.make_node("Cast", ["tokens"], ["triton/tokens"], to=kind),
        helper.make_node("Reshape", ["triton/tokens", "triton/rows"], ["triton/flat"]),
    ]
    after = [
        helper.make_node("Shape", ["tokens"], ["triton/shape"]),
        helper.make_node("Slice", ["triton/shape", "triton/start", "triton/end"], ["triton/batch"]),
        helper.make_node("Concat", ["triton/batch", "triton/width"], ["triton/out"], axis=0),
        helper.make_node("Reshape", ["triton/vectors", "triton/out"], ["text"]),
    ]
    model = onnx.ModelProto()
    model.CopyFrom(encoder)
    renamed = {inner: "triton/flat", outer: "triton/vectors"}
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [renamed.get(name, name) for name in values]
    nodes = [*before, *model.graph.node, *after]
    weights = [*model.graph.initializer, *(numpy_helper.from_array(np.array(v), k) for k, v in ints.items())]
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT32, ["B", "N", TOKENS])
    text = helper.make_tensor_value_info("text", TensorProto.FLOAT, ["B", "N", dimension])
    model.graph.CopyFrom(helper.make_graph(nodes, TEXT, [tokens], [text], weights))
    return model


def batched_label_graph(labels: onnx.ModelProto) -> onnx.ModelProto:
    """The label-map graph of `lseg.scoring.label_graph` with `text` float32 [B, N, D]: each image brings its own."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.ModelProto()
    model.CopyFrom(labels)
    graph = model.graph
    dim = next(value for value in graph.input if value.name == "pixels").type.tensor_type.shape.dim[0]
    for value in graph.input:
        if value.name == "text":
            dimension = value.type.tensor_type.shape.dim[1].dim_value
            batch = dim.dim_param or dim.dim_value
            value.CopyFrom(helper.make_tensor_value_info("text", TensorProto.FLOAT, [batch, "N", dimension]))
    del graph.value_info[:]  # shapes of before; the products themselves take a batch of texts as they are
    return model


def write_repository(folder: Path, onnx_folder: Path, weights: str, precision: str) -> list[Path]:
    """Writes the repository, each graph compared with the exported files before it stays.

    Args:
        folder: of the repository; made where it is missing, and what is there of these models is replaced.
        onnx_folder: of the exported files.
        weights: as `--weights`.
        precision: of TensorRT below ONNX Runtime: "fp16", or "fp32" for all others.

    Returns:
        the files.

    Raises:
        UserError: the exported files are missing or of other weights, a graph does not agree, or the disk is full.
    """
    digest, about = checked_image(onnx_folder, weights)
    checked_text(onnx_folder, weights, digest, about)
    config = about["image_config"]
    graphs = {
        TEXT: batched_text_graph(load_encoder(onnx_folder / TEXT_ONNX)),
        LABELS: batched_label_graph(Recipe(onnx_folder, config, "fp32", "4d").prepare("labels")),
    }
    configs = configurations(config["image_size"], config["embedding"], "FP16" if precision == "fp16" else "FP32")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; choose another --export-triton")
    files = []
    for name, graph in graphs.items():
        path = folder / name / "1" / "model.onnx"
        files.append(write_onnx(graph, path, {"kind": f"triton {name}", "weights_sha256": digest}))
    try:
        _compare(folder, onnx_folder, weights, config["image_size"])
    except UserError:
        for path in files:
            path.unlink()
        raise
    (folder / ENSEMBLE / "1").mkdir(parents=True, exist_ok=True)  # Triton wants a version's folder of an ensemble too
    texts = {folder / name / "config.pbtxt": text.encode() for name, text in configs.items()}
    write_files(texts)
    return [*files, *texts]


def _compare(folder: Path, onnx_folder: Path, weights: str, size: int) -> None:
    """The two graphs after one another, two images with different texts, against the exported files one by one."""
    from lseg.run_onnxruntime import OnnxRuntimeRunner, open_session
    from lseg.tokenizer import Tokenizer

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    tokens = np.stack([Tokenizer()(["sky", "road", "tree"]), Tokenizer()(["car", "wall", "a blue door"])])
    cpu = ["CPUExecutionProvider"]
    sessions = {name: open_session(folder / name / "1" / "model.onnx", "", cpu) for name in (TEXT, LABELS)}
    text = sessions[TEXT].run(["text"], {"tokens": tokens})[0]
    best = sessions[LABELS].run(["best"], {"pixels": pixels, "text": text})[0]
    with OnnxRuntimeRunner(weights, onnx_folder, device="cpu") as runner:
        for index in range(2):
            expected = runner.segment(pixels[index : index + 1], runner.encode_text(tokens[index]), best=True).best[0]
            off = float(np.linalg.norm(best[index] - expected) / np.linalg.norm(expected))
            if not off <= BOUND:
                raise UserError(
                    f"{folder / LABELS} is {off:.1e} off the exported files, more than {BOUND:.0e}: export those again"
                )


def configurations(size: int, dimension: int, precision: str) -> dict[str, str]:
    """Each model's config.pbtxt.

    Args:
        size: S, the side of the network's input.
        dimension: D, of an embedding.
        precision: "FP16" or "FP32", of TensorRT.
    """
    tokens: Tensor = ("tokens", "INT32", (-1, TOKENS))
    text: Tensor = ("text", "FP32", (-1, dimension))
    pixels: Tensor = ("pixels", "UINT8", (size, size, 3))
    maps: list[Tensor] = [("labels", "UINT8", (size, size)), ("best", "FP32", (size, size))]
    return {
        TEXT: _model(
            TEXT,
            [tokens],
            [text],
            _accelerator("FP32", {}, {"tokens": (TOKENS,)}),  # texts are few and kept
            {"tokens": ("INT32", (USUAL_LABELS, TOKENS))},
        ),
        LABELS: _model(
            LABELS,
            [pixels, text],
            maps,
            _accelerator(precision, {"pixels": (size, size, 3)}, {"text": (dimension,)}),
            {"pixels": ("UINT8", (size, size, 3)), "text": ("FP32", (USUAL_LABELS, dimension))},
        ),
        ENSEMBLE: _ensemble([pixels, tokens], maps),
    }


def _accelerator(precision: str, fixed: Mapping[str, tuple[int, ...]], by_label: Mapping[str, tuple[int, ...]]) -> str:
    """TensorRT below ONNX Runtime, with one range of shapes, so that no request makes it build again."""
    ranges = {"min": (1, 1), "opt": (MAX_BATCH, USUAL_LABELS), "max": (MAX_BATCH, LABELS_A_PASS)}
    parameters = {
        "precision_mode": precision,
        "max_workspace_size_bytes": str(WORKSPACE),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/tmp/lseg_engines",
    }
    for name, (batch, labels) in ranges.items():
        shapes = {key: (batch, *axes) for key, axes in fixed.items()}
        shapes |= {key: (batch, labels, *axes) for key, axes in by_label.items()}
        value = ",".join(f"{key}:{'x'.join(map(str, axes))}" for key, axes in shapes.items())
        parameters[f"trt_profile_{name}_shapes"] = value
    lines = "\n".join(f'      parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items())
    return f"""optimization {{
  execution_accelerators {{
    gpu_execution_accelerator {{
      name: "tensorrt"
{lines}
    }}
  }}
}}
"""


def _model(
    name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], optimization: str, warm: Mapping[str, tuple]
) -> str:
    batches = "".join(_warm_up(batch, warm) for batch in (1, MAX_BATCH))
    cached = "response_cache { enable: true }\n" if name == TEXT else ""  # where the server has a cache
    return f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
{_tensors("input", inputs)}{_tensors("output", outputs)}dynamic_batching {{
  preferred_batch_size: [ {MAX_BATCH} ]
  max_queue_delay_microseconds: {DELAY}
}}
instance_group [ {{ count: 1 kind: KIND_AUTO }} ]
{cached}{optimization}{batches}"""


def _warm_up(batch: int, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """A request of random numbers before the model counts as ready; tokens are zero, which every encoder knows."""
    lines = []
    for key, (kind, axes) in tensors.items():
        data = "zero_data" if kind == "INT32" else "random_data"
        dims = ", ".join(map(str, axes))
        lines.append(f'  inputs {{ key: "{key}" value {{ data_type: TYPE_{kind} dims: [ {dims} ] {data}: true }} }}\n')
    return f'model_warmup {{\n  name: "batch of {batch}"\n  batch_size: {batch}\n{"".join(lines)}}}\n'


def _tensors(field: str, tensors: Sequence[Tensor]) -> str:
    return "".join(
        f'{field} {{ name: "{name}" data_type: TYPE_{kind} dims: [ {", ".join(map(str, axes))} ] }}\n'
        for name, kind, axes in tensors
    )


def _ensemble(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    def maps(field: str, names: Mapping[str, str]) -> str:
        return "".join(f'    {field} {{ key: "{key}" value: "{value}" }}\n' for key, value in names.items())

    first = maps("input_map", {"tokens": "tokens"}) + maps("output_map", {"text": "text"})
    second = maps("input_map", {"pixels": "pixels", "text": "text"})
    second += maps("output_map", {"labels": "labels", "best": "best"})
    steps = "".join(
        f'  step {{\n    model_name: "{name}"\n    model_version: -1\n{lines}  }}\n'
        for name, lines in ((TEXT, first), (LABELS, second))
    )
    return f"""name: "{ENSEMBLE}"
platform: "ensemble"
max_batch_size: {MAX_BATCH}
{_tensors("input", inputs)}{_tensors("output", outputs)}ensemble_scheduling {{
{steps}}}
"""
