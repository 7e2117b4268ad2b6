"""From a name to a directory; the hub itself is never asked."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from vlmlora.models import hub


def test_a_directory_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_path_that_is_not_there(tmp_path):
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", Path("owner/name")):
        with pytest.raises(FileNotFoundError, match="there is no directory"):
            hub.resolve(name)


def test_a_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        hub.resolve(file)


def test_no_repository_id():
    with pytest.raises(FileNotFoundError, match=r"no repository id \(owner/name\)"):
        hub.resolve("a/b/c")


def test_not_in_the_cache():
    with pytest.raises(
        FileNotFoundError, match=r"not in the cache.*Call once without local_files_only.*hf download"
    ):
        hub.resolve("nobody/nothing-of-the-kind", local_files_only=True)


def refuse(error):
    def snapshot_download(*args, **kwargs):
        raise error

    return snapshot_download


def without_response(cls):
    """An error of the hub's server, of which only the type counts."""
    return cls.__new__(cls)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            errors.LocalEntryNotFoundError("no"),
            FileNotFoundError,
            "cannot be reached.*hf download.*--local-dir",
        ),
        (errors.OfflineModeIsEnabled("no"), FileNotFoundError, "cannot be reached.*hf download.*--local-dir"),
        (
            without_response(errors.GatedRepoError),
            PermissionError,
            "accept its terms at https://huggingface.co/o/n",
        ),
        (without_response(errors.RepositoryNotFoundError), FileNotFoundError, "or it is private.*token="),
        (without_response(errors.RevisionNotFoundError), FileNotFoundError, "has no revision 'v9'"),
    ],
)
def test_errors_say_what_to_do(monkeypatch, error, raised, message):
    monkeypatch.setattr(hub, "snapshot_download", refuse(error))
    with pytest.raises(raised, match=message):
        hub.resolve("o/n", revision="v9")


def test_downloads_what_is_needed_and_no_more(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **kwargs):
        asked.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert hub.resolve("owner/name", token="t", revision="main") == tmp_path
    assert asked["token"] == "t"
    files = [
        *(
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ),
        *("chat_template.jinja", "merges.txt", "adapter_config.json", "preprocessor_config.json"),
        *("pytorch_model.bin", "modeling_qwen.py", "onnx/model.safetensors", "consolidated.safetensors"),
        *("README.md", "training_args.bin", "image.png"),
    ]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(chosen) == files[:8]
