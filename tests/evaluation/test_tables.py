"""One table, two ways to read it."""

from evaluation.tables import Table

TABLE = Table(
    ["class", "accuracy"], [["crane & <b>", "0.50 -> 0.75"], ["all", 1]], note="of 4 pictures"
)


def test_text_is_aligned():
    assert (
        TABLE.to_text()
        == "class        accuracy\ncrane & <b>  0.50 -> 0.75\nall          1\nof 4 pictures"
    )


def test_markdown_has_a_rule_below_its_header():
    assert TABLE.to_markdown().splitlines() == [
        "| class | accuracy |",
        "| --- | --- |",
        "| crane & <b> | 0.50 -> 0.75 |",
        "| all | 1 |",
    ]
