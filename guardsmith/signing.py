"""Signatures of published models (OpenSSF Model Signing; `pip install guardsmith[signing]`), with an elliptic-curve key.

Signed is every file but the model card, which people go on editing, and what the Hub and its client add.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from guardsmith.errors import GuardsmithError, UserError
from guardsmith.models import EVIDENCE

SIGNATURE = f"{EVIDENCE}/model.sig"
UNSIGNED = ("README.md", ".cache", ".gitattributes", SIGNATURE)


class BadSignature(GuardsmithError):
    """A model is not what was signed, or not by that key (exit code 1)."""

    exit_code = 1


def check_key(key: Path) -> None:
    """What can be said before there is anything to sign.

    Raises:
        UserError: the package is missing, or there is no such key.
    """
    if find_spec("model_signing") is None or find_spec("OpenSSL") is None:
        raise UserError("signatures need the package model-signing; install guardsmith[signing]")
    if not key.is_file():
        raise UserError(
            f"there is no key {key}; make one with `openssl ecparam -name prime256v1 -genkey -noout -out {key}`"
        )


def sign(folder: Path, key: Path) -> None:
    """Write `SIGNATURE` into a folder.

    Args:
        folder: a release.
        key: private key, PEM, elliptic curve.

    Raises:
        UserError: see `check_key`; or the key is of another kind.
    """
    check_key(key)
    from model_signing import hashing, signing

    ignored = hashing.Config().set_ignored_paths(paths=[folder / name for name in UNSIGNED], ignore_git_paths=True)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(ignored)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{key} is no private key of an elliptic curve ({type(error).__name__})") from error
    config.sign(folder, folder / SIGNATURE)


def check_signature(folder: Path, key: Path) -> None:
    """Whether a folder is what the owner of a key signed.

    Args:
        folder: a published model, downloaded whole.
        key: public key, PEM.

    Raises:
        BadSignature: it is not.
        UserError: see `check_key`; or there is no signature.
    """
    check_key(key)
    from model_signing import verifying

    signature = folder / SIGNATURE
    if not signature.is_file():
        raise UserError(f"{folder} has no signature ({SIGNATURE})")
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, signature)
    except (
        Exception
    ) as error:  # the library raises what its parts raise: a wrong key, an altered signature, another file
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(": Expected")[0][:200]
        raise BadSignature(f"{folder} is not what was signed with {key}: {reason}") from error
