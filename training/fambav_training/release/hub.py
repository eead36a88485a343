"""A release on the Hugging Face Hub: one commit with all its files, and a tag that names it.

Whatever fails on the way, the same command completes it: the main branch holds either what it held before or the whole
release, and what is there already is not sent again.
"""

import contextlib
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from fambav_training.release.model_card import LOCATION
from fambav_training.release.quantized import ONNX_FILE, OWNER, QUANTIZED_FILE
from fambav_training.release.saving import RESULTS_FILE
from fambav_training.run.checkpointing import FOLDER as CHECKPOINTS

_CARD = "README.md"
_REQUIRED = (RESULTS_FILE, "config.json", "model.safetensors", "preprocessor_config.json", _CARD)
_REQUIRED_QUANTIZED = (QUANTIZED_FILE, ONNX_FILE, "config.json", "preprocessor_config.json", _CARD)
# Of trackers
LOGS = "logs"
_LEFT_OUT = (CHECKPOINTS, LOGS, "*tfevents*", "nonfinite_step_*", "*.partial", "__pycache__", ".*")
_SEARCHED_BYTES = 1_000_000
_TAG = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)
# The client waits for an answer forever. No answer of the Hub takes this long.
_TIMEOUT_SECONDS = 300


class PublishError(ValueError):
    """A release that was not published, or not completely: why, what the repository holds now, and what to do."""


def prepare_repository(repo_id: str, private: bool) -> str:
    """Make sure that a release can be published, before hours are spent on it: token, permission, repository.

    Args:
        repo_id: `NAME`, which is one of the user of the token, or `OWNER/NAME`. It is created if it is new.
        private: whether nobody else may see it. If not, what is there stays as it is, and an organization decides
            about its new ones.

    Returns:
        `OWNER/NAME`.

    Raises:
        PublishError: if a release cannot be published there.
    """
    api = _connect(repo_id)
    with _hub_errors(api, repo_id, lambda _: "nothing was published"):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        # For a repository that exists, `create_repo` is content with a token that may only read
        api.auth_check(repo_id, write=True)
        is_private = api.model_info(repo_id).private
    if private and not is_private:
        raise PublishError(
            f"{repo_id}: exists and is public, expected a private one; nothing was published. Make it private in its "
            "settings on the Hub, or choose another name"
        )
    return repo_id


def publish_folder(folder: Path, repo_id: str, tag: str | None = None) -> str:
    """Upload a finished release as one commit on the main branch, and tag this commit.

    Checkpoints, logs, reports of steps that were not finite and hidden files stay behind. Files of an earlier release
    that this one does not have stay on the Hub.

    Args:
        folder: a release, with its code.
        repo_id: `OWNER/NAME` that `prepare_repository` returned.
        tag: name of the commit, `step-STEPS-seed-SEED-DIGEST` if None, or `int8-DIGEST` of a quantised model. The
            digest is one of all files, so that another model has another tag.

    Returns:
        The address of the repository.

    Raises:
        PublishError: if the folder is not a whole release, contains the token, or cannot be published.
    """
    files = find_files(folder)
    if tag is not None:
        check_tag(tag)
    api = _connect(repo_id)
    _refuse_token(files, api.token)
    operations = [CommitOperationAdd(name, path) for name, path in files.items() if name != _CARD]
    # Readers load it from the Hub
    card = files[_CARD].read_text().replace(LOCATION, repo_id).replace(OWNER, repo_id.split("/")[0])
    operations.append(CommitOperationAdd(_CARD, card.encode()))
    command = shlex.join(["python", "training/publish.py", str(folder), repo_id])
    same_command = command if tag is None else f"{command} --tag {tag}"
    tag = tag or _default_tag(files)

    with _hub_errors(api, repo_id, lambda _: f"main was not touched. To try again: {same_command}"):
        before = api.model_info(repo_id).sha

    def describe_failed_commit(error: Exception) -> str:
        return f"{_state_of_main(api, repo_id, before, error)}. To complete it: {same_command}"

    with _hub_errors(api, repo_id, describe_failed_commit):
        # Not `upload_folder`, which may make several commits. With `parent_commit` nobody else's commit comes between.
        commit = api.create_commit(repo_id, operations, commit_message=f"Release {tag}", parent_commit=before).oid

    with _hub_errors(api, repo_id, lambda _: f"main is updated but not tagged. To complete it: {same_command}"):
        tagged = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tag not in tagged:
            api.create_tag(repo_id, tag=tag, revision=commit)
    if tagged.get(tag, commit) != commit:
        raise PublishError(
            f"{repo_id}: tag {tag!r} names another commit, {tagged[tag][:8]}; main is updated but not tagged. Give "
            f"another: {command} --tag ANOTHER"
        )
    return f"{api.endpoint}/{repo_id}"


def find_files(folder: Path) -> dict[str, Path]:
    """The files of a release, by their names in the repository.

    Raises:
        PublishError: if one that a release needs is missing or empty.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder}: no such folder, expected one of a finished training run")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatchcase(part, pattern) for part in name.parts for pattern in _LEFT_OUT):
            files[name.as_posix()] = path
    is_quantized = QUANTIZED_FILE in files
    required = _REQUIRED_QUANTIZED if is_quantized else _REQUIRED
    missing = [name for name in required if name not in files or not files[name].stat().st_size]
    if not missing and not is_quantized:
        missing = _missing_code(folder)
    if missing:
        source = "quantize.py" if is_quantized else "a finished training run"
        raise PublishError(
            f"{folder}: {', '.join(missing)} missing or empty, expected the folder of {source}; nothing was sent"
        )
    return files


def _missing_code(folder: Path) -> list[str]:
    try:
        references = json.loads((folder / "config.json").read_text())["auto_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError(f"{folder}: config.json names no code, expected an auto_map; nothing was sent") from error
    missing = set()
    for module in {reference.split(".")[0] for reference in references}:
        try:
            # Reads the module and all that it imports
            get_relative_import_files(folder / f"{module}.py")
        except FileNotFoundError as error:
            missing.add(Path(error.filename).name)
    return sorted(missing)


def check_tag(tag: str) -> None:
    """Raise a `PublishError` if git, or a shell, would not take this tag as it is."""
    if not _TAG.fullmatch(tag) or ".." in tag or tag.endswith((".", ".lock")):
        raise PublishError(f"--tag {tag!r}: expected letters, digits and . _ + -, such as v1.0; nothing was sent")


def _default_tag(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    if QUANTIZED_FILE in files:
        return f"int8-{digest.hexdigest()[:8]}"
    try:
        results = json.loads(files[RESULTS_FILE].read_text())
        steps, seed = int(results["steps"]), int(results["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{files[RESULTS_FILE]}: expected steps and seed, which name the release; give --tag; nothing was sent"
        ) from error
    return f"step-{steps}-seed-{seed}-{digest.hexdigest()[:8]}"


def _connect(repo_id: str) -> HfApi:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(
            f"repository {repo_id!r}: expected NAME or OWNER/NAME; nothing was published. {error}"
        ) from error
    try:
        token = get_token()
    except Exception as error:  # a login that runs out is renewed over the network, which fails in many ways
        raise PublishError(
            f"{repo_id}: the stored login cannot be renewed ({type(error).__name__}); nothing was published. Run "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    if token is None:
        raise PublishError(f"{repo_id}: no token; nothing was published. Run `hf auth login`, or set HF_TOKEN")
    # Another one would be quoted by an error about headers
    if not re.fullmatch("[!-~]+", token):
        raise PublishError(
            f"{repo_id}: the token has characters that no token has; nothing was published. Run `hf auth login`, or "
            "correct HF_TOKEN"
        )
    return HfApi(token=token)


def _refuse_token(files: dict[str, Path], token: str) -> None:
    for path in files.values():
        if path.stat().st_size < _SEARCHED_BYTES and token.encode() in path.read_bytes():
            raise PublishError(f"{path}: contains your token; nothing was sent. Remove it, and replace the token")


@contextlib.contextmanager
def _hub_errors(api: HfApi, repo_id: str, describe_state: Callable[[Exception], str]) -> Iterator[None]:
    """Turn whatever the client raises into a `PublishError`, and limit how long it waits for an answer."""
    session = get_session()
    timeout = session.timeout
    session.timeout = _TIMEOUT_SECONDS
    try:
        yield
    except Exception as error:  # errors of HTTP, of the system, RuntimeError, ValueError, and KeyError for bad answers
        text = f"{repo_id}: {_describe(error, api)}; {describe_state(error)}"
        raise PublishError(text.replace(api.token, "<token>")) from error
    finally:
        session.timeout = timeout


def _describe(error: Exception, api: HfApi) -> str:
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # an upload in a thread
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on, expected HF_HUB_OFFLINE not to be set"
    if not isinstance(error, HfHubHTTPError):
        return f"no success with {api.endpoint} ({type(error).__name__}: {' '.join(str(error).split())})"
    status = error.response.status_code
    reasons = {
        401: "the token is not valid; run `hf auth login`, or correct HF_TOKEN",
        403: "the token may not write there; it needs write permission, and its user must own or belong to OWNER",
        404: "not found, or not to be seen with this token",
        412: "somebody else changed the repository meanwhile",
        429: "too many requests; wait some minutes",
    }
    reason = reasons.get(status, "the Hub has a problem" if status >= 500 else error.server_message or "refused")
    return f"{reason} (HTTP {status} from {api.endpoint})"


def _state_of_main(api: HfApi, repo_id: str, before: str, error: Exception) -> str:
    """What is known about the main branch after a commit that went wrong."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:  # refused
        return "main was not touched"
    # Otherwise the commit may have been made, and only the answer lost
    try:
        after = api.model_info(repo_id).sha
    except Exception:  # whatever it is, there is an error to report already
        return "main is either unchanged or has the whole release"
    return "main was not touched" if after == before else "main is updated but not tagged"
