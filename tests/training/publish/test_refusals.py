"""What is refused before anything is sent: folders, repositories, tokens."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from fambav_training.release.hub import prepare_repository, publish_folder
from support.releases import READ_TOKEN, TOKEN, add_repository, error_of


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
