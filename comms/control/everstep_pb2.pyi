from . import telemetry_pb2 as _telemetry_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerId(_message.Message):
    __slots__ = ("rank", "incarnation")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("number", "hello", "ready", "heartbeat", "from_worker", "died", "stop", "store", "drain", "unhealthy", "telemetry", "spans")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FROM_WORKER_FIELD_NUMBER: _ClassVar[int]
    DIED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    UNHEALTHY_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    number: int
    hello: Hello
    ready: NodeReady
    heartbeat: Heartbeat
    from_worker: FromWorker
    died: WorkerDied
    stop: StopRequest
    store: StoreOpened
    drain: DrainRequest
    unhealthy: NodeUnhealthy
    telemetry: _telemetry_pb2.Telemetry
    spans: _telemetry_pb2.Spans
    def __init__(self, number: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[NodeReady, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., from_worker: _Optional[_Union[FromWorker, _Mapping]] = ..., died: _Optional[_Union[WorkerDied, _Mapping]] = ..., stop: _Optional[_Union[StopRequest, _Mapping]] = ..., store: _Optional[_Union[StoreOpened, _Mapping]] = ..., drain: _Optional[_Union[DrainRequest, _Mapping]] = ..., unhealthy: _Optional[_Union[NodeUnhealthy, _Mapping]] = ..., telemetry: _Optional[_Union[_telemetry_pb2.Telemetry, _Mapping]] = ..., spans: _Optional[_Union[_telemetry_pb2.Spans, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("job", "node", "protocol", "returning", "received", "token_digest")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RETURNING_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    protocol: int
    returning: bool
    received: int
    token_digest: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., protocol: _Optional[int] = ..., returning: _Optional[bool] = ..., received: _Optional[int] = ..., token_digest: _Optional[str] = ...) -> None: ...

class NodeReady(_message.Message):
    __slots__ = ("host", "slots", "keeper", "order", "memory_bytes", "stores", "health", "domains")
    class HealthEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    HOST_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    KEEPER_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORES_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    host: str
    slots: int
    keeper: str
    order: int
    memory_bytes: int
    stores: _containers.RepeatedScalarFieldContainer[int]
    health: _containers.ScalarMap[str, float]
    domains: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, host: _Optional[str] = ..., slots: _Optional[int] = ..., keeper: _Optional[str] = ..., order: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., stores: _Optional[_Iterable[int]] = ..., health: _Optional[_Mapping[str, float]] = ..., domains: _Optional[_Iterable[str]] = ...) -> None: ...

class NodeUnhealthy(_message.Message):
    __slots__ = ("host", "why", "health")
    class HealthEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    HOST_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    host: str
    why: str
    health: _containers.ScalarMap[str, float]
    def __init__(self, host: _Optional[str] = ..., why: _Optional[str] = ..., health: _Optional[_Mapping[str, float]] = ...) -> None: ...

class StoreOpened(_message.Message):
    __slots__ = ("port",)
    PORT_FIELD_NUMBER: _ClassVar[int]
    port: int
    def __init__(self, port: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("worker", "json")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    json: str
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., json: _Optional[str] = ...) -> None: ...

class WorkerDied(_message.Message):
    __slots__ = ("worker", "cause", "clean", "step", "phase", "finished_micro_batches", "detected_at_s", "killed_at_s", "hang", "stacks")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    CLEAN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    DETECTED_AT_S_FIELD_NUMBER: _ClassVar[int]
    KILLED_AT_S_FIELD_NUMBER: _ClassVar[int]
    HANG_FIELD_NUMBER: _ClassVar[int]
    STACKS_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    cause: str
    clean: bool
    step: int
    phase: str
    finished_micro_batches: int
    detected_at_s: float
    killed_at_s: float
    hang: str
    stacks: str
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., cause: _Optional[str] = ..., clean: _Optional[bool] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., finished_micro_batches: _Optional[int] = ..., detected_at_s: _Optional[float] = ..., killed_at_s: _Optional[float] = ..., hang: _Optional[str] = ..., stacks: _Optional[str] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("number", "welcome", "refused", "start", "kill", "to_worker", "end", "heartbeat", "fence", "notice", "ask_spans")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    KILL_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    ASK_SPANS_FIELD_NUMBER: _ClassVar[int]
    number: int
    welcome: Welcome
    refused: Refused
    start: StartWorkers
    kill: KillWorkers
    to_worker: ToWorker
    end: EndJob
    heartbeat: Heartbeat
    fence: Fence
    notice: Notice
    ask_spans: _telemetry_pb2.AskSpans
    def __init__(self, number: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., start: _Optional[_Union[StartWorkers, _Mapping]] = ..., kill: _Optional[_Union[KillWorkers, _Mapping]] = ..., to_worker: _Optional[_Union[ToWorker, _Mapping]] = ..., end: _Optional[_Union[EndJob, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., fence: _Optional[_Union[Fence, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., ask_spans: _Optional[_Union[_telemetry_pb2.AskSpans, _Mapping]] = ...) -> None: ...

class Fence(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("token", "received", "beat_s", "unix_s")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BEAT_S_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    token: str
    received: int
    beat_s: float
    unix_s: float
    def __init__(self, token: _Optional[str] = ..., received: _Optional[int] = ..., beat_s: _Optional[float] = ..., unix_s: _Optional[float] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class StartWorkers(_message.Message):
    __slots__ = ("workers", "world_size", "restart_count", "master_addr", "master_port", "group_rank", "group_world_size", "begun")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESTART_COUNT_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDR_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    GROUP_RANK_FIELD_NUMBER: _ClassVar[int]
    GROUP_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerId]
    world_size: int
    restart_count: int
    master_addr: str
    master_port: int
    group_rank: int
    group_world_size: int
    begun: Begun
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerId, _Mapping]]] = ..., world_size: _Optional[int] = ..., restart_count: _Optional[int] = ..., master_addr: _Optional[str] = ..., master_port: _Optional[int] = ..., group_rank: _Optional[int] = ..., group_world_size: _Optional[int] = ..., begun: _Optional[_Union[Begun, _Mapping]] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("samples", "values", "settings")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    samples: int
    values: str
    settings: str
    def __init__(self, samples: _Optional[int] = ..., values: _Optional[str] = ..., settings: _Optional[str] = ...) -> None: ...

class KillWorkers(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerId]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerId, _Mapping]]] = ...) -> None: ...

class ToWorker(_message.Message):
    __slots__ = ("worker", "json", "differs")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    DIFFERS_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    json: str
    differs: bool
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., json: _Optional[str] = ..., differs: _Optional[bool] = ...) -> None: ...

class EndJob(_message.Message):
    __slots__ = ("succeeded", "why", "detail", "rank", "lost", "released")
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    succeeded: bool
    why: str
    detail: str
    rank: int
    lost: _containers.RepeatedScalarFieldContainer[str]
    released: bool
    def __init__(self, succeeded: _Optional[bool] = ..., why: _Optional[str] = ..., detail: _Optional[str] = ..., rank: _Optional[int] = ..., lost: _Optional[_Iterable[str]] = ..., released: _Optional[bool] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("steps", "rank_steps")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RANK_STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    rank_steps: int
    def __init__(self, steps: _Optional[int] = ..., rank_steps: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("json", "view")
    JSON_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    json: str
    view: str
    def __init__(self, json: _Optional[str] = ..., view: _Optional[str] = ...) -> None: ...

class OrderRequest(_message.Message):
    __slots__ = ("drain", "quarantine", "release", "relayout")
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RELAYOUT_FIELD_NUMBER: _ClassVar[int]
    drain: Drain
    quarantine: Quarantine
    release: Release
    relayout: Relayout
    def __init__(self, drain: _Optional[_Union[Drain, _Mapping]] = ..., quarantine: _Optional[_Union[Quarantine, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., relayout: _Optional[_Union[Relayout, _Mapping]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("node", "why")
    NODE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    node: str
    why: str
    def __init__(self, node: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class Quarantine(_message.Message):
    __slots__ = ("host", "seconds", "why")
    HOST_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    host: str
    seconds: float
    why: str
    def __init__(self, host: _Optional[str] = ..., seconds: _Optional[float] = ..., why: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("host",)
    HOST_FIELD_NUMBER: _ClassVar[int]
    host: str
    def __init__(self, host: _Optional[str] = ...) -> None: ...

class Relayout(_message.Message):
    __slots__ = ("stages",)
    STAGES_FIELD_NUMBER: _ClassVar[int]
    stages: int
    def __init__(self, stages: _Optional[int] = ...) -> None: ...

class OrderResponse(_message.Message):
    __slots__ = ("refused", "text")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    refused: str
    text: str
    def __init__(self, refused: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class GetTraceRequest(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class GetTraceResponse(_message.Message):
    __slots__ = ("head", "node", "spans", "tail")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    head: str
    node: str
    spans: _telemetry_pb2.Spans
    tail: str
    def __init__(self, head: _Optional[str] = ..., node: _Optional[str] = ..., spans: _Optional[_Union[_telemetry_pb2.Spans, _Mapping]] = ..., tail: _Optional[str] = ...) -> None: ...
