"""Tables are as wide as what is in them, and say it as it is."""

from softcot_ds.tables import table_lines


def test_words_begin_at_the_left_numbers_end_at_the_right_and_what_is_missing_is_empty():
    rows = [["learned", "84.0%", "fits"], ["a name that is longer", "9.5%"]]
    assert table_lines(["condition", "accuracy", "verdict"], rows, words=(0, 2)) == [
        "condition              accuracy  verdict",
        "learned                   84.0%  fits",
        "a name that is longer      9.5%",
    ]


def test_nothing_in_a_cell_is_markup_and_no_row_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "[bold]runs/demo[/bold] :smile: https://example.org " + "x" * 300
    assert table_lines(["name"], [[long]]) == ["name", long]
