"""The generated code of the device protocol is that of its .proto file; what a proof is."""

from __future__ import annotations

import hashlib
import hmac
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sottovoce.client import protocol
from sottovoce.client.protocol import session_proof

HERE = Path(protocol.__file__).parent
NAME = "sottovoce/client/protocol/device.proto"


def test_the_code_is_what_protoc_makes_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="the dev group brings grpcio-tools")
    (tmp_path / NAME).parent.mkdir(parents=True)
    shutil.copy(HERE / "device.proto", tmp_path / NAME)
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={tmp_path}",
         f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
         NAME], check=True,
    )  # fmt: skip
    made = sorted((tmp_path / NAME).parent.glob("device_pb2*"))
    assert [path.name for path in made] == sorted(p.name for p in HERE.glob("device_pb2*"))
    for path in made:
        assert path.read_text() == (HERE / path.name).read_text(), "run make protocol"


def test_a_proof_is_the_one_that_the_protocol_defines() -> None:
    key, nonce, device = b"k" * 32, b"n" * 32, 2**62 + 5
    said = b"sottovoce session v1" + nonce + device.to_bytes(8, "big")
    assert session_proof(key, nonce, device) == hmac.new(key, said, hashlib.sha256).digest()
