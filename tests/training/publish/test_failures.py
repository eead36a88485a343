"""A Hub that fails on the way: main stays whole, and the error says what to do."""

import shlex

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants

from fambav_training.release import hub as release_hub
from fambav_training.release.hub import prepare_repository, publish_folder
from support.hub_server import CUT, HANG, LOSE, Commit, Fault
from support.releases import error_of, messages, run_main

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
