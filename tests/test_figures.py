"""What texts say of tables is what the tables say.

`quotes` names the sentences that quote figures, of README and of the pages of the benchmarks and of
training, and the cells that they quote. A figure must be its cell, rounded to the digits that are
said. What stands between marks is written by commands, with its own tests.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.benchmarks import guard, page
from tests.paths import ROOT

BENCHMARKS = "tests/benchmarks/README.md"
TABLES = page.tables((ROOT / BENCHMARKS).read_text(encoding="utf-8"))
B32, LONGEST, SUITES = "CLIP ViT-B/32, bfloat16", "32768 tokens, float32", "Test suites"
FORMS = "Forms by number of tokens"
WORDS = "none one two three four five six seven eight nine ten".split()
NUMBER = rf"([\d.,]*\d|(?i:{'|'.join(WORDS)}))"
# What a figure of time, memory or size looks like, ranges too.
UNITS = "times|x|%|s|ms|min|seconds|minutes|hours|kB|MB|GB|MiB|GiB|(?:images|pairs|rows) a second"
FIGURE = re.compile(rf"(?<![\w.,])\d[\d.,]*(?: (?:to|and) \d[\d.,]*)? ?(?:{UNITS})(?!\w)")


@dataclass(frozen=True)
class Quote:
    """A sentence, of `#` for each figure, and the figures of the tables in their order."""

    file: str
    sentence: str
    figures: Sequence[float]

    @property
    def pattern(self) -> str:
        """The sentence as a regular expression, with a group for each figure."""
        return re.escape(self.sentence).replace(r"\#", NUMBER)


def cells(title: str, column: str, name: str = "", **where: str) -> list[float]:
    """The numbers of a column, of the rows whose first cell ends in a name."""
    found = []
    for row in TABLES[title]:
        first = row.get("method", row.get("suite"))
        if first.endswith(name) and all(row[other] == x for other, x in where.items()):
            found += [float(row[column])] if row[column] != "-" else []
    assert found, f"no figures of {title!r}, {column!r}, {name!r}, {where}"
    return found


def record(name: str) -> dict:
    """The first table of a record of `jaxrel evaluate`."""
    file = ROOT / f"train/results/{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["tables"][0]


def quotes():
    """All sentences that quote figures."""
    yield from gpu_quotes()
    yield from peer_quotes()
    yield from long_inputs_quotes()
    yield from results_quotes()
    yield from flag_quotes()
    yield Quote(BENCHMARKS, "one costs more than # times what is kept", [guard.MOST])


def gpu_quotes():
    for begins, method in (
        ("streaming `weighted` explains both towers for # pairs", "streaming weighted"),
        ("AttnLRP explains # images", "AttnLRP"),
    ):
        of_row = [cells(B32, column, method)[0] for column in ("images/s", "x time")]
        yield Quote(BENCHMARKS, f"{begins} a second and takes # times as long", of_row)
    milliseconds, gib = (cells(LONGEST, unit, "blockwise weighted")[0] for unit in ("ms", "GiB"))
    said = "Blockwise accumulation explains 32,768 tokens in # s and # GiB"
    yield Quote(BENCHMARKS, said, [milliseconds / 1e3, gib])
    failed, of_blocks = (sum(cells(SUITES, "failed", name)) for name in ("", "/test_blocks.py"))
    yield Quote(BENCHMARKS, "Of the # tests that failed", [failed])
    # One of them showed an error, which has been corrected.
    said = "The other # differ in the last digits of float64. # compare blockwise"
    yield Quote(BENCHMARKS, said, [failed - 1, of_blocks])
    yield Quote("README.md", "where # float64 tests miss their tolerance", [failed - 1])


def peer_quotes():
    for network, method, peer, said in (
        ("ViT-B/16", "AttnLRP", "LXT", "takes # times as long as a gradient (LXT # times)"),
        ("VGG16", "gamma", "zennit", "and Gamma of a VGG16 # times (zennit # times)"),
    ):
        of_tools = [
            cells(network, "x own gradient", method, tool=tool)[0] for tool in ("jaxrel", peer)
        ]
        yield Quote("README.md", said, of_tools)


def long_inputs_quotes():
    for tokens, said in (
        ("1025", "It is # times that of `jax.grad` at 1,025"),
        ("4097", "# at 4,097"),
    ):
        for figure in cells(FORMS, "x temp", "blockwise", tokens=tokens):
            yield Quote(BENCHMARKS, said, [figure])
    for said, figures in (
        ("# to # at 8,193", cells(FORMS, "x temp", "blockwise", tokens="8193")),
        ("for # to # times its CPU time", cells(FORMS, "x CPU s", "blockwise")),
        (
            "takes # to # times the temporary memory of `jax.grad`",
            cells(FORMS, "x temp", "streaming"),
        ),
    ):
        yield Quote(BENCHMARKS, said, [min(figures), max(figures)])


def results_quotes():
    weighted = [
        dict(zip(table["columns"], row, strict=True))
        for table in (record(f"weighting-test-{layers}-layers") for layers in (2, 4, 6))
        for row in table["rows"]
        if row[0] == "grad_value, rest"
    ]
    better = sum(float(row["better"]) for row in weighted)
    compared = sum(name.endswith((" -", " +")) for row in weighted for name in row)
    said = "with mappers of two, four and six layers it is better in # of # perturbation figures"
    yield Quote("README.md", said, [better, compared])
    # One of the rules is that of `weighted`.
    yield Quote(
        "README.md", "Of # other rules", [len(record("weighting-val-2-layers")["rows"]) - 1]
    )
    (scenes,) = re.findall(r"(\d+) examples", record("perturbation-vqa-shapes")["note"])
    yield Quote("README.md", "Patches of # held-out scenes", [float(scenes)])


def flag_quotes():
    for model in ("gridtd-shapes", "aoa-shapes"):
        file = ROOT / f"models/pretrained/{model}/hallucination.json"
        group = json.loads(file.read_text(encoding="utf-8"))["groups"]["shape"]
        lrp = group["methods"]["lrp"]
        shares = [100 * lrp["precision"]["mean"], 100 * group["hallucinated"]]
        auc = [lrp["auc"][end] for end in ("mean", "low", "high")]
        yield Quote("train/README.md", f"| `{model}` | #% | #% | # [#, #] |", shares + auc)
        yield Quote("train/README.md", "These are # held-out images", [lrp["images"]])


# Figures of texts that are of no table.
OTHERS = {
    "README.md": {
        "1.8 GB": "what the environment fills",
        "95%": "the confidence of intervals",
    },
    BENCHMARKS: {"8 minutes": "the limit that device.sh sets itself"},
}


def prose(text: str) -> str:
    """A page's own words, one space between them: no code, tables or text that commands write."""
    for left_out in (r"<!-- ([\w ]+): begin -->.*?<!-- \1: end -->", "```.*?```", "<!--.*?-->"):
        text = re.sub(left_out, "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"^\|.*$", "", text, flags=re.MULTILINE).split())


def agrees(said: str, figure: float) -> bool:
    """Whether a figure is what is said of it, rounded to the digits that are said."""
    if said.lower() in WORDS:
        return figure == WORDS.index(said.lower())
    digits = len(said.partition(".")[2])
    # Half a unit of the last digit; binary fractions may lie a little beyond it.
    return abs(float(said.replace(",", "")) - figure) <= 0.5001 * 10**-digits


def unquoted(text: str, sentences: Sequence[re.Pattern], others: Sequence[str]) -> list[str]:
    """The figures of a text that no sentence quotes and that are not among others."""
    spans = [found.span() for one in sentences for found in one.finditer(text)]
    spans += [found.span() for one in others for found in re.finditer(re.escape(one), text)]
    return [
        text[max(found.start() - 40, 0) : found.end()]
        for found in FIGURE.finditer(text)
        if not any(start <= found.start() and found.end() <= end for start, end in spans)
    ]


@pytest.mark.parametrize("quote", list(quotes()), ids=lambda quote: quote.sentence[:50])
def test_figures_of_texts_are_those_of_tables(quote):
    text = " ".join((ROOT / quote.file).read_text(encoding="utf-8").split())
    found = re.findall(quote.pattern, text)
    assert len(found) == 1, f"{quote.file} says {len(found)} times, not once: {quote.sentence}"
    said = [found[0]] if isinstance(found[0], str) else found[0]
    for one, figure in zip(said, quote.figures, strict=True):
        assert agrees(one, figure), f"{quote.file} says {one}, the table {figure}: {quote.sentence}"


@pytest.mark.parametrize("file", OTHERS)
def test_every_figure_is_a_quote(file):
    text = prose((ROOT / file).read_text(encoding="utf-8"))
    sentences = [re.compile(quote.pattern) for quote in quotes() if quote.file == file]
    found = unquoted(text, sentences, list(OTHERS[file]))
    assert not found, f"{file} has figures that no entry of `quotes` checks: {found}"
    for other in OTHERS[file]:
        assert other in text, f"{file} does not say {other!r} any more"


def test_figures_are_rounded_as_they_are_said():
    for said, figure in (("4,819", 4819), ("0.3", 0.34), ("0.3", 0.25), ("nine", 9), ("none", 0)):
        assert agrees(said, figure), (said, figure)
    for said, figure in (("4,819", 4820), ("0.3", 0.36), ("0.30", 0.31), ("nine", 8)):
        assert not agrees(said, figure), (said, figure)


def test_figures_that_nothing_checks_are_found():
    text = prose("""It takes 1.5 times as long,\nand 20 MiB. | no |
<!-- some: begin -->\n9 MiB\n<!-- some: end -->
```console\n$ 8 MiB\n```\n| 7 MiB |\nIt has 12 layers, JAX 0.10.2, and is 5x faster or 1 to 2%.""")
    quote = Quote("", "takes # times as", [1.5])
    found = unquoted(text, [re.compile(quote.pattern)], ["20 MiB"])
    assert [re.search(r"\S*$", one)[0] for one in found] == ["5x", "2%"]
