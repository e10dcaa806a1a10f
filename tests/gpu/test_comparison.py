"""What `make gpu` runs, tried without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import run, training
from tests.jobs import Result


@pytest.mark.soak
def test_the_comparison_on_the_cpu(tmp_path: Path) -> None:
    """One of its cases, with three kills and without."""
    place = tmp_path / "results.json"
    status = run.main(
        ["--device=cpu", "--steps=8", "--small", f"--json={place}", "--only=training", "--case=1 stage x 4 ranks"]
    )
    results = json.loads(place.read_text())
    assert status == 0, results
    entries = results["training"]["cases"]
    entry = entries["1 stage x 4 ranks"]
    assert (entry["identical"], entry["kills"], entry["devices"]) == (True, 3, ["cpu"])
    assert set(entries) <= {"1 stage x 4 ranks", "resumed"}
    assert all(other["identical"] for other in entries.values())


def finished(out: Path, losses: list[float], weight: float) -> Result:
    out.mkdir()
    state = {"model": {"w": torch.tensor([1.0, weight])}, "optimizer": {"w": {"step": 3}}}
    torch.save(state, out / "state-0.pt")
    events = [{"event": "committed", "step": step, "loss": loss, "digest": "0"} for step, loss in enumerate(losses)]
    workers = {"worker-0": [{"step": step, "loss": loss} for step, loss in enumerate(losses)]}
    return Result(0, "", events, out, workers)


def test_what_differs_is_named(tmp_path: Path) -> None:
    expected = finished(tmp_path / "expected", [3.0, 2.0], 1.0)
    same = finished(tmp_path / "same", [3.0, 2.0], 1.0)
    assert training.differences(same, expected) == []
    nearly = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    other = finished(tmp_path / "other", [3.0, 2.0], nearly)
    assert training.differences(other, expected) == ["state-0: /model/w"]
    other = finished(tmp_path / "losses", [3.0, 2.5], 1.0)
    assert training.differences(other, expected) == ["losses", "ledgers"]
    failed = Result(1, "it broke", [], tmp_path, {})
    assert training.differences(failed, expected) == ["a run ended with status 1: it broke"]


def test_without_a_gpu_it_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "why_no_gpu", lambda: "RuntimeError: Found no NVIDIA driver\n on your system")
    assert run.main([]) == 0
    assert capsys.readouterr().out == (
        "make gpu: skipped, no GPU: RuntimeError: Found no NVIDIA driver on your system\n"
    )


def test_results_are_named_by_device_and_date() -> None:
    results: dict[str, Any] = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "started": "2026-01-02T03:04:05Z"}
    assert run.name_of(results) == "nvidia-h100-80gb-hbm3-2026-01-02.json"
