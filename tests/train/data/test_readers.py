"""Readers of downloaded data sets, on tiny files in the true formats."""

import copy
import pickle
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxrel.images import read_image
from jaxrel.train.data import coco, files, flickr30k, vqa_v2
from jaxrel.train.data.files import ImageSource
from jaxrel.train.data.vqa_v2 import AnswerVocabulary, normalise_answer, vqa_accuracy
from tests.train.folders import (
    ANNOTATIONS,
    ANNOTATIONS_FILE,
    CAPTIONS,
    CATS,
    DOGS,
    INSTANCES,
    QUESTIONS,
    QUESTIONS_FILE,
    change,
    karpathy,
    question,
    write_image,
    write_json,
)


def test_coco_captions(coco_folder):
    source = coco.captions(coco_folder, "val2017")
    assert len(source) == 3
    assert [record["id"] for record in source.records] == [139, 285, 632]
    first = source[0]
    image = first.pop("image")
    assert (image.shape, image.dtype) == ((8, 12, 3), np.uint8)
    assert first == source.records[0]
    assert first == {
        "id": 139,
        "file": "val2017/000000000139.jpg",
        "captions": ("A woman in a room.", "A room with chairs."),
        "caption_ids": (3, 5),
    }
    # A plain grey comes through JPEG within rounding.
    np.testing.assert_allclose(source[np.int64(2)]["image"], 100, atol=1)
    assert source[-1]["id"] == 632


def test_coco_karpathy_captions(coco_folder):
    source = coco.karpathy_captions(coco_folder, "train+restval")
    assert [record["file"] for record in source.records] == [
        "train2014/COCO_train2014_000000000500.jpg",
        "val2014/COCO_val2014_000000000502.jpg",
    ]
    example = source[1]
    assert example["image"].shape == (8, 12, 3)
    assert example["id"] == 502
    assert example["captions"] == ("A dog, no 2.", "It runs.")
    assert example["tokens"] == (("a", "dog", "no", "2"), ("it", "runs"))
    assert example["caption_ids"] == (4, 5)
    # What a split does not need may be absent.
    shutil.rmtree(coco_folder / "train2014")
    assert len(coco.karpathy_captions(coco_folder, "val")) == 2


def test_restval_is_among_the_images_of_val2014(coco_folder):
    shutil.rmtree(coco_folder / "train2014")
    assert coco.karpathy_captions(coco_folder, "restval")[0]["image"].shape == (8, 12, 3)
    shutil.rmtree(coco_folder / "val2014")
    with pytest.raises(FileNotFoundError, match=r"COCO: \S*val2014 is missing"):
        coco.karpathy_captions(coco_folder, "restval")


def test_coco_instances(coco_folder):
    source = coco.instances(coco_folder, "val2017")
    assert [len(record["categories"]) for record in source.records] == [2, 1, 0]
    first = source[0]
    np.testing.assert_array_equal(first["boxes"], [[1.5, 2, 3, 4.25], np.float32([0, 0, 12.6, 8])])
    np.testing.assert_array_equal(first["crowd"], [False, True])
    np.testing.assert_array_equal(first["area"], np.float32([4.5, 4.5]))
    assert first["categories"] == ("chair", "person")
    assert (first["height"], first["width"]) == (8, 12)
    assert source[2]["boxes"].shape == (0, 4)
    shutil.rmtree(coco_folder / "val2017")
    objects = coco.objects(coco_folder, "val2017")
    assert objects.keys() == {139, 285, 632}
    assert objects[285]["categories"] == ("bear",)


def test_flickr30k(flickr_folder):
    source = flickr30k.captions(flickr_folder, "train")
    assert [record["id"] for record in source.records] == [0, 2]
    assert source[1]["file"] == "flickr30k-images/12.jpg"
    assert source[1]["captions"] == ("A dog, no 2.", "It runs.")
    assert len(flickr30k.captions(flickr_folder, "train+val")) == 3


def test_vqa(vqa_folder):
    source = vqa_v2.questions(vqa_folder, "val")
    assert [record["id"] for record in source.records] == [9001, 9000, 42000]
    example = source[0]
    np.testing.assert_allclose(example.pop("image"), 9, atol=1)
    assert example == {
        "id": 9001,
        "file": "val2014/COCO_val2014_000000000009.jpg",
        "image_id": 9,
        "question": "What is it?",
        "question_type": "what is",
        "answer_type": "other",
        "answer": "dog",
        "answers": tuple(DOGS),
    }


def test_vqa_test_split_has_no_answers(tmp_path):
    document = {"data_subtype": "test-dev2015", "questions": [question(1, 262144)]}
    write_json(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", document)
    write_image(tmp_path / "coco/test2015/COCO_test2015_000000262144.jpg")
    images = tmp_path / "coco"
    source = vqa_v2.questions(tmp_path, "test-dev", answers=False, images=images)
    assert source[0].keys() == {"id", "file", "image_id", "question", "image"}
    with pytest.raises(ValueError, match=r"answers of 'test-dev' are not published.*answers=False"):
        vqa_v2.questions(tmp_path, "test-dev", images=images)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A Dog.", "dog"),
        ("the  two\tdogs", "2 dogs"),
        ("None", "0"),
        ("1,000,978", "1000978"),
        ("black,white", "black white"),
        ("red,2", "red 2"),
        ("2,red", "2 red"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("2:50 p.m.", "2:50 pm"),
        ("girl's", "girl's"),
        ("girls", "girls"),
        ("t-shirt", "t shirt"),
        ("yes, it is!", "yes it is"),
        ("50% & $5", "50% & $5"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("its oclock", "its o'clock"),
        ("a", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised(answer, expected):
    assert normalise_answer(answer) == expected


@given(st.text("at1,.'; eNOoht-", max_size=12) | st.text(max_size=12))
def test_a_normalised_answer_stays(answer):
    once = normalise_answer(answer)
    assert normalise_answer(once) == once


# By hand: of n people that agree, n leave-one-out sets hold n - 1 and the rest hold n.
@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqa_accuracy(agree, expected):
    answers = ["Two dogs!"] * agree + [f"{i} cats" for i in range(10 - agree)]
    assert vqa_accuracy("the 2 dogs", answers) == pytest.approx(expected, abs=1e-12)


def test_answer_vocabulary_and_soft_scores(vqa_folder):
    vocabulary = AnswerVocabulary.from_answers(
        ["cat", "Dog", "a dog", "dog.", "two", "2", "bird", "Cat"], at_least=2
    )
    assert vocabulary.answers == ("dog", "2", "cat")  # the most frequent, then the alphabet
    scores = vocabulary.scores(CATS)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.float32([1 / 3, 0, 1]))
    np.testing.assert_array_equal(
        vocabulary.scores(["two", "2", "bird"]), np.float32([0, 2 / 3, 0])
    )
    built = vqa_v2.build_vocabulary(vqa_folder, ("val",), at_least=1)
    assert built.answers == ("cat", "dog", "yes")


def test_the_vocabulary_counts_train_and_val(vqa_folder):
    for kind, document in (("questions", QUESTIONS), ("annotations", ANNOTATIONS)):
        file = QUESTIONS_FILE if kind == "questions" else ANNOTATIONS_FILE
        document = {**document, "data_subtype": "train2014"}
        write_json(vqa_folder / file.replace("val", "train"), document)
    assert len(vqa_v2.build_vocabulary(vqa_folder, at_least=2)) == 3
    with pytest.raises(ValueError, match=r"no answer occurs 9 times or more among 6; give more"):
        vqa_v2.build_vocabulary(vqa_folder)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vqa_accuracy("a", "yes"), TypeError, r"expected a list of answers, got one text"),
        (lambda: vqa_accuracy("a", ["yes"]), ValueError, r"one answer out at a time and got 1"),
        (lambda: AnswerVocabulary(()), ValueError, r"needs at least one answer"),
        (lambda: AnswerVocabulary(("x", "x")), ValueError, r"'x' is in the vocabulary twice"),
        (lambda: AnswerVocabulary(("Two",)), ValueError, r"'Two' is not normalised; expected '2'"),
    ],
)
def test_bad_answers(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_missing_files_are_listed_with_what_is_expected(tmp_path):
    calls = {
        "captions_val2017.json and .*val2017 are missing. Expected: the file .*captions_val2017"
        ".json .*trainval2017.zip.*; the folder .*val2017 .*annotations= and images=": (
            lambda: coco.captions(tmp_path, "val2017")
        ),
        "instances_val2017.json is missing": lambda: coco.objects(tmp_path, "val2017"),
        "dataset_coco.json and .*val2014 are missing": (
            lambda: coco.karpathy_captions(tmp_path, "test")
        ),
        "dataset_flickr30k.json and .*flickr30k-images are": (
            lambda: flickr30k.captions(tmp_path, "test")
        ),
        f"{QUESTIONS_FILE} and .*{ANNOTATIONS_FILE} and .*val2014 are missing": (
            lambda: vqa_v2.questions(tmp_path, "val")
        ),
    }
    for message, call in calls.items():
        with pytest.raises(FileNotFoundError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: coco.captions(x, "val"), r"COCO: split is 'val'; expected one of train2014"),
        (lambda x: coco.karpathy_captions(x, "dev"), r"split is 'dev'; expected.*restval.*with \+"),
        (lambda x: flickr30k.captions(x, "restval"), r"Flickr30k: split is 'restval'; expected"),
        (lambda x: vqa_v2.questions(x, "dev"), r"VQA v2: split is 'dev'; expected one of train"),
    ],
)
def test_unknown_splits(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_damaged_json(coco_folder):
    path = coco_folder / "annotations/captions_val2017.json"
    text = path.read_text()
    path.write_text(text[:-40])
    where = rf"line 1, column \d+ \(character \d+ of {len(text) - 40}\)"
    message = (
        rf"captions_val2017\.json is not valid JSON at {where}.*cut short or damaged, download"
    )
    with pytest.raises(ValueError, match=message):
        coco.captions(coco_folder, "val2017")
    path.write_text("")
    with pytest.raises(ValueError, match=r"character 0 of 0\)"):
        coco.captions(coco_folder, "val2017")
    path.write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(ValueError, match=r"is no JSON: byte 1 is not UTF-8.*archive"):
        coco.captions(coco_folder, "val2017")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            CAPTIONS,
            r"looks like a COCO captions file .*'annotations'.*; expected a COCO instances ",
        ),
        (QUESTIONS, r"looks like a VQA questions file"),
        (ANNOTATIONS, r"looks like a VQA annotations file"),
        (karpathy("val"), r"looks like a Karpathy split file"),
        ({}, r"is of no known kind \(it holds nothing\).*'images' and 'annotations' and 'categor"),
        ([CAPTIONS], r"holds a list of 1 at the top; expected a COCO instances file"),
        ({**INSTANCES, "categories": None}, r"it holds 'images', 'annotations', 'categories'\)"),
    ],
)
def test_files_of_another_kind(tmp_path, document, message):
    write_json(tmp_path / "a.json", document)
    with pytest.raises(ValueError, match=message):
        coco.objects(tmp_path, "val2017", annotations=tmp_path / "a.json")


def put(*steps, **fields):
    """A change to a document: set fields of what the steps lead to; None deletes a field."""

    def change(document):
        for step in steps:
            document = document[step]
        document.update({name: value for name, value in fields.items() if value is not None})
        for name in [name for name, value in fields.items() if value is None]:
            del document[name]

    return change


COCO_FAULTS = [
    (
        "captions",
        put("images", 1, file_name=None),
        r"images\[1\] has no 'file_name'; expected a text",
    ),
    ("captions", put("images", 1, id=139), r"images\[1\]: 'id' is 139, which images\[0\] has"),
    ("captions", put("images", 1, file_name="../../x"), r"'\.\./\.\./x'; expected a plain name"),
    ("captions", put("annotations", 2, id=3), r"annotations\[2\]: 'id' is 3, which annot"),
    ("captions", put("annotations", 2, caption=5), r"s\[2\]: 'caption' is 5; expected a text"),
    ("captions", put("annotations", 0, id=True), r"'id' is true; expected a whole number"),
    ("captions", put("annotations", 0, image_id=6), r"'image_id' is 6, which is not among the 3"),
    (
        "captions",
        lambda d: d["annotations"].insert(2, []),
        r"s\[2\] is a list of 0; expected an obj",
    ),
    ("captions", lambda d: d["images"].clear(), r"lists no images; expected a whole copy"),
    ("instances", put("annotations", 1, category_id=5), r"'category_id' is 5, which is not among"),
    ("instances", put("annotations", 1, bbox=[1, 2, 3]), r"'bbox' is \[1, 2, 3\]; expected four"),
    ("instances", put("annotations", 1, bbox=[1, 2, 3, "4"]), r"expected four numbers: left, top"),
    ("instances", put("annotations", 1, area="9"), r"s\[1\]: 'area' is '9'; expected a number"),
    ("instances", put("images", 0, height=8.5), r"'height' is 8\.5; expected a whole number"),
    ("instances", put("categories", 2, id=1), r"categories\[2\]: 'id' is 1, which categories\[0\]"),
]


@pytest.mark.parametrize(("kind", "fault", "message"), COCO_FAULTS)
def test_inconsistent_coco_files(coco_folder, kind, fault, message):
    change(coco_folder / f"annotations/{kind}_val2017.json", fault)
    with pytest.raises(ValueError, match=rf"{kind}_val2017\.json.*{message}"):
        getattr(coco, kind)(coco_folder, "val2017")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (put("images", 2, split="dev"), r"images\[2\]: 'split' is 'dev'; expected one of train"),
        (put("images", 2, imgid=0), r"images\[2\]: 'imgid' is 0, which images\[0\] has already"),
        (put("images", 2, filepath=".."), r"'filepath' is '\.\.'; expected a plain name"),
        (put("images", 2, cocoid=None), r"images\[2\] has no 'cocoid'"),
        (put("images", 2, "sentences", 1, sentid=0), r"images\[2\].sentences\[1\]: 'sentid' is 0"),
        (put("images", 2, "sentences", 1, tokens=["a", 1]), r"tokens\[1\] is 1; expected a text"),
        (put("images", 0, split="val"), r"no images of the split train"),
    ],
)
def test_inconsistent_split_files(coco_folder, fault, message):
    change(coco_folder / "dataset_coco.json", fault)
    with pytest.raises(ValueError, match=rf"dataset_coco\.json.*{message}"):
        coco.karpathy_captions(coco_folder, "train")


@pytest.mark.parametrize(
    ("file", "fault", "message"),
    [
        (QUESTIONS_FILE, put(data_subtype="train2014"), r"'train2014'; expected 'val2014'. Put th"),
        (QUESTIONS_FILE, put("questions", 1, question_id=9001), r"'question_id' is 9001, which q"),
        (QUESTIONS_FILE, put("questions", 1, question=" "), r"ns\[1\]: 'question' is ''; expected"),
        (QUESTIONS_FILE, lambda d: d["questions"].clear(), r"has no questions"),
        (QUESTIONS_FILE, lambda d: d["questions"].pop(), r"\[0\]: 'question_id' is 42000, which i"),
        (
            QUESTIONS_FILE,
            lambda d: d["questions"].append(question(77, 9)),
            r"for 3 of the 4 questions of .*, and none for question 77; expected .* one version",
        ),
        (ANNOTATIONS_FILE, put("annotations", 2, image_id=8), r"'image_id' is 8, and .* asks que"),
        (ANNOTATIONS_FILE, lambda d: d["annotations"][1]["answers"].pop(), r"\[1\] has 9 answers"),
        (ANNOTATIONS_FILE, put("annotations", 1, "answers", 3, answer=3), r"answers\[3\]: 'answ"),
        (ANNOTATIONS_FILE, put("annotations", 1, answer_type=None), r"\[1\] has no 'answer_type'"),
    ],
)
def test_inconsistent_vqa_files(vqa_folder, file, fault, message):
    change(vqa_folder / file, fault)
    with pytest.raises(ValueError, match=r"mscoco_val2014_\w+\.json.*" + message):
        vqa_v2.questions(vqa_folder, "val")


def test_blank_captions_are_left_out_with_one_warning(coco_folder, flickr_folder):
    change(
        coco_folder / "annotations/captions_val2017.json",
        lambda d: (put("annotations", 2, caption=" \n")(d), d["annotations"].pop()),
    )
    message = (
        r"captions_val2017\.json: 2 of 4 captions cannot be used: .*annotations\[2\]: the caption "
        r"5 of image 139 is blank; image 632 has no caption\. "
    )
    with pytest.warns(UserWarning, match=message + "They are left out") as caught:
        source = coco.captions(coco_folder, "val2017")
    assert len(caught) == 1
    assert [record["captions"] for record in source.records] == [
        ("A woman in a room.",),
        ("A big bear.",),
    ]
    with pytest.raises(ValueError, match=message + r'Correct the file.*blank="skip"'):
        coco.captions(coco_folder, "val2017", blank="error")
    change(flickr_folder / "dataset_flickr30k.json", put("images", 0, "sentences", 0, tokens=[]))
    with pytest.warns(UserWarning, match=r"1 of 4 captions .*images\[0\]: the caption 0 has no w"):
        source = flickr30k.captions(flickr_folder, "train")
    assert source.records[0]["captions"] == ("It runs.",)


@pytest.mark.parametrize(
    "box", [[1, 2, 3, 0], [-2, 0, 3, 3], [10, 0, 4, 4], [1, 1, float("nan"), 1]]
)
def test_bad_boxes_are_left_out_with_one_warning(coco_folder, box):
    path = coco_folder / "annotations/instances_val2017.json"
    change(path, put("annotations", 0, bbox=box))
    message = (
        r"instances_val2017\.json: 1 of 3 boxes cannot be used: .*annotations\[0\]: the box .* of "
        r"annotation 1 has no size or leaves its image of 12 x 8"
    )
    with pytest.warns(UserWarning, match=message):
        objects = coco.objects(coco_folder, "val2017")
    assert objects[139]["categories"] == ("person",)
    with pytest.raises(ValueError, match=message + r'.*bad_boxes="skip"'):
        coco.objects(coco_folder, "val2017", bad_boxes="error")


def test_missing_images(vqa_folder):
    (vqa_folder / "val2014/COCO_val2014_000000000009.jpg").unlink()
    message = r"VQA v2 val: 1 of 2 images are not in .*: val2014/COCO_val2014_000000000009\.jpg\."
    with pytest.raises(FileNotFoundError, match=message + r'.*missing="skip"'):
        vqa_v2.questions(vqa_folder, "val")
    with pytest.warns(UserWarning, match=message + " They are left out") as caught:
        source = vqa_v2.questions(vqa_folder, "val", missing="skip")
    assert len(caught) == 1
    assert [record["id"] for record in source.records] == [42000]


def test_many_missing_images_are_counted(coco_folder):
    for path in (coco_folder / "val2017").iterdir():
        path.unlink()
    document = copy.deepcopy(CAPTIONS)
    for number in (1, 2):
        document["images"].append(
            {"id": number, "file_name": f"{number}.jpg", "height": 8, "width": 12}
        )
        document["annotations"].append({"id": 90 + number, "image_id": number, "caption": "x"})
    write_json(coco_folder / "annotations/captions_val2017.json", document)
    with pytest.raises(FileNotFoundError, match=r"5 of 5 images.*632\.jpg, and 2 more\. Unpack"):
        coco.captions(coco_folder, "val2017")
    with (
        pytest.warns(UserWarning, match="5 of 5"),
        pytest.raises(
            ValueError, match=r"COCO captions val2017: no example is left; give a folder"
        ),
    ):
        coco.captions(coco_folder, "val2017", missing="skip")


def test_corrupt_images(coco_folder):
    path = coco_folder / "val2017/000000000285.jpg"
    path.write_bytes(path.read_bytes()[:200])
    source = coco.captions(coco_folder, "val2017")
    assert source[0]["id"] == 139
    for _ in range(2):
        with pytest.raises(ValueError, match=r"000000000285\.jpg is (damaged|not an image)"):
            source[1]
    message = r"COCO captions val2017: 1 of 3 images cannot be read: .*285\.jpg .*left out"
    with pytest.warns(UserWarning, match=message) as caught:
        source = coco.captions(coco_folder, "val2017", corrupt="skip")
    assert len(caught) == 1
    assert [source[i]["id"] for i in range(len(source))] == [139, 632]


def test_boxes_need_an_image_of_the_annotated_size(coco_folder):
    write_image(coco_folder / "val2017/000000000285.jpg", size=(8, 12))
    source = coco.instances(coco_folder, "val2017")
    message = r"285\.jpg is 12 x 8 pixels .* of image 285 are for 8 x 12, so its boxes would be"
    with pytest.raises(ValueError, match=message):
        source[1]
    with pytest.warns(UserWarning, match=message):
        assert len(coco.instances(coco_folder, "val2017", corrupt="skip")) == 2
    assert coco.captions(coco_folder, "val2017")[1]["image"].shape == (12, 8, 3)


@pytest.mark.parametrize(
    ("mode", "colour", "format", "expected"),
    [
        ("L", 90, "JPEG", (90, 90, 90)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),
        ("RGBA", (9, 9, 9, 0), "PNG", (255, 255, 255)),
        ("P", 0, "PNG", (0, 0, 0)),
        ("I;16", 257 * 90, "PNG", (90, 90, 90)),
    ],
)
def test_images_of_any_mode_come_as_rgb(flickr_folder, mode, colour, format, expected):
    path = flickr_folder / "flickr30k-images/10.jpg"
    Image.new(mode, (12, 8), colour).save(path, format=format)
    image = flickr30k.captions(flickr_folder, "train")[0]["image"]
    assert (image.shape, image.dtype) == ((8, 12, 3), np.uint8)
    np.testing.assert_allclose(image[4, 6], expected, atol=4)  # JPEG is lossy


def test_images_come_upright(flickr_folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(flickr_folder / "flickr30k-images/10.jpg", exif=exif)
    assert flickr30k.captions(flickr_folder, "train")[0]["image"].shape == (12, 8, 3)


def test_nothing_is_decoded_before_it_is_asked_for(flickr_folder):
    for path in (flickr_folder / "flickr30k-images").iterdir():
        path.write_text("no image")
    source = flickr30k.captions(flickr_folder, "train")
    assert len(source) == 2
    assert source.records[1]["tokens"][1] == ("it", "runs")
    with pytest.raises(ValueError, match="not an image"):
        source[0]


def test_a_source_is_a_sequence(coco_folder, tmp_path):
    source = coco.captions(coco_folder, "val2017")
    assert [example["id"] for example in source] == [139, 285, 632]
    with pytest.raises(IndexError, match=r"val2017 has 3 examples; there is no number 3"):
        source[3]
    with pytest.raises(TypeError):
        source[0:2]
    # Workers get it by pickle; Grain's DataLoader compares the repr when it resumes.
    assert pickle.loads(pickle.dumps(source)).records == source.records
    moved = shutil.copytree(coco_folder, tmp_path / "moved")
    assert repr(coco.captions(moved, "val2017")) == repr(source)
    assert re.fullmatch(
        r"ImageSource\('COCO captions val2017', examples=3, ids=[0-9a-f]{8}\)", repr(source)
    )
    other = ImageSource(source.name, source.folder, source.records[:1] * 3)
    assert repr(other) != repr(source)


def test_threads_take_turns_at_reading(coco_folder, monkeypatch):
    """Two at once could leave the process without its warnings: see `files._READING`."""
    inside, most = [], []

    def read(path):
        inside.append(path)
        time.sleep(1e-3)  # lets the other threads in, if they may
        most.append(len(inside))
        inside.pop()
        return read_image(path)

    monkeypatch.setattr(files, "read_image", read)
    source = coco.captions(coco_folder, "val2017")
    with ThreadPoolExecutor(8) as threads:
        ids = [example["id"] for example in threads.map(source.__getitem__, [0, 1, 2] * 8)]
    assert ids == [139, 285, 632] * 8
    assert max(most) == 1


def test_grain_shuffles_shards_and_resumes(coco_folder):
    source = coco.captions(coco_folder, "val2017")
    epochs = grain.MapDataset.source(source).seed(4).shuffle().repeat(4)

    def ids(dataset):
        return [example["id"] for example in dataset]

    order = ids(epochs)
    again = coco.captions(coco_folder, "val2017")
    assert ids(grain.MapDataset.source(again).seed(4).shuffle().repeat(4)) == order
    assert [sorted(order[i : i + 3]) for i in range(0, 12, 3)] == [[139, 285, 632]] * 4
    assert len({tuple(order[i : i + 3]) for i in range(0, 12, 3)}) > 1  # a new order per epoch
    shards = [ids(epochs[process::2]) for process in range(2)]
    assert shards == [order[0::2], order[1::2]]
    iterator = iter(epochs.to_iter_dataset())
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    rest = ids(iterator)
    assert rest == order[5:]
    resumed = iter(epochs.to_iter_dataset())
    resumed.set_state(state)
    assert ids(resumed) == rest
