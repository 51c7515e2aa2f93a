"""The command ``lightning-peft push``: an adapter to a model hub, with a card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from lightning_peft.errors import PEFTError
from lightning_peft.files.card import CARD_FILE, write_card
from lightning_peft.files.manifest import check_manifest
from lightning_peft.formats.configuration import read_config
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE
from lightning_peft.storage.saving import FILES


def push(
    adapter: str, repo: str, endpoint: str | None = None, revision: str | None = None, private: bool = False
) -> None:
    """Send an adapter to a model hub: its files and a model card, and nothing of the run that trained it.

    Whoever is logged in with Hugging Face's tools, or has HF_TOKEN set, is who sends it.

    Args:
        adapter: The adapter directory.
        repo: The repository, such as NAME/my-adapter. It is made if there is none.
        endpoint: Address of the hub; that of Hugging Face, or of HF_ENDPOINT, if not given.
        revision: The branch to write to; the main one, if not given.
        private: Whether a repository that is made is to be private.

    Raises:
        PEFTError: There is no adapter, or the hub refuses or cannot be reached.
    """
    source = Path(adapter)
    read_config(source)
    check_manifest(source, FILES)
    with tempfile.TemporaryDirectory() as place:
        for name in (*FILES, CARD_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, Path(place) / name)
        if not (source / CARD_FILE).is_file():
            write_card(Path(place), CONFIG_FILE, TENSOR_FILE, {})
        api = HfApi(endpoint=endpoint)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            info = api.upload_folder(
                repo_id=repo, folder_path=place, revision=revision, commit_message="Adapter of lightning_peft"
            )
        except Exception as error:  # of the HTTP client underneath, which is another from release to release
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
            raise PEFTError(
                f"{adapter} was not sent to {repo!r} at {api.endpoint}: {reason}. Log in with `hf auth login`, and "
                "leave HF_HUB_OFFLINE unset."
            ) from error
    print(f"Sent {adapter} to {repo}: {info.oid}.")
