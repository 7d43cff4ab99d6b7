"""Who may give this process native code to run.

Host code (a shared object in an artifact) can do anything, so it is loaded only if its manifest is
signed (Ed25519) by a key that this user trusts: the user's own, made on first use, or one listed in
`trusted_keys` beside it. The signature covers the manifest, which holds the sha256 of every file.

    <cache folder>/keys/own.pem          private key, readable by the user only
    <cache folder>/keys/trusted_keys     one public key (64 hex digits) a line; # starts a comment
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from accel.config import cache_dir
from accel.errors import ArtifactError, TrustError

_CONTEXT = b"accel artifact manifest, version 1\0"
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Signature:
    """What `signature.json` holds: the algorithm, the signer's public key, the signature (hex)."""

    algorithm: str
    key: str
    signature: str


def _folder() -> Path:
    return cache_dir() / "keys"


def own_key() -> Ed25519PrivateKey:
    """The user's own key; it is made, with mode 0600, if there is none.

    Raises TrustError if others may read it, or if it cannot be read or made.
    """
    path = _folder() / "own.pem"
    try:
        if not path.exists():
            _make_key(path)
        mode = path.stat().st_mode
        if mode & 0o077:
            raise TrustError(
                f"the signing key can be read by others (mode {mode & 0o777:o})",
                where=str(path),
                advice=f"chmod 600 {path}, or delete it to have a new one made",
            )
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise TrustError(
            f"the signing key cannot be read or made: {error.strerror or error}",
            where=str(path),
            advice="set ACCEL_CACHE_DIR to a folder that you may write to",
        ) from error
    except (ValueError, TypeError) as error:
        raise TrustError(
            "the signing key is damaged", where=str(path), advice="delete it to have a new one made"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError("the signing key is of another kind than Ed25519", where=str(path))
    return key


def _make_key(path: Path) -> None:
    """Appears at once and complete; if another process was faster, its key is kept."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    temporary = path.with_name(f".own.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()


def _public(key: Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def own_public_key() -> str:
    """The user's own public key, 64 hex digits: what others put into their `trusted_keys`."""
    return _public(own_key().public_key())


def sign(manifest: bytes) -> Signature:
    """Signs a manifest with the user's own key."""
    key = own_key()
    return Signature("ed25519", _public(key.public_key()), key.sign(_CONTEXT + manifest).hex())


def check_signature(manifest: bytes, signature: Signature) -> None:
    """Raises ArtifactError if the signature is not of this manifest by the key that it names."""
    try:
        if signature.algorithm != "ed25519" or _KEY.fullmatch(signature.key) is None:
            raise ValueError("unknown algorithm or key")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
        key.verify(bytes.fromhex(signature.signature), _CONTEXT + manifest)
    except (InvalidSignature, ValueError) as error:
        raise ArtifactError(
            "the signature does not fit the manifest: the artifact was changed after it was signed",
            advice="get it again from where it comes from",
        ) from error


def trusted_keys() -> set[str]:
    """Public keys that this user trusts, the own one included if there is one."""
    found: set[str] = set()
    path = _folder() / "trusted_keys"
    if path.exists():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            key = line.partition("#")[0].strip()
            if key and _KEY.fullmatch(key) is None:
                raise TrustError(
                    "a line that is no public key (64 hex digits)", where=f"{path}:{number}"
                )
            found |= {key} if key else set()
    if (_folder() / "own.pem").exists():
        found.add(own_public_key())
    return found


def add_trusted_key(key: str, comment: str = "") -> None:
    """Adds a public key to `trusted_keys`. Raises TrustError if it is none."""
    if _KEY.fullmatch(key) is None:
        raise TrustError(f"'{key[:80]}' is no public key", advice="give its 64 hex digits")
    path = _folder() / "trusted_keys"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    note = " ".join(comment.split())
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(f"{key}  # {note}\n" if note else f"{key}\n")
