"""Folders of downloaded data sets: tiny files in the true formats."""

import json

from PIL import Image


def write_json(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def write_image(path, grey=100, size=(12, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(path, **options)


CAPTIONS = {
    "info": {"year": 2017},
    "licenses": [],
    "images": [
        {"id": 139, "file_name": "000000000139.jpg", "height": 8, "width": 12, "license": 2},
        {"id": 285, "file_name": "000000000285.jpg", "height": 8, "width": 12, "license": 4},
        {"id": 632, "file_name": "000000000632.jpg", "height": 8, "width": 12, "license": 3},
    ],
    "annotations": [
        {"id": 7, "image_id": 285, "caption": "A big bear."},
        {"id": 3, "image_id": 139, "caption": "A woman in a room. \n"},
        {"id": 5, "image_id": 139, "caption": "A room with chairs."},
        {"id": 9, "image_id": 632, "caption": "A bedroom."},
    ],
}

INSTANCES = {
    "images": CAPTIONS["images"],
    "annotations": [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "segmentation": [[0, 0, 1, 0, 1, 1]],
            "iscrowd": crowd,
            "area": 4.5,
        }
        for number, image, category, box, crowd in (
            (1, 139, 62, [1.5, 2, 3, 4.25], 0),
            (2, 139, 1, [0, 0, 12.6, 8], 1),
            (4, 285, 23, [0, 0, 12, 8], 0),
        )
    ],
    "categories": [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 23, "name": "bear", "supercategory": "animal"},
        {"id": 62, "name": "chair", "supercategory": "furniture"},
    ],
}


def karpathy(*splits, coco=True):
    images = []
    for i, split in enumerate(splits):
        sentences = [
            {"raw": f"A dog, no {i}. ", "tokens": ["a", "dog", "no", str(i)], "sentid": 2 * i},
            {"raw": "It runs.", "tokens": ["it", "runs"], "sentid": 2 * i + 1},
        ]
        sentences = [{**sentence, "imgid": i} for sentence in sentences]
        image = {"imgid": i, "split": split, "sentids": [2 * i, 2 * i + 1], "sentences": sentences}
        part = "train2014" if split == "train" else "val2014"
        named = {"filename": f"COCO_{part}_{500 + i:012d}.jpg"} if coco else {}
        place = {"filepath": part, "cocoid": 500 + i} if coco else {"filename": f"{10 + i}.jpg"}
        images.append({**image, **named, **place})
    return {"images": images, "dataset": "coco" if coco else "flickr30k"}


def question(number, image, text="What is it?"):
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number, image, answers):
    return {
        "question_id": number,
        "image_id": image,
        "question_type": "what is",
        "answer_type": "other",
        "multiple_choice_answer": max(answers, key=answers.count),
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
            for i, answer in enumerate(answers)
        ],
    }


DOGS = ["dog"] * 8 + ["A dog.", "puppy"]
CATS = ["cat"] * 5 + ["2 cats", "two cats", "dog", "bird", "cow"]
QUESTIONS = {
    "info": {},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [question(9001, 9), question(9000, 9, "Is it red?"), question(42000, 42)],
}
ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        annotation(42000, 42, CATS),
        annotation(9000, 9, ["yes"] * 10),
        annotation(9001, 9, DOGS),
    ],
}
QUESTIONS_FILE = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS_FILE = "v2_mscoco_val2014_annotations.json"


def change(path, change):
    """Rewrite a JSON file with a change made to it."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    write_json(path, document)


class Repeated:
    """A source as often as a batch needs it: eight devices want eight examples."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.source[index % len(self.source)]
