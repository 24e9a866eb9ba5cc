"""What README and docs say exists: links, files, settings, modules, targets of make."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from command_line import parse_settings
from utils import ROOT, UserError

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("page/space/*.md"))
)

ROOMS = ("experiments", "benchmarks", "evaluation", "docs", "miniature")


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands_of(page: str) -> list[str]:
    """Of all code: blocks for a shell and words between backquotes."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [
        line.partition("  #")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [
        line
        for line in lines + re.findall(r"`([^`\n]+)`", page)
        if "python" in line or line.startswith("make ")
    ]


def list_titles(file: Path) -> list[str]:
    """The anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_links_lead_somewhere():
    broken = []
    for name in PAGES:
        page = re.sub(r"```.*?```", "", read_page(name), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", page):
            if re.match(r"https?:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            if not file.exists() or (anchor and anchor not in list_titles(file)):
                broken.append((name, target))
    assert not broken


def test_python_files_named_are_there():
    named = []
    for name in PAGES:
        named += re.findall(r"`((?:\w+/)*\w+\.py)\b", read_page(name))
    assert named and [path for path in named if not (ROOT / path).exists()] == []


def check_words(words: list[str]):
    """Every run.py command has settings that exist; every module and target is there."""
    if words[:1] == ["make"]:
        targets = re.findall(r"(?m)^([a-z]+):", read_page("Makefile"))
        assert words[1].split("=")[0] in (*targets, "PYTHON", "OPTIONS")
    elif words[:2] == ["python", "run.py"]:
        is_pattern = "--help" in words or any("[" in word for word in words)
        if not is_pattern:
            parse_settings([word for word in words[2:] if word != "--SETTING"])
    elif words[:2] == ["python", "-m"]:
        room = words[2].split(".")[0]
        if room in ROOMS and not words[2].endswith("."):
            assert importlib.util.find_spec(words[2])
    elif words[:1] == ["python"] and words[1:2] and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists()


def test_commands_can_be_given():
    wrong = []
    for name in PAGES:
        for command in commands_of(read_page(name)):
            for part in re.split(r"&&|;|\bdo\b|&(?!&)", command):
                words = shlex.split(re.sub(r"<[^>]*>|\.\.\.|\$i\b|\$gpu\b", "1", part.strip()))
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                try:
                    check_words(words)
                except (AssertionError, UserError) as error:
                    wrong.append((name, command, str(error)))
    assert not wrong


def test_the_readme_is_short():
    assert len(read_page("README.md").splitlines()) <= 150


def test_the_workflow_and_hooks_are_yaml():
    for name in (
        ".github/workflows/ci.yml",
        ".pre-commit-config.yaml",
        "CITATION.cff",
        "requirements.yml",
    ):
        assert yaml.safe_load(read_page(name))


@pytest.fixture(scope="module")
def notebook_cells():
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(ROOT / "notebooks/class_tokens.ipynb", 4)
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_the_notebook_is_clean(notebook_cells):
    """No outputs of errors, no paths of a machine, every cell is Python."""
    for cell in notebook_cells:
        ast.parse(cell.source)
        for output in cell.outputs:
            assert (
                output.output_type != "error"
                and output.get("name") != "stderr"
                and "/home" not in str(output)
            )


def test_the_notebook_imports_what_is_there(notebook_cells):
    """Of our own modules."""
    imported = []
    for cell in notebook_cells:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (ROOT / node.module.split(".")[0]).is_dir():
                imported += [(node.module, alias.name) for alias in node.names]
    assert imported
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize(
    "repository, said",
    [
        ("", "No checkout is here: put the address of the repository into REPOSITORY."),
        (
            "https://github.com/owner/name/",
            "https://colab.research.google.com/github/owner/name/blob/main/notebooks/class_tokens.ipynb",
        ),
    ],
)
def test_the_notebook_opened_by_itself(notebook_cells, tmp_path, repository, said):
    """It says what is missing, in one line; its badge opens it wherever its repository is."""
    code = notebook_cells[0].source.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
    code = code.replace(
        "from IPython.display import Markdown, display", "Markdown, display = str, print"
    )
    code = code.replace('"git", "clone", REPOSITORY, "class-tokens"', '"false"')  # no network here
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and said in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["--lrr", "1"], 2, "did you mean '--lr'?"),
        (["--help"], 0, "Training loop:"),
        (["--class_index", "3", "--train", "True", "--lr", "-1"], 2, "lr must be greater than 0"),
    ],
)
def test_answers_come_before_torch_is_imported(argv, code, words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "run.py"), *argv],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and words in done.stdout + done.stderr
    assert not re.search(r"\| +(torch|diffusers|transformers|numpy)$", done.stderr, re.MULTILINE)
