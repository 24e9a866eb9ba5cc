"""Files that are whole or not there, and images that come back from them."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from evaluation.read_image import load_images, read_image
from system.paths import list_checkpoint_files
from system.tensor_files import save_pixels, to_pixels
from system.text_files import read_json, read_yaml
from utils import ROOT, UserError, replace_file, suggest_word, to_printable, write_json


def test_replace_file_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "new" / "file.txt"
    with replace_file(file) as temporary:
        temporary.write_text("whole")
    with pytest.raises(RuntimeError), replace_file(file) as temporary:
        temporary.write_text("hal")
        raise RuntimeError
    assert file.read_text() == "whole" and [path.name for path in file.parent.iterdir()] == [
        "file.txt"
    ]


@pytest.mark.parametrize(
    "head, right",
    [
        (b"\xef\xbb\xbf", None),
        (b"", None),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, head, right):
    """As some editors write it."""
    (tmp_path / "x.yml").write_bytes(head + "lr: 鶴\r\n".encode())
    if right:
        with pytest.raises(UserError, match=right):
            read_yaml(str(tmp_path / "x.yml"), "lr: 0.001")
    else:
        assert read_yaml(str(tmp_path / "x.yml"), "lr: 0.001") == {"lr": "鶴"}


@pytest.mark.parametrize(
    "word, known, question",
    [
        ("inet", ["inet", "inat"], ""),
        ("inett", ["inet", "inat"], "did you mean 'inet'?"),
        ("zzz", ["inet"], ""),
        ("inet", iter(["inat", "inet"]), ""),
    ],
)
def test_no_word_is_suggested_for_itself(word, known, question):
    assert suggest_word(word, known) == question


@pytest.mark.parametrize(
    "make, right",
    [
        (
            lambda path: path.write_bytes(b"no picture"),
            "is broken .*: remove it",
        ),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: None, "cannot be read: No such file or directory"),
    ],
    ids=["foreign", "folder", "missing"],
)
def test_a_picture_that_cannot_be_read(tmp_path, make, right):
    """Not everything that fails is broken, and to be removed."""
    make(tmp_path / "0.png")
    with pytest.raises(UserError, match=f"0.png' {right}"):
        read_image(tmp_path / "0.png")


def test_images_come_back_to_the_nearest_level(tmp_path):
    images = torch.rand(2, 3, 5, 7)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    save_pixels(to_pixels(images), paths)
    assert (load_images(paths) - images).abs().max() <= 0.5 / 255 + 1e-6


def test_two_threads_may_write_one_file(tmp_path):
    """An update that is tried again with a smaller batch writes its pictures while the first try's
    are on their way.
    """
    together = threading.Barrier(2)

    def write(text):
        with replace_file(tmp_path / "file") as temporary:
            temporary.write_text(text)
            together.wait(10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("one", "two")))
    assert (tmp_path / "file").read_text() in ("one", "two") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "shell, printed",
    [
        ("{}", "鶴\n"),
        ("{} >&-", ""),
        ("{} 2>&-", "鶴\n"),
        ("{} >&- 2>&-", ""),
        ("PYTHONIOENCODING=ascii {}", "\\u9db4\n"),
        ("set -o pipefail; {} | true", ""),
        ("set -o pipefail; {} 2>&1 >/dev/null | true", ""),
        ("PYTHONUNBUFFERED=1 PYTHONIOENCODING=latin-1 {} 2>&1 >&- | tail -1", "\\u9db4\n"),
    ],
)
def test_no_output_ends_a_program(shell, printed):
    """A closed stream, a reader that has gone, an encoding without the letter: the program does its
    work.
    """
    program = (
        "import sys; from system import terminal; terminal.exit_code(lambda: [print(chr(0x9db4),"
        " file=file) for file in (sys.stdout, sys.stderr)]); sys.exit(7)"
    )
    done = subprocess.run(
        ["bash", "-c", shell.format(f"{sys.executable} -c '{program}'")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (
        done.returncode == (0 if "tail" in shell else 7)
        and done.stdout == printed
        and "rror" not in done.stderr
    )


def test_a_checkpoint_s_parts_may_be_links(tmp_path):
    """To another disk, say: they are told apart when they change."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/model.safetensors").write_bytes(b"weights")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/unet").symlink_to(tmp_path / "disk")
    assert list(list_checkpoint_files(str(tmp_path / "pipeline"))) == ["unet/model.safetensors"]


def test_file_names_that_are_not_utf_8(tmp_path):
    """Their bytes come back from JSON, and are readable on a terminal."""
    name = os.fsdecode(b"caf\xe9.png")
    write_json(tmp_path / "files.json", {name: "café"})
    assert read_json(tmp_path / "files.json") == {name: "café"}
    assert "café" in (tmp_path / "files.json").read_text()
    assert to_printable(f"{name}\n\x1b") == "caf\\xe9.png  "
