"""Signatures of statements: DSSE envelopes of in-toto, with keys from files or the environment.

PREFOPT_SIGNING_KEY is a private key and PREFOPT_PUBLIC_KEY that by which it is verified: each a PEM
text, or the path of a file that holds one. Neither is ever shown or written.
"""

# securesystemslib.signer exports these names without saying so in a way that pyright knows.
# pyright: reportPrivateImportUsage=false

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from securesystemslib.signer import Key, Signer

SIGNING_KEY = "PREFOPT_SIGNING_KEY"
PUBLIC_KEY = "PREFOPT_PUBLIC_KEY"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BEGIN = b"-----BEGIN"


def signer() -> "Signer":
    """By the private key of PREFOPT_SIGNING_KEY.

    Raises:
        ValueError: if there is no such key, or none that signs; its text is not shown.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    pem = _pem(SIGNING_KEY)
    try:
        return CryptoSigner(load_pem_private_key(pem, password=None))  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _refused(SIGNING_KEY, "an unencrypted private key in PEM") from None


def public_key() -> "Key | None":
    """The key of PREFOPT_PUBLIC_KEY, None if there is none.

    Raises:
        ValueError: if it is no public key; its text is not shown.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    if not os.environ.get(PUBLIC_KEY):
        return None
    pem = _pem(PUBLIC_KEY)
    try:
        return SSlibKey.from_crypto(load_pem_public_key(pem))  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _refused(PUBLIC_KEY, "a public key in PEM") from None


def signed(text: str, by: "Signer") -> dict[str, Any]:
    """The envelope of a statement's text."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(text.encode(), PAYLOAD_TYPE, {})
    envelope.sign(by)
    return envelope.to_dict()


def is_envelope(tree: dict[str, Any]) -> bool:
    return tree.get("payloadType") == PAYLOAD_TYPE


def opened(tree: dict[str, Any]) -> str:
    """The text within an envelope, whoever signed it."""
    return _envelope(tree).payload.decode()


def signers(tree: dict[str, Any]) -> list[str]:
    """The names of the keys by which an envelope says that it is signed."""
    return list(_envelope(tree).signatures)


def is_signed_by(tree: dict[str, Any], key: "Key") -> bool:
    from securesystemslib.exceptions import VerificationError

    try:
        _envelope(tree).verify([key], 1)
    except VerificationError:
        return False
    return True


def _envelope(tree: dict[str, Any]) -> Any:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import FormatError

    try:
        return Envelope.from_dict(json.loads(json.dumps(tree)))  # It changes what it is given.
    except (KeyError, TypeError, FormatError) as error:
        raise ValueError(f"envelope: it is no DSSE, got {error!r}; write it anew") from None


def _pem(name: str) -> bytes:
    given = os.environ.get(name, "").encode()
    if given.lstrip().startswith(BEGIN):
        return given
    try:
        return Path(os.fsdecode(given)).read_bytes()
    except OSError:
        raise _refused(name, "a PEM text or the path of a file that holds one") from None


def _refused(name: str, wanted: str) -> ValueError:
    length = len(os.environ.get(name, ""))
    return ValueError(
        f"{name}: it is not {wanted}, got {length} characters that are not shown; "
        "`openssl genpkey -algorithm ed25519 -out key.pem` makes a private key, "
        "`openssl pkey -in key.pem -pubout -out key.pub` the public one"
    )
