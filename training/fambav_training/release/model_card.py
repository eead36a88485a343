"""Model cards, written from what a run measured and nothing else; `saving.save_release` puts them into folders."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.configuration_utils import PreTrainedConfig

# Beside the card, see run_plot.py
PLOT_FILE = "training.png"
# Stands for the repository, where the model is not published
LOCATION = "PATH_OF_THIS_FOLDER"
TEMPLATE = Path(__file__).parents[3] / "model_cards" / "template.md"


def create_card(config: PreTrainedConfig, results: dict[str, Any]) -> ModelCard:
    """Card of a trained classifier.

    Args:
        config: configuration of the model.
        results: the content of `all_results.json`.
    """
    dataset = results["dataset"]
    name = f"fambav-{Path(dataset).name}-{config.fusion_strategy}"
    prefix = "ema_" if results.get("release_weights") == "average" else ""
    metrics = {"accuracy": results[f"{prefix}top1"], "top-5 accuracy": results[f"{prefix}top5"]}
    # Without a validation split, a part of the training split was set aside and scored
    arguments = results["arguments"]
    scored_split = arguments.get("validation_split") or arguments.get("train_split", "train")
    is_hub_id = dataset.count("/") == 1 and not Path(dataset).exists()
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["fambav", "vision-mamba", "token-fusion", "image-classification"],
        datasets=[dataset] if is_hub_id else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset if is_hub_id else Path(dataset).name,
                dataset_name=Path(dataset).name,
                dataset_split=scored_split,
                metric_type="accuracy",
                metric_name=metric,
                metric_value=round(value, 2),
            )
            for metric, value in metrics.items()
        ],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        dataset=Path(dataset).name,
        config=config,
        fusion=_describe_fusion(config),
        location=results.get("hub_model_id") or LOCATION,
        plot_file=PLOT_FILE,
        train_images=_count(results["train_images"]),
        validation_images=_count(results["validation_images"]),
        memory_mib=round(results["peak_memory_bytes"] / 2**20),
        command=_command(arguments, results["num_processes"]),
        versions=", ".join(f"{package} {version}" for package, version in results["versions"].items()),
        results=results,
    )


def _count(number: int | None) -> str:
    """A number of images; that of a stream is not known."""
    return "all" if number is None else f"{number:,}"


def _describe_fusion(config: PreTrainedConfig) -> str:
    if config.fusion_strategy == "none":
        return "off"
    settings = [f"{config.fusion_metric} similarity", f"{config.fusion_reduction} reduction"]
    settings.append(f"{config.fusion_order} order")
    if config.fusion_window is not None:
        settings.append(f"tokens at most {config.fusion_window} places apart")
    if config.fusion_scale_time_step:
        settings.append("time steps scaled by token size")
    return (
        f"`{config.fusion_strategy}`, {sum(config.tokens_removed)} of {config.num_patches} patch tokens are averaged "
        f"away ({', '.join(settings)})"
    )


def _command(arguments: dict[str, Any], num_processes: int) -> str:
    """The command that repeats a run, one flag per line."""
    # `--multi_gpu` starts several processes on CPUs too
    launch = "accelerate launch " + (f"--multi_gpu --num_processes {num_processes} " if num_processes > 1 else "")
    lines = [f"{launch}training/train.py"]
    for name, value in arguments.items():
        if value is not None:
            words = value if isinstance(value, (list, tuple)) else [value]
            lines.append(f"  --{name} " + " ".join(shlex.quote(str(word)) for word in words))
    return " \\\n".join(lines)
