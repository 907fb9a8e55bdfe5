"""TensorRT engines: built with progress, kept with what made them, trusted only where that still holds."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lseg.errors import UserError
from lseg.files import locked, unfinished, write_files
from lseg.tensorfile import sha256

if TYPE_CHECKING:
    import onnx
    import tensorrt as trt

    from lseg.cuda import Device

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # for each input: smallest, usual and largest shape


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made from. Two specs that are equal give interchangeable engines."""

    name: str  # "image", "images2" to "images8", "dots" or "text"
    onnx_sha256: str  # of the exported file that the graph is prepared from
    precision: str  # "fp32", "tf32", "fp16" or "bf16"
    matmul: str  # "4d", "3d" or "2d"
    profiles: tuple[Profile, ...]
    recipe: dict[str, object] = field(default_factory=dict)  # what else decides the graph
    optimization_level: int = 3
    workspace_mib: int = 4096


def import_tensorrt():
    """The tensorrt module; raises UserError where it is missing."""
    try:
        import tensorrt
    except ImportError as error:
        raise UserError(f"TensorRT cannot be imported ({error}): install it with 'pip install tensorrt'") from error
    if not hasattr(tensorrt, "Builder"):
        raise UserError("TensorRT is installed without its libraries: install it with 'pip install tensorrt'")
    return tensorrt


def provenance(spec: EngineSpec, device: Device) -> dict[str, object]:
    """What an engine's sidecar must say for the engine to be used: the spec, the library and the GPU."""
    trt = import_tensorrt()
    made_by = {"tensorrt": trt.__version__, "gpu": device.name, "compute_capability": device.compute_capability}
    return json.loads(json.dumps({**asdict(spec), **made_by}))  # tuples become lists, as they are in the file


def engine_path(folder: Path, made_from: dict[str, object]) -> Path:
    """The engine's name: legible parts, and a hash of everything."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:10]
    capability = str(made_from["compute_capability"]).replace(".", "")
    parts = (made_from["name"], made_from["precision"], made_from["matmul"], f"sm{capability}")
    return folder / f"{'_'.join(map(str, parts))}_trt{made_from['tensorrt']}_{digest}.engine"


def get_engine(
    spec: EngineSpec,
    prepare: Callable[[], onnx.ModelProto],
    folder: Path,
    device: Device,
    say: Callable[[str], object] = print,
) -> bytes:
    """The serialized engine for a spec: from `folder` where its sidecar matches, else built and kept there.

    Args:
        spec: what it is made from.
        prepare: makes the ONNX graph; called only for a build.
        folder: of engines, sidecars and the timing cache.
        device: the GPU to build for, current in this thread.
        say: takes the one line that tells why an engine is built again.

    Raises:
        UserError: the parser rejects the graph, the build fails, or the folder cannot be written.
    """
    made_from = provenance(spec, device)
    path = engine_path(folder, made_from)
    reason = mismatch(path, made_from)
    if reason is None:
        return path.read_bytes()
    with locked(folder / f".{path.name}.lock", "choose another with --engines"):
        reason = mismatch(path, made_from)  # another process may have built it meanwhile
        if reason is None:
            return path.read_bytes()
        say(f"building {path.name} ({reason}); this takes minutes at full size")
        start = time.perf_counter()
        serialized = build(spec, prepare(), folder)
        sidecar = {**made_from, "engine_sha256": hashlib.sha256(serialized).hexdigest()}
        sidecar["build_seconds"] = round(time.perf_counter() - start, 1)
        # The sidecar last: an engine without it counts for nothing.
        write_files({path: serialized, path.with_suffix(".json"): (json.dumps(sidecar, indent=1) + "\n").encode()})
    return serialized


def mismatch(path: Path, made_from: dict[str, object]) -> str | None:
    """Why the engine at `path` must not be used; None where it may."""
    if not path.is_file():
        return "there is none yet"
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, RecursionError):
        return "its sidecar is missing or damaged"
    if not isinstance(sidecar, dict):
        return "its sidecar is damaged"
    different = [key for key, value in made_from.items() if sidecar.get(key) != value]
    if different:
        return f"it was made with another {different[0]}"
    if sidecar.get("engine_sha256") != sha256(path):
        return "its contents do not match its sidecar"
    return None


def build_seconds(path: Path) -> float:
    """How long the engine at `path` took to build, as its sidecar says; 0 where it does not."""
    try:
        seconds = json.loads(path.with_suffix(".json").read_text())["build_seconds"]
        return float(seconds) if isinstance(seconds, (int, float)) and 0 <= seconds < 1e9 else 0.0
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0.0


def discard(path: Path) -> None:
    """Removes an engine that failed to load, sidecar first."""
    for file in (path.with_suffix(".json"), path):
        file.unlink(missing_ok=True)


def build(spec: EngineSpec, model: onnx.ModelProto, folder: Path) -> bytes:
    """Parses and builds, with progress on a terminal and the timing cache of `folder`.

    Raises:
        UserError: with the parser's first error and its node, or the builder's last word.
    """
    from lseg.onnx_file import write_onnx

    trt = import_tensorrt()
    logger = make_logger(trt)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # later versions know no other
    if strongly_typed is None and int(trt.__version__.split(".")[0]) < 10:
        raise UserError(f"TensorRT {trt.__version__} has no strongly typed networks: install 10 or later")
    builder = trt.Builder(logger)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            workspace = stack.enter_context(unfinished(folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): choose another with --engines") from error
        path = write_onnx(model, workspace / f"{spec.name}.onnx", {})
        if not parser.parse_from_file(str(path)):
            error = parser.get_error(0)
            nodes = model.graph.node
            node = nodes[error.node()] if 0 <= error.node() < len(nodes) else None
            where = f"node {error.node()}" + (f" ({node.op_type} {node.name})" if node is not None else "")
            reason = " ".join(error.desc().split())[:300]
            raise UserError(
                f"TensorRT {trt.__version__} rejects the {spec.name} graph at {where}: {reason}; "
                "export it again, or report it"
            )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mib << 20)
    config.builder_optimization_level = spec.optimization_level
    if spec.precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    for shapes in spec.profiles:
        if all(smallest == largest for smallest, _, largest in shapes.values()):
            continue  # the graph itself has these shapes
        profile = builder.create_optimization_profile()
        for input_name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(input_name, *(trt.Dims(list(shape)) for shape in (smallest, usual, largest)))
        config.add_optimization_profile(profile)
    config.progress_monitor = make_progress(trt, spec.name)
    cache_file = folder / f"timing_{trt.__version__}.cache"
    cache = config.create_timing_cache(cache_file.read_bytes() if cache_file.is_file() else b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = logger.last_error or "it gives no reason"
        remedy = "free GPU memory" if logger.no_memory else "try another --precision, and see log/tensorrt.log"
        raise UserError(f"TensorRT {trt.__version__} cannot build the {spec.name} engine ({reason}): {remedy}")
    if cache is not None:
        with suppress(UserError):  # a disk without room for what only saves time; minutes' work is not lost by that
            write_files({cache_file: bytes(config.get_timing_cache().serialize())})
    return bytes(serialized)


def make_logger(trt):
    """A TensorRT logger that writes warnings to log/tensorrt.log and keeps the last error.

    `no_memory` tells whether the last error spoke of memory, or any of being out of it: the last one is often no more
    than what came of that.
    """
    from lseg.logfile import append

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error, self._ran_out = "", False

        @property
        def no_memory(self) -> bool:
            return self._ran_out or "memory" in self.last_error.lower()

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = " ".join(message.split())[:300]
                self._ran_out = self._ran_out or "out of memory" in message.lower()
            if severity not in (trt.ILogger.Severity.INFO, trt.ILogger.Severity.VERBOSE):
                append("tensorrt.log", f"{severity.name}: {message}")

    return Logger()


def make_progress(trt, name: str):
    """A progress monitor: one bar for the builder's phases; silent where stderr is no terminal."""
    from tqdm import tqdm

    class Progress(trt.IProgressMonitor):
        """Called from the builder's threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock, self.steps = threading.Lock(), {}
            self.bar = tqdm(total=0, desc=f"{name} engine", unit="step", disable=not sys.stderr.isatty(), leave=False)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.steps[phase_name] = 0
                self.bar.total += num_steps
                self.bar.set_postfix_str(phase_name[:40])

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                self.bar.update(step + 1 - self.steps.get(phase_name, 0))
                self.steps[phase_name] = step + 1
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.steps.pop(phase_name, None)
                if not self.steps:
                    self.bar.close()

    return Progress()
