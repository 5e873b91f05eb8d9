"""The gateway's certificates: a CA of its own and what it signs, or the operator's files.

The CA (EC P-256, ten years) stays in the gateway's folder. It signs the server's certificate
(about a year, made anew a month before its end: devices trust the CA, so none enrols again) and,
for mutual TLS, one certificate for each device.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sottovoce.client.errors import ConfigError, RunError

CA_DAYS, SERVER_DAYS, DEVICE_DAYS = 3650, 397, 1825
RENEW_DAYS = 30
SKEW = timedelta(minutes=10)  # a device's clock may be behind
DEVICE_PREFIX = "device-"


@dataclass(frozen=True)
class Pair:
    """A certificate (PEM, with its chain if it has one) and its private key (PEM)."""

    certificate: bytes
    private_key: bytes

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate itself."""
        return x509.load_pem_x509_certificate(self.certificate)

    @property
    def days_left(self) -> float:
        """Until it is out of date."""
        return (self.leaf.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


class Authority:
    """The CA in `folder`: made at the first start, read at every later one.

    Raises RunError where its files are damaged, out of date, or cannot be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        made = not (folder / "ca.pem").exists()
        if made:
            _store(folder, "ca", _new_ca(name))
        self.pair = _load(folder / "ca.pem", folder / "ca.key")
        if self.pair.days_left < 0:
            raise RunError(
                f"{folder / 'ca.pem'} ended on {_day(self.pair)}: move {folder} away, start the "
                "gateway again for a new CA, and give devices its ca.pem"
            )

    @property
    def file(self) -> Path:
        """What devices are given to trust."""
        return self.folder / "ca.pem"

    def server(self, hosts: Sequence[str]) -> Pair:
        """The server's certificate for `hosts`; a new one where the last is about to end."""
        certificate, key = self.folder / "server.pem", self.folder / "server.key"
        try:
            pair = _load(certificate, key)
        except RunError:  # none yet, or a crash between the two files
            pair = None
        if pair and pair.days_left > RENEW_DAYS and self._serves(pair, hosts):
            return pair
        _store(self.folder, "server", self._server_pair(hosts))
        return _load(certificate, key)

    def _server_pair(self, hosts: Sequence[str], days: float = SERVER_DAYS) -> Pair:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._sign(hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, days, names)

    def device(self, device: int) -> Pair:
        """A certificate for a device, to be handed over and forgotten."""
        return self._sign(f"{DEVICE_PREFIX}{device}", ExtendedKeyUsageOID.CLIENT_AUTH, DEVICE_DAYS)

    def _serves(self, pair: Pair, hosts: Sequence[str]) -> bool:
        """Whether `pair` is of this CA and for all `hosts`."""
        try:
            pair.leaf.verify_directly_issued_by(self.pair.leaf)
            found = pair.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return False
        return {_general_name(host) for host in hosts} <= set(found)

    def _sign(
        self,
        common_name: str,
        usage: x509.ObjectIdentifier,
        days: float,
        names: x509.SubjectAlternativeName | None = None,
    ) -> Pair:
        issuer = self.pair.leaf
        signer = serialization.load_pem_private_key(self.pair.private_key, None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        end = min(datetime.now(UTC) + timedelta(days=days), issuer.not_valid_after_utc)
        builder = _builder(common_name[:64], issuer.subject, key, end)
        builder = builder.add_extension(x509.BasicConstraints(False, None), True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(authority, False)
        if names is not None:
            builder = builder.add_extension(names, False)
        return Pair(_pem(builder.sign(signer, hashes.SHA256())), _private_pem(key))


def operators_pair(certificate: Path, private_key: Path) -> Pair:
    """The operator's own certificate. ConfigError where it cannot serve."""
    try:
        pair = _load(certificate, private_key)
    except RunError as error:
        raise ConfigError(str(error)) from error
    if pair.days_left < 0:
        raise ConfigError(f"{certificate} ended on {_day(pair)}: put a new certificate there")
    return pair


def expiry_line(what: str, pair: Pair) -> str | None:
    """One line for the operator where a certificate is about to end, else None."""
    if pair.days_left < 0:
        return f"the certificate of {what} ended on {_day(pair)}: devices no longer connect"
    if pair.days_left < RENEW_DAYS:
        return f"the certificate of {what} ends on {_day(pair)}, in {pair.days_left:.0f} days"
    return None


def device_of(common_name: str) -> int | None:
    """The device that a client certificate names."""
    digits = common_name.removeprefix(DEVICE_PREFIX)
    named = common_name.startswith(DEVICE_PREFIX) and digits.isascii() and digits.isdigit()
    return int(digits) if named else None


def _new_ca(name: str) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    label = f"{name[:40]} gateway CA"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
    end = datetime.now(UTC) + timedelta(days=CA_DAYS)
    signs = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = _builder(label, subject, key, end)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), True)
    builder = builder.add_extension(signs, True)
    return Pair(_pem(builder.sign(key, hashes.SHA256())), _private_pem(key))


def _builder(
    common_name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _day(pair: Pair) -> str:
    return pair.leaf.not_valid_after_utc.date().isoformat()


def _store(folder: Path, name: str, pair: Pair) -> None:
    """The key first, so that a certificate on disk always has one."""
    _write(folder / f"{name}.key", pair.private_key, 0o600)
    _write(folder / f"{name}.pem", pair.certificate, 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    """The whole file or none of it, never readable by more than `mode` allows."""
    partial = path.with_name(path.name + ".new")
    try:
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror})") from error


def _load(certificate: Path, private_key: Path) -> Pair:
    """Both files; RunError unless they are PEM and belong together."""
    try:
        pair = Pair(certificate.read_bytes(), private_key.read_bytes())
        key = serialization.load_pem_private_key(pair.private_key, None)
        public = pair.leaf.public_key()
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{certificate} and {private_key} are no PEM certificate and unencrypted private key"
        ) from error
    if key.public_key() != public:
        raise RunError(f"{private_key} is not the private key of {certificate}")
    return pair
