"""What an evaluation adds on request: a condition of other words, and what the token looks at."""

import json
from pathlib import Path

import pytest
from PIL import Image

from miniature.world import THINGS
from models.classifiers import load_labels
from prompt_datasets import oracle_words, select_classes
from run import main
from system.tensor_files import save_image
from tests.conftest import error_of, flags

TRAINED = ("--train", "True", "--evaluate", "True", "--num_train_epochs", "1")


@pytest.fixture
def oracle(tmp_path) -> str:
    (tmp_path / "oracle.yml").write_text("2: wading bird\n3: striped cat\n")
    return str(tmp_path / "oracle.yml")


def read_metrics(tmp_path) -> dict:
    return json.loads(next(tmp_path.rglob("metrics.json")).read_text())


def test_better_words_are_a_condition(tiny_config, tmp_path, oracle, capsys):
    argv = flags(tiny_config, *TRAINED, class_index="2-3")
    assert main([*argv, "--oracle_names", oracle]) == 0
    assert "better words" in capsys.readouterr().out
    assert set(read_metrics(tmp_path)["conditions"]["oracle"]) == {"classifier"}
    prompts = {
        path.parent.parent.parent.name: json.loads(path.read_text())["oracle"]["prompt"]
        for path in tmp_path.rglob("drawn.json")
    }
    assert prompts == {
        "0002_crane": "A photo of a wading bird",
        "0003_tiger_cat": "A photo of a striped cat",
    }
    page = next(tmp_path.rglob("report_demo.html"))
    assert page.read_text().count("<span>better words</span>") == 2
    assert main(argv) == 0 and "oracle" not in read_metrics(tmp_path)["conditions"]
    assert "better words" not in page.read_text().replace("oracle_names", "")


def test_better_words_have_distances_of_their_own(tiny_config, tmp_path, oracle):
    """Also where the words have changed since the summary was written."""
    for name in ("2", "3"):
        for i in range(6):
            save_image(
                Image.effect_noise((32, 32), 50 + 10 * i).convert("RGB"),
                tmp_path / "real" / name / f"{i}.png",
            )
    argv = flags(
        tiny_config,
        "--class_index",
        "2-3",
        *TRAINED,
        "--test_size",
        "6",
        "--oracle_names",
        oracle,
        "--real_images",
        str(tmp_path / "real"),
        "--features",
        tiny_config.classifier,
    )
    found = []
    for words in ("wading bird", "machine"):
        Path(oracle).write_text(f"2: {words}\n3: striped {words}\n")
        assert main(argv) == 0
        found.append(
            json.loads(next(tmp_path.rglob("summary_demo.json")).read_text())["distribution"]
        )
    assert found[0]["oracle"] != found[1]["oracle"] and found[0]["with"] == found[1]["with"]


def test_better_words_must_be_other(tiny_config, oracle, capsys):
    assert "oracle.yml' has no other words for class 1 (" in error_of(
        capsys, *flags(tiny_config, "--class_index", "1-3", *TRAINED, "--oracle_names", oracle)
    )


def test_the_miniatures_better_words_name_one_class_each():
    labels = load_labels("miniature", None)
    words = oracle_words(
        "miniature/oracle_names.yml", labels, select_classes("all", labels, labels)
    )
    assert len(set(words.values())) == 16 and all(
        set(phrase.split()) & set(thing.adjectives)
        for phrase, thing in zip(words.values(), THINGS, strict=True)
    )


def test_what_the_token_looks_at(tiny_config, tmp_path):
    argv = flags(tiny_config, *TRAINED, class_index=3)
    assert main(argv) == 0 and read_metrics(tmp_path)["nearest_words"] is None
    assert main([*argv, "--attention_maps", "True"]) == 0
    maps = sorted(tmp_path.rglob("eval/attention/*/*.png"))
    assert [(path.parent.name, path.stem) for path in maps] == [
        (word, seed) for word in ("noun", "token") for seed in "01"
    ]
    assert Image.open(maps[0]).size == (32, 32) and maps[0].read_bytes() != maps[2].read_bytes()
    words = read_metrics(tmp_path)["nearest_words"]
    assert words["before"][0].startswith("a 1.00") and len(words["after"]) == 1
    page = next(tmp_path.rglob("report*.html")).read_text()
    assert "its token looks at" in page and "nearest words of the vocabulary" in page
