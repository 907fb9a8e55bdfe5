"""The README's examples hold what they say: scripts, options, files and imports are there. Nothing is run.

`test_newcomer_clean.py` runs them.
"""

from __future__ import annotations

import ast
import glob
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from readme_examples import MADE, OWN, PLACES, ROOT, Example, examples, place

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "MEASUREMENTS.md").read_text(encoding="utf-8")
EXAMPLES = list(examples(README))
COMMANDS = [command for example in EXAMPLES if example.language == "bash" for command in example.commands]
FILE = re.compile(r"[\w*-][\w./*-]*(\.(jpg|png|py|sh|txt|tar|json|mp4|npy|ckpt)|/)")
STUB = '#!/bin/sh\necho "$(basename "$0")" "$@"\n'


def named(text: str) -> str:
    return text.splitlines()[0][:70]


def parse(words: list[str]) -> None:
    """Gives a script's options to its own parser; SystemExit where they do not do."""
    script = next(word for word in words if word.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    module.parse_args(words[words.index(script) + 1 :])


def stub(folder: Path, *names: str) -> Path:
    """Programs that print how they were called."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    return folder


def test_there_are_examples():
    """The extraction finds both languages, and knows no third."""
    assert {example.language for example in EXAMPLES} == {"bash", "python"}
    assert sum(example.language == "python" for example in EXAMPLES) == README.count("```python\n") > 1
    assert len(re.findall("^```(bash|python)?$", README, re.MULTILINE)) == README.count("```") and len(COMMANDS) > 20


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: named(example.text))
def test_every_example_is_placed(example):
    """Either it is said what running it makes, or why it cannot run without a GPU and large files."""
    assert place(example) is not None, f"say in tests/readme_examples.py whether this can run: {example.text}"


def test_a_new_example_would_be_missed():
    assert place(Example("bash", "python enginerun.py --new")) is None


def test_no_place_without_an_example():
    found = {id(place(example)) for example in EXAMPLES}
    assert not [start for start, where in PLACES.items() if not isinstance(where, str) and id(where) not in found]
    assert not [start for start in PLACES if not any(f"{example.text} ".startswith(start) for example in EXAMPLES)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:70])
def test_command(command, tmp_path, capfd):
    program = command[0]
    assert program in ("python", "pip", "docker", "tritonserver", "./requirements.sh", "./polygraph.sh")
    if any(word.endswith(".py") for word in command):
        parse(command)
    if "pip" in command:
        what, *names = command[command.index("pip") + 1 :]
        assert what == "install"
        if names[0] == "-r":
            assert (ROOT / names[1]).is_file()
    if "./requirements.sh" in command:
        set_up(command[command.index("./requirements.sh") + 1 :], tmp_path)
    if program == "./polygraph.sh":
        polygraph(command[1:], tmp_path)
    if command[:2] == ["docker", "build"]:
        assert command[-1] == "." and (ROOT / "Dockerfile").is_file()


def set_up(words: list[str], folder: Path) -> None:
    """requirements.sh takes the options and hands the rest on, in a set-up where every program only tells of itself."""
    stub(folder / "venv" / "bin", "python", "pytest", "curl")
    command = [str(ROOT / "requirements.sh"), "--venv", str(folder / "venv"), *words]
    nothing = {"PATH": f"{folder / 'venv' / 'bin'}:{os.defpath}", "PYTHON": str(folder / "venv" / "bin" / "python")}
    done = subprocess.run(command, capture_output=True, text=True, env=nothing)
    assert (done.returncode, done.stderr) == (0, "")
    first = next(i for i, word in enumerate(words) if not word.startswith("-"))
    assert done.stdout.splitlines()[-1] == " ".join(words[first:])


def polygraph(words: list[str], folder: Path) -> None:
    """polygraph.sh takes the options and comes to its end, with programs that do nothing and files that are empty."""
    python = stub(folder / "bin", "python") / "python"
    shutil.copy(ROOT / "polygraph.sh", folder)
    (folder / "onnx").mkdir()
    for name in ("onnx/lseg.onnx", *(word for word in words if word in OWN)):
        (folder / name).touch()
    environment = {"PATH": os.defpath, "PYTHON": str(python)}
    done = subprocess.run(["./polygraph.sh", *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)


def test_unknown_options_are_found(tmp_path):
    """The checks above can fail."""
    with pytest.raises(SystemExit):
        parse(["python", "enginerun.py", "--no-such-option"])
    with pytest.raises(AssertionError):
        set_up(["--no-such-option", "python"], tmp_path)
    with pytest.raises(AssertionError):
        polygraph(["compare", "--no-such-option"], tmp_path)


def test_ray_examples_write_to_folders_of_their_own():
    """One after the other they run: a job's folder is refused to another job, with --resume or without."""
    jobs = [command for command in COMMANDS if command[:2] == ["python", "lseg_ray.py"]]
    folders = [job[job.index("--output") + 1] for job in jobs]
    assert len(set(folders)) == len(folders) > 2


def test_files_are_there():
    """What an example names is in the repository, or known as the reader's own or as what is made."""
    words = [word for command in COMMANDS for word in command[1:] if FILE.fullmatch(word)]
    words += [word for example in EXAMPLES for word in re.findall(r'"([\w/]+\.\w{3})"', example.text)]
    assert {"enginerun.py", "street.jpg", "log/report_*.json", "image/temple.jpg"} <= set(words)
    assert not [word for word in words if word not in OWN | MADE and not glob.glob(word, root_dir=ROOT)]


def test_commands_within_the_text():
    """Commands in the running text: their scripts are there, and those of this folder take their options."""
    found = [text.replace("\n", " ").split() for text in re.findall(r"`(python [^`]+?\.py[^`]*)`", README + MEASURED)]
    assert len(found) > 5
    for words in found:
        assert (ROOT / words[1]).is_file(), words
        if "/" not in words[1]:
            parse(words)


PYTHON = [example.text for example in EXAMPLES if example.language == "python"]


@pytest.mark.parametrize("text", PYTHON, ids=named)
def test_python(text):
    """It compiles, and what it imports is there."""
    compile(text, "README.md", "exec")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    for node in imports:
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        else:
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
