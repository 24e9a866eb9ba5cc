"""What README and docs say exists: links, files, settings, modules, targets of make."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from command_line import parse_settings
from utils import ROOT

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"),
                                                              *ROOT.glob("spaces/*.md")))


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands_of(page: str) -> list[str]:
    """Of all code: blocks for a shell and words between backquotes."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines + re.findall(r"`([^`\n]+)`", page) if "python" in line or line.startswith("make ")]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = re.sub(r"```.*?```", "", read_page(name), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = ROOT / name if not path else (ROOT / name).parent / path
        assert file.exists(), target
        if anchor:
            titles = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                      for title in re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))]
            assert anchor in titles, target


@pytest.mark.parametrize("name", PAGES)
def test_commands_can_be_given(name):
    """Every run.py command has settings that exist; every module and target is there."""
    targets = re.findall(r"(?m)^([a-z]+):", read_page("Makefile"))
    for command in commands_of(read_page(name)):
        for part in re.split(r"&&|;|\bdo\b|&(?!&)", command):
            words = shlex.split(re.sub(r"<[^>]*>|\.\.\.|\$i\b|\$gpu\b", "1", part.strip()))
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words[:1] == ["make"]:
                assert words[1].split("=")[0] in (*targets, "PYTHON", "OPTIONS"), command
            elif words[:2] == ["python", "run.py"] and "--help" not in words and not any("[" in word for word in words):
                parse_settings([word for word in words[2:] if word != "--SETTING"])
            elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("experiments", "benchmarks", "evaluation",
                                                                             "docs", "miniature"):
                if not words[2].endswith("."):
                    assert importlib.util.find_spec(words[2]), command
            elif words[:1] == ["python"] and words[1:2] and words[1].endswith(".py"):
                assert (ROOT / words[1]).exists(), command


def test_the_readme_is_short():
    assert len(read_page("README.md").splitlines()) <= 150


def test_the_workflow_and_hooks_are_yaml():
    for name in (".github/workflows/ci.yml", ".pre-commit-config.yaml", "CITATION.cff", "requirements.yml"):
        assert yaml.safe_load(read_page(name))


def test_the_notebook_is_clean():
    """No outputs of errors, no paths of a machine, every cell is Python."""
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(ROOT / "notebooks/class_tokens.ipynb", 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
            assert not [output for output in cell.outputs if output.output_type == "error" or "/home" in str(output)]


@pytest.mark.parametrize("argv, code, words", [
    (["--lrr", "1"], 2, "did you mean '--lr'?"), (["--help"], 0, "Training loop:"),
    (["--class_index", "3", "--train", "True", "--lr", "-1"], 2, "lr must be greater than 0")])
def test_answers_come_before_torch_is_imported(argv, code, words):
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "run.py"), *argv], capture_output=True,
                          text=True)
    assert done.returncode == code and words in done.stdout + done.stderr
    assert not re.search(r"\| +(torch|diffusers|transformers|numpy)$", done.stderr, re.MULTILINE)
