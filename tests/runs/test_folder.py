"""The run folder: same bytes, whole files, a state that comes back, no run lost."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
import os
import random
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mismatch.errors import OutputError, RunError, UsageError
from mismatch.report.quantity import quantity
from mismatch.runs import files, state, table
from mismatch.runs.folder import RunFolder, check_output, load_run, made_by
from mismatch.runs.plan import SwapPlan
from mismatch.runs.run_id import run_id

SETTINGS = {"model": "smollm2", "swap": ["layer12:infini(segment=64)"], "tokens": 8192}
NOON = datetime(2026, 11, 23, 12, 0, 0)
FINGERPRINT = {"tokens": 8192, "data": "abc", "controls": ("zero", "mean")}


def row(**changes):
    base = {
        "run_id": "r", "mode": "free", "student": "swap", "layer": 3, "site": "resid_post",
        "metric": "rel_l2", "stat": "mean", "value": 0.5, "n": 10,
    }  # fmt: skip
    return {**base, **changes}


def some_rows():
    return [
        row(layer=layer, site=site, student=student, position=position, value=layer + 0.1)
        for layer in (10, 2)
        for site in ("resid_post", "attn_out", "resid_pre")
        for student in ("zero", "floor", "swap")
        for position in ("64-127", "0", "all", "4-15")
    ] + [row(layer=pd.NA, site="logits", metric="kl")]


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(
        "smollm2",
        SETTINGS["swap"][0],
        SETTINGS,
        kind="trace",
        resumable=True,
        output=tmp_path / "run",
        command=["mismatch", "trace"],
    )


def test_bytes_do_not_depend_on_the_order_of_the_rows():
    rows = some_rows()
    first = table.to_parquet(table.as_table(rows))
    random.Random(0).shuffle(rows)
    assert table.to_parquet(table.as_table(rows)) == first
    rows[0]["value"] += 1e-16 + np.spacing(rows[0]["value"])
    assert table.to_parquet(table.as_table(rows)) != first


def test_bytes_survive_reading_and_another_process(tmp_path):
    data = table.to_parquet(table.as_table(some_rows()))
    assert table.to_parquet(table.from_parquet(data)) == data
    (tmp_path / "a.parquet").write_bytes(data)
    code = (
        "import pathlib, sys; from mismatch.runs import table; p = pathlib.Path(sys.argv[1]);"
        "sys.stdout.buffer.write(table.to_parquet(table.from_parquet(p.read_bytes())))"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, check=True
    )
    assert again.stdout == data


def test_rows_are_typed_and_sorted_as_computed():
    frame = table.as_table(some_rows())
    assert str(frame["layer"].dtype) == "Int16"
    assert frame["value"].dtype == np.float64
    assert frame[frame.student == "swap"]["site"].iloc[-1] == "logits"
    one = frame[(frame.student == "swap") & (frame.layer == 2)]
    assert list(dict.fromkeys(one.site)) == ["resid_pre", "attn_out", "resid_post"]
    assert list(one.position[:4]) == ["all", "0", "4-15", "64-127"]
    assert list(dict.fromkeys(frame.student)) == ["swap", "zero", "floor"]
    assert list(frame.layer.dropna().unique()) == [2, 10]


def test_plain_pandas_reads_the_table_with_its_types(folder):
    folder.write_table([{k: v for k, v in r.items() if k != "run_id"} for r in some_rows()[:3]])
    frame = pd.read_parquet(folder.path / "metrics.parquet")
    assert str(frame["layer"].dtype) == "Int16"
    assert set(frame["run_id"]) == {folder.run_id}


def test_two_numbers_for_one_address_are_refused():
    with pytest.raises(RunError, match=r"two numbers for one address: .*'layer': 3"):
        table.as_table([row(value=1.0), row(value=2.0)])


def test_unknown_and_missing_columns_are_named():
    with pytest.raises(RunError, match=r"missing columns \['mode'\], unknown columns \['colour'\]"):
        table.as_table([{**{k: v for k, v in row().items() if k != "mode"}, "colour": 1}])


def test_a_wrong_position_is_refused():
    with pytest.raises(RunError, match="position `early`"):
        table.as_table([row(position="early")])


def test_a_table_of_another_schema_is_refused(monkeypatch):
    data = table.to_parquet(table.as_table(some_rows()))
    monkeypatch.setattr(table, "SCHEMA_VERSION", 9)
    with pytest.raises(RunError, match="schema 2, this version reads schema 9"):
        table.from_parquet(data)
    with pytest.raises(RunError, match="cannot be read"):
        table.from_parquet(data[:100])


def test_the_dictionary_explains_every_column_and_metric():
    about = table.dictionary([])
    assert list(about["columns"]) == [c.name for c in table.COLUMNS]
    assert all(c["doc"] for c in about["columns"].values())


def test_the_folder_is_named_by_time_model_swap_and_settings(tmp_path):
    made = RunFolder.create("a/Some Model", "layers8-15.attn:sliding_window(window=256)", SETTINGS,
                            kind="trace", root=tmp_path, now=NOON)  # fmt: skip
    assert made.path.parent == tmp_path
    assert made.path.name.startswith("20261123-120000_some-model_layers8-15.attn-sliding-window_")
    assert len(made.path.name.rsplit("_", 1)[1]) == 6
    assert made.path.name.endswith(made.run_id)


def test_the_run_id_is_the_settings_not_the_time():
    first = run_id("m", "layer1:parallel(infini(segment=4), alpha=0);layer2:zero", SETTINGS)
    assert first.startswith("m_layer1-parallel-layer2-zero_")
    assert run_id("m", "layer1:x", SETTINGS) == run_id("m", "layer1:x", dict(SETTINGS))
    assert run_id("m", "layer1:x", SETTINGS) != run_id("m", "layer1:x", {**SETTINGS, "tokens": 1})


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="exists and is not empty") as caught:
        RunFolder.create("m", "s", SETTINGS, kind="trace", output=tmp_path)
    assert "--resume" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_takes_the_place_of_a_run_and_of_nothing_else(tmp_path, folder):
    folder.write("figures/a.png", b"x")
    again = RunFolder.create("m", "s", SETTINGS, kind="trace", output=folder.path, overwrite=True)
    assert not (again.path / "figures").exists()
    (again.path / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"not overwritten: it holds notes\.md"):
        RunFolder.create("m", "s", SETTINGS, kind="trace", output=again.path, overwrite=True)
    (again.path / "notes.md").unlink()
    (again.path / "manifest.json").unlink()
    with pytest.raises(OutputError, match=r"it has no manifest\.json"):
        check_output(again.path, overwrite=True)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_output(tmp_path / "x")


def test_a_run_is_read_as_it_was_written(folder):
    plan = SwapPlan(spec="layer12:infini", clauses=(), warnings=("short text",))
    folder.write_plan(plan)
    folder.write_findings([{"severity": "high", "title": "t", "value": float("nan")}])
    written = folder.write_table(some_rows()[:-1])
    folder.log("hello")
    folder.finish("done", seconds=1.5, peak_memory=np.int64(7))
    run = load_run(folder.path)
    pd.testing.assert_frame_equal(run.table, written)
    assert run.config == SETTINGS
    assert run.findings[0]["value"] is None
    assert run.plan == plan
    assert run.raw_plan == dataclasses.asdict(plan) | {"clauses": [], "warnings": ["short text"]}
    assert run.manifest["status"] == "done"
    assert run.manifest["peak_memory"] == 7
    assert run.manifest["versions"]["torch"].startswith("2.")
    assert run.dictionary["schema_version"] == table.SCHEMA_VERSION
    assert (folder.path / "log.txt").read_text().endswith(" hello\n")


def test_a_folder_without_a_run_or_without_numbers_says_so(tmp_path, folder):
    with pytest.raises(RunError, match=r"manifest\.json is missing"):
        load_run(tmp_path)
    with pytest.raises(RunError, match=r"no numbers yet \(status: running\)") as caught:
        load_run(folder.path)
    assert str(caught.value).endswith(f"hint: finish it: mismatch trace --resume {folder.path}")
    (folder.path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="is not valid JSON"):
        load_run(folder.path)


def test_a_run_of_the_first_schema_is_refused_with_the_way_out(folder):
    folder.update(schema_version=1, versions={"mismatch": "0.1.0"})
    with pytest.raises(
        RunError, match=r"made by mismatch 0\.1\.0 \(schema 1\); this version reads"
    ) as caught:
        load_run(folder.path)
    assert (
        "hint: make it again, or read it with that version; it was made by: mismatch trace"
        in str(caught.value)
    )


def test_an_unfinished_run_that_cannot_be_resumed_says_what_to_type(tmp_path):
    words = ["mismatch", "probe", "--output", "x"]
    made = RunFolder.create(
        "m", "s", SETTINGS, kind="probe", output=tmp_path / "run", command=words
    )
    assert made_by(made.path) == "probe"
    with pytest.raises(RunError, match="no numbers yet") as caught:
        load_run(made.path)
    assert str(caught.value).endswith(
        "hint: mismatch probe begins anew; run it again with --overwrite: mismatch probe --output x"
    )


ARRAYS = {
    "scalar": np.array(3.0),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "flags": np.array([True, False]),
    "counts": np.array([2**60, -1]),
    "tiny": np.array([5e-324, np.nan, np.inf, -0.0]),
    "empty": np.zeros((0, 4)),
}


@pytest.mark.parametrize("part", [1, 64 * 2**20])
def test_the_state_comes_back_bit_equal(folder, monkeypatch, part):
    monkeypatch.setattr(state, "PART", part)
    assert folder.state.load(FINGERPRINT) is None
    folder.state.save({"old": np.zeros(3)}, {"batch": 0}, FINGERPRINT)
    folder.state.save(ARRAYS, {"batch": 7, "rng": [0.1, 1e-300]}, FINGERPRINT)
    arrays, info = RunFolder.resume(folder.path).state.load(FINGERPRINT)
    assert info == {"batch": 7, "rng": [0.1, 1e-300]}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].shape == array.shape, name
        assert arrays[name].tobytes() == array.tobytes(), name
    assert not list((folder.path / "state").glob("000001*"))


def test_resume_with_other_settings_says_which_field_differs(folder):
    folder.state.save(ARRAYS, {}, FINGERPRINT)
    with pytest.raises(OutputError, match="tokens: 8192 then, 99 now") as caught:
        folder.state.load({**FINGERPRINT, "tokens": 99})
    assert "data" not in str(caught.value)


def test_a_damaged_state_is_not_used(folder):
    folder.state.save(ARRAYS, {}, FINGERPRINT)
    part = next((folder.path / "state").glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(RunError, match="is damaged"):
        folder.state.load(FINGERPRINT)


def test_done_removes_the_state_and_interrupted_keeps_it(folder):
    folder.state.save(ARRAYS, {"batch": 1}, FINGERPRINT)
    folder.finish("interrupted")
    assert folder.state.load(FINGERPRINT)[1] == {"batch": 1}
    again = RunFolder.resume(folder.path)
    assert (again.manifest["status"], again.manifest["resumed"]) == ("running", 1)
    again.finish("done")
    assert not (folder.path / "state").exists()
    with pytest.raises(OutputError, match="nothing to resume"):
        RunFolder.resume(folder.path)


class FullDisk:
    """The file system takes the first `room` bytes of each file, then is full."""

    def __init__(self, monkeypatch, room):
        self.room = room
        monkeypatch.setattr(files, "open", self.open, raising=False)

    def open(self, path, mode):
        file = builtins.open(path, mode)  # noqa: SIM115
        plain, room = file.write, self.room

        class Handle:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                plain(data[:room])
                if len(data) > room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def __getattr__(self, name):
                return getattr(file, name)

        return Handle()


def test_a_full_disk_names_the_file_and_leaves_the_last_state(folder, monkeypatch):
    folder.state.save(ARRAYS, {"batch": 1}, FINGERPRINT)
    folder.write_findings([])
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        FullDisk(patch, room=40)
        for attempt in (
            lambda: folder.state.save(ARRAYS, {"batch": 2}, FINGERPRINT),
            lambda: folder.write_table(some_rows()[:3]),
            lambda: folder.update(status="done"),
        ):
            with pytest.raises(RunError, match=r"could not write .*No space left") as caught:
                attempt()
            assert "free some space" in caught.value.hint
    assert {p: p.read_bytes() for p in before} == before
    assert folder.state.load(FINGERPRINT)[1] == {"batch": 1}


def test_arrays_that_do_not_fit_on_the_disk(folder):
    """safetensors writes them itself and has errors of its own: here the system's, of a file that may not grow."""
    resource = pytest.importorskip("resource")
    folder.state.save(ARRAYS, {"batch": 1}, FINGERPRINT)
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(RunError, match=r"^could not write .*\.safetensors: File too large$"):
            folder.state.save({"large": np.ones(2**15)}, {"batch": 2}, FINGERPRINT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before
    assert folder.state.load(FINGERPRINT)[1] == {"batch": 1}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_a_save_needs_no_copy_of_the_arrays(tmp_path):
    """Where there was no room for one, Rust panicked, and a run under a cap of its memory ended there."""
    code = f"""
import re, resource, numpy as np
from pathlib import Path
from mismatch.runs.state import State
State(Path({str(tmp_path)!r})).save({{"small": np.ones(8)}}, {{}}, {{}})
arrays = {{"large": np.ones(2**25)}}
kilobytes = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (kilobytes * 1024 + 2**26,) * 2)
State(Path({str(tmp_path)!r})).save(arrays, {{}}, {{}})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.all(state.State(tmp_path).load({})[0]["large"] == 1)


def test_a_kill_between_the_arrays_and_the_index_leaves_the_last_state(folder, monkeypatch):
    folder.state.save(ARRAYS, {"batch": 1}, FINGERPRINT)
    real = os.replace

    def dies(source, target):
        if Path(target).name == "state.json":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            folder.state.save({"a": np.ones(2)}, {"batch": 2}, FINGERPRINT)
    arrays, info = folder.state.load(FINGERPRINT)
    assert info == {"batch": 1}
    assert arrays.keys() == ARRAYS.keys()
    folder.state.save({"a": np.ones(2)}, {"batch": 2}, FINGERPRINT)
    assert folder.state.load(FINGERPRINT)[1] == {"batch": 2}


def test_the_manifest_is_json_for_every_reader(folder):
    folder.update(value=float("inf"), path=Path("a"), nested=[np.float32(1.5)])
    text = (folder.path / "manifest.json").read_text()
    assert json.loads(text)["nested"] == [1.5]
    assert "Infinity" not in text


def test_run_and_report_do_not_import_torch():
    code = (
        "import sys, mismatch.runs.folder, mismatch.report, mismatch.stages.trace.report.comparison;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_runs_that_begin_in_one_second(tmp_path):
    made = [
        RunFolder.create("toy", "nope", {}, kind="scan", root=tmp_path, now=NOON).path
        for _ in range(3)
    ]
    assert len(set(made)) == 3
    assert [path.name.removeprefix(made[0].name) for path in made] == ["", "-2", "-3"]


HOSTILE = {
    "kind": "planted.parts:Evil",
    "status": ["done"],
    "run_id": None,
    "texts": {"evaluation": None},
    "fingerprints": [],
    "versions": None,
    "model_info": "x",
    "chosen_on": {"run": "before", "digests": [0]},
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_manifest_that_does_not_fit_names_its_field_and_runs_nothing(folder, planted, field):
    folder.write_table(some_rows()[:-1])
    file = folder.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: HOSTILE[field]}))
    with pytest.raises(RunError, match=f"manifest.json: `{field}"):
        load_run(folder.path)
    assert not planted.exists()


def test_a_table_that_names_a_class_is_read_without_running_it(folder, planted):
    rows = [row(metric="planted.parts:Evil") | {"run_id": folder.run_id}]
    folder.write("metrics.parquet", table.to_parquet(table.as_table(rows)))
    run = load_run(folder.path)
    with pytest.raises(UsageError, match=r"metrics\.json does not describe the metric `planted"):
        quantity("planted.parts:Evil", run.dictionary)
    assert not planted.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.append_column("x", pa.array([1])), "unknown columns"),
        (lambda t: t.drop_columns(["metric"]), "missing columns"),
        (
            lambda t: t.set_column(4, "student", pa.array([1])),
            "`student` must be string, got int64",
        ),
        (
            lambda t: t.set_column(5, "layer", pa.array([30_000], pa.int16())),
            "a layer outside 0..1023",
        ),
    ],
)
def test_a_table_of_other_columns_is_refused(change, message):
    sink = io.BytesIO()
    changed = change(pq.read_table(io.BytesIO(table.to_parquet(table.as_table([row()])))))
    pq.write_table(changed, sink)
    with pytest.raises(RunError, match=message):
        table.from_parquet(sink.getvalue())
