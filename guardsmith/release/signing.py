"""Signatures of published models (OpenSSF Model Signing; `pip install guardsmith[signing]`).

With an elliptic-curve key of one's own, or without one (Sigstore: the identity that a CI job or a browser login proves, in a
certificate of minutes and a public log). Signed is every file but the model card, which people go on editing, and what the Hub
and its client add.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from guardsmith.core.errors import GuardsmithError, RunFailed, UserError
from guardsmith.models.contents import EVIDENCE

SIGNATURE = f"{EVIDENCE}/model.sig"
UNSIGNED = ("README.md", ".cache", ".gitattributes", SIGNATURE)


class BadSignature(GuardsmithError):
    """A model is not what was signed, or not by that key or identity (exit code 1)."""

    exit_code = 1


def check_package() -> None:
    """Whether signatures can be made here.

    Raises:
        UserError: the package is missing.
    """
    if find_spec("model_signing") is None or find_spec("OpenSSL") is None:
        raise UserError("signatures need the package model-signing; install guardsmith[signing]")


def check_key(key: Path) -> None:
    """What can be said before there is anything to sign.

    Raises:
        UserError: the package is missing, or there is no such key.
    """
    check_package()
    if not key.is_file():
        raise UserError(
            f"there is no key {key}; make one with `openssl ecparam -name prime256v1 -genkey -noout -out {key}`"
        )


def sign(folder: Path, key: Path | None, earlier: Path | None = None) -> None:
    """Write `SIGNATURE` into a folder.

    Args:
        folder: a release.
        key: private key, PEM, elliptic curve; `None` for Sigstore.
        earlier: an earlier release; its signature is kept if it holds for this one too, so that nothing changes where nothing
            changed. With a key only: no other signature says which identity would be asked for.

    Raises:
        UserError: see `check_key`; or the key is of another kind.
        RunFailed: Sigstore gave no signature.
    """
    check_package()
    from model_signing import hashing, signing

    ignored = hashing.Config().set_ignored_paths(paths=[folder / name for name in UNSIGNED], ignore_git_paths=True)
    if key is None:
        try:
            config = signing.Config().use_sigstore_signer(use_ambient_credentials=True).set_hashing_config(ignored)
            config.sign(folder, folder / SIGNATURE)
        except Exception as error:  # whatever its parts raise: no network, no identity, a log that does not answer
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise RunFailed(
                f"Sigstore gave no signature ({reason}); sign with a key (--sign-key), or not at all"
            ) from error
        return
    check_key(key)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(ignored)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{key} is no private key of an elliptic curve ({type(error).__name__})") from error
    if earlier is not None and (earlier / SIGNATURE).is_file():
        shutil.copyfile(earlier / SIGNATURE, folder / SIGNATURE)
        try:
            with TemporaryDirectory() as place:
                check_signature(folder, _public(key, Path(place) / "key.pub"))
        except BadSignature:
            (folder / SIGNATURE).unlink()
        else:
            return
    config.sign(folder, folder / SIGNATURE)


def _public(key: Path, file: Path) -> Path:
    """Write the public key that belongs to a private one."""
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(key.read_bytes(), None)
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    file.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return file


def check_signature(
    folder: Path, key: Path | None = None, *, identity: str | None = None, issuer: str | None = None
) -> None:
    """Whether a folder is what the owner of a key, or of an identity, signed.

    Args:
        folder: a published model, downloaded whole.
        key: public key, PEM; `None` for Sigstore.
        identity: who signed, without a key: an address, or the URL of a workflow.
        issuer: who vouches for that identity, a URL.

    Raises:
        BadSignature: it is not.
        UserError: see `check_key`; or there is no signature.
    """
    if key is None:
        check_package()
    else:
        check_key(key)
    from model_signing import verifying

    signature = folder / SIGNATURE
    if not signature.is_file():
        raise UserError(f"{folder} has no signature ({SIGNATURE})")
    try:
        if key is None:
            config = verifying.Config().use_sigstore_verifier(identity=identity or "", oidc_issuer=issuer or "")
        else:
            config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.verify(folder, signature)
    except Exception as error:  # whatever its parts raise: a wrong key, an altered signature, another file
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(": Expected")[0][:200]
        raise BadSignature(f"{folder} is not what was signed with {key or identity}: {reason}") from error
