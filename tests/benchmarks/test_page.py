"""Pages are made of what is kept, and are read back."""

import json

import pytest

from tests.benchmarks import cost_model, cpu, device, device_report, long_inputs, page, scaling
from tests.benchmarks.table import Table


def kept(module):
    return json.loads(module.KEPT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [cpu, long_inputs, scaling], ids=lambda module: module.SECTION)
def test_sections_are_made_of_what_is_kept(module):
    made = module.markdown(kept(module)).strip("\n")
    assert page.read(module.README, module.SECTION) == made, (
        f"python -m {module.__name__} writes it"
    )


def test_the_cost_model_is_made_of_what_is_kept_and_of_the_tables_of_the_h200():
    text = cost_model.README.read_text(encoding="utf-8")
    made = cost_model.markdown(cost_model.read(), text).strip("\n")
    assert page.read(cost_model.README, cost_model.SECTION) == made


def test_the_section_of_the_device_is_there():
    assert page.read(device.README, device_report.SECTION).startswith("Measured on device ")


def test_writing_again_changes_nothing(tmp_path):
    file = tmp_path / "README.md"
    begin, end = page.marks("some")
    file.write_text(f"# Above\n\n{begin}\nold\n{end}\n\nBelow.\n", encoding="utf-8")
    page.write(file, "some", "new\n\nand ü\n")
    once = file.read_text(encoding="utf-8")
    assert once == f"# Above\n\n{begin}\n\nnew\n\nand ü\n\n{end}\n\nBelow.\n"
    assert page.read(file, "some") == "new\n\nand ü"
    page.write(file, "some", page.read(file, "some"))
    assert file.read_text(encoding="utf-8") == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", r"README.md: expected the line '<!-- some: begin -->' once, found 0"),
        ("{begin}{begin}{end}", "begin -->' once, found 2"),
        ("{begin}", "end -->' once, found 0"),
        ("{end}\n{begin}", "expected the line '<!-- some: begin -->' above the line"),
    ],
)
def test_a_page_without_its_marks_is_refused(tmp_path, text, message):
    file = tmp_path / "README.md"
    begin, end = page.marks("some")
    file.write_text(text.format(begin=begin, end=end), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        page.write(file, "some", "new")


def test_tables_are_read_as_they_are_written():
    rows = [{"method": "a", "ms": 1.234, "x": None}, {"method": r"b \| c", "ms": 120.4, "x": "-1"}]
    text = f"# Page\n\n{Table('One', 'A note.', rows).markdown()}\nText.\n\n"
    text += Table("Two", "", rows[:1]).markdown()
    first = {"method": "a", "ms": "1.23", "x": "-"}
    assert page.tables(text) == {
        "One": [first, {"method": r"b \| c", "ms": "120", "x": "-1"}],
        "Two": [first],
    }
