"""From a path or a Hugging Face repository to a directory on this machine."""

import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

PROCESSOR_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What of a repository belongs to a model's inputs and outputs, and not to its weights."""

NEEDED_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    *PROCESSOR_FILES,
)
"""What is downloaded of a repository. No pickle file, no code."""

UNNEEDED_FILES = ("*/*", "consolidated*")
"""What is left out of it: folders, and a second copy of the weights in another layout."""


def resolve(
    path_or_repo_id: str | PathLike[str],
    *,
    token: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    files: Sequence[str] = NEEDED_FILES,
) -> Path:
    """A directory as it is; a hub repository downloaded, with huggingface_hub's progress bars.

    Args:
        path_or_repo_id: a directory, or ``owner/name`` on the hub.
        token: for private and gated repositories; None uses the one that ``hf auth login`` stored.
        revision: branch, tag or commit.
        local_files_only: use what is in the cache and do not ask the hub.
        files: patterns of the files to download.

    Returns:
        The directory that holds the files.

    Raises:
        FileNotFoundError: no such directory, repository or revision, or it cannot be downloaded.
        NotADirectoryError: the path is a file.
        PermissionError: the repository is gated.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; pass the directory that holds config.json")
    name = str(path_or_repo_id)
    if not isinstance(path_or_repo_id, str) or path.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"there is no directory {path}")
    at = f"{name} at revision {revision}" if revision else name
    elsewhere = (
        f"Or download it on a machine with network by `hf download {name} --local-dir DIR` "
        "and pass that directory."
    )
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(files),
                ignore_patterns=list(UNNEEDED_FILES),
            )
        )
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no directory {name!r}, and it is no repository id (owner/name) of the hub either"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{at} is gated: accept its terms at https://huggingface.co/{name}, then pass token=... "
            "or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"the repository {name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no directory {name!r} and no repository of that name on the hub, or it is private: "
            "check the name, or pass token=... or run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        if local_files_only:
            raise FileNotFoundError(
                f"{at} is not in the cache, and local_files_only=True forbids to download it. "
                f"Call once without local_files_only. {elsewhere}"
            ) from error
        raise FileNotFoundError(
            f"there is no directory {name!r}, the hub cannot be reached, and {at} is not in the cache. "
            f"Check the network. {elsewhere}"
        ) from error
    except (OfflineModeIsEnabled, ConnectionError) as error:
        raise FileNotFoundError(
            f"there is no directory {name!r}, and the hub cannot be reached for {at}: {error}. "
            f"Check the network. {elsewhere}"
        ) from error


def copy_processor_files(source: Path, directory: Path) -> None:
    """Copy the files of a model's processor, and its generation config, as they are."""
    for pattern in PROCESSOR_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def upload(
    directory: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put the files of a directory into a repository of the hub, which is made if it does not exist.

    Args:
        directory: the files.
        repo_id: ``owner/name``, or a name of one's own.
        token: with write access; None uses the one that ``hf auth login`` stored.
        private: whether a new repository is; None leaves it to the hub's default.
        commit_message: the commit's first line.
        commit_description: what else it says.
        revision: branch to commit to, which is made if it does not exist; None for the main one.
        create_pr: open a pull request.

    Returns:
        The address of the commit.

    Raises:
        ValueError: `repo_id` is none.
        OSError: the hub cannot be reached or refuses, with huggingface_hub's reason.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=directory,
            repo_id=repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id (owner/name) of the hub") from error
    return str(commit.commit_url)
