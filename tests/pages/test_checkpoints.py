"""What the pages say of the released checkpoints, and of the runs that led to them."""

import re

import pytest
from huggingface_hub import ModelCard

from support.pages import MEASURED, MODEL_CARDS, README, read_json, sentences, tables


def test_the_answer_in_the_readme_is_that_of_the_checkpoint():
    text = README.read_text(encoding="utf-8")
    (folder,) = re.findall(r'^folder = "model_cards/([\w-]+)"$', text, re.MULTILINE)
    (image,) = re.findall(r"examples/([\w.]+)\"", text)
    answers = read_json(folder, "examples", "answers.json")[image]
    shown = "\n".join(f"{answer['label']}: {answer['score']:.1%}" for answer in answers)
    assert f"```\n{shown}\n```" in text


def test_every_checkpoint_in_the_index_is_as_it_was_scored():
    index = tables(MODEL_CARDS)["| folder | data | top-1, % | top-5, % | parameters | trained |"]
    assert {re.match(r"\[([\w-]+)\]", row[0]).group(1) for row in index} == {
        path.parent.name for path in MEASURED.glob("*/model.safetensors")
    }
    for row in index:
        results = read_json(re.match(r"\[([\w-]+)\]", row[0]).group(1), "all_results.json")
        assert row[2:4] == [f"{results['top1']:.2f}", f"{results['top5']:.2f}"]
        assert row[4].startswith(f"{results['num_parameters'] / 1e6:.1f} million")


def test_levers_are_as_they_were_scored():
    runs = read_json("tables", "levers", "levers.json")
    rows = tables(MODEL_CARDS)["| | top-1, % | processor time, s |"]
    assert [row[1:] for row in rows] == [
        [f"{run['top1']:.2f}", f"{run['processor_seconds']:.0f}"] for run in runs.values()
    ]
    text, base = sentences(MODEL_CARDS), runs["base_0"]["top1"]
    gains = [base - runs[f"{name}_0"]["top1"] for name in ("labels", "adamw", "kl", "no_stem")]
    shown = "the teacher is worth {:.1f} points, Muon {:.1f}, standardized logits {:.1f} and the stem {:.1f}"
    assert shown.format(*gains) in text
    middle, temperature = (runs[f"{name}_0"]["top1"] - base for name in ("middle", "temperature_4"))
    assert f"brings {middle:.1f}**, and a temperature of 4 instead of 2 brings {temperature:.1f}" in text
    assert runs["none_0"]["top1"] < base
    assert all(abs(run["ema_top1"] - run["top1"]) < 0.4 for run in runs.values())


def test_levers_with_another_teacher_are_as_they_were_scored():
    runs = {name: f"{run['top1']:.2f}" for name, run in read_json("tables", "levers", "another_teacher.json").items()}
    rows = [["base_0"], ["middle_0", "middle_1"], ["middle_t4_0"], ["mean_0"]]
    shown = tables(MODEL_CARDS)["| with another teacher | top-1, %, seeds 0 and 1 |"]
    assert [row[1] for row in shown] == [", ".join(runs[name] for name in names) for names in rows]


def test_mixing_is_as_it_was_scored():
    alone, mixed = (read_json("tables", "levers", "mixing.json")[name] for name in ("alone", "mixed"))
    differing = {name for name, value in alone["arguments"].items() if value != mixed["arguments"][name]}
    assert differing == {"mixup_alpha", "cutmix_alpha", "output_dir"}
    text = sentences(MODEL_CARDS)
    assert f"{alone['top1']:.2f} % on 10,000 other training images, and {mixed['top1']:.2f} % with" in text


def test_earlier_releases_are_as_they_were_scored():
    text = sentences(MODEL_CARDS)
    runs = {name: read_json("tables", "earlier_release", f"{name}.json") for name in ("first", "second", "third")}
    accuracies, minutes = zip(*((f"{run['top1']:.2f} %", round(run["train_seconds"] / 60)) for run in runs.values()))
    assert f"17 epochs ended with {accuracies[0]} after {minutes[0]} minutes" in text
    assert f"22 more with {accuracies[1]} after {minutes[1]}" in text
    assert f"the same again with {accuracies[2]} after {minutes[2]}" in text
    fourth = read_json("tables", "earlier_release", "fourth.json")
    assert f"ended with {fourth['top1']:.2f} % after {fourth['train_seconds']:.0f} s" in text
    fused, unfused = runs["third"], read_json("tables", "earlier_release", "third_unfused.json")
    saved, cost = 1 - fused["train_seconds"] / unfused["train_seconds"], unfused["top1"] - fused["top1"]
    assert f"{unfused['top1']:.2f} % after {unfused['train_seconds']:.0f} s" in text
    assert f"saved {saved:.0%} of the time".replace("%", " %") in text and f"cost {cost:.1f} point" in text


def test_what_fusion_costs_the_checkpoint_is_what_was_measured():
    fused, unfused = (read_json("fambav-cifar100", f"{name}.json") for name in ("all_results", "without_fusion"))
    differing = {name for name, value in fused["arguments"].items() if value != unfused["arguments"][name]}
    assert differing == {"fusion_strategy", "output_dir"} and fused["git_commit"] == unfused["git_commit"]
    cost, seconds = unfused["top1"] - fused["top1"], [run["processor_seconds"] for run in (fused, unfused)]
    saved = f"{1 - seconds[0] / seconds[1]:.0%}".replace("%", " %")
    tokens = sum(fused["sequence_lengths"]) / sum(unfused["sequence_lengths"])
    for page in (MODEL_CARDS, MEASURED / "fambav-cifar100" / "README.md"):
        text = sentences(page).replace("**", "")
        assert f"ended with {unfused['top1']:.2f} %" in text
        assert f"saved {saved} of the processor time" in text and f"cost {cost:.1f} points" in text
    text = sentences(MODEL_CARDS)
    assert f"{seconds[0]:.0f} instead of {seconds[1]:.0f} s, of {1 - tokens:.0%}".replace("%", " %") in text


@pytest.mark.parametrize("folder", sorted(path.parent for path in MEASURED.glob("*/README.md")), ids=lambda p: p.name)
def test_a_card_names_the_data_that_its_model_was_scored_on(folder):
    card = ModelCard.load(folder / "README.md").data
    (result,) = {(each.dataset_type, each.dataset_split) for each in card.eval_results}
    assert card.datasets == [result[0]] == ["uoft-cs/cifar100"] and result[1] == "test"
