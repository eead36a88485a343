"""Releases on a Hub that runs here: one commit or none, a tag, and errors that say what to do."""

import json
import logging
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import publish
from fambav_training.release import hub as release_hub
from fambav_training.release.hub import PublishError, prepare_repository, publish_folder
from fambav_training.release.model_card import LOCATION
from fambav_training.release.quantized import base_model_of, write_quantized_release
from fambav_training.release.saving import save_release
from modeling_fambav import FambaVForImageClassification
from support.child_process import REPOSITORY, run_python
from support.helpers import tiny_config
from support.hub_server import CUT, HANG, LOSE, Commit, Fault, HubServer, Repository, User
from support.training_runs import FLAGS, command_line

TOKEN = "hf_verysecrettoken"
READ_TOKEN = "hf_thisonemayonlyread"
RESULTS = {
    "top1": 81.23,
    "top5": 98.76,
    "ema_top1": 82.34,
    "ema_top5": 97.65,
    "train_seconds": 57.61,
    "images_per_second": 488.4,
    "peak_memory_bytes": 839 * 2**20,
    "sequence_lengths": [17, 15, 13],
    "num_parameters": 215_818,
    "steps": 440,
    "epochs": 20,
    "seed": 17,
    "scan_backend": "numba",
    "dataset": "digits",
    "train_images": 1437,
    "validation_images": 360,
    "arguments": {"dataset_name": "digits", "output_dir": "outputs/run"},
    "device": "cpu",
    "num_processes": 1,
    "mixed_precision": "no",
    "versions": {"python": "3.11.7"},
    "git_commit": "0123456789abcdef",
}
LEFT_BEHIND = (
    "checkpoints/step_000001/model.safetensors",
    "logs/fambav/run.yml",
    "fambav/events.out.tfevents.1",
    "nonfinite_step_000007/report.json",
    ".release.x/config.json",
    ".hidden",
    "model.safetensors.partial",
    "__pycache__/token_fusion.pyc",
)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The output folder of a run, with what it leaves there besides the release. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "release"
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    save_release(folder, FambaVForImageClassification(tiny_config()), processor, RESULTS)
    (folder / "metrics.jsonl").write_text('{"loss": 0.5}\n')
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not part of the release")
    return folder


@pytest.fixture
def folder(release, tmp_path) -> Path:
    """A release that a test may change."""
    return Path(shutil.copytree(release, tmp_path / "release"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> HubServer:
    """A Hub, and a client in this process that talks to it as ann and does not wait between attempts."""
    with HubServer() as hub:
        hub.users = {TOKEN: User("ann"), READ_TOKEN: User("ann", can_write=False)}
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "stored_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def repository(hub) -> Repository:
    return add_repository(hub)


def add_repository(hub: HubServer, name: str = "ann/tiny", **fields) -> Repository:
    hub.repositories[name] = Repository(**{"is_private": False, **fields})
    return hub.repositories[name]


def client_environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """What makes the client of another process talk to this Hub as ann."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


def messages(repository: Repository) -> list[str]:
    return [commit.message for commit in repository.commits]


def error_of(function, *arguments) -> str:
    """The message of the error that a call ends with."""
    with pytest.raises(PublishError) as raised:
        function(*arguments)
    assert TOKEN not in str(raised.value)
    return str(raised.value)


# ---- what users see ----


@pytest.mark.slow
def test_published_model_loads_where_this_package_is_not_installed(hub, release, tmp_path):
    torch.manual_seed(1)
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16),
        "image": torch.randint(256, (23, 31, 3), dtype=torch.uint8),
    }
    (tmp_path / "ann").mkdir()
    save_file(inputs, tmp_path / "ann" / "inputs.safetensors")  # where the script below looks for it
    environment = client_environment(hub, tmp_path)
    process = run_python(
        REPOSITORY / "training" / "publish.py", release, "tiny", "--private", "--tag", "v1", **environment
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"published: {hub.endpoint}/ann/tiny\n"
    assert TOKEN not in process.stderr
    assert hub.repositories["ann/tiny"].is_private

    script = REPOSITORY / "tests" / "support" / "load_remote_code.py"
    process = run_python("-I", script, "ann/tiny", tmp_path, "modeling_fambav", cwd=tmp_path, **environment)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["code_from"] == ["transformers_modules"]
    assert "modeling_fambav" not in report["imported"]

    model = FambaVForImageClassification.from_pretrained(release)
    logits = load_file(tmp_path / "tensors.safetensors")["logits"]
    torch.testing.assert_close(logits, model(inputs["pixel_values"]).logits.detach(), rtol=0, atol=0)
    image = ViTImageProcessorPil.from_pretrained(release)(inputs["image"].numpy(), return_tensors="pt")
    scores = model(**image).logits.softmax(-1)[0]
    answers = {answer["label"]: answer["score"] for answer in report["answers"]}
    assert answers == pytest.approx({name: scores[model.config.label2id[name]].item() for name in answers})


@pytest.mark.slow
def test_onnx_goes_with_the_release(hub, repository, folder, monkeypatch):
    run_main(monkeypatch, folder, "ann/tiny", "--onnx")
    path = folder / "onnx" / "model.onnx"
    written = path.read_bytes()
    assert repository.commits[-1].files["onnx/model.onnx"] == written
    run_main(monkeypatch, folder, "ann/tiny", "--onnx")
    assert path.read_bytes() == written and len(repository.commits) == 2  # an empty one, and the release


def run_main(monkeypatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
    publish.main()


def test_command_ends_with_a_line_that_says_what_is_wrong(hub, folder, monkeypatch, capsys):
    (folder / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: .*config\.json missing"):
        run_main(monkeypatch, folder, "tiny")
    assert hub.requests == []


@pytest.mark.parametrize("tag", ["", "a b", "a..b", "v1.lock", "-v1", "v1.", "v/1"])
def test_command_refuses_a_tag_that_git_would_refuse(hub, release, tag, monkeypatch):
    with pytest.raises(SystemExit, match=re.escape(f"error: --tag {tag!r}: expected letters")):
        run_main(monkeypatch, release, "tiny", f"--tag={tag}")
    assert hub.requests == []


# ---- what is published ----


def test_release_is_one_commit_with_a_tag(repository, hub, release):
    assert publish_folder(release, "ann/tiny", "v1") == f"{hub.endpoint}/ann/tiny"
    assert messages(repository) == ["initial commit", "Release v1"]
    assert repository.tags == {"v1": repository.main.oid}
    expected = {path.name for path in release.glob("*.*") if path.is_file()} - set(LEFT_BEHIND)
    assert {"modeling_fambav.py", "metrics.jsonl", "model.safetensors", "all_results.json"} < expected
    assert repository.main.files.keys() == expected | {".gitattributes"}
    for name in expected - {"README.md"}:  # in which the name of the repository is filled in
        assert repository.main.files[name] == (release / name).read_bytes(), name


def test_token_is_in_nothing_that_is_uploaded_or_said(repository, release, monkeypatch, capfd, caplog):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    caplog.set_level("DEBUG", logger="huggingface_hub")
    publish_folder(release, "ann/tiny")
    assert "authorization: <TOKEN>" in caplog.text  # every request is there
    for name, content in repository.main.files.items():
        assert TOKEN.encode() not in content, name
    assert TOKEN not in "".join(capfd.readouterr()) + caplog.text


def test_another_run_makes_no_second_commit(repository, release):
    publish_folder(release, "ann/tiny")
    tags = dict(repository.tags)
    publish_folder(release, "ann/tiny")
    assert len(repository.commits) == 2
    assert repository.tags == tags


def test_default_tag_tells_releases_apart(repository, folder):
    publish_folder(folder, "ann/tiny")
    [first] = repository.tags
    assert re.fullmatch(r"step-440-seed-17-[0-9a-f]{8}", first)
    (folder / "metrics.jsonl").write_text("{}\n")
    publish_folder(folder, "ann/tiny")
    assert len(repository.tags) == 2
    assert repository.tags[first] == repository.commits[1].oid


def test_later_release_keeps_files_that_it_does_not_have(repository, folder):
    publish_folder(folder, "ann/tiny", "v1")
    (folder / "metrics.jsonl").unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    publish_folder(folder, "ann/tiny", "v2")
    assert messages(repository) == ["initial commit", "Release v1", "Release v2"]
    assert repository.main.files["README.md"] == (folder / "README.md").read_bytes()
    assert "metrics.jsonl" in repository.main.files
    assert repository.tags == {"v1": repository.commits[1].oid, "v2": repository.commits[2].oid}


def test_tag_of_another_commit_stays_there(repository, folder):
    publish_folder(folder, "ann/tiny", "v1")
    (folder / "metrics.jsonl").write_text("{}\n")
    message = error_of(publish_folder, folder, "ann/tiny", "v1")
    assert f"tag 'v1' names another commit, {repository.commits[1].oid[:8]}; main is updated but not tagged" in message
    assert repository.tags == {"v1": repository.commits[1].oid}
    assert message.endswith(f"python training/publish.py {folder} ann/tiny --tag ANOTHER")
    publish_folder(folder, "ann/tiny", "v2")
    assert len(repository.commits) == 3
    assert repository.tags["v2"] == repository.main.oid


# ---- what is refused before anything is sent ----


@pytest.mark.parametrize(
    "name",
    [
        "all_results.json",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "modeling_fambav.py",  # named by config.json
        "token_fusion.py",  # imported by that one
    ],
)
def test_incomplete_folder_is_refused(hub, repository, folder, name):
    (folder / name).unlink()
    assert f"{name} missing or empty" in error_of(publish_folder, folder, "ann/tiny")
    assert hub.requests == []


def test_empty_weights_are_refused(hub, repository, folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors missing or empty" in error_of(publish_folder, folder, "ann/tiny")
    assert hub.requests == []


def test_config_without_code_is_refused(hub, repository, folder):
    (folder / "config.json").write_text("{}")
    assert "config.json names no code, expected an auto_map" in error_of(publish_folder, folder, "ann/tiny")


@pytest.mark.parametrize("content", ["{}", "[]", "not json"])
def test_results_that_name_no_run_need_a_tag(hub, repository, folder, content):
    (folder / "all_results.json").write_text(content)
    assert "all_results.json: expected steps and seed" in error_of(publish_folder, folder, "ann/tiny")
    assert hub.requests == []
    publish_folder(folder, "ann/tiny", "v1")


def test_missing_folder_is_refused(hub, tmp_path):
    assert "nothere: no such folder" in error_of(publish_folder, tmp_path / "nothere", "ann/tiny")


@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl", "notes.txt"])
def test_folder_with_the_token_is_refused(hub, repository, folder, name):
    with (folder / name).open("a") as file:
        file.write(f"HF_TOKEN={TOKEN} python train.py\n")
    assert f"{name}: contains your token; nothing was sent" in error_of(publish_folder, folder, "ann/tiny")
    assert hub.requests == []


# ---- the repository ----


@pytest.mark.parametrize("name", ["tiny", "ann/tiny"])
@pytest.mark.parametrize("private", [True, False])
def test_repository_is_created_once(hub, name, private):
    for _ in range(2):
        assert prepare_repository(name, private) == "ann/tiny"
        assert hub.repositories.keys() == {"ann/tiny"}
        assert hub.repositories["ann/tiny"].is_private == private


def test_public_repository_is_not_used_for_a_private_release(repository):
    assert "exists and is public, expected a private one" in error_of(prepare_repository, "tiny", True)


def test_private_repository_stays_private(hub):
    private = add_repository(hub, is_private=True)
    assert prepare_repository("tiny", False) == "ann/tiny"
    assert private.is_private


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "../x", "", "a b", "outputs/run.git"])
def test_bad_name_is_refused(hub, name):
    assert error_of(prepare_repository, name, False).startswith(f"repository {name!r}: expected NAME or OWNER/NAME")
    assert hub.requests == []


# ---- the token ----


def test_stored_login_is_used(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert prepare_repository("tiny", False) == "ann/tiny"


def test_missing_token(hub, release, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for function, arguments in [(prepare_repository, ("tiny", False)), (publish_folder, (release, "ann/tiny"))]:
        assert "no token; nothing was published. Run `hf auth login`, or set HF_TOKEN" in error_of(
            function, *arguments
        )
    assert hub.requests == []


@pytest.mark.parametrize("name", ["tiny", "ann/tiny"])
def test_wrong_token(hub, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = error_of(prepare_repository, name, False)
    assert "the token is not valid; run `hf auth login`, or correct HF_TOKEN (HTTP 401" in message
    assert "hf_wrong" not in message


@pytest.mark.parametrize("token", ["hf_a\x07b", "hf_a b", "hf_ä"])
def test_token_that_cannot_be_sent_is_not_quoted(hub, token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    message = error_of(prepare_repository, "tiny", False)
    assert "the token has characters that no token has" in message
    assert "hf_a" not in message and "hf_ä" not in message


@pytest.mark.parametrize("name", ["ann/tiny", "bob/new"])
def test_token_without_permission_is_found_before_training(repository, hub, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "the token may not write there" in error_of(prepare_repository, name, False)
    assert hub.repositories.keys() == {"ann/tiny"}


def test_permission_that_is_gone_after_training(repository, release, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    message = error_of(publish_folder, release, "ann/tiny")
    assert "the token may not write there" in message and "main was not touched" in message


def test_repository_that_is_gone_after_training(hub, release):
    message = error_of(publish_folder, release, "ann/tiny")
    assert "not found, or not to be seen with this token (HTTP 404" in message


# ---- failures on the way ----

UNCHANGED = "main was not touched"
UPDATED = "main is updated but not tagged"


@pytest.mark.parametrize("tag", [None, "v1"])
@pytest.mark.parametrize(
    ("request_", "action", "reason", "state"),
    [
        ("GET /api/models/ann/tiny", 500, "the Hub has a problem (HTTP 500", UNCHANGED),
        ("GET /api/models/ann/tiny", CUT, "no success with", UNCHANGED),
        ("POST /api/validate-yaml", 503, "the Hub has a problem (HTTP 503", UNCHANGED),
        ("POST /api/validate-yaml", 400, "Invalid metadata in README.md", UNCHANGED),
        ("POST .*/preupload/", 400, "injected, with Bearer <token> (HTTP 400", UNCHANGED),
        ("POST .*/preupload/", 503, "the Hub has a problem (HTTP 503", UNCHANGED),
        ("POST .*/objects/batch", 403, "the token may not write there", UNCHANGED),
        ("PUT /large/", CUT, "no success with", UNCHANGED),
        ("PUT /large/", 502, "the Hub has a problem (HTTP 502", UNCHANGED),
        ("POST /large/.*/verify", 500, "the Hub has a problem (HTTP 500", UNCHANGED),
        ("POST .*/commit/", 503, "the Hub has a problem (HTTP 503", UNCHANGED),
        ("POST .*/commit/", 429, "too many requests", UNCHANGED),
        ("POST .*/commit/", CUT, "no success with", UNCHANGED),
        ("POST .*/commit/", LOSE, "no success with", UPDATED),
        ("GET .*/refs", 500, "the Hub has a problem (HTTP 500", UPDATED),
        ("POST .*/tag/", 500, "the Hub has a problem (HTTP 500", UPDATED),
        ("POST .*/tag/", CUT, "no success with", UPDATED),
        ("POST .*/tag/", LOSE, "no success with", UPDATED),
    ],
)
def test_failure_leaves_main_whole_and_the_command_in_the_message_completes_it(
    repository, hub, release, request_, action, reason, state, tag, monkeypatch, capsys
):
    hub.faults = [Fault(request_, action)]
    message = error_of(publish_folder, release, "ann/tiny", tag)
    assert reason in message
    assert state in message
    assert len(repository.commits) == (2 if state == UPDATED else 1)

    hub.faults.clear()
    python, script, *arguments = shlex.split(message.rpartition(": ")[2])
    assert (python, script) == ("python", "training/publish.py")
    run_main(monkeypatch, *arguments)
    assert capsys.readouterr().out == f"published: {hub.endpoint}/ann/tiny\n"
    assert len(repository.commits) == 2
    assert messages(repository)[1] == f"Release {next(iter(repository.tags))}"
    assert list(repository.tags.values()) == [repository.main.oid]
    assert tag in (None, *repository.tags)
    assert repository.main.files["model.safetensors"] == (release / "model.safetensors").read_bytes()


def test_failure_that_leaves_the_hub_silent(repository, hub, release):
    hub.faults = [Fault("POST .*/commit/", 503), Fault("GET /api/models/ann/tiny", CUT, skip=1)]
    message = error_of(publish_folder, release, "ann/tiny")
    assert "the Hub has a problem (HTTP 503" in message
    assert "main is either unchanged or has the whole release" in message


def test_upload_that_is_cut_once_is_tried_again(repository, hub, release):
    hub.faults = [Fault("PUT /large/", CUT, times=1)]
    publish_folder(release, "ann/tiny", "v1")
    assert messages(repository) == ["initial commit", "Release v1"]
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 2


def test_commit_of_somebody_else_is_not_mixed_with_a_release(repository, release, monkeypatch):
    create_commit = HfApi.create_commit

    def come_second(*args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        repository.commits.append(Commit("of somebody else", {"README.md": b"theirs"}, repository.main.oid))
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", come_second)
    message = error_of(publish_folder, release, "ann/tiny", "v1")
    assert "somebody else changed the repository meanwhile (HTTP 412" in message and UNCHANGED in message
    assert messages(repository) == ["initial commit", "of somebody else"]
    publish_folder(release, "ann/tiny", "v1")
    assert messages(repository) == ["initial commit", "of somebody else", "Release v1"]


@pytest.mark.parametrize("action", [500, CUT])
@pytest.mark.parametrize("request_", ["GET /api/whoami-v2", "POST /api/repos/create", "GET .*/auth-check/write"])
def test_failure_before_training(hub, request_, action):
    hub.faults = [Fault(request_, action)]
    message = error_of(prepare_repository, "tiny", False)
    assert "the Hub has a problem (HTTP 500" in message or "no success with" in message
    assert "nothing was published" in message
    hub.faults.clear()
    assert prepare_repository("tiny", False) == "ann/tiny"


def test_hub_that_never_answers(hub, monkeypatch):
    monkeypatch.setattr(release_hub, "_TIMEOUT_SECONDS", 0.3)
    hub.faults = [Fault("GET /api/whoami-v2", HANG)]
    assert "ReadTimeout" in error_of(prepare_repository, "tiny", False)
    assert huggingface_hub.get_session().timeout.read is None  # that of other users of the client


def test_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    message = error_of(prepare_repository, "tiny", False)
    assert "no success with http://127.0.0.1:1 (ConnectError" in message


def test_offline_mode(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on, expected HF_HUB_OFFLINE not to be set" in error_of(prepare_repository, "tiny", False)
    assert hub.requests == []


def test_card_on_the_hub_names_the_repository(repository, folder):
    assert LOCATION in (folder / "README.md").read_text()
    publish_folder(folder, "ann/tiny")
    card = repository.main.files["README.md"].decode()
    assert 'model="ann/tiny"' in card and LOCATION not in card


def test_quantised_model_is_published_with_its_base(repository, tmp_path):
    model, report = FambaVForImageClassification(tiny_config()), {"model": "shapes", "method": "static", "rounds": 1}
    row = {"name": "ONNX Runtime, int8 static", "top1": 60.0}
    report |= {"dataset": "digits", "split": "train", "validation_images": 9, "calibration_images": 9}
    (tmp_path / "model.onnx").write_bytes(b"model")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    report |= {"precisions": [row], "device": "cpu"}
    files = processor, tmp_path / "model.onnx", report, base_model_of(None, str(tmp_path)), ""
    write_quantized_release(tmp_path / "int8", model.config, *files)
    publish_folder(tmp_path / "int8", "ann/tiny")
    [tag] = repository.tags
    assert re.fullmatch("int8-[0-9a-f]{8}", tag)
    assert repository.main.files["onnx/model_quantized.onnx"] == b"model"
    card = repository.main.files["README.md"].decode()
    assert f"base_model: ann/{tmp_path.name}\n" in card and "base_model_relation: quantized\n" in card
    assert 'folder = "ann/tiny"' in card and 'folder / "onnx/model_quantized.onnx"' in card and LOCATION not in card


# ---- from training to the Hub in one command ----


@pytest.mark.slow
def test_training_publishes_what_it_trained(hub, tmp_path):
    environment = client_environment(hub, tmp_path)
    flags = command_line(**{**FLAGS, "max_train_steps": 4, "push_to_hub": True, "hub_private_repo": True})
    folder = tmp_path / "my-digits"
    process = run_python(REPOSITORY / "training" / "train.py", *flags, "--output_dir", folder, **environment)
    assert process.returncode == 0, process.stderr
    assert f"published: {hub.endpoint}/ann/my-digits" in process.stdout
    assert TOKEN not in process.stdout + process.stderr
    repository = hub.repositories["ann/my-digits"]
    assert repository.is_private
    files = repository.main.files
    for name in ("model.safetensors", "README.md", "all_results.json", "training.png", "metrics.jsonl"):
        assert files[name] == (folder / name).read_bytes()
    assert 'model="ann/my-digits"' in files["README.md"].decode()


@pytest.mark.slow
def test_a_hub_that_refuses_stops_a_run_before_it_begins(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_wrong", "HF_HUB_OFFLINE": "0"}
    words = [*command_line(**FLAGS), "--push_to_hub", "--output_dir", tmp_path / "out"]
    process = run_python(REPOSITORY / "training" / "train.py", *words, HF_HOME=str(tmp_path), **environment)
    assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() and "hf_wrong" not in process.stdout + process.stderr
