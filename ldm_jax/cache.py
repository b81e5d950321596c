"""Where downloaded packages and weights are kept: environment => a folder."""

import os
import re
from pathlib import Path


def cache_home() -> Path:
    """The folder that holds what is fetched once and used again.

    Returns:
        $LDM_JAX_CACHE if it is set, else $XDG_CACHE_HOME/ldm_jax, else ~/.cache/ldm_jax.
        The folder need not exist yet.
    """
    own = os.environ.get("LDM_JAX_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "ldm_jax"


def check_local(folder: str | os.PathLike) -> None:
    """Raises ValueError for an address where a folder is needed: pathlib would make one of it."""
    if re.match(r"\w{2,}:/", str(folder)):  # pathlib has dropped a slash, where it came first.
        raise ValueError(
            f"a folder must be one of this machine's file system, got {folder}: mount what it "
            "names (gcsfuse, s3fs) on all hosts"
        )
