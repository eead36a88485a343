"""A sweep over fusion: what is measured, the rows, and a report that is whole after every one of them."""

import json
import re
from contextlib import contextmanager

import pytest
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from fambav_training.fusion.multiply_adds import multiply_add_share, multiply_adds
from fambav_training.fusion.settings import STRATEGIES, with_fusion
from fambav_training.fusion.sweep import (
    Setting,
    ablation_settings,
    default_tokens,
    markdown,
    plot,
    sweep,
    sweep_settings,
    write_report,
)
from fambav_training.plots import plot_to
from modeling_fambav import FambaVConfig
from support.helpers import tiny_config


@pytest.mark.parametrize("strategy, largest", [("all", 7), ("interleaved", 14), ("lower", 9), ("upper", 9)])
def test_default_numbers_end_at_the_papers_budget(strategy, largest):
    numbers = default_tokens(FambaVConfig(), strategy)
    assert numbers[-1] == largest and len(numbers) == 4 and numbers == sorted(set(numbers))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("image_size", [8, 12, 16])
def test_default_numbers_fit_small_models(strategy, image_size):
    numbers = default_tokens(tiny_config(image_size=image_size), strategy)
    assert 1 <= len(numbers) <= 4 and min(numbers) >= 1


def test_settings_begin_without_fusion():
    config = tiny_config(fusion_strategy="custom", fusion_schedule=[0, 3, 3])
    assert sweep_settings(config, ["upper", "all", "upper"], [3, 1, 3]) == [
        ("none", {"fusion_strategy": "none"}),
        ("upper", {"fusion_strategy": "upper", "fusion_tokens": 1}),
        ("upper", {"fusion_strategy": "upper", "fusion_tokens": 3}),
        ("all", {"fusion_strategy": "all", "fusion_tokens": 1}),
        ("all", {"fusion_strategy": "all", "fusion_tokens": 3}),
    ]
    assert config.fusion_strategy == "custom"


def test_settings_by_what_they_save_and_in_both_orders():
    config = FambaVConfig()
    unfused, *settings = sweep_settings(config, ["upper", "all"], saved=[0.3, 0.1], orders=["raster", "appended"])
    assert unfused == ("none", {"fusion_strategy": "none"})
    assert [(setting.strategy, setting.fusion["fusion_order"]) for setting in settings] == [
        *2 * [("upper", "raster")],
        *2 * [("all", "raster")],
        *2 * [("upper", "appended")],
        *2 * [("all", "appended")],
    ]
    for setting, share in zip(settings, 4 * (0.9, 0.7)):
        assert multiply_add_share(with_fusion(config, setting.fusion)) == pytest.approx(share, abs=0.01)


def test_more_than_a_strategy_can_save_is_refused_with_what_it_can():
    expected = r"--sweep_saved 0\.9: share of the multiply-adds 0\.1: 'upper' fusion .* leaves at least (0\.\d{3})"
    with pytest.raises(ValueError, match=expected) as refused:
        sweep_settings(FambaVConfig(), ["upper"], saved=[0.3, 0.9])
    most = 1 - float(re.search(expected, str(refused.value))[1])
    assert len(sweep_settings(FambaVConfig(), ["upper"], saved=[most])) == 2


def test_a_wrong_setting_is_refused_before_anything_is_measured():
    with pytest.raises(StrictDataclassError, match="fusion_tokens=0"):
        sweep_settings(tiny_config(), ["upper"], [2, 0])


def measure_by(config: FambaVConfig):
    """Stands for scores and speed: the more tokens, the better and the slower."""

    def measure() -> dict[str, float]:
        total = sum(config.sequence_lengths)
        return {
            "top1": float(total),
            "top5": 99.5,
            "images_per_second": 5100 / total,
            "speedup": 51 / total,
            "validation_images": 40,
        }

    return measure


def test_rows_are_those_of_the_fusion():
    config = tiny_config(fusion_strategy="lower")
    before = config.to_dict()
    settings = sweep_settings(config, ["upper", "all"], [2])
    rows = []
    for row in sweep(config, settings, measure_by(config)):
        assert config.to_dict() == before
        rows.append(row)
    assert [row["sequence_lengths"] for row in rows] == [[17, 17, 17], [17, 15, 13], [15, 13, 11]]
    assert rows[1] == {
        "strategy": "upper",
        "tokens": 2,
        "changes": {},
        "top1": 45.0,
        "top5": 99.5,
        "images_per_second": pytest.approx(5100 / 45),
        "speedup": pytest.approx(51 / 45),
        "validation_images": 40,
        "multiply_adds": multiply_adds(tiny_config(fusion_strategy="upper", fusion_tokens=2)),
        "tokens_removed": [0, 2, 2],
        "mean_tokens": 15,
        "tokens_left": 13,
        "sequence_lengths": [17, 15, 13],
    }
    assert rows[0]["tokens"] is None


def test_ablation_changes_one_field_at_a_time_and_sizes_together():
    config = tiny_config(fusion_strategy="upper", fusion_tokens=2)
    settings = ablation_settings(config)
    assert [setting.strategy for setting in settings] == ["none", *7 * ["upper"]]
    assert [setting.fusion for setting in settings] == [
        {"fusion_strategy": "none"},
        {},
        {"fusion_metric": "dot"},
        {"fusion_metric": "euclidean"},
        {"fusion_reduction": "size_weighted"},
        {"fusion_order": "appended"},
        {"fusion_scale_time_step": True},
        {"fusion_reduction": "size_weighted", "fusion_scale_time_step": True},
    ]
    rows = list(sweep(config, settings, measure_by(config)))
    assert [row["strategy"] for row in rows] == ["none", *7 * ["upper"]]
    assert {tuple(row["sequence_lengths"]) for row in rows[1:]} == {(17, 15, 13)}
    assert rows[3]["changes"] == {"fusion_metric": "euclidean"} and rows[1]["changes"] == {}
    text = markdown({**make_report(1), "rows": rows})
    assert (
        "| upper, order=appended " in text and "| upper, reduction=size_weighted, scale_time_step=True | 2 |" in text
    )


def test_ablation_starts_from_the_fusion_of_the_model():
    config = tiny_config(fusion_strategy="custom", fusion_schedule=[0, 3, 3], fusion_order="appended")
    config.fusion_scale_time_step = True
    changes = [setting.fusion for setting in ablation_settings(config)[2:]]
    assert {"fusion_order": "raster"} in changes and {"fusion_scale_time_step": False} in changes
    assert all(len(change) == 1 for change in changes)
    with pytest.raises(ValueError, match="--ablate: expected a fusion to vary"):
        ablation_settings(tiny_config(fusion_strategy="none"))


def make_report(num_rows: int) -> dict:
    """The report after some rows of three."""
    config = tiny_config()
    settings = sweep_settings(config, ["upper"], [2, 4])
    rows = list(sweep(config, settings[:num_rows], measure_by(config)))
    return {
        "model": "outputs/some model",
        "batch_size": 16,
        "settings": len(settings),
        "arguments": {"dataset_name": "digits"},
        "device": "cpu: some processor",
        "scan_backend": "numba",
        "versions": {"torch": "2.9"},
        "git_commit": "0123",
        "rows": rows,
    }


def test_markdown_has_a_line_per_row():
    report = make_report(3)
    text = markdown(report)
    work = [f"{row['multiply_adds'] / 1e6:.1f}" for row in report["rows"]]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    names = "fusion, r, top-1 %, top-5 %, multiply-adds M, images/s, times as fast, tokens per layer, tokens left"
    assert [name.replace(",", "") for name in lines[0]] == names.split(", ")
    assert lines[2] == ["none", "", "51.00", "99.50", work[0], "100", "", "17.0", "17"]
    assert lines[4] == ["upper", "4", "39.00", "99.50", work[2], "131", "1.31", "13.0", "9"]
    assert "40 images of digits" in text and "batch size 16" in text
    assert "rows are measured" not in text


def test_a_custom_schedule_stands_in_its_strategys_rows():
    config = tiny_config()
    settings = [Setting("none", {"fusion_strategy": "none"})]
    settings.append(Setting("all", {"fusion_strategy": "custom", "fusion_schedule": [2, 1, 1]}))
    rows = list(sweep(config, settings, measure_by(config)))
    assert rows[1]["strategy"] == "all" and rows[1]["tokens"] is None
    assert "| all    | 2 1 1 |" in markdown({**make_report(1), "rows": rows})


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_report_is_whole_after_every_row(tmp_path, num_rows):
    report = make_report(num_rows)
    write_report(report, tmp_path / "sweep.json")
    assert json.loads((tmp_path / "sweep.json").read_text()) == report
    text = (tmp_path / "sweep.md").read_text()
    assert text == markdown(report)
    assert (f"**{num_rows} of 3 rows are measured.**" in text) == (num_rows < 3)
    with Image.open(tmp_path / "sweep.png") as plot:
        plot.verify()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sweep.json", "sweep.md", "sweep.png"]


def test_the_published_order_is_dashed_in_the_colour_of_its_strategy(tmp_path, monkeypatch):
    drawn = []

    @contextmanager
    def kept(*arguments, **options):
        with plot_to(*arguments, **options) as axes:
            drawn.extend(axes)
            yield axes

    monkeypatch.setattr("fambav_training.fusion.sweep.plot_to", kept)
    config = tiny_config()
    settings = sweep_settings(config, ["upper", "all"], [2, 4], orders=["raster", "appended"])
    plot({**make_report(1), "rows": list(sweep(config, settings, measure_by(config)))}, tmp_path / "sweep.png")
    for axis in drawn:
        assert {line.get_label(): (line.get_linestyle(), line.get_color()) for line in axis.lines[:-1]} == {
            "upper, order=raster": ("-", "C0"),
            "all, order=raster": ("-", "C1"),
            "upper, order=appended": ("--", "C0"),
            "all, order=appended": ("--", "C1"),
        }


def test_an_error_while_writing_leaves_the_report_before_it(tmp_path, monkeypatch):
    write_report(make_report(1), tmp_path / "sweep.json")
    before = (tmp_path / "sweep.json").read_text()
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(make_report(2), tmp_path / "sweep.json")
    assert (tmp_path / "sweep.json").read_text() == before
