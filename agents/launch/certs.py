"""`everstep certs`: a private authority, and a certificate signed by it for all nodes of a cluster."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from everstep.comms.base.security import CERTIFICATES, NAME

AUTHORITY_DAYS = 3650


def certs(arguments: Sequence[str]) -> int:
    """Make certificates; returns the exit status."""
    parse = argparse.ArgumentParser(
        prog="everstep certs",
        description="Make an authority (ca.pem, ca-key.pem) in DIR, unless it is there, and a new certificate of it "
        "(cert.pem, key.pem). Nodes need ca.pem, cert.pem and key.pem; keep ca-key.pem to yourself.",
    )
    parse.add_argument("folder", metavar="DIR", type=Path)
    parse.add_argument("--days", type=float, default=365.0, help="how long the certificate is valid (default: 365)")
    own = parse.parse_args(list(arguments))
    if own.days <= 0:
        print(f"everstep: error: --days must be more than 0, got {own.days:g}", file=sys.stderr)
        return 2
    try:
        made = make(own.folder, own.days)
    except (OSError, ValueError) as error:
        print(f"everstep: error: {own.folder}: {error}", file=sys.stderr)
        return 2
    print(f"{'made' if made else 'used'} the authority {own.folder}/ca.pem; made {own.folder}/cert.pem and key.pem")
    print(f"start nodes and coordinators with {CERTIFICATES}={own.folder.resolve()}")
    return 0


def make(folder: Path, days: float) -> bool:
    """Write a certificate into `folder`, valid from now on; whether the authority was made too.

    Raises OSError, and ValueError for an authority that cannot be read.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = not (folder / "ca.pem").exists()

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def begun(
        subject: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lasts_days: float
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(issuer)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(
            now + datetime.timedelta(days=lasts_days)
        )

    if fresh:
        authority_key = ec.generate_private_key(ec.SECP256R1())
        builder = begun("everstep authority", named("everstep authority"), authority_key, AUTHORITY_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        authority = builder.add_extension(usage, critical=True).sign(authority_key, hashes.SHA256())
        _write_key(folder / "ca-key.pem", authority_key)
        (folder / "ca.pem").write_bytes(authority.public_bytes(Encoding.PEM))
    else:
        authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        loaded = load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        authority_key = loaded
    key = ec.generate_private_key(ec.SECP256R1())
    builder = begun(NAME, authority.subject, key, days)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    certificate = builder.sign(authority_key, hashes.SHA256())
    _write_key(folder / "key.pem", key)
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    return fresh


def _write_key(path: Path, key: object) -> None:
    """A private key, for its owner's eyes only."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    assert isinstance(key, ec.EllipticCurvePrivateKey)
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(data)
