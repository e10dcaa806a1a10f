"""`everstep convert`, `inspect`, `verify` and `diff` as a user runs them, on checkpoints that the frameworks wrote."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import command, everstep

from .commands import Commands, chunks, files, safetensors

# Of each format: the fixture of its samples, the checkpoint in it, and the formats that hold all that it holds.
SOURCES = {
    "deepspeed": ("deepspeed_samples", "z1-bf16"),
    "deepspeed-zero3": ("deepspeed_samples", "z3-bf16"),
    "deepspeed-tensor-parallel": ("deepspeed_samples", "tp2-z1-bf16"),
    "deepspeed-pipeline": ("deepspeed_samples", "pp2-dp2-bf16"),
    "deepspeed-experts": ("deepspeed_samples", "moe-z1-bf16"),
    "deepspeed-universal": ("deepspeed_samples", "z2-bf16/global_step3_universal"),
    "megatron": ("megatron_samples", "buckets"),
    "megatron-legacy": ("megatron_samples", "buckets/legacy"),
    "dcp": ("fsdp_samples", "nested/checkpoint"),
    "hf": ("transformers_samples", "sharded/model"),
    "hf-pickled": ("transformers_samples", "pickled/model"),
}
WITHOUT_LIBRARIES = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "megatron", "transformers", "safetensors"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Absent())
from everstep.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Path:
    fixture, checkpoint = SOURCES[request.param]
    return request.getfixturevalue(fixture) / checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers by Hugging Face's names."""
    shapes = {f"model.layers.{n}.mlp.{part}_proj.weight": (6, 4) for n in range(2) for part in ("gate", "up")}
    return safetensors(tmp_path / "model" / "model.safetensors", shapes)


def test_every_format_goes_into_universal(source: Path, tmp_path: Path, run: Commands) -> None:
    before = files(source)
    run.done("convert", source, tmp_path / "out", "--to", "universal")
    assert run.done("verify", tmp_path / "out").endswith(": whole\n")
    assert "tensors are equal, bit for bit" in run.done("diff", source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert files(source) == before


# What has no names of Megatron's cannot become Megatron's; what has an optimizer loses it in Hugging Face's.
@pytest.mark.parametrize(
    ("begin", "to"),
    [
        *[(begin, "deepspeed") for begin in ("deepspeed", "deepspeed-universal", "dcp", "hf-pickled")],
        *[(begin, "deepspeed-universal") for begin in SOURCES if begin not in ("hf", "deepspeed-experts")],
        *[(begin, "dcp") for begin in ("deepspeed-zero3", "deepspeed-experts", "megatron", "dcp", "hf")],
        ("megatron", "megatron"),
        ("megatron-legacy", "megatron"),
        ("hf", "hf"),
        ("hf-pickled", "hf"),
    ],
)
def test_out_of_universal_and_back_is_the_same(
    begin: str, to: str, tmp_path: Path, run: Commands, request: pytest.FixtureRequest
) -> None:
    fixture, checkpoint = SOURCES[begin]
    one, other, two = tmp_path / "one", tmp_path / "other", tmp_path / "two"
    run.done("convert", request.getfixturevalue(fixture) / checkpoint, one, "--to", "universal")
    run.done("convert", one, other, "--to", to)
    run.done("convert", other, two, "--to", "universal")
    run.done("diff", one, two)
    assert chunks(one) == chunks(two)
    assert sorted(os.listdir(tmp_path)) == ["one", "other", "two"]


def test_a_chain_of_formats(megatron_samples: Path, tmp_path: Path, run: Commands) -> None:
    """Names are Megatron's all along, so that Megatron has them back in the end."""
    before = megatron_samples / "buckets"
    for number, to in enumerate(["deepspeed", "universal", "dcp", "deepspeed-universal", "megatron"]):
        run.done("convert", before, tmp_path / str(number), "--to", to)
        before = tmp_path / str(number)
    run.done("diff", before, megatron_samples / "buckets")


@pytest.mark.parametrize(("case", "rules"), [("tied", "llama"), ("sharded", "llama"), ("gpt2", "gpt2")])
def test_hugging_face_to_megatron_and_back(
    case: str, rules: str, transformers_samples: Path, tmp_path: Path, run: Commands
) -> None:
    first = transformers_samples / case / "model"
    run.done("convert", first, tmp_path / "megatron", "--to", "megatron", "--names", rules)
    assert '"format": "megatron"' in run.done("inspect", tmp_path / "megatron", "--json")
    run.done("convert", tmp_path / "megatron", tmp_path / "universal", "--to", "universal", "--names", rules)
    run.done("convert", tmp_path / "universal", tmp_path / "back", "--to", "hf")
    run.done("diff", first, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (first / "config.json").read_bytes()


def test_inspect_tells_what_is_there(source: Path, tmp_path: Path, run: Commands) -> None:
    run.done("convert", source, tmp_path / "out", "--to", "universal")
    told, kept = (json.loads(run.done("inspect", path, "--json")) for path in (source, tmp_path / "out"))
    for key in ("step", "bytes", "scalars", "tied"):
        assert told[key] == kept[key]
    assert [t["path"] for t in told["tensors"]] != []
    for tensor in kept["tensors"]:
        assert all(len(sum_) == 16 for sum_ in tensor["checksums"])
    text = run.done("inspect", tmp_path / "out")
    assert text.startswith(f"{tmp_path / 'out'}: universal, step {told['step']}: ")
    assert text.count("xxh3") == len(kept["tensors"])


def test_differences_are_named(tmp_path: Path, run: Commands) -> None:
    one = safetensors(tmp_path / "a" / "model.safetensors", {"x": (3,), "y": (2, 2), "only": (1,)})
    two = safetensors(tmp_path / "b" / "model.safetensors", {"x": (3,), "y": (4,), "other": (1,)}, seed=1)
    ended = run("diff", one, two)
    assert (ended.status, ended.stderr) == (1, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == "params/only: only in A"
    assert lines[1] == "params/other: only in B"
    assert lines[2].startswith("params/x: differ by 0.")
    assert lines[3:] == ["params/y: shape [2, 2] and [4]", "0 of 4 tensors are equal, bit for bit"]
    found = json.loads(run("diff", one, two, "--json").stdout)
    assert (found["equal"], len(found["tensors"])) == (False, 4)


def test_steps_and_ties_are_compared(deepspeed_samples: Path, tmp_path: Path, run: Commands) -> None:
    run.done("convert", deepspeed_samples / "z1-bf16", tmp_path / "hf", "--to", "hf")
    ended = run("diff", deepspeed_samples / "z1-bf16", tmp_path / "hf")
    assert ended.status == 1
    assert "\nstep: 3 and 0\n" in ended.stdout
    assert "\nscalars/step/scale: 3.0 and nothing\n" in ended.stdout


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path, run: Commands) -> None:
    before = sorted(tmp_path.rglob("*")), files(source)
    for to in ("universal", "deepspeed-universal", "deepspeed", "dcp", "hf"):
        ended = run("convert", source, tmp_path / "new" / "out", "--to", to, "--dry-run", "--explain")
        if "are experts" in ended.stderr and to.startswith("deepspeed"):
            continue
        assert ended.status == 0, ended
        assert "would write step " in ended.stderr
        lines = ended.stdout.splitlines()
        described = json.loads(run.done("inspect", source, "--json"))
        held = [each for each in described["tensors"] if to != "hf" or not each["room"].startswith("optimizer/")]
        assert len(lines) == len(held) + len(described["tied"])
        for line in lines:
            assert " from " in line or line.startswith("tied ")
            if line.startswith("params/"):
                assert line.endswith("]"), line
    assert (sorted(tmp_path.rglob("*")), files(source)) == before


def test_a_dry_run_finds_what_writing_would(model: Path, run: Commands) -> None:
    for arguments in (["--dry-run"], []):
        assert "the parameters' names are not Megatron's" in run.refused(model, *arguments, to="megatron")
        alike = {f"decoder.layers.{n}.mlp.linear_fc2.weight": (4, 4 + n) for n in range(2)}
        other = safetensors(model.parent / "alike" / "model.safetensors", alike)
        assert "has shape [4, 5], and decoder.layers.0.mlp.linear_fc2.weight has [4, 4]" in run.refused(
            other, *arguments, to="megatron"
        )
        assert "expected a number of bytes" in run.refused(model, "--set", "max_shard_size=5XB", *arguments, to="hf")
        assert "no.json: cannot be read" in run.refused(model, "--set", "config=no.json", *arguments, to="hf")
        assert "dp=x: expected a number" in run.refused(model, "--set", "dp=x", *arguments, to="deepspeed")


def test_settings_that_mean_nothing_are_refused(model: Path, run: Commands) -> None:
    message = run.refused(model, "--set", "dtpye=bfloat16", to="hf")
    assert message.startswith("--set dtpye: there is no such setting here (did you mean 'dtype'?); there are ")
    assert "there are none" in run.refused(model, "--set", "dtype=bfloat16")
    assert "--set dtype: expected NAME=VALUE" in run.refused(model, "--set", "dtype", to="hf")
    assert "no such setting" in run("inspect", model, "--set", "x=1").error()


RULE = '[[name]]\na = "model.layers.{n}.mlp.gate_proj.weight"\nb = "gate.{n}"\n'
UP = '[[name]]\na = "model.layers.{n}.mlp.up_proj.weight"\nb = "up.{n}"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[name", "not TOML"),
        ("[[nmae]]\n", "unknown key 'nmae' (did you mean 'name'?)"),
        ('[[name]]\na = "x.{n}"\nb = "y"\n', "expected the same in all"),
        ('[[name]]\na = "x"\nb = "y"\nhow = "transpoze"\n', "'transpoze' (did you mean 'transpose'?)"),
        ('[[shard]]\npattern = "x"\nhow = "dimm"\n', "'dimm' (did you mean 'dim'?)"),
        (RULE, "2 names without exactly one rule: model.layers.0.mlp.up_proj.weight is matched by no rule; model.lay"),
        (RULE + UP + RULE, "weight is matched by rules.toml:name 1 (model.layers.{n}.mlp.gate_proj.weight) and rules"),
    ],
)
def test_rules_that_are_wrong(text: str, message: str, model: Path, run: Commands) -> None:
    rules = model.parent / "rules.toml"
    rules.write_text(text)
    assert message in run.refused(model, "--names", rules)
    if "shard" in text or "nmae" in text:
        assert message in run.refused(model, "--rules", rules)  # though no format that was asked for needs them


def test_rules_that_are_not_there(model: Path, run: Commands) -> None:
    assert "no rules are named 'lama' (did you mean 'llama'?)" in run.refused(model, "--names", "lama")
    assert "no.toml: cannot be read: No such file" in run.refused(model, "--rules", "no.toml")


def test_a_rule_that_matches_nothing_is_told(model: Path, tmp_path: Path, run: Commands) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text(RULE + UP + '[[name]]\na = "norm"\nb = "n"\n[[shard]]\npattern = "nothing"\nhow = "average"\n')
    ended = run("convert", model, tmp_path / "out", "--to", "universal", "--names", rules)
    assert ended.status == 0
    assert ended.stderr.splitlines()[:-1] == [
        "everstep: warning: mine.toml:shard 1: matches no name",
        "everstep: warning: mine.toml:name 3: matches no name",
    ]
    names = [tensor["name"] for tensor in json.loads(run.done("inspect", tmp_path / "out", "--json"))["tensors"]]
    assert sorted(names) == ["gate.0", "gate.1", "up.0", "up.1"]


def test_mistakes_on_the_command_line(model: Path, tmp_path: Path, run: Commands) -> None:
    for arguments in (["convert"], ["convert", "a"], ["convert", "a", "b"], ["diff", "a"], ["inspect"], ["verify"]):
        ended = run(*arguments)
        assert ended.status == 2
        assert "usage: everstep" in ended.stderr
    for form in ("nope", "megatron-legacy"):
        ended = run("convert", model, tmp_path / "out", "--to", form)
        assert ended.status == 2
        assert f"invalid choice: '{form}'" in ended.stderr
    assert list(tmp_path.iterdir()) == [model]


def test_source_and_destination_are_apart(model: Path, tmp_path: Path, run: Commands) -> None:
    (tmp_path / "link").symlink_to(model)
    for destination, message in (
        (model, "is SRC itself"),
        (tmp_path / "link", "is SRC itself"),
        (f"file://{model}", "is SRC itself"),
        (model / "sub" / "out", "is inside SRC"),
        (tmp_path, "has SRC in it"),
    ):
        before = files(tmp_path)
        ended = run("convert", model, destination, "--to", "universal", "--force")
        assert message in ended.error()
        assert files(tmp_path) == before


def test_what_is_there_is_not_replaced(model: Path, tmp_path: Path, run: Commands) -> None:
    out = tmp_path / "out"
    run.done("convert", model, out, "--to", "universal")
    before = files(tmp_path)
    for arguments in ([], ["--dry-run"]):
        assert (
            f"{out} exists already: --force replaces it" in run("convert", model, out, "--to", "hf", *arguments).error()
        )
    assert files(tmp_path) == before
    run.done("convert", model, out, "--to", "hf", "--force")
    run.done("diff", model, out)
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    diary = tmp_path / "home" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("dear diary")
    message = run("convert", model, diary.parent, "--to", "hf", "--force").error()
    assert "not a checkpoint of a known format: --force replaces only those" in message
    assert diary.read_text() == "dear diary"


def test_at_a_url(model: Path, tmp_path: Path, run: Commands) -> None:
    import fsspec

    url = f"memory://{tmp_path.name}/out"
    assert "only universal checkpoints are written to a URL" in run("convert", model, url, "--to", "hf").error()
    run.done("convert", model, url, "--to", "universal")
    run.done("diff", model, url)
    assert "has a checkpoint already" in run("convert", model, url, "--to", "universal").error()
    run.done("convert", model, url, "--to", "universal", "--force")
    assert "not an everstep checkpoint" in run("convert", f"{url}-none", tmp_path / "x", "--to", "hf").error()
    run.done("convert", url, tmp_path / "x", "--to", "hf")
    run.done("diff", model, tmp_path / "x")
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/mine/diary.txt", b"dear diary")
    for arguments in ([], ["--force"]):
        ended = run("convert", model, f"memory://{tmp_path.name}/mine", "--to", "universal", *arguments)
        assert "has files that are of no checkpoint" in ended.error()
    assert fsspec.filesystem("memory").cat_file(f"/{tmp_path.name}/mine/diary.txt") == b"dear diary"
    assert "deepspeed checkpoints are read from local folders" in run("inspect", url, "--from", "deepspeed").error()


def test_names_of_any_kind(tmp_path: Path, run: Commands) -> None:
    """No name leads out of the folder, is confused with zarr's files, or writes to the terminal."""
    names = [
        "..",
        ".",
        "a",
        "../../../x",
        "/etc/x",
        "zarr.json",
        "c",
        "a/c/0",
        "a.b",
        "__x",
        "100%",
        "new\nline\x1b[2J",
    ]
    source = safetensors(tmp_path / "deep" / "model" / "model.safetensors", dict.fromkeys(names, (3,)))
    run.done("convert", source, tmp_path / "deep" / "out", "--to", "universal")
    run.done("verify", tmp_path / "deep" / "out")
    run.done("diff", source, tmp_path / "deep" / "out")
    assert "\x1b" not in run.done("inspect", source)
    assert sorted(os.listdir(tmp_path / "deep")) == ["model", "out"]
    assert os.listdir(tmp_path) == ["deep"]
    assert "has no place in a DeepSpeed" in run.refused(source, to="deepspeed-universal")


@pytest.mark.parametrize(
    "begin", ["deepspeed", "deepspeed-universal", "megatron", "megatron-legacy", "dcp", "hf-pickled"]
)
def test_no_library_is_needed(begin: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Where torch cannot be imported, every format is read, and all but torch's own are written."""
    fixture, checkpoint = SOURCES[begin]
    source = request.getfixturevalue(fixture) / checkpoint
    targets = ("universal", "deepspeed-universal", "hf") if begin == "deepspeed" else ("universal",)
    for to in targets:
        ended = command(["-c", WITHOUT_LIBRARIES, "convert", str(source), str(tmp_path / to), "--to", to])
        assert ended.status == 0, ended.stderr
    assert command(["-c", WITHOUT_LIBRARIES, "diff", str(source), str(tmp_path / "universal")]).status == 0


def test_a_target_that_needs_torch_says_so(model: Path, tmp_path: Path) -> None:
    ended = command(["-c", WITHOUT_LIBRARIES, "convert", str(model), str(tmp_path / "out"), "--to", "dcp"])
    assert "torch is not installed" in ended.error()
    assert os.listdir(tmp_path) == ["model"]


def test_progress_is_drawn_to_its_end(deepspeed_samples: Path, tmp_path: Path) -> None:
    for to in ("universal", "hf"):
        ours, theirs = pty.openpty()
        arguments = ["-m", "everstep", "convert", deepspeed_samples / "z1-bf16", tmp_path / to, "--to", to]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        process = subprocess.Popen([sys.executable, *arguments], stderr=theirs, stdout=theirs, env=environment)
        os.close(theirs)
        drawn = b""
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            drawn += data
        os.close(ours)
        assert process.wait() == 0
        last = [line for line in drawn.decode().replace("\r", "\n").splitlines() if "%" in line][-1]
        assert "100%" in last, drawn
        assert b"wrote step 3: 10 parameters" in drawn


def test_a_reader_that_has_seen_enough(deepspeed_samples: Path) -> None:
    line = f"{sys.executable} -m everstep inspect {deepspeed_samples / 'tp2-z1-bf16'} | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_the_process_itself(deepspeed_samples: Path, tmp_path: Path) -> None:
    source, out = str(deepspeed_samples / "z1-bf16"), str(tmp_path / "out")
    ended = everstep("convert", source, out, "--to", "universal")
    assert (ended.status, ended.stdout) == (0, "")
    assert ended.stderr.startswith("wrote step 3: 10 parameters, 36 tensors")
    assert everstep("verify", out).status == 0
    (tmp_path / "out" / "params" / "scale" / "c" / "0").write_bytes(b"1234")
    ended = everstep("verify", out)
    assert ended.status == 1
    assert "params/scale/c/0 is damaged: its checksum is" in ended.stdout
    assert "params/scale/c/0 is damaged" in everstep("diff", source, out).error()
    assert "not an everstep checkpoint" in everstep("verify", source).error()
