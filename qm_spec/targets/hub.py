"""A target from the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from qm_spec.targets.folder import is_disk_full, sha256

# Of one request, when the hub is asked whether it is there.
_REACH_TIMEOUT_S = 5.0
# The model itself: the hub's repositories hold other formats in sub-folders.
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*"]


def download_from_hub(repository: str, folder: Path) -> str:
    """Download a model's files into a folder and return the revision they are of, a commit.

    What an earlier call has brought into the folder is not downloaded again.

    Raises:
        ConnectionError: the hub cannot be reached, does not have the model, or broke off.
        ValueError: a file came damaged; it is removed, and the others stay.
        Exception: the disk is full; what is raised then is its library's own.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download

        info = HfApi().model_info(repository, timeout=_REACH_TIMEOUT_S, files_metadata=True)
        snapshot_download(
            repository, revision=info.sha, local_dir=folder, allow_patterns=_MODEL_FILES, ignore_patterns=["*/*"]
        )
    # The hub's client lets through what its HTTP and transfer libraries raise, and those change between versions.
    except Exception as error:
        if is_disk_full(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConnectionError(reason) from error
    for published in info.siblings or []:
        file = folder / published.rfilename
        # The hub states the hash of large files only.
        if published.lfs is not None and file.is_file() and sha256(file) != published.lfs.sha256:
            file.unlink()
            raise ValueError(f"{repository}: {file.name} came damaged, its sha256 is not the hub's; run this again")
    # The client's notes of what is complete.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return str(info.sha)
