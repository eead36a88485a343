"""The page of `demo_app.py`: its layout, and an answer of the model in the form in which the page shows it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from gradio.components import Component
from gradio.utils import get_upload_folder, is_in_or_equal
from huggingface_hub.errors import StrictDataclassError

from fambav_training.app.examples import Example
from fambav_training.app.trial import Answer, FusionTrial
from fambav_training.data.image_file import read_image
from fambav_training.fusion.settings import UNFUSED
from fambav_training.fusion.speed import Speedup
from fambav_training.fusion.targets import token_share
from fambav_training.pictures.fusion_pictures import fusion_tiles, layers_that_fuse, no_fusion

NO_IMAGE = "Drop an image on the left, or choose one of the examples below it."
_INTRODUCTION = (
    "Vision Mamba reads an image as a sequence of patches. Token fusion averages the most similar ones at chosen "
    "layers, so that the layers after them have less to scan."
)
_SHOWN_CLASSES = 5
_FILE_SECONDS = 3600  # after which uploads and drawings are deleted
_LARGEST_UPLOAD = "32mb"
# Fonts that come with gradio; the weight between these two has no letters in its file
_THEME = gr.themes.Default(
    font=(gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "sans-serif"),
    font_mono=(gr.themes.LocalFont("IBM Plex Mono", weights=(400,)), "monospace"),
)
# Titles below the drawings, where gradio lays them over a corner, and no second scroll bar
_CSS = """
#drawings .grid-wrap { max-height: none; overflow: visible }
#drawings .thumbnail-item { display: flex; flex-direction: column; aspect-ratio: auto; border: 0; background: none }
#drawings .thumbnail-item img { height: auto }
#drawings .thumbnail-item .caption-label { position: static; max-width: 100%; border: 0; background: none; opacity: 1 }
"""


def describe(answer: Answer) -> str:
    """Tokens of an answer, as Markdown."""
    config = answer.config
    if not layers_that_fuse(config):
        return no_fusion(config)
    schedule = "The model's own schedule, whatever r is. " if config.fusion_strategy == "custom" else ""
    return (
        f"{schedule}**{token_share(config):.0%} of the tokens** are left to scan, layer by layer "
        f"{' '.join(map(str, config.sequence_lengths))} of {config.num_patches + 1}."
    )


def describe_speed(strategy: str, tokens: int, speedup: Speedup | None) -> str:
    """Times of a fusion, as Markdown, which names it: somebody may have chosen another one meanwhile."""
    name = "Without fusion" if strategy in UNFUSED.values() else f"With {strategy} fusion, r = {tokens}"
    if speedup is None:
        return f"{name}: the time of a forward pass is being measured."
    text = f"{name}: a forward pass of one image takes **{1000 * speedup.seconds:.1f} ms**"
    if strategy in UNFUSED.values():
        return f"{text}."
    return f"{text}, {speedup.times:.2f} +- {speedup.uncertainty:.2f} times as fast as without fusion."


def token_table(answer: Answer) -> pd.DataFrame:
    """Columns `layer`, counted from 1, and `tokens`: what each layer scans."""
    lengths = answer.config.sequence_lengths
    return pd.DataFrame({"layer": [str(number) for number in range(1, len(lengths) + 1)], "tokens": lengths})


@contextmanager
def _sentences(folder: Path) -> Iterator[None]:
    """Errors of images and settings as one sentence for the visitor, without the server's `folder`."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        # The cause is the configuration's own sentence
        message = str(error.__cause__ or error) if isinstance(error, StrictDataclassError) else str(error)
        raise gr.Error(message.replace(f"{folder}/", ""), print_exception=False) from error


def try_fusion(trial: FusionTrial, upload: dict[str, Any] | None, strategy: str, tokens: int) -> tuple[Any, ...]:
    """What the page shows: probabilities by class, texts on tokens and times, tokens per layer, titled drawings.

    Args:
        upload: the file of the image as `path`, or None if there is none.
        strategy, tokens: the fusion to try.

    Raises:
        gr.Error: if the image cannot be read, or the fusion has a wrong value or would remove no token.
    """
    if upload is None:
        return None, NO_IMAGE, "", None, None
    path = Path(upload["path"])
    with _sentences(path.parent):
        answer = trial.answer(read_image(path), strategy, tokens)
    tiles, titles = fusion_tiles(answer.trace, layers_that_fuse(answer.config))
    speed = describe_speed(strategy, tokens, answer.speedup)
    return answer.probabilities, describe(answer), speed, token_table(answer), list(zip(tiles, titles))


def time_fusion(trial: FusionTrial, upload: dict[str, Any] | None, strategy: str, tokens: int) -> str:
    """The text on times, once they are measured, which takes a second the first time that a fusion is tried.

    Raises:
        gr.Error: if the fusion has a wrong value or would remove no token.
    """
    if upload is None:
        return ""
    with _sentences(Path()):
        return describe_speed(strategy, tokens, trial.speedup(strategy, tokens))


def is_upload(upload: dict[str, Any]) -> bool:
    """Whether a payload names a file that was sent to the page, and not just any file of the server."""
    path = upload.get("path")
    return isinstance(path, str) and is_in_or_equal(path, get_upload_folder())


def _question_column(trial: FusionTrial, examples: Sequence[Example]) -> list[Component]:
    """What is asked, in the order of the arguments of `try_fusion`: image, strategy, r."""
    config = trial.config
    most_tokens = max(2, trial.most_tokens)  # a slider needs a range
    image = gr.Image(label="Image", sources=["upload", "clipboard"], height=260, buttons=[])
    strategy = gr.Radio(trial.strategies, value=config.fusion_strategy, label="Strategy", info="which layers fuse")
    tokens = gr.Slider(
        1,
        most_tokens,
        value=max(1, min(config.fusion_tokens, most_tokens)),
        step=1,
        precision=0,
        label="r",
        info="tokens that each of them removes; at most half of the patches that it receives",
    )
    if examples:
        shows = gr.Textbox(label="what it shows", visible=False)
        rows = [[str(example.path), example.strategy, example.tokens, example.shows] for example in examples]
        gr.Examples(rows, inputs=[image, strategy, tokens, shows], label="Examples")
    return [image, strategy, tokens]


def _answer_column(num_patches: int) -> list[Component]:
    """What is shown, in the order in which `try_fusion` returns it: classes, tokens, times, chart, drawings."""
    with gr.Row():
        classes = gr.Label(label="Classes", num_top_classes=_SHOWN_CLASSES, min_width=240)
        lengths = gr.BarPlot(
            x="layer",
            y="tokens",
            y_lim=[0, num_patches + 1],
            height=282,  # of the classes beside it
            label="Tokens that each layer scans",
            min_width=240,
            buttons=[],
        )
    text = gr.Markdown(NO_IMAGE, container=True)
    speed = gr.Markdown("", container=True)
    drawings = gr.Gallery(
        show_label=False,
        format="png",  # lines stay sharp
        columns=3,
        height="auto",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_id="drawings",
    )
    gr.Markdown("Patches that have become one token have one colour and an outline; they need not touch.")
    return [classes, text, speed, lengths, drawings]


def build_page(trial: FusionTrial, name: str, examples: Sequence[Example] = ()) -> gr.Blocks:
    """The page for a model of this name, with examples to choose from."""

    def answer(upload: dict[str, Any] | None, strategy: str, tokens: int) -> tuple[Any, ...]:
        # Nobody else checks: anybody can call this without the page, and `preprocess=False` below
        if upload is not None and not is_upload(upload):
            raise gr.Error("expected an uploaded image", print_exception=False)
        return try_fusion(trial, upload, strategy, tokens)

    def time_answer(upload: dict[str, Any] | None, strategy: str, tokens: int) -> str:
        return time_fusion(trial, upload, strategy, tokens)

    with gr.Blocks(
        title=f"Famba-V: {name}", analytics_enabled=False, delete_cache=(_FILE_SECONDS, _FILE_SECONDS)
    ) as page:
        gr.Markdown(f"# Famba-V: {name}\n{_INTRODUCTION}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                questions = _question_column(trial, examples)
            with gr.Column(scale=5, min_width=300):
                answers = _answer_column(trial.config.num_patches)
        answered = gr.on(
            [component.change for component in questions],
            answer,
            questions,
            answers,
            preprocess=False,  # gradio's own checks of images and numbers fail with a stack trace
            trigger_mode="always_last",  # a slider that is dragged asks once for where it ends
            api_name="try_fusion",
        )
        answered.success(
            time_answer,
            questions,
            answers[2],
            preprocess=False,
            trigger_mode="always_last",
            show_progress="hidden",
            api_name="time_fusion",
        )
    return page


def launch(page: gr.Blocks, host: str | None, port: int | None) -> None:
    """Serve the page until the process is interrupted, and say where.

    Args:
        host, port: where to listen; gradio's environment variables or its own choice if None.

    Raises:
        OSError: if the port is not free.
    """
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        max_file_size=_LARGEST_UPLOAD,
        theme=_THEME,
        css=_CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        quiet=True,  # gradio's own words offer a public link
        prevent_thread_lock=True,
    )
    print(f"The page is at {url}; Ctrl-C ends it.", flush=True)
    page.block_thread()
