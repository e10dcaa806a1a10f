from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MeetAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEET_ACTION_UNSPECIFIED: _ClassVar[MeetAction]
    MEET_ACTION_JOIN: _ClassVar[MeetAction]
    MEET_ACTION_STAY: _ClassVar[MeetAction]
    MEET_ACTION_LEAVE: _ClassVar[MeetAction]
    MEET_ACTION_CLOSE: _ClassVar[MeetAction]

class MeetPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEET_PHASE_UNSPECIFIED: _ClassVar[MeetPhase]
    MEET_PHASE_WAITING: _ClassVar[MeetPhase]
    MEET_PHASE_FORMED: _ClassVar[MeetPhase]
    MEET_PHASE_CLOSED: _ClassVar[MeetPhase]
    MEET_PHASE_REFUSED: _ClassVar[MeetPhase]
MEET_ACTION_UNSPECIFIED: MeetAction
MEET_ACTION_JOIN: MeetAction
MEET_ACTION_STAY: MeetAction
MEET_ACTION_LEAVE: MeetAction
MEET_ACTION_CLOSE: MeetAction
MEET_PHASE_UNSPECIFIED: MeetPhase
MEET_PHASE_WAITING: MeetPhase
MEET_PHASE_FORMED: MeetPhase
MEET_PHASE_CLOSED: MeetPhase
MEET_PHASE_REFUSED: MeetPhase

class MeetRequest(_message.Message):
    __slots__ = ("job", "token_digest", "node", "action", "min_nodes", "max_nodes", "last_call_s", "lost_after_s", "round", "rank", "world_size", "store_host", "store_port")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    MIN_NODES_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    LAST_CALL_S_FIELD_NUMBER: _ClassVar[int]
    LOST_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    STORE_HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    job: str
    token_digest: str
    node: str
    action: MeetAction
    min_nodes: int
    max_nodes: int
    last_call_s: float
    lost_after_s: float
    round: int
    rank: int
    world_size: int
    store_host: str
    store_port: int
    def __init__(self, job: _Optional[str] = ..., token_digest: _Optional[str] = ..., node: _Optional[str] = ..., action: _Optional[_Union[MeetAction, str]] = ..., min_nodes: _Optional[int] = ..., max_nodes: _Optional[int] = ..., last_call_s: _Optional[float] = ..., lost_after_s: _Optional[float] = ..., round: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., store_host: _Optional[str] = ..., store_port: _Optional[int] = ...) -> None: ...

class MeetResponse(_message.Message):
    __slots__ = ("phase", "round", "rank", "world_size", "store_host", "store_port", "waiting", "why")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    STORE_HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    phase: MeetPhase
    round: int
    rank: int
    world_size: int
    store_host: str
    store_port: int
    waiting: int
    why: str
    def __init__(self, phase: _Optional[_Union[MeetPhase, str]] = ..., round: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., store_host: _Optional[str] = ..., store_port: _Optional[int] = ..., waiting: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...
