"""Which real pictures belong to a class, and what is wrong with them before any work is done."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.class_folders import allowed_folder_names, match_published_names, suggest_folder
from evaluation.real_images import draw_missing_images, find_real_images, find_version
from miniature import world
from models.labels import IMAGENET_LABELS
from prompt_datasets import class_name, select_classes, target_class
from run import main
from tests.conftest import error_of, flags
from utils import UserError

LABELS, NAMES = ["crane, bird", "crane, machine", "tiger cat"], ["crane", "crane", "tiger cat"]
CRANE = target_class(0, "crane", "crane")


@pytest.fixture
def crane_folder(tmp_path) -> Path:
    """Where the pictures of the class `CRANE` belong."""
    (tmp_path / "real" / "crane").mkdir(parents=True)
    return tmp_path / "real" / "crane"


def find_cranes(folder: Path) -> list[str]:
    found = find_real_images(
        str(folder.parent), [CRANE], {CRANE: folder}, 1, folder.parent.parent / "cache"
    )
    return [file.name for file in found[CRANE]]


def test_every_kind_of_picture_is_found_and_what_is_left_out_is_counted(crane_folder, capsys):
    for name in ("a.jfif", "b.gif", "c.AVIF", "d.webp", "e.JPG", "f.jp2", "g.mpo"):
        kind = {"jfif": "JPEG", "jpg": "JPEG", "mpo": "JPEG", "jp2": "JPEG2000"}.get(
            name[2:].lower(), name[2:].upper()
        )
        Image.new("RGB", (8, 8)).save(crane_folder / name, kind)
    assert len(find_cranes(crane_folder)) == 7 and capsys.readouterr().err == ""
    (crane_folder / "notes.txt").write_text("")
    (crane_folder / "more").mkdir()
    (crane_folder / ".DS_Store").write_text("")
    Image.fromarray(np.full((4, 4), 300, np.float32)).save(crane_folder / "h.tif")
    (crane_folder / "i.png").write_bytes(b"nothing")
    assert len(find_cranes(crane_folder)) == 7
    (warning,) = capsys.readouterr().err.splitlines()
    assert "skipped 2 of 9 real pictures" in warning and "2 that are no pictures" in warning
    for reason in (
        "h.tif' (its values range from 300 to 300",
        "i.png' (cannot identify",
        "more'",
        "notes.txt'",
    ):
        assert reason in warning


def test_pictures_are_decoded_once(crane_folder):
    """Their names, sizes and times tell whether they were found readable before."""
    file = crane_folder / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    Image.new("RGB", (8, 8)).save(crane_folder / "b.png")
    assert find_cranes(crane_folder) == ["a.png", "b.png"]
    before = file.stat()
    file.write_bytes(bytes(before.st_size))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_cranes(crane_folder) == ["a.png", "b.png"]
    file.touch()
    assert find_cranes(crane_folder) == ["b.png"]


def find_images(folder: Path) -> list[str]:
    """The folder in which every class's pictures are found."""
    targets = [target_class(i, NAMES[i], LABELS[i]) for i in range(3)]
    found = find_real_images(
        str(folder), targets, dict.fromkeys(targets, folder), 1, folder.parent / "cache"
    )
    return [found[target][0].parent.name for target in targets]


def test_a_name_that_two_classes_share_is_no_folder_of_either(tmp_path):
    for folder in ("0001_crane", "crane, machine", "tiger cat"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
    assert find_images(tmp_path) == ["0001_crane", "crane, machine", "tiger cat"]
    (tmp_path / "crane").mkdir()
    # of which of the two?
    with pytest.raises(UserError, match="no class: 'crane'"):
        find_images(tmp_path)
    (tmp_path / "crane").rmdir()
    (tmp_path / "2").mkdir()
    with pytest.raises(UserError, match="class 2 .*'2' and 'crane, machine'"):
        find_images(tmp_path)
    (tmp_path / "2").rmdir()
    shutil.rmtree(tmp_path / "0001_crane")
    with pytest.raises(UserError, match="'0001_crane' or '1' or 'crane, bird'"):
        find_images(tmp_path)


def test_numbers_as_labels_are_not_taken_for_positions():
    """Digits: folder '1' is the class of label 1, or the first class, so it is neither; '0' can
    only be the first.
    """
    digits = [str(i) for i in range(10)]
    allowed = allowed_folder_names(select_classes("all", digits, digits))
    assert allowed[:2] == [["0001_0", "0"], ["0002_1"]] and allowed[9] == ["0010_9", "10"]


def make_classes(*labels: str):
    return select_classes("all", list(labels), [class_name(label) for label in labels])


def test_folders_of_published_data_sets_are_read_by_their_names():
    """Their numbers count other lists: iNaturalist's from 0, CUB's from 1, in the order of the data
    set.
    """
    worms = make_classes("Lumbricus terrestris", "Sabella pavonina", "Sabella spallanzanii")
    sabella = "00001_Animalia_Annelida_Polychaeta_Sabellida_Sabellidae_Sabella_pavonina"
    earthworm = "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris"
    assert match_published_names([sabella, earthworm], worms) == {sabella: 1, earthworm: 0}
    birds = make_classes("002.Laysan_Albatross", "001.Black_footed_Albatross")
    assert match_published_names(
        ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"], birds
    ) == {"001.Black_footed_Albatross": 1, "002.Laysan_Albatross": 0}
    twins = make_classes("crane, bird", "crane, machine")
    assert match_published_names(["001.crane", "002.crane_bird"], twins) == {"002.crane_bird": 0}
    thousand = make_classes(*IMAGENET_LABELS.read_text().splitlines())
    assert match_published_names(["n02123159", "n02012849", "n03126707"], thousand) == {
        "n02123159": 282,
        "n02012849": 134,
        "n03126707": 517,
    }
    assert match_published_names(["n02123159"], worms) == {}


@pytest.mark.parametrize(
    "folder, hint",
    [
        ("00002_Sabela_pavonina", "did you mean '0002_sabella_pavonina'?"),
        ("9", "the classes are numbered 1 to 3"),
        ("00001_owl", ""),
        ("0001_owl", "did you mean '0001_lumbricus_terrestris'?"),
        ("Sabela pavonina", ""),
    ],
)
def test_a_folder_s_name_tells_what_it_was_to_be(folder, hint):
    classes = make_classes("Lumbricus terrestris", "Sabella pavonina", "Sabella spallanzanii")
    assert suggest_folder(folder, classes) == hint


def test_a_label_that_is_a_path_is_no_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "0.png").write_bytes(b"")
    target = target_class(0, "..", "..")
    with pytest.raises(UserError, match="has no readable pictures"):
        find_real_images(str(tmp_path / "real"), [target], {target: tmp_path}, 1, tmp_path)


def test_a_function_draws_the_pictures_that_are_missing(tmp_path):
    target = target_class(0, "crane", "crane, bird")
    files = find_real_images("miniature.world:draw", [target], {target: tmp_path}, 3, tmp_path)[
        target
    ]
    assert not any(file.exists() for file in files)
    assert draw_missing_images("miniature.world:draw", target, files) == files
    drawn = [file.read_bytes() for file in files]
    assert len(set(drawn)) == 3
    files[1].unlink()
    before = files[0].stat().st_mtime_ns
    draw_missing_images("miniature.world:draw", target, files)
    assert [file.read_bytes() for file in files] == drawn and files[0].stat().st_mtime_ns == before


def test_a_function_draws_a_class_by_its_label_and_not_by_its_number(tmp_path):
    """The zero-shot list may have other classes, in another order: 'bat, club' is no crane."""
    labels = ["bat, club", "crane, bird"]
    bat, crane = select_classes("all", labels, ["bat", "crane"])
    runs = {bat: tmp_path / "bat", crane: tmp_path / "crane"}
    found = find_real_images("miniature.world:draw", [bat, crane], runs, 1, tmp_path)
    draw_missing_images("miniature.world:draw", bat, found[bat])
    club = world.LABELS.index("bat, club")
    assert np.array_equal(
        np.asarray(Image.open(found[bat][0])), np.asarray(world.draw(club, random.Random("0 0")))
    )
    owl = target_class(0, "owl", "owl")
    with pytest.raises(UserError, match=r"cannot draw class 1 \(owl\).*has no 'owl'"):
        find_real_images("miniature.world:draw", [owl], {owl: tmp_path / "owl"}, 1, tmp_path)
    assert not (tmp_path / "owl").exists()


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--real_images", "miniature.world:draw"], "class 3 (tiger cat)"),
        (
            ["--real_images", "{stray}"],
            "did you mean 'tiger cat'?",
        ),
        (["--real_images", "{empty}"], "class 3"),
        (["--real_images", "miniature.nowhere:draw"], "no module 'miniature.nowhere'"),
        (["--real_images", "miniature.world:paint"], "has no function 'paint'"),
        (["--context_judge", "miniature.world"], "context_judge must be module:function"),
        (
            ["--real_images", "{real}", "--features", "inception:nowhere.pth"],
            "no file 'nowhere.pth'",
        ),
        (["--real_images", "{real}", "--test_size", "4"], "more than 5 generated pictures"),
        (["--evaluator", "nobody/no-such-model"], "cannot open 'nobody/no-such-model'"),
    ],
)
def test_wrong_measurements_are_found_before_any_work(
    tiny_config, tmp_path, real_images, capsys, more, reason
):
    next(real_images.rglob("9.jpg")).unlink()
    (tmp_path / "empty").mkdir()
    shutil.copytree(real_images, tmp_path / "stray")
    (tmp_path / "stray" / "tigre cat").mkdir()
    places = {f"{{{name}}}": str(tmp_path / name) for name in ("empty", "real", "stray")}
    argv = flags(tiny_config, class_index=3, train=True, evaluate=True, test_size=6)
    assert reason in error_of(capsys, *argv, *(places.get(part, part) for part in more))
    assert not (tmp_path / "img").exists() and not (tmp_path / "pipeline_token").exists()


def test_too_few_readable_real_pictures_are_found_before_any_work(
    tiny_config, tmp_path, real_images, capsys
):
    for i in range(4, 9):
        next(real_images.rglob(f"{i}.jpg")).write_bytes(b"broken")
    assert (
        main(
            flags(
                tiny_config,
                class_index=3,
                train=True,
                evaluate=True,
                test_size=6,
                real_images=real_images,
            )
        )
        == 2
    )
    warning, error = capsys.readouterr().err.splitlines()
    assert "skipped 6 of 10 real pictures" in warning
    assert "more than 5 real pictures" in error
    assert not (tmp_path / "img").exists()


def test_real_pictures_are_measured_where_the_summary_lacks_them(
    tiny_config, tmp_path, real_images
):
    """Also where every class is finished: the command names other pictures than before, or none."""
    argv = flags(
        tiny_config, class_index=3, train=True, evaluate=True, num_train_epochs=1, test_size=6
    )
    measure = ["--real_images", str(real_images), "--features", tiny_config.classifier]

    def read_distances():
        return json.loads(next((tmp_path / "img").rglob("summary_demo.json")).read_text())[
            "distribution"
        ]

    assert main(argv) == 0 and read_distances() is None
    assert main([*argv, *measure]) == 0
    first = read_distances()
    assert first["with"]["real_images"] == 9
    next(real_images.rglob("8.jpg")).unlink()
    assert main([*argv, *measure]) == 0 and read_distances()["with"]["real_images"] == 8


@pytest.mark.parametrize(
    "folder, hint",
    [
        ("4", "the classes are numbered 1 to 3"),
        ("0", "the classes are numbered 1 to 3"),
        ("1001", "the classes are numbered 1 to 3"),
        ("03", "did you mean '0003_tiger_cat'?"),
        ("0003_x", "did you mean '0003_tiger_cat'?"),
        ("tigre cat", "did you mean 'tiger cat'?"),
        ("zz", "name them such as '0001_crane'"),
    ],
)
def test_a_folder_of_no_class(tmp_path, folder, hint):
    (tmp_path / folder).mkdir()
    with pytest.raises(UserError) as raised:
        find_images(tmp_path)
    assert f"no class: '{folder}'; {hint}" in str(raised.value)


def test_file_names_that_are_not_utf_8(tiny_config, tmp_path, real_images, capsys):
    """From an old disk: measured, remembered as readable, and named where they are not."""
    for name in (b"caf\xe9.jpg", b"na\xefve.jpg"):
        shutil.copy(
            real_images / "tiger cat/0.jpg", os.fsencode(real_images / "tiger cat") + b"/" + name
        )
    with open(os.fsencode(real_images / "tiger cat") + b"/na\xefve.jpg", "wb") as file:
        file.write(b"broken")
    argv = flags(
        tiny_config,
        num_train_epochs=1,
        test_size=6,
        evaluate=True,
        train=True,
        class_index=3,
        real_images=real_images,
        features=tiny_config.classifier,
    )
    for _ in range(2):
        assert main(argv) == 0
        assert "na\\xefve.jpg" in capsys.readouterr().err
    assert next(tmp_path.rglob("summary_demo.json"))


def test_drawn_pictures_are_told_by_version_or_source(tmp_path, monkeypatch):
    """A comment changes the source and no picture: a module that names its VERSION keeps them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    draw = "def draw(label, rng):\n    return None\n"

    def find(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return find_version(f"{name}:draw")

    assert find("plain", draw) != find("commented", f"# better\n{draw}")
    assert find("first", f"VERSION = 1\n{draw}") == find("second", f"VERSION = 1  # same\n{draw}")
    assert find("third", f"VERSION = 2\n{draw}") == "2"
