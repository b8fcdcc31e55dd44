"""The recipes vqa-v2 and caption-coco, on tiny files in the true formats."""

import json

import numpy as np
import pytest
from flax import nnx

from jaxrel import cli
from jaxrel.models import (
    CLIP,
    CLIPConfig,
    CLIPMapperCaption,
    CLIPMapperVQA,
    Processor,
    TextConfig,
    VisionConfig,
    image_processing,
    word_tokenizer,
)
from jaxrel.train.data import coco, vqa_v2
from jaxrel.train.data.image_texts import ImageTexts
from jaxrel.train.loop.train import train_model
from jaxrel.train.recipes import caption_coco
from jaxrel.train.recipes import vqa_v2 as vqa
from jaxrel.train.recipes.caption_coco import CaptionCoco
from jaxrel.train.recipes.vqa_v2 import VqaV2
from tests.train.folders import Repeated

pytestmark = pytest.mark.recipes

WORDS = ("a", "dog", "is", "it", "no", "red", "runs", "what")
SMALL = {
    "steps": 2,
    "batch": 8,
    "learning_rate": 1e-2,
    "warmup": 1,
    "width": 8,
    "layers": 1,
    "heads": 2,
    "mlp_width": 8,
    "context": 8,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    config = CLIPConfig(
        vision=VisionConfig(8, 1, 2, 8, image_size=16, patch_size=8),
        text=TextConfig(8, 1, 2, 8, vocab_size=12, context=8, eos_token_id=3),
        projection=4,
    )
    processor = Processor(word_tokenizer(WORDS, 8), image_processing(16))
    folder = tmp_path_factory.mktemp("stage1") / "clip"
    CLIP(config, rngs=nnx.Rngs(0), processor=processor).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def enough(monkeypatch):
    """Eight devices want eight examples, and the tiny files have three."""
    for recipe in (vqa, caption_coco):
        monkeypatch.setattr(
            recipe,
            "train_model",
            lambda recipe, folder, parts, loss, source, **more: train_model(
                recipe, folder, parts, loss, Repeated(source), **more
            ),
        )


@pytest.mark.filterwarnings("ignore:this model does not know:UserWarning")
def test_vqa_v2(vqa_folder, stage1, enough, tmp_path, capsys):
    recipe = VqaV2(
        data=str(vqa_folder), stage1=stage1, split="val", counted="val", at_least=1, **SMALL
    )
    model = vqa.train(recipe, tmp_path / "model")
    assert isinstance(model, CLIPMapperVQA)
    assert model.config.several
    assert set(model.config.answers) == {"cat", "dog", "yes"}
    log = [json.loads(line) for line in (tmp_path / "model/train.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    # The command line prints what evaluate returns.
    arguments = ["--model", str(tmp_path / "model"), "--data", str(vqa_folder), "--split", "val"]
    assert cli.main(["evaluate", "vqa-v2", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["questions"], found["split"]) == (3, "val")
    assert set(found["accuracy"]) == {"all", "other"}


@pytest.mark.filterwarnings("ignore:this model does not know:UserWarning")
def test_vqa_v2_examples(vqa_folder, stage1):
    source = vqa_v2.questions(vqa_folder, "val")
    vocabulary = vqa_v2.build_vocabulary(vqa_folder, ("val",), at_least=1)
    processor = CLIP.from_pretrained(stage1).processor
    example = vqa.Questions(source, processor, 8, vocabulary)[0]
    assert example["image"].shape == (16, 16, 3)
    assert example["text"].shape == (8,)
    scores = dict(zip(vocabulary.answers, example["target"], strict=True))
    assert scores == {"dog": 1, "cat": 0, "yes": 0}


@pytest.mark.filterwarnings("ignore:this model does not know:UserWarning")
def test_caption_coco(coco_folder, stage1, enough, tmp_path):
    recipe = CaptionCoco(data=str(coco_folder), stage1=stage1, **SMALL)
    model = caption_coco.train(recipe, tmp_path / "model")
    assert isinstance(model, CLIPMapperCaption)
    found = caption_coco.evaluate(model, data=str(coco_folder), scenes=4, batch=2)
    assert found["images"] == 1
    assert np.isfinite(found["CIDEr-D"]["mean"])


def test_captions_that_are_too_long_are_left_out_with_a_warning(coco_folder, stage1):
    source = coco.karpathy_captions(coco_folder, "train+restval")
    texts = [record["captions"] for record in source.records]
    processor = CLIP.from_pretrained(stage1).processor
    # "A dog, no 0." has seven tokens with its punctuation, start and end; "It runs." has five.
    with pytest.warns(UserWarning, match="2 of 4 captions have more than 6 tokens"):
        captions = ImageTexts(source, texts, processor, 6)
    assert len(captions) == 2


def test_bad_settings(tmp_path, stage1):
    with pytest.raises(ValueError, match="name the folder of the data set with --data"):
        VqaV2()
    with pytest.raises(ValueError, match="missing must be one of error, skip, got 'ask'"):
        CaptionCoco(data="x", missing="ask")
    with pytest.raises(FileNotFoundError, match="VQA v2"):
        vqa.train(VqaV2(data=str(tmp_path), stage1=stage1), tmp_path / "new")
    assert not (tmp_path / "new").exists()
