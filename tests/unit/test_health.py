"""The health check of a node that joins: its measurements, and their evaluation."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

import numpy as np
import pytest

from everstep.agents.analysis.health import judge, odd
from everstep.agents.launch.quarantine_flag import Policy, policy
from everstep.agents.node import checkup
from everstep.elastic.contract.faults import Fault
from everstep.elastic.protocol.state import Config

WELL = {
    "product_wrong": 0.0,
    "product_runs": 4.0,
    "product_flops": 5e10,
    "copy_wrong": 0.0,
    "copy_runs": 4.0,
    "copy_bytes_per_s": 1e10,
    "loopback_bytes_per_s": 1e9,
    "memory_available_bytes": 8e9,
    "work_free_bytes": 8e9,
    "temporary_free_bytes": 8e9,
    "clock_ahead_s": 0.01,
}


def test_this_machine_is_fit_and_it_takes_no_time() -> None:
    began_s = time.monotonic()
    figures = min((checkup.measure("quick", "127.0.0.1", time.time()) for _ in range(3)), key=lambda f: f["check_s"])
    assert time.monotonic() - began_s < 5.0
    assert figures["check_s"] < 0.3
    assert judge(figures) == []
    assert set(WELL) <= set(figures)
    assert abs(figures["clock_ahead_s"]) < 1.0
    assert checkup.measure("off", "127.0.0.1", 0.0) == {}
    assert "clock_ahead_s" not in checkup.measure("quick", "192.0.2.1", 0.0)


@pytest.mark.parametrize("extent", [checkup.QUICK, checkup.FULL])
def test_the_reference_is_the_exact_product(extent: checkup.Extent) -> None:
    """By whole numbers, in blocks; and no partial sum needs more than 53 bits."""
    left, right = checkup.operands(extent.size)
    most = int(np.abs(left).max()) * int(np.abs(right).max()) * extent.size
    assert most < 2**53
    digest = checkup.digest_of(left.astype(np.float64) @ right.astype(np.float64))
    assert digest == extent.digest
    rows = slice(0, 8)
    assert np.array_equal(left[rows] @ right, (left[rows].astype(np.float64) @ right.astype(np.float64)).astype("i8"))


def test_one_wrong_bit_in_one_of_several_products_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faulty hardware is wrong only now and then."""
    digests = iter([checkup.QUICK.digest, checkup.QUICK.digest ^ 1, checkup.QUICK.digest, checkup.QUICK.digest])
    monkeypatch.setattr(checkup, "digest_of", lambda product: next(digests))
    figures = checkup.measure("quick", "127.0.0.1", 0.0)
    assert figures["product_wrong"] == 1
    assert judge(figures) == ["1 of 4 matrix products came out wrong: its processor or memory is damaged"]


def test_a_digest_sees_a_single_bit() -> None:
    left, right = checkup.operands(8)
    product = left.astype(np.float64) @ right.astype(np.float64)
    before = checkup.digest_of(product)
    product[3, 5] += 1
    assert checkup.digest_of(product) != before


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        ({"copy_wrong": 2.0}, "2 of 4 copies of memory came out wrong"),
        ({"gpu_wrong": 1.0, "gpu_runs": 16.0}, "1 of 16 matrix products on GPUs came out wrong"),
        ({"gpu_wrong": 1.0}, "1 matrix products on GPUs came out wrong"),
        ({"product_flops": 1e6}, "it computes at 0.001 GFLOP/s, which is less than 0.05"),
        ({"copy_bytes_per_s": 1e6}, "it copies memory at 0.001 GB/s"),
        ({"loopback_bytes_per_s": 1e6}, "it moves bytes through its own sockets at 0.001 GB/s"),
        ({"memory_available_bytes": 1 << 20}, "there are 1 MiB of memory left, which is less than 64"),
        ({"work_free_bytes": 0.0}, "there are 0 MiB of disk in its working folder left"),
        ({"temporary_free_bytes": 0.0}, "disk in its temporary folder"),
        ({"clock_ahead_s": 900.0}, "its clock is 900 s ahead of the coordinator's"),
        ({"clock_ahead_s": -900.0}, "its clock is 900 s behind the coordinator's"),
    ],
)
def test_what_keeps_a_node_from_joining(figures: dict[str, float], why: str) -> None:
    assert judge(WELL) == []
    (said,) = judge({**WELL, **figures})
    assert why in said


def test_what_was_not_measured_is_not_judged() -> None:
    assert judge({}) == []
    assert len(judge({"product_wrong": 1.0, "clock_ahead_s": 1e6})) == 2


def test_the_odd_one_out() -> None:
    nodes = {f"n{number}": {**WELL} for number in range(4)}
    assert odd(nodes) == {}
    nodes["n2"] |= {"interface_bits_per_s": 1e8, "copy_bytes_per_s": 3e9, "clock_ahead_s": 5.0}
    for name in ("n0", "n1", "n3"):
        nodes[name]["interface_bits_per_s"] = 1e10
    assert odd(nodes) == {
        "n2": [
            "copies memory at 3 GB/s, others 10",
            "has a network interface at 0.1 Gbit/s, others 10",
            "its clock differs by +5.0 s from the others'",
        ]
    }
    assert odd({"a": WELL, "b": {**WELL, "copy_bytes_per_s": 1.0}}) == {}, "of two nobody is the odd one"


def test_injected_figures_are_the_agents_and_no_fault_of_a_worker() -> None:
    faults = json.dumps([{"kind": "unhealthy", "figures": {"clock_ahead_s": 999.0}}, {"rank": 1, "phase": "reduce"}])
    assert checkup.measure("quick", "127.0.0.1", 0.0, faults)["clock_ahead_s"] == 999.0
    assert [fault.rank for fault in Fault.parse(faults)] == [1]
    assert checkup.measure("quick", "127.0.0.1", 0.0, '[{"kind": "unhealthy"}]')["product_wrong"] == 1.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("off", Policy()),
        ("3/3600", Policy(3, 3600.0, 3600.0)),
        ("2/60/600", Policy(2, 60.0, 600.0)),
        ("1/0.5", Policy(1, 0.5, 0.5)),
    ],
)
def test_a_policy(text: str, found: Policy) -> None:
    assert policy(text) == found
    config = dataclasses.replace(Config(), **found.config())
    assert config.quarantine_after == found.after


@pytest.mark.parametrize("text", ["", "3", "0/60", "3/0", "-1/60", "3/60/0", "3/60/1/1", "3/inf", "a/b", "1e3/4", "3/"])
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected N/SECONDS"):
        policy(text)


def test_the_products_for_gpus_are_exact_in_both_types() -> None:
    """On the processor here; without a device the check reports nothing."""
    import torch

    from everstep.agents.node.gpu_checkup import check

    figures = check([torch.device("cpu")], 128)
    assert (figures["gpu_wrong"], figures["gpu_runs"]) == (0, 16)
    assert check([]) == {}
