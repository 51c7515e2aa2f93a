"""What whoever makes or changes a directory by hand does beside it."""

from pathlib import Path

from lightning_peft.files.manifest import MANIFEST


def unsealed(directory: Path) -> Path:
    """Take the manifest away, so that what reads the files has to find by itself what is wrong with them."""
    (directory / MANIFEST).unlink(missing_ok=True)
    return directory
