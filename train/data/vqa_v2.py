"""VQA v2 (Goyal et al. 2017), once downloaded and unpacked: questions, answers, scores.

FOLDER/v2_OpenEnded_mscoco_val2014_questions.json
FOLDER/v2_mscoco_val2014_annotations.json
FOLDER/val2014/COCO_val2014_000000262148.jpg       also train2014/, test2015/
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from jaxrel.train.data.files import (
    Choice,
    ImageSource,
    Record,
    StrPath,
    check_choice,
    check_layout,
    field,
    image_source,
    new_id,
    places,
    read_annotations,
)

# The name of a split in the files, and of its images.
_SUBTYPES = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}
SPLITS = tuple(_SUBTYPES)
ANNOTATED = ("train", "val")
ANSWERS = 10  # people who answered each question

_ADVICE = "Unpack them there, or name another folder"

# What the evaluation treats as punctuation; currency and percent signs, & and : stay.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}


def _contractions() -> dict[str, str]:
    """Contractions by their letters alone, less those that are other words: its, well, wed, ..."""
    endings = {
        "n't": "are ca could did do does had has have is might must need ought sha should was were "
        "wo would ai",
        "'ve": "could i might must not should they we what where who would you",
        "'re": "there they what why you",
        "'ll": "it somebody someone something that they what who why you",
        "'d": "he how it somebody someone something that there they where who you",
        "'s": "he how she somebody someone that there what when where who why",
        "'m": "i",
    }
    whole = [stem + ending for ending, stems in endings.items() for stem in stems.split()]
    # Two endings at once: couldn't've, she'd've.
    whole += [f"{stem}n't've" for stem in "could had might should would".split()]
    stems = "he i it she somebody someone something there they we who you"
    whole += [f"{stem}'d've" for stem in stems.split()]
    whole += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've"]
    return {word.replace("'", ""): word for word in whole}


_CONTRACTIONS = _contractions()


def questions(
    folder: StrPath,
    split: str,
    *,
    answers: bool = True,
    images: StrPath | None = None,
    missing: Choice = "error",
    corrupt: Choice = "error",
) -> ImageSource:
    """Questions with their images and the answers of ten people.

    Args:
      folder: holds the questions, the annotations and the images' folder.
      split: "train" (443757 questions), "val" (214354), "test" (447793) or "test-dev" (107394).
      answers: whether annotations are read; the tests' are not published.
      images: the folder that holds train2014/, val2014/ or test2015/, where it is elsewhere,
        such as COCO's.
      missing: as in `files.image_source`.
      corrupt: likewise.

    Returns:
      A source of the records of `read_questions`, with `"image"`.

    Raises:
      FileNotFoundError: a file, the folder or images are missing.
      ValueError: the split is unknown or has no answers, or the files are damaged or disagree.
    """
    for name, choice in (("missing", missing), ("corrupt", corrupt)):
        check_choice(name, choice, ("error", "skip"))
    _check_split(split, answers)
    root = Path(images if images is not None else folder)
    shown = root / _SUBTYPES[split][1]
    _check_files(Path(folder), split, answers, {shown: f"the images, of {shown.name}.zip"})
    records = read_questions(folder, split, answers=answers)
    return image_source(f"VQA v2 {split}", root, records, missing=missing, corrupt=corrupt)


def read_questions(folder: StrPath, split: str, *, answers: bool = True) -> tuple[Record, ...]:
    """Questions and answers alone, in the order of the questions file.

    Args:
      folder: holds the questions and the annotations.
      split: as in `questions`.
      answers: likewise.

    Returns:
      A dict each: `"id"` (the question's), `"file"` (the image's), `"image_id"`,
      `"question"`; with answers also `"question_type"`, `"answer_type"` ("yes/no", "number" or
      "other"), `"answer"` (what most people said) and `"answers"` (ten), as they were given.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the split is unknown or has no answers, or the files are damaged or disagree.
    """
    _check_split(split, answers)
    folder = Path(folder)
    _check_files(folder, split, answers, {})
    path = _questions_file(folder, split)
    records = _read_questions(path, split)
    if not answers:
        return tuple(records.values())
    annotations = _read_annotations(_annotations_file(folder, split), split, records, path)
    return tuple(record | annotations[number] for number, record in records.items())


def normalise_answer(answer: str) -> str:
    """An answer as the VQA evaluation compares it (Antol et al. 2015, visualqa.org/evaluation).

    Lower case; a comma between digits and a period that no digit follows are taken away, and
    other punctuation becomes a space, but ' and : stay; number words up to ten become digits
    ("none" is 0); a, an and the are taken away; contractions get their apostrophe.

    This follows the published description. The official program has side effects that it does
    not follow: where a comma stands between digits, all punctuation of the answer is taken away
    without a space, and a sign with a space beside it is taken away wherever else it stands.

    Args:
      answer: any text.

    Returns:
      Words with single spaces; nothing is left of an answer such as "a".
    """
    text = answer.lower()
    kept = []
    for i, letter in enumerate(text):
        after = text[i + 1 : i + 2].isdecimal()
        if letter == "," and after and text[i - 1 : i].isdecimal():
            continue
        if letter == "." and not after:
            continue
        kept.append(" " if letter in _PUNCTUATION else letter)
    words = (_NUMBERS.get(word, word) for word in "".join(kept).split())
    # The apostrophe may be there in part: couldn'tve.
    return " ".join(
        _CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in _ARTICLES
    )


def vqa_accuracy(predicted: str, answers: Sequence[str]) -> float:
    """The official accuracy of one answer (Antol et al. 2015).

    The mean of min(n / 3, 1) over the sets that leave one person out, where n people of the set
    gave the predicted answer. All answers are normalised first (the official program leaves them
    as they are when the ten agree to the letter).

    Args:
      predicted: the model's answer.
      answers: what people said, usually ten.

    Returns:
      From 0 to 1.

    Raises:
      TypeError: `answers` is one text.
      ValueError: there are fewer than two answers.
    """
    given = _normalised(answers)
    if len(given) < 2:
        raise ValueError(
            f"vqa_accuracy leaves one answer out at a time and got {len(given)}; give the answers "
            f"of all people, usually {ANSWERS}"
        )
    right = normalise_answer(predicted)
    agree = [answer == right for answer in given]
    scores = [min((sum(agree) - left_out) / 3, 1) for left_out in agree]
    return float(np.mean(scores))


@dataclasses.dataclass(frozen=True)
class AnswerVocabulary:
    """The answers that a classifier chooses from.

    Args:
      answers: normalised, each once; the index of an answer is its class.

    Raises:
      ValueError: there are none, or one is there twice or not normalised.
    """

    answers: tuple[str, ...]

    def __post_init__(self):
        if not self.answers:
            raise ValueError("an answer vocabulary needs at least one answer")
        if len(self._index) < len(self.answers):
            twice = next(a for a, count in Counter(self.answers).items() if count > 1)
            raise ValueError(f"the answer {twice!r} is in the vocabulary twice; list each once")
        for answer in self.answers:
            if answer != normalise_answer(answer):
                raise ValueError(
                    f"the answer {answer!r} is not normalised; expected "
                    f"{normalise_answer(answer)!r}, as normalise_answer gives it"
                )

    def __len__(self) -> int:
        return len(self.answers)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {answer: index for index, answer in enumerate(self.answers)}

    def scores(self, answers: Sequence[str]) -> Float32[np.ndarray, " vocabulary"]:
        """The soft target: min(n / 3, 1) for an answer that n people gave, 0 for the others.

        Args:
          answers: what people said; they are normalised first.

        Raises:
          TypeError: `answers` is one text.
        """
        scores = np.zeros(len(self), np.float32)
        for answer, count in Counter(_normalised(answers)).items():
            if answer in self._index:
                scores[self._index[answer]] = min(count / 3, 1)
        return scores

    @classmethod
    def from_answers(cls, answers: Iterable[str], *, at_least: int = 9) -> "AnswerVocabulary":
        """Take the answers that occur often enough.

        Args:
          answers: one per question; they are normalised first.
          at_least: how often an answer must occur.

        Returns:
          The vocabulary, the most frequent first, then in the order of the alphabet.

        Raises:
          ValueError: no answer occurs that often.
        """
        counts = Counter(map(normalise_answer, answers))
        kept = [answer for answer, count in counts.items() if count >= at_least]
        if not kept:
            raise ValueError(
                f"no answer occurs {at_least} times or more among {sum(counts.values())}; give "
                "more answers, or a smaller at_least"
            )
        return cls(tuple(sorted(kept, key=lambda answer: (-counts[answer], answer))))


def build_vocabulary(
    folder: StrPath, splits: Sequence[str] = ANNOTATED, *, at_least: int = 9
) -> AnswerVocabulary:
    """The answer vocabulary of the data set: answers that most people gave to >= 9 questions.

    The usual 3129 classes come from counting the normalised `multiple_choice_answer` over train
    AND val together, which is the default here. So val has a say in the classes, though in no
    weight; splits=("train",) keeps it out, and gives fewer classes. Where `normalise_answer`
    departs from the official program, the number can be off by a few.

    Args:
      folder: holds the questions and annotations of the splits.
      splits: "train", "val" or both.
      at_least: how often an answer must occur.

    Returns:
      The vocabulary, the most frequent first. As in the usual 3129, what is left of answers such
      as "a" is a class: the empty text.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: as `read_questions` and `AnswerVocabulary.from_answers`.
    """
    for split in splits:
        _check_split(split, True)
        _check_files(Path(folder), split, True, {})
    found = (record["answer"] for split in splits for record in read_questions(folder, split))
    return AnswerVocabulary.from_answers(found, at_least=at_least)


def _normalised(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str):
        raise TypeError(f"expected a list of answers, got one text: [{answers!r}]")
    return [normalise_answer(answer) for answer in answers]


def _check_split(split: str, answers: bool) -> None:
    check_choice("VQA v2: split", split, SPLITS)
    if answers and split not in ANNOTATED:
        raise ValueError(
            f"VQA v2: the answers of {split!r} are not published; read the questions alone with "
            f"answers=False, or use {' or '.join(ANNOTATED)}"
        )


def _questions_file(folder: Path, split: str) -> Path:
    return folder / f"v2_OpenEnded_mscoco_{_SUBTYPES[split][0]}_questions.json"


def _annotations_file(folder: Path, split: str) -> Path:
    return folder / f"v2_mscoco_{_SUBTYPES[split][0]}_annotations.json"


def _check_files(folder: Path, split: str, answers: bool, folders: dict[Path, str]) -> None:
    files = {_questions_file(folder, split): "questions"}
    if answers:
        files[_annotations_file(folder, split)] = "annotations"
    check_layout(f"VQA v2 {split}", files, folders, _ADVICE)


def _check_subtype(document: Record, path: Path, split: str) -> None:
    expected, found = _SUBTYPES[split][0], document.get("data_subtype")
    if found != expected:
        raise ValueError(
            f"{path}: 'data_subtype' is {found!r:.60}; expected {expected!r}. Put the "
            f"file of the split {split!r} there"
        )


def _read_questions(path: Path, split: str) -> dict[int, Record]:
    document = read_annotations(path, "VQA questions")
    _check_subtype(document, path, split)
    images = _SUBTYPES[split][1]
    seen: dict[int, int] = {}
    records = {}
    for place, question in places(document, "questions", path):
        number = new_id(question, "question_id", place, seen)
        image = field(question, "image_id", int, place)
        text = field(question, "question", str, place).strip()
        if not text or image < 0:
            name, value = ("image_id", image) if text else ("question", text)
            raise ValueError(
                f"{place}: {name!r} is {value!r}; expected a question about an image. Correct "
                f"{path.name}, or download it again"
            )
        file = f"{images}/COCO_{images}_{image:012d}.jpg"
        records[number] = {"id": number, "file": file, "image_id": image, "question": text}
    if not records:
        raise ValueError(f"{path} has no questions; expected a whole copy, download it again")
    return records


def _read_annotations(
    path: Path, split: str, records: dict[int, Record], asked: Path
) -> dict[int, Record]:
    document = read_annotations(path, "VQA annotations")
    _check_subtype(document, path, split)
    seen: dict[int, int] = {}
    annotations = {}
    both = f"expected {path.name} and {asked.name} to be of one version of the data set"
    for place, annotation in places(document, "annotations", path):
        number = new_id(annotation, "question_id", place, seen)
        image = field(annotation, "image_id", int, place)
        if number not in records:
            raise ValueError(
                f"{place}: 'question_id' is {number}, which is not among the {len(records)} of "
                f"{asked.name}; {both}, download both again"
            )
        if image != records[number]["image_id"]:
            raise ValueError(
                f"{place}: 'image_id' is {image}, and {asked.name} asks question {number} about "
                f"image {records[number]['image_id']}; {both}, download both again"
            )
        given = field(annotation, "answers", list, place)
        prefix = f"{place.name}[{place.number}]."
        answers = tuple(
            field(answer, "answer", str, where)
            for where, answer in places(annotation, "answers", path, prefix)
        )
        if len(given) != ANSWERS:
            raise ValueError(
                f"{place} has {len(given)} answers; expected {ANSWERS}. Correct {path.name}, or "
                "download it again"
            )
        annotations[number] = {
            "question_type": field(annotation, "question_type", str, place),
            "answer_type": field(annotation, "answer_type", str, place),
            "answer": field(annotation, "multiple_choice_answer", str, place),
            "answers": answers,
        }
    silent = [number for number in records if number not in annotations]
    if silent:
        raise ValueError(
            f"{path} has annotations for {len(annotations)} of the {len(records)} questions of "
            f"{asked.name}, and none for question {', '.join(map(str, silent[:3]))}; {both}, "
            "download both again"
        )
    return annotations
