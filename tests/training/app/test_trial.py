"""Answers of one model that several people ask for other fusion: each gets its own, and the model stays as it was."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from fambav_training.app import trial as fusion_trial
from fambav_training.app.trial import FusionTrial
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.fusion.settings import set_fusion
from support.helpers import noise, save_classifier

SETTINGS = [("none", 1), ("all", 3), ("interleaved", 8), ("lower", 2), ("upper", 5)]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(fusion_trial, "_TIMED_SECONDS", 0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model"), num_labels=4)


@pytest.fixture
def trial(model_folder):
    return FusionTrial(*load_classifier(str(model_folder), {}))


@torch.no_grad()
def probabilities_of(model_folder, image, fusion) -> dict[str, float]:
    """The classes as a user of transformers gets them."""
    model, processor = load_classifier(str(model_folder), fusion)
    outputs = model.eval()(**processor(image.convert("RGB"), return_tensors="pt"))
    return {model.config.id2label[index]: value for index, value in enumerate(outputs.logits[0].softmax(0).tolist())}


@pytest.mark.parametrize("strategy, tokens", SETTINGS)
def test_an_answer_is_that_of_the_model(trial, model_folder, strategy, tokens):
    image = noise(width=16, height=16)
    answer = trial.answer(image, strategy, tokens)
    fusion = {"fusion_strategy": strategy, "fusion_tokens": tokens}
    assert answer.probabilities == pytest.approx(probabilities_of(model_folder, image, fusion), abs=1e-6)
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    patches = [len(np.unique(tokens)) for tokens in answer.trace.tokens]
    assert [count + 1 for count in patches] == answer.config.sequence_lengths
    assert answer.speedup is None
    speedup = trial.speedup(strategy, tokens)
    assert speedup.seconds > 0 and speedup.times > 0
    assert trial.answer(image, strategy, tokens).speedup == speedup


def test_an_answer_leaves_no_fusion_behind(model_folder):
    model, processor = load_classifier(str(model_folder), {})
    trial, before = FusionTrial(model, processor), model.config.to_dict()
    trial.answer(noise(), "all", 4)
    trial.speedup("all", 4)
    for ask in (lambda: trial.answer(noise(), "all", 0), lambda: trial.speedup("all", 0)):
        with pytest.raises(StrictDataclassError, match="fusion_tokens=0"):
            ask()
    assert model.config.to_dict() == before == trial.config.to_dict()


def test_threads_get_the_answers_to_their_own_questions(trial):
    questions = [(noise(seed=seed), *setting) for seed, setting in enumerate(SETTINGS)]
    expected = [trial.answer(*question) for question in questions]
    with ThreadPoolExecutor(len(questions)) as threads:
        answers = list(threads.map(lambda question: trial.answer(*question), 3 * questions))
    for ours, theirs in zip(answers, 3 * expected):
        assert ours.probabilities == theirs.probabilities
        assert ours.config.sequence_lengths == theirs.config.sequence_lengths
        np.testing.assert_array_equal(ours.trace.tokens, theirs.trace.tokens)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (3, 900)], ids=str)
def test_images_of_any_mode_and_size(trial, mode, size):
    image = noise(width=size[0], height=size[1]).convert("L" if mode == "I;16" else "RGB").convert(mode)
    assert trial.answer(image, "upper", 2).trace.pixels.shape == (16, 16, 3)


def test_the_models_own_strategy_keeps_its_layers(model_folder):
    own = {"fusion_strategy": "all", "fusion_tokens": 2, "fusion_start_layer": 1}
    trial = FusionTrial(*load_classifier(str(model_folder), own))
    assert trial.answer(noise(), "all", 3).config.sequence_lengths == [17, 14, 11]
    assert trial.answer(noise(), "lower", 3).config.sequence_lengths == [14, 11, 11]


def test_a_schedule_is_a_strategy_of_the_model_that_has_one(trial, model_folder):
    assert trial.strategies == ["none", "all", "interleaved", "lower", "upper"]
    model, processor = load_classifier(str(model_folder), {})
    set_fusion(model.config, {"fusion_strategy": "custom", "fusion_schedule": [1, 0, 4]})
    trial = FusionTrial(model, processor)
    assert trial.strategies[-1] == "custom"
    assert trial.answer(noise(), "custom", 7).config.sequence_lengths == [16, 16, 12]
    assert trial.answer(noise(), "all", 7).config.sequence_lengths == [10, 6, 4]


def test_most_tokens_are_what_a_layer_can_remove(trial, tmp_path):
    assert trial.most_tokens == 8
    assert trial.answer(noise(), "all", 8).config.tokens_removed[0] == 8
    folder = save_classifier(tmp_path, image_size=4, fusion_strategy="none")
    one_patch = FusionTrial(*load_classifier(str(folder), {}))
    assert one_patch.most_tokens == 0
    with pytest.raises(StrictDataclassError, match="removes no token from the 1 patches"):
        one_patch.answer(noise(), "all", 1)
