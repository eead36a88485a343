"""The page: what it shows and refuses, its command line, and its use in a browser that reaches nothing else."""

import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import demo_app
from fambav_training.app import trial as fusion_trial
from fambav_training.app.examples import make_examples
from fambav_training.app.trial import FusionTrial
from fambav_training.data.image_file import find_examples, read_image
from fambav_training.evaluation.scoring import load_classifier
from support.browser import requested_hosts
from support.child_process import REPOSITORY
from support.helpers import noise, save_classifier

WAIT_SECONDS = 300


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_classifier(tmp_path_factory.mktemp("models") / "shapes", num_labels=4)
    (folder / "examples").mkdir()
    noise("P", 9, 5).save(folder / "examples" / "b.png")
    noise("L", 40, 30).save(folder / "examples" / "a.jpg")
    (folder / "examples" / "notes.txt").write_text("no image")
    noise().save(folder / "training.png")  # a plot, no example
    return folder


# ---- what it shows ----


@pytest.fixture(scope="module")
def gradio():
    return pytest.importorskip("gradio", reason='gradio is not installed: pip install -e ".[app]"')


@pytest.fixture
def fusion_page(gradio, monkeypatch):
    from fambav_training.app import page as fusion_page

    monkeypatch.setattr(fusion_trial, "_TIMED_SECONDS", 0)
    return fusion_page


@pytest.fixture
def trial(model_folder):
    return FusionTrial(*load_classifier(str(model_folder), {}))


def test_an_answer_on_the_page(fusion_page, trial, tmp_path):
    noise("RGBA", 33, 20).save(tmp_path / "photo.png")
    upload = {"path": str(tmp_path / "photo.png")}
    classes, text, speed, lengths, drawings = fusion_page.try_fusion(trial, upload, "all", 3)
    assert sum(classes.values()) == pytest.approx(1) and len(classes) == 4
    assert text == "**65% of the tokens** are left to scan, layer by layer 14 11 8 of 17."
    assert speed == "With all fusion, r = 3: the time of a forward pass is being measured."
    assert lengths["layer"].tolist() == ["1", "2", "3"] and lengths["tokens"].tolist() == [14, 11, 8]
    titles = [title for _, title in drawings]
    assert titles[1:] == ["layer 1: 14 of 17 tokens", "layer 2: 11 of 17 tokens", "layer 3: 8 of 17 tokens"]


def test_times_come_after_the_answer_and_are_then_known(fusion_page, trial, tmp_path):
    noise().save(tmp_path / "a.png")
    upload = {"path": str(tmp_path / "a.png")}
    measured = fusion_page.time_fusion(trial, upload, "all", 3)
    assert measured.startswith("With all fusion, r = 3: a forward pass of one image takes **")
    assert measured.endswith("times as fast as without fusion.")
    assert fusion_page.time_fusion(trial, upload, "all", 3) == measured
    assert fusion_page.try_fusion(trial, upload, "all", 3)[2] == measured
    assert "is being measured" in fusion_page.try_fusion(trial, upload, "all", 2)[2]
    assert fusion_page.time_fusion(trial, None, "all", 3) == ""


def test_without_fusion_there_is_one_time(fusion_page, trial, tmp_path):
    noise().save(tmp_path / "a.png")
    upload = {"path": str(tmp_path / "a.png")}
    _, text, _, lengths, drawings = fusion_page.try_fusion(trial, upload, "none", 3)
    assert text == "No layer fuses: all 3 scan 17 tokens."
    speed = fusion_page.time_fusion(trial, upload, "none", 3)
    assert speed.startswith("Without fusion: a forward pass") and "times as fast" not in speed
    assert lengths["tokens"].tolist() == [17, 17, 17] and len(drawings) == 1


def test_a_schedule_says_that_r_is_not_used(fusion_page, model_folder):
    own = {"fusion_strategy": "custom", "fusion_schedule": [0, 3, 3]}
    trial = FusionTrial(*load_classifier(str(model_folder), own))
    answer = trial.answer(noise(), "custom", 7)
    assert "The model's own schedule, whatever r is." in fusion_page.describe(answer)


def test_no_image_is_no_error(fusion_page, trial):
    assert fusion_page.try_fusion(trial, None, "all", 3) == (None, fusion_page.NO_IMAGE, "", None, None)


@pytest.mark.parametrize(
    "name, strategy, tokens, expected",
    [
        ("text.png", "all", 2, "text.png: this image cannot be read: "),
        ("drawing.svg", "all", 2, "drawing.svg: this image cannot be read: "),
        ("gone.png", "all", 2, "gone.png: no such image"),
        ("a.png", "all", 0, "fusion_tokens=0 with fusion_strategy='all' would remove no token"),
        ("a.png", "all", -1, "expected an integer >= 0, got -1"),
        ("a.png", "all", None, "fusion_tokens"),
        ("a.png", "all", 2.5, "fusion_tokens"),
        ("a.png", "some", 2, "fusion_strategy"),
    ],
    ids=str,
)
def test_errors_are_sentences(gradio, fusion_page, trial, tmp_path, name, strategy, tokens, expected):
    noise().save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    with pytest.raises(gradio.Error) as error:
        fusion_page.try_fusion(trial, {"path": str(tmp_path / name)}, strategy, tokens)
    assert expected in error.value.message and str(tmp_path) not in error.value.message
    assert not error.value.print_exception


def test_a_strategy_without_a_layer_is_a_sentence(gradio, fusion_page, tmp_path):
    folder = save_classifier(tmp_path / "model", num_hidden_layers=1)
    trial = FusionTrial(*load_classifier(str(folder), {}))
    noise().save(tmp_path / "a.png")
    for function in (fusion_page.try_fusion, fusion_page.time_fusion):
        with pytest.raises(gradio.Error, match="fuses no layer"):
            function(trial, {"path": str(tmp_path / "a.png")}, "interleaved", 2)


def test_a_page_for_a_model_of_one_patch(fusion_page, tmp_path):
    folder = save_classifier(tmp_path, image_size=4, fusion_strategy="none")
    page = fusion_page.build_page(FusionTrial(*load_classifier(str(folder), {})), "one patch")
    assert not page.analytics_enabled


RELEASED = REPOSITORY / "model_cards" / "fambav-cifar100"


@pytest.fixture(scope="module")
def released():
    return FusionTrial(*load_classifier(str(RELEASED), {}))


def test_the_released_model_answers_within_a_tenth_of_a_second(gradio, fusion_page, released):
    """Of processor time, whichever control is used, with everything up to the files of the drawings.

    It was 16 to 45 ms on one core; a measurement of speed within the answer, or similarities that nobody sees, would
    take it over the bound.
    """
    with gradio.Blocks():
        drawings = gradio.Gallery(format="png")
    upload = {"path": str(RELEASED / "examples" / "wolf.png")}
    fusion_page.try_fusion(released, upload, "upper", 9)  # compiles the kernels
    for strategy in released.strategies:
        for tokens in (1, 9, released.most_tokens):
            seconds = []
            for _ in range(3):
                started = time.process_time()
                drawings.postprocess(fusion_page.try_fusion(released, upload, strategy, tokens)[-1])
                seconds.append(time.process_time() - started)
            assert min(seconds) < 0.1, (strategy, tokens, seconds)


def test_a_question_is_answered_while_a_speed_is_measured(fusion_page, released, monkeypatch):
    monkeypatch.setattr(fusion_trial, "_TIMED_SECONDS", 3.0)
    upload = {"path": str(RELEASED / "examples" / "wolf.png")}
    with ThreadPoolExecutor(1) as thread:
        measuring = thread.submit(released.speedup, "upper", 5)
        answers = [fusion_page.try_fusion(released, upload, "upper", 9) for _ in range(3)]
        assert not measuring.done()
    assert measuring.result().rounds >= 5 and len(answers) == 3


# ---- examples ----


def test_examples_show_right_and_wrong_answers_with_strong_and_weak_fusion(released):
    examples = make_examples(released, find_examples(str(RELEASED), None))
    assert {example.path for example in examples} == {*(RELEASED / "examples").glob("*.png")}
    for verdict in ("right", "wrong"):
        shares = [
            int(example.shows.split("; ")[1].split("%")[0])
            for example in examples
            if example.shows.startswith(verdict)
        ]
        assert min(shares) < 45 and len(shares) >= 2, verdict
    assert any("91% of the tokens" in example.shows for example in examples)


def test_an_example_says_what_the_model_answers_now(trial, model_folder, tmp_path):
    noise().save(tmp_path / "a.png")
    noise(seed=1).save(tmp_path / "b.png")
    label = trial.answer(read_image(tmp_path / "a.png"), "all", 3).trace.label
    other = next(name for name in trial.config.label2id if name != label)
    entry = {"image": "a.png", "fusion_strategy": "all", "fusion_tokens": 3}
    gone = {"image": "gone.png", "label": label, "fusion_strategy": "all", "fusion_tokens": 1}
    settings = [{**entry, "label": label}, {**entry, "label": other}, gone]
    (tmp_path / "examples.json").write_text(json.dumps(settings))
    first, second, third = make_examples(trial, [tmp_path / "b.png", tmp_path / "a.png"])
    assert first[:3] == second[:3] == (tmp_path / "a.png", "all", 3)
    assert first.shows.startswith(f"right: {label}, ") and first.shows.endswith("; 65% of the tokens scanned")
    assert second.shows.startswith(f"wrong, it is a {other}: {label}, ")
    assert third[:3] == (tmp_path / "b.png", "upper", 2)
    assert not third.shows.startswith(("right", "wrong"))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ("{", r"examples\.json: expected JSON"),
        ('[{"image": "a.png"}]', r'examples\.json: \{"image": "a\.png"\}: expected the fields'),
        ("[1]", r"examples\.json: 1: expected the fields"),
        (
            '[{"image": "a.png", "label": "0", "fusion_strategy": "all", "fusion_tokens": 0}]',
            r"example a\.png: .*fusion_tokens=0",
        ),
    ],
    ids=str,
)
def test_wrong_settings_of_examples_are_named(trial, tmp_path, settings, expected):
    noise().save(tmp_path / "a.png")
    (tmp_path / "examples.json").write_text(settings)
    with pytest.raises(ValueError, match=expected):
        make_examples(trial, [tmp_path / "a.png"])


# ---- the command line ----


def test_examples_are_the_images_in_the_folder_of_that_name(model_folder, tmp_path):
    names = [path.name for path in find_examples(str(model_folder), None)]
    assert names == ["a.jpg", "b.png"]
    assert find_examples("owner/on-the-hub", None) == []
    assert find_examples(str(model_folder), []) == []


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nowhere"], "error: "),
        (["model", "--examples", "missing.png"], "error: --examples missing.png: no such image"),
        (["model", "--examples", "model/config.json"], "error: --examples model/config.json: no such image"),
        (["model", "--port", "99999"], "error: --port 99999: expected 1 to 65535"),
    ],
    ids=str,
)
def test_errors_are_one_line(gradio, model_folder, monkeypatch, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    monkeypatch.setattr(sys, "argv", ["demo_app.py", *words])
    with pytest.raises(SystemExit) as end:
        demo_app.main()
    assert end.value.code.startswith(expected)


def test_without_gradio_it_says_how_to_install_it(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "fambav_training.app.page", raising=False)
    monkeypatch.setattr(sys, "argv", ["demo_app.py", str(model_folder)])
    with pytest.raises(SystemExit) as end:
        demo_app.main()
    assert end.value.code == 'error: the page needs gradio: pip install -e ".[app]"'


# ---- served ----


@pytest.fixture
def page_url(gradio, model_folder, tmp_path):
    """The address of the page, served by a process of its own whose log has no stack trace in the end."""
    log = tmp_path / "server.log"
    with log.open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "training/demo_app.py", str(model_folder)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        line = server.stdout.readline()
        assert line.startswith("The page is at http"), line + log.read_text()
        yield line.split()[4].rstrip(";")
    finally:
        server.terminate()
        server.communicate(timeout=WAIT_SECONDS)
    assert "Traceback" not in log.read_text()


def post(page_url: str, *arguments) -> tuple[str, str]:
    """Call the page as programs do: the kind of the last event, and what it holds."""
    url = f"{page_url}gradio_api/call/try_fusion"
    request = urllib.request.Request(
        url, json.dumps({"data": arguments}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=WAIT_SECONDS) as answer:
        kind, data = answer.read().decode().strip().splitlines()[-2:]
    return kind.removeprefix("event: "), data.removeprefix("data: ")


@pytest.mark.slow
def test_other_files_of_the_server_are_refused(page_url, model_folder, tmp_path):
    noise().save(tmp_path / "secret.png")
    for path in (str(tmp_path / "secret.png"), "/etc/passwd", str(tmp_path / "missing.png"), None):
        kind, data = post(page_url, {"path": path, "url": "x"}, "all", 2)
        assert kind == "error" and "secret" not in data and "passwd" not in data, (path, data)


# ---- in a browser ----


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_visit(page_url, browser, tmp_path):
    """Choose an example, upload, move the slider, switch the strategy, upload what is no image."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait_for(text: str) -> None:
        def is_shown(_) -> bool:
            return text in browser.find_element(By.TAG_NAME, "body").text

        WebDriverWait(browser, WAIT_SECONDS).until(is_shown, f"no {text!r} in the page")

    def drawings() -> list[str]:
        return [image.get_attribute("src") for image in browser.find_elements(By.CSS_SELECTOR, "#drawings img")]

    def clear() -> None:
        browser.find_element(By.CSS_SELECTOR, "button[aria-label=Clear], button[aria-label='Remove Image']").click()
        wait_for("Drop an image on the left")

    noise("RGBA", 50, 40).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no image")
    browser.implicitly_wait(WAIT_SECONDS)

    browser.get(page_url)
    wait_for("Drop an image on the left")
    browser.find_element(By.CSS_SELECTOR, "table tbody tr").click()
    wait_for("layer 3: 13 of 17 tokens")
    wait_for("With upper fusion, r = 2: a forward pass of one image takes")
    clear()
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "photo.png"))
    wait_for("layer by layer 17 15 13 of 17")
    wait_for("layer 3: 13 of 17 tokens")
    two = drawings()
    assert len(two) == 3

    browser.find_element(By.CSS_SELECTOR, "input[type=range]").send_keys(Keys.ARROW_RIGHT)
    wait_for("layer by layer 17 14 11 of 17")
    wait_for("layer 3: 11 of 17 tokens")
    three = drawings()
    assert three[0] == two[0] and three[1] != two[1]

    browser.find_element(By.CSS_SELECTOR, "input[type=radio][value=all]").click()
    wait_for("layer by layer 14 11 8 of 17")
    wait_for("layer 1: 14 of 17 tokens")
    browser.find_element(By.CSS_SELECTOR, "input[type=radio][value=none]").click()
    wait_for("No layer fuses: all 3 scan 17 tokens.")

    clear()
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "text.png"))
    wait_for("text.png: this image cannot be read")
    assert requested_hosts(browser) <= {"127.0.0.1", None}
