"""Where rows come from: each kind of file, and one clear sentence for each that is bad."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxrel.batch.sources import open_source
from jaxrel.images import read_image

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def read(path, **options):
    source = open_source(path, **options)
    rows = source.read(0, len(source.ids))
    assert [row["id"] for row in rows] == list(source.ids)
    return [(row["id"], row["image"], row["text"], row["target"]) for row in rows]


def test_a_folder(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows = read(tmp_path, text="a dog")
    assert rows == [
        (name, str(tmp_path / name), "a dog", None) for name in ("a.JPG", "b.png", "sub/c.webp")
    ]


def test_csv_keeps_ids_and_texts_as_written(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('id,file,caption,more\n007,a.png,null,1\n008,b.png,"a, b",2\n009,c.png,,3\n')
    rows = read(path, columns={"image": "file", "text": "caption"}, text="else")
    assert rows == [
        ("007", str(tmp_path / "a.png"), "null", None),
        ("008", str(tmp_path / "b.png"), "a, b", None),
        ("009", str(tmp_path / "c.png"), "else", None),
    ]


def test_jsonl_and_numbered_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [{"image": "a.png", "text": "red?", "target": "yes"}, {"image": "b.png", "text": "x"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read(path, images=tmp_path / "i") == [
        ("0", str(tmp_path / "i" / "a.png"), "red?", "yes"),
        ("1", str(tmp_path / "i" / "b.png"), "x", None),
    ]


def test_parquet_is_read_by_row_group(tmp_path):
    table = pa.table({"id": [f"r{i}" for i in range(7)], "image": [b"%d" % i for i in range(7)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    source = open_source(tmp_path / "x.parquet", text="t")
    rows = source.read(2, 7)
    assert [row["id"] for row in rows] == ["r2", "r3", "r4", "r5", "r6"]
    assert [row["image"] for row in rows] == [b"2", b"3", b"4", b"5", b"6"]
    assert {row["text"] for row in rows} == {"t"}


def test_published_annotations(tmp_path):
    coco = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [{"id": 5, "image_id": 9, "caption": " a dog \n"}],
    }
    vqa = {
        "data_subtype": "val2014",
        "questions": [{"question_id": 420001, "image_id": 42, "question": "what?"}],
    }
    flickr = {
        "dataset": "flickr30k",
        "images": [
            {
                "filename": "1.jpg",
                "sentences": [{"sentid": 0, "raw": "a"}, {"sentid": 1, "raw": "b"}],
            }
        ],
    }
    for name, held in (("coco", coco), ("vqa", vqa), ("flickr", flickr)):
        (tmp_path / f"{name}.json").write_text(json.dumps(held))
    assert read(tmp_path / "coco.json") == [
        ("5", str(tmp_path / "000000000009.jpg"), "a dog", None)
    ]
    assert read(tmp_path / "vqa.json", images=tmp_path / "val2014") == [
        ("420001", str(tmp_path / "val2014/COCO_val2014_000000000042.jpg"), "what?", None)
    ]
    assert open_source(tmp_path / "vqa.json").are_questions
    assert not open_source(tmp_path / "coco.json").are_questions
    with pytest.raises(ValueError, match="has no columns to be named"):
        open_source(tmp_path / "coco.json", columns={"text": "caption"})
    assert [row[:1] + row[2:3] for row in read(tmp_path / "flickr.json")] == [
        ("0", "a"),
        ("1", "b"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "id,image\n", "holds no rows to explain"),
        ("x.csv", "id,file\n1,a.png\n", "has no column 'image'; it has id, file.*--columns"),
        ("x.csv", "id,image\n1,a\n1,b\n2,c\n", "the id '1' is there 2 times"),
        ("x.csv", "id,image\n1,a\n,b\n", r"row 2 has no id \(1 of 2 rows\)"),
        ("x.csv", "id,image\n1,a,b\n", "cannot be read .*UTF-8, with rows with commas"),
        ("x.csv", "id,image,text\n1,a,\xe9\n", r"\(line 2: 'utf-8' codec .*\); what is read is"),
        ("x.csv", "id,image,image\n1,a,b\n", "has 2 columns 'image': give each a name"),
        ("x.csv", "id;image\n1;a\n", r"has one column, 'id;image': .* commas, not by ';'"),
        ("x.csv", "id\timage\n1\ta\n", r"separate columns by commas, not by '\\t'"),
        ("x.jsonl", "{", "cannot be read .* with one JSON object per line"),
        ("x.jsonl", '{"image": "a"}\nno\n', r"\(line 2: Expecting value.*\); what is read"),
        ("x.jsonl", '{"image": "\xe9"}\n', r"\(line 1: 'utf-8' codec"),
        ("x.parquet", "PAR1", "is not a Parquet file that can be read"),
        ("x.json", "{}", "is neither COCO's captions"),
        ("x.json", "[", "is not valid JSON"),
        ("x.json", '{"images": [{"id": 1}], "annotations": []}', "an entry lacks 'file_name'"),
        ("x.tar", "", "a folder of images, .csv, .jsonl, .parquet or .json"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        open_source(tmp_path / "x")
    with pytest.raises(ValueError, match="holds no images; they end in "):
        open_source(tmp_path)
    (tmp_path / "x.csv").write_text("image\na.png\n")
    with pytest.raises(ValueError, match="has no column 'caption'; it has image"):
        open_source(tmp_path / "x.csv", columns={"text": "caption"})


def test_addresses_are_no_files(tmp_path):
    (tmp_path / "x.csv").write_text("image\nhttps://x.y/a.png\n")
    ((_, image, _, _),) = read(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"https://x.y/a.png is an address; download the image"):
        read_image(image)


def test_the_digest_tells_other_rows(tmp_path):
    image = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    image.save(tmp_path / "a.png")
    before = open_source(tmp_path).digest
    assert open_source(tmp_path).digest == before
    image.save(tmp_path / "b.png")
    assert open_source(tmp_path).digest != before
