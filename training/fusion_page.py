"""The page of `demo_app.py`: its layout, and an answer of the model in the form in which the page shows it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from huggingface_hub.errors import StrictDataclassError

from fusion_trial import Answer, FusionTrial
from visualize_fusion import fused_layers, fusion_tiles, no_fusion, read_image

NO_IMAGE = "Drop an image on the left, or choose one of the examples below it."
_INTRODUCTION = (
    "Vision Mamba reads an image as a sequence of patches. Token fusion averages the most similar ones at chosen "
    "layers, so that the layers after them have less to scan."
)
_SHOWN_CLASSES = 5
_FILE_SECONDS = 3600  # after which uploads and drawings are deleted


class _ImageFile(gr.Image):
    """An image that is handed on as a path, unopened.

    gr.Image opens the file itself, turns some modes into others, and fails with a stack trace if it cannot.
    """

    is_template = True  # shown as a gr.Image

    def preprocess(self, payload) -> str | None:
        return None if payload is None else payload.path


def describe(answer: Answer) -> str:
    """Tokens and times of an answer, as Markdown."""
    config, milliseconds = answer.config, 1000 * answer.seconds
    if not fused_layers(config):
        return f"{no_fusion(config)} A forward pass of this image takes **{milliseconds:.1f} ms**."
    lengths = config.sequence_lengths
    share = sum(lengths) / (len(lengths) * (config.num_patches + 1))
    return (
        f"**{share:.0%} of the tokens** are left to scan, layer by layer {' '.join(map(str, lengths))} of "
        f"{config.num_patches + 1}. A forward pass of this image takes **{milliseconds:.1f} ms**, without fusion "
        f"{1000 * answer.unfused_seconds:.1f} ms: {answer.unfused_seconds / answer.seconds:.2f} times as fast."
    )


def token_table(answer: Answer) -> pd.DataFrame:
    """Columns `layer`, counted from 1, and `tokens`: what each layer scans."""
    lengths = answer.config.sequence_lengths
    return pd.DataFrame({"layer": [str(number) for number in range(1, len(lengths) + 1)], "tokens": lengths})


def try_fusion(trial: FusionTrial, path: str | None, strategy: str, tokens: int) -> tuple[Any, ...]:
    """What the page shows: probabilities by class, a text, tokens per layer, and drawings with titles.

    Raises:
        gr.Error: if the image cannot be read, or the fusion would remove no token.
    """
    if path is None:
        return None, NO_IMAGE, None, None
    try:
        answer = trial.answer(read_image(Path(path)), strategy, int(tokens))
    except (ValueError, StrictDataclassError) as error:
        # The cause is the configuration's own sentence; the folder is one of the server's
        message = str(error.__cause__ or error) if isinstance(error, StrictDataclassError) else str(error)
        raise gr.Error(message.replace(f"{Path(path).parent}/", ""), print_exception=False) from error
    tiles, titles = fusion_tiles(answer.trace, fused_layers(answer.config))
    return answer.probabilities, describe(answer), token_table(answer), list(zip(tiles, titles))


def build_page(trial: FusionTrial, name: str, examples: Sequence[Path] = ()) -> gr.Blocks:
    """The page for a model of this name; `examples` are image files to choose from."""
    config = trial.config
    with gr.Blocks(
        title=f"Famba-V: {name}", analytics_enabled=False, delete_cache=(_FILE_SECONDS, _FILE_SECONDS)
    ) as page:
        gr.Markdown(f"# Famba-V: {name}\n{_INTRODUCTION}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = _ImageFile(label="Image", sources=["upload", "clipboard"], height=260, buttons=[])
                strategy = gr.Radio(
                    trial.strategies, value=config.fusion_strategy, label="Strategy", info="the layers that fuse"
                )
                tokens = gr.Slider(
                    1,
                    trial.most_tokens,
                    value=max(1, min(config.fusion_tokens, trial.most_tokens)),
                    step=1,
                    precision=0,
                    label="r",
                    info="tokens removed at each of these layers, or half of the patches that are left if r is more",
                )
                if examples:
                    gr.Examples([[str(path)] for path in examples], inputs=[image], label="Examples")
            with gr.Column(scale=3, min_width=300):
                classes = gr.Label(label="Classes", num_top_classes=_SHOWN_CLASSES)
                text = gr.Markdown(NO_IMAGE, container=True)
                lengths = gr.BarPlot(
                    x="layer",
                    y="tokens",
                    y_lim=[0, config.num_patches + 1],
                    height=180,
                    label="Tokens that each layer scans",
                )
        drawings = gr.Gallery(
            label="Patches that have become one token have one colour and an outline; they need not touch",
            format="png",  # lines stay sharp
            columns=4,
            object_fit="contain",
            height="auto",
            buttons=["download", "fullscreen"],
            interactive=False,
        )
        gr.on(
            [image.change, strategy.change, tokens.change],
            lambda *values: try_fusion(trial, *values),
            [image, strategy, tokens],
            [classes, text, lengths, drawings],
            trigger_mode="always_last",  # a slider that is dragged asks once for where it ends
            api_name="try_fusion",
        )
    return page
