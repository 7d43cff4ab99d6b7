"""Native code runs only if someone whom the user trusts signed it."""

from __future__ import annotations

import logging
import stat
import threading
from pathlib import Path

import pytest
import torch

from accel.errors import ArtifactError, TrustError
from accel.runtime import trust
from accel.runtime.artifact import Artifact
from accel.runtime.interfaces import HostCode
from accel.runtime.loader import Rebuilt, load
from accel.runtime.verify import verify_artifact
from tests.runtime.models import example_inputs, expected, write_small
from tests.runtime.support import host_code


def _never(data: bytes) -> HostCode:
    raise AssertionError("native code was loaded")


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """An artifact signed by someone else, and that person's key."""
    path = tmp_path / "m.accel"
    with monkeypatch.context() as other:
        other.setenv("ACCEL_CACHE_DIR", str(tmp_path / "other"))
        write_small(path, kernels=True)
        key = trust.own_public_key()
    return path, key


def _works(path: Path, **options: object) -> bool:
    inputs = example_inputs()
    y = load(path, **options)(inputs["x"], ids=inputs["ids"])["y"]  # type: ignore[arg-type]
    return torch.allclose(y, expected(True, **inputs)[0])


def test_own_artifacts_are_trusted(tmp_path: Path) -> None:
    write_small(tmp_path / "m.accel", kernels=True)
    assert _works(tmp_path / "m.accel")


def test_strangers_are_not(strange: tuple[Path, str]) -> None:
    path, key = strange
    with pytest.raises(TrustError, match=key) as caught:
        load(path, load_host=_never)
    assert caught.value.id == "ACCEL051"
    assert "trust=True" in caught.value.advice
    trust.own_key()  # the user has a key now, and it is another one
    with pytest.raises(TrustError):
        load(path, load_host=_never)
    assert not verify_artifact(path).ok


def test_trust_for_once(strange: tuple[Path, str]) -> None:
    assert _works(strange[0], trust=True)
    assert verify_artifact(strange[0], trust=True).ok


def test_trusted_keys(strange: tuple[Path, str], own_cache: Path) -> None:
    path, key = strange
    trust.add_trusted_key("ab" * 32, "somebody else")
    with pytest.raises(TrustError):
        load(path, load_host=_never)
    trust.add_trusted_key(key, "a colleague\nwith a long name")
    assert _works(path)
    lines = (own_cache / "keys" / "trusted_keys").read_text().splitlines()
    assert lines == [f"{'ab' * 32}  # somebody else", f"{key}  # a colleague with a long name"]
    with pytest.raises(TrustError, match="is no public key"):
        trust.add_trusted_key("short")
    (own_cache / "keys" / "trusted_keys").write_text("# comment\n\nnonsense\n")
    with pytest.raises(TrustError, match="no public key") as caught:
        load(path)
    assert caught.value.where.endswith("trusted_keys:3")


def test_rebuilt_from_the_ir(
    strange: tuple[Path, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook gets the artifact and returns plans and code; the log says so."""
    seen: list[str] = []

    def rebuild(artifact: Artifact) -> Rebuilt:
        seen.append(artifact.ir("kernels"))
        return Rebuilt(artifact.manifest.functions, host_code())

    monkeypatch.setattr(logging.getLogger("accel"), "propagate", True)
    with caplog.at_level("WARNING"):
        assert _works(strange[0], rebuild=rebuild, load_host=_never)
    assert seen == ["module { func @main }\n"]
    assert "rebuilt from the IR" in caplog.text
    with pytest.raises(ArtifactError, match="other functions"):
        load(strange[0], rebuild=lambda a: Rebuilt({}, None))


def test_an_artifact_without_native_code_needs_no_trust(tmp_path: Path, own_cache: Path) -> None:
    write_small(tmp_path / "m.accel")
    inputs = example_inputs()
    assert load(tmp_path / "m.accel")(inputs["x"], inputs["ids"])["rows"][1] == "done"
    assert not own_cache.exists()  # no key was made


class TestOwnKey:
    def test_made_once_and_private(self, own_cache: Path) -> None:
        key = trust.own_public_key()
        path = own_cache / "keys" / "own.pem"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert trust.own_public_key() == key
        assert [p.name for p in path.parent.iterdir()] == ["own.pem"]

    def test_made_by_many_at_once(self) -> None:
        keys: list[str] = []
        threads = [
            threading.Thread(target=lambda: keys.append(trust.own_public_key())) for _ in range(8)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(keys) == 8
        assert len(set(keys)) == 1

    def test_readable_by_others(self, own_cache: Path) -> None:
        trust.own_key()
        (own_cache / "keys" / "own.pem").chmod(0o644)
        with pytest.raises(TrustError, match="can be read by others"):
            trust.own_key()

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\n"])
    def test_damaged(self, own_cache: Path, content: bytes) -> None:
        trust.own_key()
        (own_cache / "keys" / "own.pem").write_bytes(content)
        with pytest.raises(TrustError, match="damaged"):
            trust.own_key()

    def test_no_place_for_it(self, own_cache: Path) -> None:
        own_cache.parent.mkdir(exist_ok=True)
        own_cache.write_text("a file where a folder should be")
        with pytest.raises(TrustError, match="cannot be read or made"):
            trust.own_key()
