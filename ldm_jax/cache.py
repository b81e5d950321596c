"""Where downloaded packages and weights are kept: environment => a folder."""

import os
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
