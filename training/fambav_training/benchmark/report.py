"""Tables, sentences and the picture of what the benchmark has measured."""

import math
from collections.abc import Iterable
from pathlib import Path

from fambav_training.benchmark.cases import Case
from fambav_training.markdown import markdown_table
from fambav_training.plots import plot_to


def table(records: list[dict]) -> str:
    """One table. Ratios are to the first row; the limit is what the number of tokens alone would allow."""
    first = records[0]
    unfused = next((r for r in records if r["family"] == "famba-v" and r["strategy"] == "none"), None)
    rows = []
    for record in records:
        row = {"model": record["label"], "tokens": f"{record['mean_tokens']:.1f}"}
        for kind, title in (("forward", "forward"), ("step", "training step")):
            if f"{kind}_seconds" in record:
                row[f"{title}, ms"] = f"{1000 * record[f'{kind}_seconds']:.1f}"
                row[f"{title}, images/s"] = f"{record[f'{kind}_images_per_second']:.1f}"
                row[f"{title}, ratio"] = f"{record[f'{kind}_seconds'] / first[f'{kind}_seconds']:.2f}"
        if "step_peak_bytes" in record:
            row["peak memory, MiB"] = f"{record['step_peak_bytes'] / 2**20:.0f}"
        if unfused is not None:
            row["saved of none (forward, step; limit)"] = _savings(record, unfused)
        rows.append(row)
    return markdown_table(rows)


def break_even(records: list[dict]) -> str:
    """The smallest number of removed tokens that is faster than none, of a table over r."""
    unfused = next(record for record in records if record["strategy"] == "none")
    sentences = []
    for kind, title in (("forward", "forward pass"), ("step", "training step")):
        faster = [r["fusion_tokens"] for r in records if r[f"{kind}_seconds"] < unfused[f"{kind}_seconds"]]
        sentences.append(f"{title} from r = {min(faster)}" if faster else f"{title} for none of these")
    return f"Fusion is faster than none: {', '.join(sentences)}."


def _savings(record: dict, unfused: dict) -> str:
    if record["family"] != "famba-v" or record["mean_tokens"] == unfused["mean_tokens"]:
        return ""
    saved = [
        f"{1 - record[name] / unfused[name]:.0%}" for name in ("forward_seconds", "step_seconds") if name in record
    ]
    return f"{', '.join(saved)}; {1 - record['mean_tokens'] / unfused['mean_tokens']:.0%}"


def core_operations_sentence(seconds: dict[str, float]) -> str:
    """One line on a result of `measure_core_operations`."""
    both = seconds["matrix products"] + seconds["scans"]
    return (
        f"Forward pass without fusion {1e3 * seconds['forward']:.1f} ms, its matrix products alone "
        f"{1e3 * seconds['matrix products']:.1f} ms, its scans alone {1e3 * seconds['scans']:.1f} ms: "
        f"{seconds['forward'] / both:.2f} times the sum of the two."
    )


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Time and memory per image against the number of tokens of the image."""
    records = [record for group in results.values() for record in group if record["size"] == "ti"]
    records = [record for record in records if record["dtype"] == records[0]["dtype"]]
    lines = {
        "DeiT-Ti": lambda r: r["family"] == "deit",
        "Famba-V-Ti, no fusion": lambda r: r["family"] == "famba-v" and r["strategy"] == "none",
        "Famba-V-Ti, upper fusion": lambda r: (
            r["strategy"] == "upper" and not (r["fusion_tokens"] or r["fusion_window"])
        ),
    }
    quantities = {
        "forward_seconds": ("forward, ms per image", 1e3),
        "step_seconds": ("training step, ms per image", 1e3),
        "step_peak_bytes": ("training memory, MiB per image", 2**-20),
    }
    with plot_to(path, 13, 4, columns=len(quantities)) as axes:
        for axis, (name, (title, unit)) in zip(axes, quantities.items()):
            for (label, belongs), color in zip(lines.items(), ("tab:blue", "tab:gray", "tab:orange")):
                points = _per_image(filter(belongs, records), name, unit)
                axis.plot(*zip(*sorted(points.items())), "o-", color=color, label=label)
                if label.endswith("no fusion"):
                    limits = {tokens: value * _token_share(tokens) for tokens, value in points.items()}
            limit_label = "limit of upper by its token count"
            axis.plot(*zip(*limits.items()), "_", color="tab:red", markersize=14, label=limit_label)
            axis.set(xscale="log", yscale="log", xlabel="tokens of an image", title=title)
            axis.set_xticks(sorted(points), labels=sorted(points))
            axis.minorticks_off()
        axes[0].legend(fontsize=8)


def _per_image(records: Iterable[dict], name: str, unit: float) -> dict[int, float]:
    """A quantity per image over the tokens of an image; of several batch sizes, the one that needs least."""
    points = {}
    for record in records:
        if name in record and record["backend"] in (None, "triton") and record["compile_mode"] is None:
            tokens = (record["image_size"] // 16) ** 2 + 1
            value = record[name] / record["batch_size"] * unit
            points[tokens] = min(value, points.get(tokens, value))
    return points


def _token_share(num_tokens: int) -> float:
    """Share of the tokens that upper fusion leaves, over all layers."""
    image_size = 16 * math.isqrt(num_tokens - 1)
    return Case("famba-v", strategy="upper", image_size=image_size).mean_tokens() / num_tokens
