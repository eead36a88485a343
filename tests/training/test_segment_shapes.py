"""The segmentation example at a small scale: drawn labels, the spread tokens, and unmerging wins."""

import sys

import pytest
import torch

from segment_shapes import CLASSES, compare, draw_shapes, main, parse_arguments, spread_over_grid, table


def test_shapes_are_where_their_labels_say():
    pixels, labels = draw_shapes(200, image_size=32, seed=3)
    assert pixels.shape == (200, 3, 32, 32) and labels.shape == (200, 32, 32)
    assert set(labels.unique().tolist()) == set(range(len(CLASSES)))
    assert (labels.flatten(1) > 0).any(1).float().mean() > 0.9
    strength = pixels.abs().mean(1)
    assert strength[labels == 0].mean() < 0.3 and strength[labels > 0].mean() > 0.7
    again, _ = draw_shapes(200, image_size=32, seed=3)
    assert torch.equal(again, pixels)
    assert not torch.equal(draw_shapes(200, image_size=32, seed=4)[0], pixels)


def test_tokens_are_spread_evenly():
    tokens = torch.arange(3.0).view(1, 3, 1)
    assert spread_over_grid(tokens, (2, 3)).tolist() == [[[[0, 0, 1], [1, 2, 2]]]]


def test_the_command_prints_a_row_for_every_way(monkeypatch, capsys):
    scale = ["--steps=2", "--num_images=16", "--image_size=16", "--batch_size=8", "--fusion_tokens=2"]
    monkeypatch.setattr(sys, "argv", ["segment_shapes.py", *scale])
    main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and sum("17 15 13 11" in row for row in rows) == 2


@pytest.mark.slow
def test_unmerging_wins():
    scale = ["--steps=60", "--num_images=256", "--image_size=32", "--batch_size=16", "--fusion_tokens=10"]
    results = compare(parse_arguments(scale))
    assert results["fusion, unmerged"].sequence_lengths == [65, 55, 45, 35]
    assert results["fusion, unmerged"].mean_iou > results["fusion, spread"].mean_iou + 5
    assert len(table(results).splitlines()) == 5
