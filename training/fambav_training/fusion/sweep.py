"""Accuracy and speed of one trained model under many fusions: which to measure, the rows, and the report."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fambav_training.files import atomic_file
from fambav_training.fusion.multiply_adds import multiply_adds
from fambav_training.fusion.settings import STRATEGIES, UNFUSED, fused, with_fusion
from fambav_training.fusion.targets import fusion_for_share, most_tokens
from fambav_training.markdown import markdown_table
from fambav_training.plots import plot_to
from modeling_fambav import FambaVConfig

# What the paper's budgets remove: 168 or 171 of 197 tokens
_LARGEST_SHARE = 0.85
_NUMBERS = 4
# How tokens are matched, averaged, ordered and scanned: fields of which each value suits any strategy
_VARIED = {
    "fusion_metric": ("cosine", "dot", "euclidean"),
    "fusion_reduction": ("mean", "size_weighted"),
    "fusion_order": ("raster", "appended"),
    "fusion_scale_time_step": (False, True),
}
# A token that weighs what it stands for, in the average and in the scan
_SIZE_AWARE = {"fusion_reduction": "size_weighted", "fusion_scale_time_step": True}


class Setting(NamedTuple):
    """A fusion to measure.

    Attributes:
        strategy: by which its rows belong together; that of a custom schedule is the one whose layers it fuses.
        fusion: fusion fields of `FambaVConfig`.
    """

    strategy: str
    fusion: dict[str, Any]


def default_tokens(config: FambaVConfig, strategy: str) -> list[int]:
    """A few numbers of tokens per layer, evenly spaced up to the one that removes nearest to 85 % of the tokens."""

    def distance(tokens: int) -> float:
        removed = with_fusion(config, {"fusion_strategy": strategy, "fusion_tokens": tokens}).tokens_removed
        return abs(sum(removed) - _LARGEST_SHARE * (config.num_patches + 1))

    largest = min(range(1, most_tokens(config) + 1), key=distance)
    return sorted({max(1, round(largest * place / _NUMBERS)) for place in range(1, _NUMBERS + 1)})


def sweep_settings(
    config: FambaVConfig,
    strategies: Sequence[str],
    tokens: Sequence[int] | None = None,
    saved: Sequence[float] | None = None,
    orders: Sequence[str] | None = None,
) -> list[Setting]:
    """What to measure: no fusion, and then every strategy with every amount and in every order.

    Args:
        config: configuration of the model; stays as it is.
        strategies: of `settings.STRATEGIES`; what is named twice counts once, here and in the others.
        tokens: tokens removed per fused layer; `default_tokens` of each strategy if both this and `saved` are None.
        saved: instead of `tokens`, shares of the multiply-adds to save.
        orders: values of `fusion_order`; the model's own if None.

    Raises:
        ValueError, StrictDataclassError: if the model cannot have one of them, before anything is measured.
    """

    def amounts(strategy: str) -> list[dict[str, Any]]:
        if saved is not None:
            return [_fusion_that_saves(config, share, strategy) for share in sorted(set(saved))]
        numbers = default_tokens(config, strategy) if tokens is None else sorted(set(tokens))
        return [{"fusion_strategy": strategy, "fusion_tokens": number} for number in numbers]

    settings = [Setting("none", UNFUSED)]
    for order in dict.fromkeys(orders or [None]):
        change = {} if order is None else {"fusion_order": order}
        for strategy in dict.fromkeys(strategies):
            settings += [Setting(strategy, {**fusion, **change}) for fusion in amounts(strategy)]
    for setting in settings:
        with_fusion(config, setting.fusion)
    return settings


def _fusion_that_saves(config: FambaVConfig, share: float, strategy: str) -> dict[str, Any]:
    """Fusion that saves this share of the multiply-adds; raises ValueError if the strategy saves less."""
    try:
        return fusion_for_share(config, 1 - share, strategy, of="multiply-adds")
    except ValueError as error:
        raise ValueError(f"--sweep_saved {share}: {error}") from None


def ablation_settings(config: FambaVConfig) -> list[Setting]:
    """What to measure: no fusion, that of the model, and this with one field changed at a time.

    Weighing tokens by their size in the average and in the scan belong together and are also changed together.

    Raises:
        ValueError: if the model does not fuse.
    """
    if config.fusion_strategy == "none":
        raise ValueError("--ablate: expected a fusion to vary, give --fusion_strategy and --fusion_tokens")
    changes = [{name: value} for name, values in _VARIED.items() for value in values if value != getattr(config, name)]
    if all(change in changes for change in ({name: value} for name, value in _SIZE_AWARE.items())):
        changes.append(_SIZE_AWARE)
    return [Setting("none", UNFUSED), *(Setting(config.fusion_strategy, change) for change in [{}, *changes])]


def sweep(
    config: FambaVConfig, settings: list[Setting], measure: Callable[[], dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """Measure one setting after another.

    Args:
        config: configuration of the model that is measured; after every row it is what it was.
        settings: see `sweep_settings` and `ablation_settings`.
        measure: top1, top5 (percent), images_per_second and speedup of the model as it is configured when called.

    Yields:
        a row with the fusion, what was measured, multiply-adds of an image, the tokens that each layer removes and
        scans, the mean number scanned, and the tokens left at the end.
    """
    for strategy, fusion in settings:
        with fused(config, fusion):
            lengths = config.sequence_lengths
            row = {
                "strategy": strategy,
                "tokens": config.fusion_tokens if config.fusion_strategy in STRATEGIES else None,
                "changes": {name: value for name, value in fusion.items() if name in _VARIED},
                **measure(),
                "multiply_adds": multiply_adds(config),
                "tokens_removed": config.tokens_removed,
                "mean_tokens": statistics.mean(lengths),
                "tokens_left": lengths[-1],
                "sequence_lengths": lengths,
            }
        yield row


def markdown(report: dict[str, Any]) -> str:
    """The report for people; of one that is not complete, the rows so far."""
    rows = report["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = [
        f"## {report['model']}: accuracy and speed by fusion\n",
        f"{rows[0]['validation_images']} images of {report['arguments']['dataset_name']}; images/s of the forward "
        f"pass, warm, at batch size {report['batch_size']}; times as fast as without fusion, measured in turn with "
        f"it. Measured on {report['device']}, scan backend {report['scan_backend']}; {versions}; commit "
        f"{report['git_commit']}.\n",
    ]
    if len(rows) < report["settings"]:
        text.append(f"**{len(rows)} of {report['settings']} rows are measured.**\n")
    return "\n".join([*text, markdown_table([_table_row(row) for row in rows]), ""])


def _table_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "fusion": ", ".join((row["strategy"], *_changes(row))),
        "r": _removed(row),
        "top-1, %": f"{row['top1']:.2f}",
        "top-5, %": f"{row['top5']:.2f}",
        "multiply-adds, M": f"{row['multiply_adds'] / 1e6:.1f}",
        "images/s": f"{row['images_per_second']:.0f}",
        "times as fast": "" if row["strategy"] == "none" else f"{row['speedup']:.2f}",
        "tokens per layer": f"{row['mean_tokens']:.1f}",
        "tokens left": f"{row['tokens_left']}",
    }


def _removed(row: dict[str, Any]) -> str:
    """Tokens per fused layer, or those of every layer where they differ."""
    if row["tokens"] is not None:
        return f"{row['tokens']}"
    return " ".join(map(str, row["tokens_removed"])) if any(row["tokens_removed"]) else ""


def _changes(row: dict[str, Any]) -> list[str]:
    return [f"{name.removeprefix('fusion_')}={value}" for name, value in row["changes"].items()]


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy against multiply-adds and against speed, a line per strategy and order that begins without fusion.

    Numbers are tokens per fused layer. An ablation has no lines: its points differ in kind, not in number.
    """
    unfused, *rows = report["rows"]
    is_ablation = any(row["changes"].keys() - {"fusion_order"} for row in rows)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join((row["strategy"], *_changes(row))), []).append(row)
    # The speedups are measured in turn with the model without fusion, which images/s of a busy machine are not
    measures = {"multiply-adds of an image, M": ("multiply_adds", 1e-6), "times as fast": ("speedup", 1)}
    colors = {strategy: f"C{place}" for place, strategy in enumerate(dict.fromkeys(row["strategy"] for row in rows))}
    with plot_to(path, 12, 4.2, columns=len(measures)) as axes:
        for axis, (label, (name, factor)) in zip(axes, measures.items()):

            def point(row: dict[str, Any], name: str = name, factor: float = factor) -> tuple[float, float]:
                return factor * row[name], row["top1"]

            for title, line in lines.items():
                # The published order keeps the colour of its strategy
                style = "o" if is_ablation else "o--" if "appended" in line[0]["changes"].values() else "o-"
                points = [*map(point, line)] if is_ablation else [point(unfused), *map(point, line)]
                axis.plot(*zip(*points), style, color=colors[line[0]["strategy"]], markersize=4, label=title)
                for row in line:
                    note = title if is_ablation else f"{row['tokens'] or ''}"
                    axis.annotate(note, point(row), xytext=(4, 4), textcoords="offset points", fontsize=7)
            axis.plot(*point(unfused), "o", color="tab:gray", label="none", zorder=3)
            axis.set(xlabel=label, ylabel="top-1, %")
        axes[0].set(title=report["model"])
        if not is_ablation:
            axes[0].legend(fontsize=8)


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report to a JSON file, and for people to .md and .png beside it.

    Each file is replaced as a whole, so that a run may be stopped at any moment and leaves what it measured.
    """
    with atomic_file(path) as new:
        new.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    with atomic_file(path.with_suffix(".md")) as new:
        new.write_text(markdown(report))
    with atomic_file(path.with_suffix(".png")) as new:
        plot(report, new)
