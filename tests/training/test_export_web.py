"""The static site: what its command refuses, and every control of its page in a browser that reaches nothing else."""

import shutil
import sys

import pytest
import torch
from PIL import Image

import export_web
from fambav_training.app.trial import FusionTrial
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.export import onnxruntime_web
from fambav_training.export.web_site import write_site
from support.browser import requested_hosts, served
from support.helpers import noise, save_classifier

WAIT_SECONDS = 30


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_classifier(tmp_path_factory.mktemp("models") / "shapes", num_labels=4)
    (folder / "examples").mkdir()
    noise("RGB", 40, 30).save(folder / "examples" / "a.png")
    noise("L", 9, 15).save(folder / "examples" / "b.jpg")
    return folder


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["export_web.py", *map(str, words)])
    export_web.main()


# ---- the command ----


@pytest.fixture
def no_runtime(tmp_path):
    """Files by the names of ONNX Runtime's."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in onnxruntime_web.FILES:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nowhere", "site"], "error: "),
        (["model", "there"], "error: there: exists already"),
        (["model", "site", "--onnxruntime_web", "there"], "error: there: ort.wasm.bundle.min.mjs, ort-wasm"),
        (["model", "site", "--examples", "missing.png"], "error: --examples missing.png: no such image"),
        (["model", "site", "--fusion_tokens", "0"], "fusion_tokens=0"),
    ],
    ids=str,
)
def test_errors_are_one_line(model_folder, no_runtime, monkeypatch, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "there").mkdir()
    runtime = [] if "--onnxruntime_web" in words else ["--onnxruntime_web", no_runtime]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words, *runtime)
    assert end.value.code.startswith("error: ") and expected in end.value.code
    assert not (tmp_path / "site").exists() and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    "fields, processor_fields, expected",
    [
        ({"num_channels": 1}, {}, "num_channels=1: "),
        ({}, {"resample": 1}, "resample=1 of the image processor: the page resizes by 2 (bilinear) or 3 (bicubic)"),
        ({}, {"size": {"height": 8, "width": 8}}, "makes images of 8 x 8 pixels"),
    ],
    ids=str,
)
def test_what_the_page_cannot_prepare_is_refused(no_runtime, tmp_path, fields, processor_fields, expected):
    folder = save_classifier(tmp_path / "model", **fields)
    model, processor = load_classifier(str(folder), {})
    for name, value in processor_fields.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError) as error:
        write_site(model, processor, "model", [], no_runtime, tmp_path / "site")
    assert expected in str(error.value) and not (tmp_path / "site").exists()


def test_without_npm_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(onnxruntime_web.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm, which provides it, is not installed.*--onnxruntime_web FOLDER"):
        with onnxruntime_web.runtime_files(None):
            pass


def test_an_error_of_npm_is_passed_on(monkeypatch, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(onnxruntime_web.shutil, "which", lambda name: str(npm))
    with pytest.raises(ValueError, match=r"npm failed \(npm error network\); give --onnxruntime_web"):
        with onnxruntime_web.runtime_files(None):
            pass


# ---- the page ----


@pytest.fixture(scope="module")
def runtime():
    """The files of ONNX Runtime, as npm has them."""
    try:
        with onnxruntime_web.runtime_files(None) as folder:
            yield folder
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def trial(model_folder):
    model, processor = load_classifier(str(model_folder), {})
    with torch.no_grad():
        model.classifier.weight.mul_(30)  # classes that differ
    return FusionTrial(model, processor)


@pytest.fixture(scope="module")
def whole_site(model_folder, trial, runtime, tmp_path_factory):
    site = tmp_path_factory.mktemp("sites") / "shapes"
    examples = sorted((model_folder / "examples").iterdir())
    write_site(trial._model, trial._processor, "shapes", examples, runtime, site)
    return site


@pytest.fixture
def site(whole_site, tmp_path):
    """A copy, from which a test may remove files."""
    return shutil.copytree(whole_site, tmp_path / "site")


class Page:
    """The site in a browser."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)

    def element(self, name: str):
        return self.browser.find_element("id", name)

    def text(self, name: str) -> str:
        return self.element(name).text

    def wait_for(self, name: str, text: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        message = f"no {text!r} in #{name}"
        WebDriverWait(self.browser, WAIT_SECONDS).until(lambda _: text in self.text(name), message)

    def drawing(self) -> str:
        return self.browser.execute_script("return document.getElementById('drawing').toDataURL()")

    def classes(self) -> dict[str, float]:
        rows = [item.text.split("\n") for item in self.browser.find_elements("css selector", "#classes li")]
        return {name: float(value.removesuffix(" %")) for name, value in rows}

    def focused(self) -> str:
        """The id of the element that keys go to, or that of its parent."""
        return self.browser.execute_script(
            "const element = document.activeElement; return element.id || element.parentElement.id"
        )


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def assert_same_classes(page: Page, trial: FusionTrial, image: Image.Image, strategy: str) -> None:
    expected = trial.answer(image, strategy, 2).probabilities
    assert page.classes() == {name: pytest.approx(100 * share, abs=0.06) for name, share in expected.items()}


@pytest.mark.slow
def test_a_visit(site, trial, browser, tmp_path, monkeypatch):
    """Choose an example and a file, switch fusion, move over layers and patches, choose what is no image."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    monkeypatch.setattr("fambav_training.app.trial._TIMED_SECONDS", 0)
    with served(site) as address:
        page = Page(browser, address)
        page.wait_for("status", "a.png: ")
        page.wait_for("times", "with fusion")
        assert_same_classes(page, trial, Image.open(site / "examples" / "a.png"), "upper")

        photo = noise("RGB", 57, 33, seed=1)
        photo.save(tmp_path / "photo.png")
        page.element("file").send_keys(str(tmp_path / "photo.png"))
        page.wait_for("status", "photo.png: ")
        assert_same_classes(page, trial, photo, "upper")
        assert page.text("tokens").split("\n")[1::2] == ["17 of 17", "15 of 17", "13 of 17"]
        assert page.text("layer-name") == "layer 3"
        last_layer = page.drawing()

        page.element("layer").send_keys(Keys.ARROW_LEFT)
        assert page.text("layer-name") == "layer 2" and page.drawing() != last_layer
        page.element("layer").send_keys(Keys.HOME)
        assert page.text("layer-name") == "nothing"
        page.element("layer").send_keys(Keys.END)
        assert page.drawing() == last_layer

        page.element("drawing").send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
        assert page.text("patch").startswith("Row 2, column 2: ") and page.drawing() != last_layer
        page.element("drawing").send_keys(Keys.ESCAPE)
        assert page.text("patch") == "" and page.drawing() == last_layer
        ActionChains(browser).move_to_element_with_offset(page.element("drawing"), 1, 1).perform()
        assert page.text("patch").startswith("Row 3, column 3: ")

        page.element("fusion").click()
        page.wait_for("times", "without")
        assert_same_classes(page, trial, photo, "none")
        assert page.text("tokens").split("\n")[1::2] == ["17 of 17"] * 3
        page.wait_for("patch", "a token of its own")

        (tmp_path / "notes.png").write_text("no image")
        page.element("file").send_keys(str(tmp_path / "notes.png"))
        page.wait_for("error", "notes.png: this is no image that the browser can read")
        page.element("file").send_keys(str(tmp_path / "photo.png"))
        page.wait_for("status", "photo.png: ")
        page.wait_for("offline", "also opens without a network")
        assert not page.element("error").is_displayed()
    assert requested_hosts(browser) <= {"127.0.0.1", None}
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_dropping_a_file(site, browser):
    drop = """
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([arguments[0]], arguments[1]));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
    """
    with served(site) as address:
        page = Page(browser, address)
        page.wait_for("status", "a.png: ")
        browser.execute_script(drop, "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "nothing.txt")
        page.wait_for("error", "nothing.txt: this is no image")
        drop_image = f"fetch('examples/b.jpg').then((r) => r.blob()).then((b) => {{ arguments[0] = b; {drop} }})"
        browser.execute_script(drop_image, None, "dropped.jpg")
        page.wait_for("status", "dropped.jpg: ")


@pytest.mark.slow
def test_the_camera(site, browser):
    with served(site) as address:
        page = Page(browser, address)
        page.wait_for("status", "a.png: ")
        permission = {"permission": {"name": "camera"}, "origin": address.rstrip("/")}
        browser.execute_cdp_cmd("Browser.setPermission", {**permission, "setting": "denied"})
        page.element("camera").click()
        page.wait_for("error", "Camera: this page may not use it")

        browser.execute_cdp_cmd("Browser.setPermission", {**permission, "setting": "granted"})
        page.element("camera").click()
        page.wait_for("camera", "Stop the camera")
        page.wait_for("status", "Camera: ")
        page.element("camera").click()
        page.wait_for("camera", "Use the camera")
        page.element("fusion").click()
        page.wait_for("tokens", "Layer 3\n17 of 17")
        assert page.text("status").startswith("Camera: ")


@pytest.mark.slow
def test_with_the_keyboard_alone(site, browser):
    from selenium.webdriver.common.keys import Keys

    with served(site) as address:
        page = Page(browser, address)
        page.wait_for("status", "a.png: ")
        seen = []
        for _ in range(7):
            press(browser, Keys.TAB)
            seen.append(page.focused())
            if seen[-1] == "examples" and seen.count("examples") == 2:
                press(browser, Keys.ENTER)
                page.wait_for("status", "b.jpg: ")
            if seen[-1] == "fusion":
                press(browser, Keys.SPACE)
                page.wait_for("tokens", "Layer 3\n17 of 17")
        assert seen == ["file", "camera", "examples", "examples", "drawing", "fusion", "layer"]
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert browser.execute_script(outline) == "solid"


@pytest.mark.slow
@pytest.mark.parametrize("scheme, is_dark", [("light", False), ("dark", True)])
def test_on_a_phone_in_light_and_dark(site, browser, scheme, is_dark):
    phone = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    with served(site) as address:
        page = Page(browser, address)
        page.wait_for("status", "a.png: ")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        colors = "const { color, backgroundColor } = getComputedStyle(document.body); return [color, backgroundColor]"
        text, back = (
            sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))
            for color in browser.execute_script(colors)
        )
        assert (text > back) == is_dark and abs(text - back) > 400


@pytest.mark.slow
def test_without_a_network(site, browser):
    """A page that was open once answers when its server is gone."""
    with served(site) as address:
        page = Page(browser, address)
        page.wait_for("offline", "also opens without a network")
    browser.get("about:blank")
    page = Page(browser, address)
    page.wait_for("status", "a.png: ")
    page.element("fusion").click()
    page.wait_for("times", "without")


@pytest.mark.slow
def test_missing_files_are_named(site, browser):
    (site / "models" / "unfused.onnx").rename(site / "later.onnx")
    (site / "service_worker.js").unlink()
    with served(site) as address:
        page = Page(browser, address)
        page.wait_for("status", "a.png: ")
        page.wait_for("error", "service_worker.js: this page will not open without a network")
        page.element("fusion").click()
        page.wait_for("error", "models/unfused.onnx: this file of the page cannot be loaded (404)")
        (site / "later.onnx").rename(site / "models" / "unfused.onnx")
        page.element("fusion").click()
        page.element("fusion").click()
        page.wait_for("times", "without")
        assert not page.element("error").is_displayed()

        (site / "models" / "fused.onnx").write_text("no model")
        page = Page(browser, address)
        page.wait_for("error", "models/fused.onnx: ONNX Runtime cannot run this model")
        (site / "models" / "fused.onnx").unlink()
        page = Page(browser, address)
        page.wait_for("error", "models/fused.onnx: this file of the page cannot be loaded (404)")
        assert page.element("main").get_attribute("inert") is not None


@pytest.mark.slow
def test_a_page_opened_as_a_file_says_what_to_do(site, browser):
    page = Page(browser, (site / "index.html").as_uri())
    page.wait_for("error", "python -m http.server")
