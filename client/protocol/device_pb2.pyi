from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    ACCEPTED: _ClassVar[Outcome]
    DUPLICATE: _ClassVar[Outcome]
    LATE: _ClassVar[Outcome]
    REFUSED: _ClassVar[Outcome]
OUTCOME_UNSPECIFIED: Outcome
ACCEPTED: Outcome
DUPLICATE: Outcome
LATE: Outcome
REFUSED: Outcome

class EnrolRequest(_message.Message):
    __slots__ = ("protocol", "token", "name")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    token: str
    name: str
    def __init__(self, protocol: _Optional[int] = ..., token: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("device", "key", "gateway", "certificate", "private_key")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_KEY_FIELD_NUMBER: _ClassVar[int]
    device: int
    key: bytes
    gateway: str
    certificate: bytes
    private_key: bytes
    def __init__(self, device: _Optional[int] = ..., key: _Optional[bytes] = ..., gateway: _Optional[str] = ..., certificate: _Optional[bytes] = ..., private_key: _Optional[bytes] = ...) -> None: ...

class ChallengeRequest(_message.Message):
    __slots__ = ("protocol", "device")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    device: int
    def __init__(self, protocol: _Optional[int] = ..., device: _Optional[int] = ...) -> None: ...

class ChallengeReply(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("device", "nonce", "proof")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    device: int
    nonce: bytes
    proof: bytes
    def __init__(self, device: _Optional[int] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class OpenSessionReply(_message.Message):
    __slots__ = ("session", "lifetime_s", "server_time_ms")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    lifetime_s: int
    server_time_ms: int
    def __init__(self, session: _Optional[bytes] = ..., lifetime_s: _Optional[int] = ..., server_time_ms: _Optional[int] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("version", "memory_mb", "threads", "encodings")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    version: str
    memory_mb: int
    threads: int
    encodings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., memory_mb: _Optional[int] = ..., threads: _Optional[int] = ..., encodings: _Optional[_Iterable[str]] = ...) -> None: ...

class CheckInRequest(_message.Message):
    __slots__ = ("run", "level", "capabilities", "wait_ms")
    RUN_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    run: str
    level: int
    capabilities: Capabilities
    wait_ms: int
    def __init__(self, run: _Optional[str] = ..., level: _Optional[int] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class CheckInReply(_message.Message):
    __slots__ = ("run", "declare", "task", "come_back_ms")
    RUN_FIELD_NUMBER: _ClassVar[int]
    DECLARE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    COME_BACK_MS_FIELD_NUMBER: _ClassVar[int]
    run: str
    declare: bool
    task: Task
    come_back_ms: int
    def __init__(self, run: _Optional[str] = ..., declare: _Optional[bool] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., come_back_ms: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "run", "round", "number", "level", "spec", "spec_bytes", "tensors", "deadline_ms", "clips", "clip_norm", "upload_encoding")
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SPEC_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    CLIPS_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ENCODING_FIELD_NUMBER: _ClassVar[int]
    id: str
    run: str
    round: int
    number: int
    level: int
    spec: bytes
    spec_bytes: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorRef]
    deadline_ms: int
    clips: bool
    clip_norm: float
    upload_encoding: str
    def __init__(self, id: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., number: _Optional[int] = ..., level: _Optional[int] = ..., spec: _Optional[bytes] = ..., spec_bytes: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorRef, _Mapping]]] = ..., deadline_ms: _Optional[int] = ..., clips: _Optional[bool] = ..., clip_norm: _Optional[float] = ..., upload_encoding: _Optional[str] = ...) -> None: ...

class TensorRef(_message.Message):
    __slots__ = ("name", "shape", "hash", "base", "delta", "delta_encoding", "delta_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DELTA_ENCODING_FIELD_NUMBER: _ClassVar[int]
    DELTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    hash: bytes
    base: bytes
    delta: bytes
    delta_encoding: str
    delta_bytes: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., hash: _Optional[bytes] = ..., base: _Optional[bytes] = ..., delta: _Optional[bytes] = ..., delta_encoding: _Optional[str] = ..., delta_bytes: _Optional[int] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("task", "blobs")
    TASK_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    task: str
    blobs: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, task: _Optional[str] = ..., blobs: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("blob", "offset", "size", "data")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    blob: bytes
    offset: int
    size: int
    data: bytes
    def __init__(self, blob: _Optional[bytes] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: UploadHead
    data: bytes
    def __init__(self, head: _Optional[_Union[UploadHead, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadHead(_message.Message):
    __slots__ = ("task", "tensors", "clipped")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_FIELD_NUMBER: _ClassVar[int]
    task: str
    tensors: _containers.RepeatedCompositeFieldContainer[EncodedTensor]
    clipped: bool
    def __init__(self, task: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[EncodedTensor, _Mapping]]] = ..., clipped: _Optional[bool] = ...) -> None: ...

class EncodedTensor(_message.Message):
    __slots__ = ("name", "shape", "encoding", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    encoding: str
    bytes: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., encoding: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class DeclineRequest(_message.Message):
    __slots__ = ("task", "reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task: str
    reason: str
    def __init__(self, task: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("outcome", "reason")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    reason: str
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ...) -> None: ...
