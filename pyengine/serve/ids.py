"""Names of sessions and jobs, and the secrets that open them. All are made here; no text of a client ever becomes one."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

__all__ = ["fingerprint", "is_id", "matches", "new_id", "new_token"]

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
LENGTH = 26  # 134 bits
ID = re.compile(rf"[0-9a-z]{{{LENGTH}}}")


def new_id() -> str:
    """A name that is safe as that of a file: 26 digits and small letters."""
    return "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))


def is_id(text: object) -> bool:
    """Whether it is of the form that `new_id` makes."""
    return isinstance(text, str) and ID.fullmatch(text) is not None


def new_token() -> str:
    """A secret that a client keeps."""
    return secrets.token_urlsafe(24)


def fingerprint(token: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def matches(token: str, stored: str) -> bool:
    """Whether a secret is the one that was stored, in a time that tells nothing about it."""
    return hmac.compare_digest(fingerprint(token), stored)
