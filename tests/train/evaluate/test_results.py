"""What was recorded: pages are made from the JSON, README quotes it, and the command writes it."""

import json
import re

import pytest

from jaxrel import cli
from jaxrel.train.evaluate import record, sanity
from jaxrel.train.evaluate.tables import Table, all_tables, cell, difference
from tests.paths import ROOT

RECORDS = record.read()
QUOTED = re.compile(r'<!-- results: ([\w/-]+) "?(.*?)"? -->')


@pytest.mark.parametrize("name", RECORDS)
def test_pages_are_made_from_the_json(name):
    page = record.FOLDER / f"{name}.md"
    assert page.read_text(encoding="utf-8") == record.markdown(name, RECORDS[name])
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page} links to {link}, which is not there"


@pytest.mark.parametrize("name", RECORDS)
def test_records_have_their_parts(name):
    found = RECORDS[name]
    parts = "protocol command hardware versions date notes tables result".split()
    assert list(found) == parts
    assert found["command"].startswith("jaxrel evaluate ")
    for table in found["tables"]:
        assert list(table) == ["title", "note", "columns", "rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_the_index_is_made_from_the_json():
    readme = (record.FOLDER / "README.md").read_text(encoding="utf-8")
    assert readme == record.index(RECORDS)
    pages = {file.stem for file in record.FOLDER.glob("*.md")} - {"README"}
    assert pages == set(RECORDS)


# README's tables.


def quoted(text):
    """Tables after comments `<!-- results: NAME "TITLE" -->`: what is named, heads and rows."""
    for block in re.findall(rf"((?:{QUOTED.pattern}\s*)+)((?:\|.*\n?)+)", text):
        lines = [[one.strip() for one in line[1:-1].split("|")] for line in block[-1].splitlines()]
        yield QUOTED.findall(block[0]), lines[0], lines[2:]


def check_quoted(named, heads, rows):
    """Each cell of a table must be in the row of the same name of a table that is named.

    A column is found by its head, before which others words may stand. Rows and columns may be
    left out. A record is named by its file or by its protocol.
    """
    tables = [
        table
        for name, title in named
        for record_name, found in RECORDS.items()
        for table in found["tables"]
        if name in (record_name, found["protocol"]) and table["title"] == title
    ]
    assert tables, f"no such results: {named}"
    for row in rows:
        for head, value in zip(heads[1:], row[1:], strict=True):
            known = [
                own[k]
                for table in tables
                for own in table["rows"]
                for k, column in enumerate(table["columns"])
                if own[0] == row[0] and head.endswith(column)
            ]
            assert value in known, (row[0], head, value, known)


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_quotes_the_results():
    for found in quoted(README):
        check_quoted(*found)


GOOD = """
<!-- results: perturbation-vqa-shapes "Questions, patches removed" -->
<!-- results: vqa-shapes/1 Localisation -->

| method | negative AUC (higher is better) | relevance mass accuracy |
| --- | ---: | --- |
| equal | 86.34 [85.6, 87.1] | 0.395 [0.380, 0.410] |
"""


def test_quotes_are_checked():
    (found,) = quoted(GOOD)
    assert [title for _, title in found[0]] == ["Questions, patches removed", "Localisation"]
    check_quoted(*found)
    for old, new in (
        ("86.34", "86.35"),
        ("| equal", "| raw"),
        ("negative", "positive"),
        ("Localisation", "Accuracy"),
        ("0.410]", "0.411]"),
    ):
        (found,) = quoted(GOOD.replace(old, new))
        with pytest.raises(AssertionError):
            check_quoted(*found)


# What the command writes.

MEASURED = {"mean": 0.5, "low": -0.25, "high": 1.0}
TABLE = Table("Title", "A note.", ["what", "mean"], [["a|b", cell(MEASURED)]])


def test_tables_as_text():
    lines = ["| what | mean |", "| --- | --- |", "| a\\|b | 0.500 [-0.250, 1.000] |"]
    assert TABLE.markdown() == "\n".join(["### Title", "", "A note.", "", *lines, ""])
    assert Table("Nothing", "None.").markdown() == "### Nothing\n\nNone.\n"
    assert difference(MEASURED) == "+0.500 [-0.250, +1.000]"
    assert difference(MEASURED | {"low": 0.25}, digits=1) == "**+0.5 [+0.2, +1.0]**"
    assert (cell(None), cell(None, "none"), difference(None)) == ("", "none", "")


def test_results_without_tables_of_their_own():
    result = {"n": 3, "all": MEASURED, "splits": {"test": {"a": MEASURED, "texts": ["x"]}}}
    found = {table.title: table.rows for table in all_tables(result)}
    shown = "0.500 [-0.250, 1.000]"
    assert found == {"Measures": [["all", shown]], "splits, test": [["a", shown]]}


def test_a_record_replaces_one_of_its_name_and_keeps_its_notes(tmp_path):
    files = record.record("one", "p/1", [TABLE], command="jaxrel a", folder=tmp_path)
    assert [file.name for file in files] == ["one.json", "one.md", "README.md"]
    found = json.loads(files[0].read_text())
    files[0].write_text(json.dumps(found | {"notes": "Mine."}))
    record.record("one", "p/1", [TABLE], command="jaxrel b", result={"a": 1}, folder=tmp_path)
    record.record("two", "p/2", [TABLE], command="jaxrel c", folder=tmp_path)
    found = record.read(tmp_path)
    assert [(n, x["command"], x["notes"]) for n, x in found.items()] == [
        ("one", "jaxrel b", "Mine."),
        ("two", "jaxrel c", ""),
    ]
    assert found["one"]["result"] == {"a": 1}
    assert set(found["one"]["versions"]) >= {"python", "jax", "jaxrel"}
    assert "cores" in found["one"]["hardware"]
    page = files[1].read_text()
    assert page == record.markdown("one", found["one"])
    assert "$ jaxrel b\n" in page
    assert page.endswith("## Notes\n\nMine.\n")
    assert "[two](two.md)" in files[2].read_text()


def test_what_cannot_be_recorded_is_said(tmp_path):
    keep = lambda tables, folder: record.record("one", "p/1", tables, command="", folder=folder)
    with pytest.raises(ValueError, match="tables need titles of their own, got Title, Title"):
        keep([TABLE, TABLE], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*new for --record; name one"):
        keep([TABLE], tmp_path / "new")


def test_the_command_records(tmp_path, monkeypatch, capsys):
    part = {"head": {"raw": MEASURED}}
    found = {"protocol": "randomisation/1", "task": "vqa", "examples": 4, "image": part}
    monkeypatch.setattr(sanity, "evaluate", lambda model, **options: found)
    command = ["evaluate", "sanity", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert "recorded" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))
    assert cli.main([*command, "--record", str(tmp_path)]) == 0
    assert "recorded " in capsys.readouterr().out
    kept = record.read(tmp_path)["sanity-vqa-shapes"]
    assert kept["result"] == found | {"model": "vqa-shapes"}
    assert kept["command"].startswith("jaxrel evaluate sanity --out ")
    assert [table["title"] for table in kept["tables"]] == ["Questions, patches"]
