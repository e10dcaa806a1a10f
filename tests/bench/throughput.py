"""Throughput of the parts of a snapshot: copies with a checksum, erasure coding and decoding.

A memcpy's throughput is bytes copied per second; encoding's and decoding's are bytes of members read per second: k
members are read to make m parity rows, or to make the two that were lost.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xxhash
from pyeclib.ec_iface import ECDriver
from stamps import median

from everstep.checkpointing.access.erasure import Code
from everstep.checkpointing.memory.copying import copy_with_checksum

DATA, PARITY = 4, 2
LOST = (0, 1)  # members, which is the dearest case

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def warm(size_bytes: int, *, shared: bool = False) -> Bytes:
    """Memory that has been touched, with random content; `shared` like the keeper's."""
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    memory = mmap.mmap(-1, size_bytes, flags=kind | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    array = np.frombuffer(memory, dtype=np.uint8)
    torch.from_numpy(array).random_(0, 256)
    return array


def rates(works: dict[str, Callable[[int], object]], items: int, item_bytes: int, rounds: int) -> dict[str, float]:
    """GB/s of each work, median of rounds. In a round each does every item once.

    They take turns item by item, a few milliseconds each, so that a disturbance of the machine hits all alike; each is
    at another item, far away, so that none finds in the cache what the one before it has read.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        spent = dict.fromkeys(names, 0.0)
        for item in range(items):
            for turn in range(len(names)):
                which = (turn + number) % len(names)
                at = (item + which * items // len(names)) % items
                started = time.perf_counter()
                works[names[which]](at)
                spent[names[which]] += time.perf_counter() - started
        for name in names if number else ():  # the first round warms up
            times[name].append(spent[name])
    return {name: round(items * item_bytes / median(seconds) / 1e9, 3) for name, seconds in times.items()}


def copying(blocks: int, block_bytes: int, rounds: int) -> dict[str, float]:
    """Copies into keeper memory: plain, with a checksum on the way, and with a checksum afterwards."""
    sources = [warm(block_bytes) for _ in range(blocks)]
    targets = [warm(block_bytes, shared=True) for _ in range(blocks)]

    def memcpy(i: int) -> None:
        np.copyto(targets[i], sources[i])

    def with_checksum(i: int) -> None:
        copy_with_checksum(sources[i].data, targets[i].data)

    def then_checksum(i: int) -> None:
        np.copyto(targets[i], sources[i])
        xxhash.xxh3_64_intdigest(targets[i].data)

    works = {"memcpy": memcpy, "copy_with_checksum": with_checksum, "copy_then_checksum": then_checksum}
    return rates(works, blocks, block_bytes, rounds)


def coding(stripes: int, block_bytes: int, rounds: int) -> dict[str, float]:
    """Encoding and decoding of stripes, by Everstep and by pyeclib's drivers, beside copies of the same members.

    `encode_by_pieces` is how keepers encode, since members arrive one after the other over the network.
    """
    code = Code(DATA, PARITY)
    members = [[warm(block_bytes) for _ in range(DATA)] for _ in range(stripes)]
    rows = [[warm(block_bytes) for _ in range(PARITY)] for _ in range(stripes)]
    out = [[warm(block_bytes) for _ in range(DATA)] for _ in range(stripes)]

    def memcpy(i: int) -> None:
        for source, target in zip(members[i], out[i], strict=True):
            np.copyto(target, source)

    def encode(i: int) -> None:
        code.encode(members[i], rows[i])

    def encode_by_pieces(i: int) -> None:
        for number, member in enumerate(members[i]):
            code.update(number, member, rows[i], range(PARITY))

    def decode(i: int) -> None:
        left = {number: block for number, block in enumerate([*members[i], *rows[i]]) if number not in LOST}
        code.decode(left, LOST, out[i][: len(LOST)])

    works = {"memcpy": memcpy, "encode": encode, "encode_by_pieces": encode_by_pieces, "decode_two_lost": decode}
    found = rates({**works, **_drivers(members)}, stripes, DATA * block_bytes, rounds)
    encode(0)
    decode(0)
    if not all(np.array_equal(members[0][number], out[0][number]) for number in LOST):
        raise AssertionError("what was decoded is not what was encoded")
    return found


def _drivers(members: Sequence[Sequence[Bytes]]) -> dict[str, Callable[[int], object]]:
    """pyeclib's own calls: it takes the members as one string and cuts it itself."""
    strings = [b"".join(member.tobytes() for member in stripe) for stripe in members]
    works: dict[str, Callable[[int], object]] = {}
    for kind in ("isa_l_rs_vand", "isa_l_rs_cauchy"):
        driver = ECDriver(k=DATA, m=PARITY, ec_type=kind)
        fragments = driver.encode(strings[0])[len(LOST) :]

        def encode(i: int, driver: ECDriver = driver) -> None:
            driver.encode(strings[i])

        def decode(i: int, driver: ECDriver = driver, fragments: list[bytes] = fragments) -> None:
            driver.decode(fragments)

        works |= {f"pyeclib_{kind}_encode": encode, f"pyeclib_{kind}_decode_two_lost": decode}
    return works
