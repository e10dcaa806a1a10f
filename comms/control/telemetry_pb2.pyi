from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Telemetry(_message.Message):
    __slots__ = ("at_s", "unix_s", "steps", "links", "host", "gpus", "missed_spans", "left_out", "ranks", "metrics", "layers")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    MISSED_SPANS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    unix_s: float
    steps: _containers.RepeatedCompositeFieldContainer[StepTimes]
    links: _containers.RepeatedCompositeFieldContainer[LinkTimes]
    host: HostReading
    gpus: _containers.RepeatedCompositeFieldContainer[GpuReading]
    missed_spans: int
    left_out: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankState]
    metrics: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerTimes]
    def __init__(self, at_s: _Optional[float] = ..., unix_s: _Optional[float] = ..., steps: _Optional[_Iterable[_Union[StepTimes, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[LinkTimes, _Mapping]]] = ..., host: _Optional[_Union[HostReading, _Mapping]] = ..., gpus: _Optional[_Iterable[_Union[GpuReading, _Mapping]]] = ..., missed_spans: _Optional[int] = ..., left_out: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankState, _Mapping]]] = ..., metrics: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerTimes, _Mapping]]] = ...) -> None: ...

class RankState(_message.Message):
    __slots__ = ("rank", "incarnation", "step", "place", "still_s", "limit_s", "waits_s", "waits_for", "waits_ranks", "sign")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    STILL_S_FIELD_NUMBER: _ClassVar[int]
    LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    WAITS_S_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    WAITS_RANKS_FIELD_NUMBER: _ClassVar[int]
    SIGN_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    step: int
    place: str
    still_s: float
    limit_s: float
    waits_s: float
    waits_for: str
    waits_ranks: _containers.RepeatedScalarFieldContainer[int]
    sign: str
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., place: _Optional[str] = ..., still_s: _Optional[float] = ..., limit_s: _Optional[float] = ..., waits_s: _Optional[float] = ..., waits_for: _Optional[str] = ..., waits_ranks: _Optional[_Iterable[int]] = ..., sign: _Optional[str] = ...) -> None: ...

class StepTimes(_message.Message):
    __slots__ = ("rank", "step", "generation", "ended_s", "step_s", "compute_s", "fetch_s", "wait_s", "send_s", "receive_s", "update_s", "blocked_s", "outside_s", "micro_batches", "tokens", "samples", "longest_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SEND_S_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_S_FIELD_NUMBER: _ClassVar[int]
    UPDATE_S_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_S_FIELD_NUMBER: _ClassVar[int]
    OUTSIDE_S_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LONGEST_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    step: int
    generation: int
    ended_s: float
    step_s: float
    compute_s: float
    fetch_s: float
    wait_s: float
    send_s: float
    receive_s: float
    update_s: float
    blocked_s: float
    outside_s: float
    micro_batches: int
    tokens: int
    samples: int
    longest_s: float
    def __init__(self, rank: _Optional[int] = ..., step: _Optional[int] = ..., generation: _Optional[int] = ..., ended_s: _Optional[float] = ..., step_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., fetch_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., send_s: _Optional[float] = ..., receive_s: _Optional[float] = ..., update_s: _Optional[float] = ..., blocked_s: _Optional[float] = ..., outside_s: _Optional[float] = ..., micro_batches: _Optional[int] = ..., tokens: _Optional[int] = ..., samples: _Optional[int] = ..., longest_s: _Optional[float] = ...) -> None: ...

class LayerTimes(_message.Message):
    __slots__ = ("rank", "layer", "forward_s", "backward_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    layer: _containers.RepeatedScalarFieldContainer[int]
    forward_s: _containers.RepeatedScalarFieldContainer[float]
    backward_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, rank: _Optional[int] = ..., layer: _Optional[_Iterable[int]] = ..., forward_s: _Optional[_Iterable[float]] = ..., backward_s: _Optional[_Iterable[float]] = ...) -> None: ...

class LinkTimes(_message.Message):
    __slots__ = ("rank", "peer", "sent_bytes", "send_s", "received_bytes", "receive_s", "wait_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEND_S_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    peer: int
    sent_bytes: int
    send_s: float
    received_bytes: int
    receive_s: float
    wait_s: float
    def __init__(self, rank: _Optional[int] = ..., peer: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., send_s: _Optional[float] = ..., received_bytes: _Optional[int] = ..., receive_s: _Optional[float] = ..., wait_s: _Optional[float] = ...) -> None: ...

class HostReading(_message.Message):
    __slots__ = ("cpu_ratio", "load", "cpus", "memory_used_bytes", "memory_bytes", "shm_used_bytes", "shm_bytes", "disks", "network_sent_bytes", "network_received_bytes", "keeper_bytes", "keeper_limit_bytes", "parity_bytes", "parity_s")
    CPU_RATIO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHM_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISKS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NETWORK_RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEEPER_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEEPER_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_S_FIELD_NUMBER: _ClassVar[int]
    cpu_ratio: float
    load: float
    cpus: int
    memory_used_bytes: int
    memory_bytes: int
    shm_used_bytes: int
    shm_bytes: int
    disks: _containers.RepeatedCompositeFieldContainer[DiskReading]
    network_sent_bytes: int
    network_received_bytes: int
    keeper_bytes: int
    keeper_limit_bytes: int
    parity_bytes: int
    parity_s: float
    def __init__(self, cpu_ratio: _Optional[float] = ..., load: _Optional[float] = ..., cpus: _Optional[int] = ..., memory_used_bytes: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., shm_used_bytes: _Optional[int] = ..., shm_bytes: _Optional[int] = ..., disks: _Optional[_Iterable[_Union[DiskReading, _Mapping]]] = ..., network_sent_bytes: _Optional[int] = ..., network_received_bytes: _Optional[int] = ..., keeper_bytes: _Optional[int] = ..., keeper_limit_bytes: _Optional[int] = ..., parity_bytes: _Optional[int] = ..., parity_s: _Optional[float] = ...) -> None: ...

class DiskReading(_message.Message):
    __slots__ = ("place", "used_bytes", "total_bytes")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    place: str
    used_bytes: int
    total_bytes: int
    def __init__(self, place: _Optional[str] = ..., used_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class GpuReading(_message.Message):
    __slots__ = ("index", "name", "busy_ratio", "memory_used_bytes", "memory_bytes", "power_watts", "temperature_celsius")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUSY_RATIO_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    POWER_WATTS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    busy_ratio: float
    memory_used_bytes: int
    memory_bytes: int
    power_watts: float
    temperature_celsius: float
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., busy_ratio: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., power_watts: _Optional[float] = ..., temperature_celsius: _Optional[float] = ...) -> None: ...

class AskSpans(_message.Message):
    __slots__ = ("ticket", "first_step", "limit_bytes")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    first_step: int
    limit_bytes: int
    def __init__(self, ticket: _Optional[int] = ..., first_step: _Optional[int] = ..., limit_bytes: _Optional[int] = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("ticket", "rank", "incarnation", "at_s", "unix_s", "records", "left_out", "last", "keeper")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    KEEPER_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    rank: int
    incarnation: int
    at_s: float
    unix_s: float
    records: bytes
    left_out: int
    last: bool
    keeper: _containers.RepeatedCompositeFieldContainer[KeeperWork]
    def __init__(self, ticket: _Optional[int] = ..., rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., at_s: _Optional[float] = ..., unix_s: _Optional[float] = ..., records: _Optional[bytes] = ..., left_out: _Optional[int] = ..., last: _Optional[bool] = ..., keeper: _Optional[_Iterable[_Union[KeeperWork, _Mapping]]] = ...) -> None: ...

class KeeperWork(_message.Message):
    __slots__ = ("at_s", "bytes", "parity_bytes")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    bytes: int
    parity_bytes: int
    def __init__(self, at_s: _Optional[float] = ..., bytes: _Optional[int] = ..., parity_bytes: _Optional[int] = ...) -> None: ...
