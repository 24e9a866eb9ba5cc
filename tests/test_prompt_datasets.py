"""Which classes, what they are called, and what the generator is asked."""

import pytest

from prompt_datasets import (
    TEMPLATES,
    PromptDataset,
    TargetClass,
    class_folder,
    class_name,
    class_names,
    prompt_folder,
    read_eval_prompts,
    select_classes,
)
from tests.conftest import LABELS
from utils import UserError

NAMES = [class_name(label) for label in LABELS]


@pytest.mark.parametrize(
    "label, name",
    [
        ("tench, Tinca tinca", "tench"),
        ("tiger cat", "tiger cat"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("7/8: odd", "7/8: odd"),
    ],
)
def test_class_name(label, name):
    assert class_name(label) == name


@pytest.mark.parametrize(
    "selection, chosen",
    [
        ("3", [2]),
        ("1-3", [0, 1, 2]),
        ("1,5,3", [0, 4, 2]),
        ("1-2, 2-3", [0, 1, 2]),
        ("all", [0, 1, 2, 3, 4]),
        ("tiger cat", [2]),
        ("Crane, Machine", [1]),
        ("7/8: odd", [4]),
        ("crane machine", [1]),
        ("Tiger_cat", [2]),
        ("horizontal bar high bar", [3]),
        ("7 8 odd", [4]),
    ],
)
def test_selection(selection, chosen):
    assert [target.index for target in select_classes(selection, LABELS, NAMES)] == chosen


def test_selected_class_carries_all_its_names():
    (target,) = select_classes("4", LABELS, NAMES)
    assert target == TargetClass(
        index=3,
        number=4,
        name="horizontal bar",
        label="horizontal bar, high bar",
        title="4 (horizontal bar, high bar)",
        folder="0004_horizontal_bar",
    )


@pytest.mark.parametrize(
    "selection, reason",
    [
        ("0", "classes are 1 to 5"),
        ("6", "classes are 1 to 5"),
        ("3-1", "backwards: write 1-3"),
        ("1--2", "must be a number"),
        ("tigger cat", "did you mean 'tiger cat'"),
        ("crane", r"2 classes: give a number, 1 \(crane, bird\) or 2"),
        ("xyz", "--list_classes"),
    ],
)
def test_selection_errors(selection, reason):
    with pytest.raises(UserError, match=reason):
        select_classes(selection, LABELS, NAMES)


def test_folders_are_distinct_and_plain():
    folders = [class_folder(i, name) for i, name in enumerate(NAMES, 1)]
    assert folders == [
        "0001_crane",
        "0002_crane",
        "0003_tiger_cat",
        "0004_horizontal_bar",
        "0005_7_8_odd",
    ]
    assert class_folder(283, "tiger cat") == "0283_tiger_cat" and class_folder(1, "鶴") == "0001"


def test_names_from_a_file(tmp_path):
    file = tmp_path / "names.yml"
    file.write_text("2: crane machine\n")
    assert class_names(LABELS, str(file))[:3] == ["crane", "crane machine", "tiger cat"]
    file.write_text("9: owl\n")
    with pytest.raises(UserError, match="class number from 1 to 5"):
        class_names(LABELS, str(file))


def test_prompts_take_turns():
    dataset = PromptDataset("newclas crane", TEMPLATES, [35, 36, 37, 38, 39])
    prompts = [dataset.prompts[dataset[i]["prompt"]] for i in range(len(dataset))]
    assert prompts[0] == prompts[3] == "A photo of a newclas crane"
    assert prompts[2] == "A close-up photo of a newclas crane"
    assert [dataset[i]["seed"] for i in range(5)] == [35, 36, 37, 38, 39]


def test_folders_of_prompts_in_any_script_and_of_any_length():
    assert prompt_folder("A painting of {}") == "a_painting_of"
    folders = [
        prompt_folder(template)
        for template in ("{} 在雪地里", "{} ночью", "{}" + "x" * 300, "{}" + "x" * 301)
    ]
    assert len(set(folders)) == 4 and max(map(len, folders)) < 80


def test_eval_prompts_from_flags_and_from_a_file(tmp_path):
    """The paper's first template is always evaluated, so it is not asked for twice."""
    given = ["A painting of {}", "A photo of a {}"]
    (tmp_path / "prompts.txt").write_text("\n".join(given) + "\n\n")
    assert (
        read_eval_prompts(given)
        == read_eval_prompts([str(tmp_path / "prompts.txt")])
        == ["A painting of {}"]
    )


@pytest.mark.parametrize(
    "given, reason",
    [
        (["no such file"], "neither a file nor a prompt"),
        (["A {} {}"], "needs one {} where"),
        (["A {} {x}"], "needs one {} where"),
        (["A {}", "a  {}!"], "the same letters and digits"),
    ],
)
def test_eval_prompts_that_cannot_be(given, reason):
    with pytest.raises(UserError, match=reason):
        read_eval_prompts(given)
