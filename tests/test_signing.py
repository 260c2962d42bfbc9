"""Signatures: what they cover, and what breaks them. The package is an extra; without it, that is a sentence."""

import importlib.util
import shutil
import subprocess

import pytest
from tiny import assert_one_sentence

from guardsmith.cli import app as cli
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.release import signing
from guardsmith.release.signing import BadSignature, check_key, check_signature, sign

needs = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("model_signing", "OpenSSL"))), reason="extra `signing`"
)


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "release"
    (folder / "unet").mkdir(parents=True)
    (folder / "guardsmith").mkdir()
    (folder / "unet" / "weights.safetensors").write_bytes(b"weights")
    (folder / "guardsmith" / "report.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    return folder


def keys(folder, name):
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


def test_without_the_package_or_a_key(tmp_path, monkeypatch):
    monkeypatch.setattr(signing, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"install guardsmith\[signing\]") as caught:
        check_key(tmp_path / "key.pem")
    assert_one_sentence(caught.value)
    monkeypatch.setattr(signing, "find_spec", lambda _: "there")
    with pytest.raises(UserError, match="openssl ecparam") as caught:
        check_key(tmp_path / "key.pem")
    assert_one_sentence(caught.value)


@needs
def test_what_is_signed_may_not_change_and_the_card_may(release, tmp_path, capsys):
    private, public = keys(tmp_path, "mine")
    sign(release, private)
    check_signature(release, public)
    (release / "README.md").write_text("another card")
    (release / ".gitattributes").write_text("*.safetensors filter=lfs")
    (release / ".cache").mkdir()
    (release / ".cache" / "x").write_text("x")
    assert cli.main(["verify-signature", str(release), "--key", str(public)]) == 0
    capsys.readouterr()

    def broken(change, back):
        change()
        with pytest.raises(BadSignature, match="is not what was signed") as caught:
            check_signature(release, public)
        assert_one_sentence(caught.value)
        assert cli.main(["verify-signature", str(release), "--key", str(public)]) == 1
        back()
        check_signature(release, public)

    weights, report = release / "unet" / "weights.safetensors", release / "guardsmith" / "report.json"
    broken(lambda: weights.write_bytes(b"Weights"), lambda: weights.write_bytes(b"weights"))
    broken(lambda: report.write_text("{ }"), lambda: report.write_text("{}"))
    added = release / "unet" / "more.safetensors"
    broken(lambda: added.write_bytes(b"more"), added.unlink)
    broken(weights.unlink, lambda: weights.write_bytes(b"weights"))


@needs
def test_a_release_that_has_not_changed_keeps_its_signature(release, tmp_path):
    """Else every publication would be a change: two signatures of one thing by one key differ."""
    mine, public = keys(tmp_path, "mine")
    other, _ = keys(tmp_path, "other")
    sign(release, mine)
    same, changed = tmp_path / "same", tmp_path / "changed"
    for folder in (same, changed):
        shutil.copytree(release, folder)
        (folder / signing.SIGNATURE).unlink()
    (same / "README.md").write_text("another card")
    (changed / "unet" / "weights.safetensors").write_bytes(b"Weights")
    before = (release / signing.SIGNATURE).read_bytes()
    sign(same, mine, release)
    assert (same / signing.SIGNATURE).read_bytes() == before
    sign(same, other, release)
    assert (same / signing.SIGNATURE).read_bytes() != before, "signed by somebody else"
    sign(changed, mine, release)
    check_signature(changed, public)
    with pytest.raises(BadSignature):
        check_signature(same, public)


@needs
def test_without_a_key_sigstore_is_asked(release, monkeypatch):
    """Sigstore itself cannot be asked here; what goes to the library, and what becomes of its answer, can be seen."""
    from model_signing import signing as library
    from model_signing import verifying

    asked = {}

    def signer(self, **how):
        asked["sign"] = how
        raise ConnectionError("no network")

    monkeypatch.setattr(library.Config, "use_sigstore_signer", signer)
    with pytest.raises(RunFailed, match="Sigstore gave no signature") as caught:
        sign(release, None)
    assert_one_sentence(caught.value)
    assert asked["sign"] == {"use_ambient_credentials": True} and not (release / signing.SIGNATURE).exists()

    def verifier(self, **who):
        asked["check"] = who
        return self

    (release / signing.SIGNATURE).write_text("a bundle")
    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", verifier)
    monkeypatch.setattr(
        verifying.Config, "verify", lambda self, folder, signature: asked.update(what=(folder, signature))
    )
    who = ["--identity", "ann@example.org", "--issuer", "https://accounts.example.org"]
    assert cli.main(["verify-signature", str(release), *who]) == 0
    assert asked["check"] == {"identity": "ann@example.org", "oidc_issuer": "https://accounts.example.org"}
    assert asked["what"] == (release, release / signing.SIGNATURE)


@pytest.mark.parametrize("given", [[], ["--identity", "ann"], ["--key", "k", "--identity", "ann", "--issuer", "i"]])
def test_whose_signature_it_has_to_be_is_said(release, given, capsys):
    assert cli.main(["verify-signature", str(release), *given]) == 2
    assert "name --key, or --identity and --issuer" in capsys.readouterr().err


@needs
def test_another_key_and_no_signature(release, tmp_path):
    private, _ = keys(tmp_path, "mine")
    _, other = keys(tmp_path, "other")
    with pytest.raises(UserError, match="has no signature"):
        check_signature(release, other)
    sign(release, private)
    with pytest.raises(BadSignature):
        check_signature(release, other)
    (tmp_path / "nonsense.pem").write_text("nonsense")
    with pytest.raises(UserError, match="no private key") as caught:
        sign(release, tmp_path / "nonsense.pem")
    assert_one_sentence(caught.value)
