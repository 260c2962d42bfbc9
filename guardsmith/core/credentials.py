"""What looks like a credential in a text: tokens by their issuers' prefixes, private keys, passwords in URLs, lines of `.env`."""

from __future__ import annotations

import re
from pathlib import Path

LARGEST = 64 << 20  # bytes of a text that is looked at; vocabularies are smaller
PICTURES = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]*")  # their letters spell anything
PATTERNS = {
    "a token of the Hub": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a token of GitLab": re.compile(r"\bglpat-[\w-]{16,}"),
    "an access key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a key of Google": re.compile(r"\bAIza[\w-]{35}"),
    "a token of Slack": re.compile(r"\bxox[abprs]-[\w-]{10,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a JSON web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a password in a URL": re.compile(r"\b[a-z][a-z0-9+.-]{0,20}://[^\s/:@\"'<>]{0,100}:[^\s/:@\"'<>]{4,}@"),
    "a token in a URL": re.compile(r"\bhttps?://[A-Za-z0-9_-]{20,}@"),
    "a secret that is set": re.compile(
        r"^[ \t]*(?:export[ \t]+)?[A-Z0-9_]{0,60}(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY)\s*=\s*[\"']?[\w+/=.-]{12,}",
        re.MULTILINE,
    ),
}


def credential_in(text: str) -> str | None:
    """What kind of credential a text seems to hold, e.g. "a token of the Hub (line 3)"; `None` where there is none.

    The credential itself is never part of the answer.
    """
    text = PICTURES.sub("", text)
    for kind, pattern in PATTERNS.items():
        match = pattern.search(text)
        if match:
            return f"{kind} (line {text.count(chr(10), 0, match.start()) + 1})"
    return None


def credential_in_file(file: Path) -> str | None:
    """The same for a file: any that is small enough, read as text; of a safetensors file its header."""
    with file.open("rb") as stream:
        if file.suffix.lower() == ".safetensors":
            size = int.from_bytes(stream.read(8), "little")
            data = stream.read(min(size, LARGEST))
        else:
            data = stream.read(LARGEST)
    return credential_in(data.decode("utf-8", errors="replace"))
