"""Pictures of token fusion from the command line: their files, images of any kind, and clear errors."""

import sys

import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import visualize_fusion
from fambav_training.data.image_file import read_image
from support.helpers import noise, save_classifier


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model"))


def run(monkeypatch, folder, *words) -> list[str]:
    """Run the command line; the names of the files that it wrote."""
    monkeypatch.setattr(sys, "argv", ["visualize_fusion.py", *map(str, words), "--output_dir", str(folder)])
    visualize_fusion.main()
    return sorted(file.name for file in folder.iterdir())


def test_one_image(model_folder, monkeypatch, tmp_path, capsys):
    noise(width=40, height=30).save(tmp_path / "photo.png")
    files = run(monkeypatch, tmp_path / "out", model_folder, tmp_path / "photo.png")
    assert files == ["photo_fusion.png", "photo_similarity.png"]
    for name in files:
        assert min(Image.open(tmp_path / "out" / name).size) > 200
    assert "photo_fusion.png" in capsys.readouterr().out


def test_images_of_any_mode_and_size(monkeypatch, tmp_path):
    folder = save_classifier(tmp_path / "model", image_size=(8, 24))
    shapes = {"L": (5, 50), "1": (9, 9), "P": (1, 1), "RGBA": (64, 16), "CMYK": (30, 20), "I;16": (8, 8)}
    names = [f"{index}.{'jpg' if mode == 'CMYK' else 'png'}" for index, mode in enumerate(shapes)]
    for name, (mode, (width, height)) in zip(names, shapes.items()):
        noise(mode, width, height).save(tmp_path / name)
    files = run(monkeypatch, tmp_path / "out", folder, *(tmp_path / name for name in names))
    assert len(files) == 2 * len(names)
    sizes = {Image.open(tmp_path / "out" / name).size for name in files if name.endswith("_fusion.png")}
    assert len(sizes) == 1


def test_a_rotated_photo_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise(width=40, height=30).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (30, 40)


def test_an_animation_has_a_frame_per_layer(model_folder, monkeypatch, tmp_path):
    noise().save(tmp_path / "a.png")
    words = [model_folder, tmp_path / "a.png", "--gif", "--layers", 3, 1, "--fusion_strategy", "all"]
    assert "a_fusion.gif" in run(monkeypatch, tmp_path / "out", *words)
    with Image.open(tmp_path / "out" / "a_fusion.gif") as animation:
        assert animation.n_frames == 2 and animation.width > 400


def test_without_fusion_there_is_a_tile_and_a_sentence(model_folder, monkeypatch, tmp_path, capsys):
    noise().save(tmp_path / "a.png")
    words = [model_folder, tmp_path / "a.png", "--fusion_strategy", "none", "--gif"]
    assert len(run(monkeypatch, tmp_path / "out", *words)) == 3
    assert "No layer fuses: all 3 scan 17 tokens." in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "a_fusion.gif") as animation:
        assert animation.n_frames == 1


def test_another_model_is_refused(monkeypatch, tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    noise().save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "out", tmp_path / "vit", tmp_path / "a.png")
    assert "'vit'" in end.value.code and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["missing.png"], "missing.png: no such image"),
        (["text.png"], "text.png: this image cannot be read"),
        (["cut.png"], "cut.png: this image cannot be read"),
        (["a.png", "a.jpg"], "a.jpg: its pictures would replace those of"),
        (["a.png", "--layers", "4"], "--layers 4: expected numbers from 1 to 3"),
        (["a.png", "--layers", "0"], "--layers 0: expected numbers from 1 to 3"),
        (["a.png", "--fusion_tokens", "0"], "fusion_tokens=0"),
    ],
    ids=str,
)
def test_errors_are_one_line(model_folder, monkeypatch, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    noise().save("a.png")
    noise().save("a.jpg")
    (tmp_path / "text.png").write_text("no image")
    noise(width=64, height=64).save("whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "out", model_folder, *words)
    assert end.value.code.startswith("error: ") and expected in end.value.code
    assert not (tmp_path / "out").exists()
