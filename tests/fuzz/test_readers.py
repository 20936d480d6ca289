"""Whatever a file or a text holds: each reader takes it, or refuses it with an error of mismatch. 500 examples each.

Nothing here loads a model. What whole commands do with such input: analyses/malformed_inputs.py.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import scan_plan, task_plan

from mismatch import config, spec
from mismatch.errors import MismatchError
from mismatch.models import folder as models
from mismatch.models import swap_record
from mismatch.runs.entries import Dictionary, FindingEntry, Settings, read_entry, read_manifest
from mismatch.runs.files import json_text
from mismatch.runs.plan import as_json, from_json
from mismatch.runs.state import State
from mismatch.runs.table import as_table, from_parquet, to_parquet
from mismatch.stages.probe.config import ProbeConfig
from mismatch.stages.scan.plan import ScanPlan
from mismatch.stages.trace.config import TraceConfig

many = settings(
    max_examples=500,
    deadline=None,  # CI machines are noisy; pytest-timeout bounds the whole
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["9" * 5000, "a" * 300, "x.y:Z", "../x", "~nouser/x", "layer0:zero", "1e999"]),
)
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def spoilt(data):
    """The data with something else at one place: a strategy."""
    ways = [anything]
    if isinstance(data, dict) and data:
        ways.append(
            st.sampled_from(sorted(data)).flatmap(
                lambda key: st.one_of(
                    spoilt(data[key]).map(lambda value: data | {key: value}),
                    st.just({k: v for k, v in data.items() if k != key}),
                )
            )
        )
    elif isinstance(data, list) and data:
        ways.append(spoilt(data[0]).map(lambda value: [value, *data[1:]]))
    return st.one_of(*reversed(ways))


def damaged(data: bytes):
    """The bytes cut, or with others in between: a strategy."""
    at = st.integers(0, len(data))
    return st.builds(lambda a, more, b: data[:a] + more + data[b:], at, st.binary(max_size=9), at)


def asked(reader, *args):
    """Only our own errors come out, and they fit on a page."""
    try:
        return reader(*args)
    except MismatchError as refused:
        text = str(refused)
    assert len(text) < 60_000
    return None


PIECES = st.sampled_from(
    ["layer1", "layers[0-2]", "norms", ".attn", ".mlp", ":", "infini", "zero", "parallel", "(", ")", "[", "]", ",", ";",
     "=", "segment", "16", "1e30", "9" * 5000, "-", "/", "last", "none", '"', "'", "\\", " ", "x.y:Z", "alpha", "\n"]
)  # fmt: skip


@many
@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=40))
def test_a_swap(text):
    found = asked(lambda: spec.check(spec.parse(text)))
    if found is not None:
        assert spec.format(spec.parse(spec.format(found))) == spec.format(found)
    asked(spec.templates, text)
    asked(spec.layers, text, 12)


SETTINGS = {
    "model": "m", "swap": ["layer1:zero"], "tokens": 64, "seq_len": 32, "controls": ["zero"], "metrics": ["kl"],
    "device": "cpu", "dtype": "auto", "seed": 0, "data": "a.txt", "run_name": "x",
}  # fmt: skip


@many
@given(spoilt(SETTINGS))
def test_settings_from_python(given_):
    if isinstance(given_, dict):
        known = {str(k): v for k, v in given_.items() if k in SETTINGS}
        with contextlib.suppress(TypeError):  # Python's own, of a required one that is missing
            asked(lambda: TraceConfig(**known).to_yaml())
        other = {k: v for k, v in known.items() if k not in ("metrics", "tokens")}
        asked(config.load, ProbeConfig, None, other)


@many
@given(
    data=spoilt(SETTINGS).map(lambda data: yaml.safe_dump(data, allow_unicode=True).encode())
    | damaged(yaml.safe_dump(SETTINGS).encode())
)
def test_a_config_file(tmp_path, data):
    file = tmp_path / "c.yaml"
    file.write_bytes(data)
    made = asked(config.load, TraceConfig, file)
    if made is not None:
        file.write_text(made.to_yaml())
        assert config.load(TraceConfig, file) == made


def files(tmp_path: Path, name: str, data) -> Path:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def spoilt_json(data):
    """What a JSON file may hold in place of this: a strategy."""
    return spoilt(data) | damaged(json.dumps(data).encode())


CONFIG = {"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}, "num_hidden_layers": 4}
RECORD = {
    "format": 1, "version": "1", "model_type": "llama", "base": {"name": "m", "sha256": "0"},
    "swaps": [{"swap": "layer1:zero", "seed": 0}], "shared": {"a": "b"},
}  # fmt: skip


@many
@given(data=spoilt_json(CONFIG) | spoilt_json({**CONFIG, "mismatch": RECORD}))
def test_a_model_config_and_a_record(tmp_path, data):
    files(tmp_path, "config.json", data)
    raw = asked(models.read_config_file, tmp_path)
    if raw is not None:
        asked(models.refuse_remote_code, raw, tmp_path, False)
        asked(swap_record.of_config, raw, tmp_path)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
}


@many
@given(
    data=spoilt(HEADER)
    .map(lambda data: json.dumps(data).encode())
    .map(lambda head: len(head).to_bytes(8, "little") + head + bytes(8))
    | damaged(
        (len(json.dumps(HEADER))).to_bytes(8, "little") + json.dumps(HEADER).encode() + bytes(8)
    )
)
def test_a_weights_file(tmp_path, data):
    asked(models.check_safetensors, files(tmp_path, "model.safetensors", data))


@many
@given(data=spoilt_json({"metadata": {}, "weight_map": {"a": "b.safetensors"}}))
def test_an_index(tmp_path, data):
    files(tmp_path, models.INDEX, data)
    asked(models.check_weights, tmp_path)


MANIFEST = {
    "schema_version": 2, "run_id": "r", "status": "done", "kind": "trace", "model": "m", "swap": "layer1:zero",
    "command": "mismatch", "versions": {"mismatch": "1"}, "fingerprints": {"evaluation": "0"},
    "texts": {"evaluation": {"tokens": 1, "fingerprint": "0", "digests": ["0"]}},
    "model_info": {"sha256": "0", "parameters": 1}, "chosen_on": {"run": "before", "digests": ["0"]},
}  # fmt: skip
FINDINGS = [{"severity": "low", "title": "t", "text": "x", "evidence": {"a": 1.0}, "next": None}]
DICTIONARY = {"metrics": {"kl": {"summary": "s", "unit": "nats", "null": {"mean": 0.0}}}}


@many
@given(data=spoilt_json(MANIFEST))
def test_a_manifest(tmp_path, data):
    files(tmp_path, "manifest.json", data)
    asked(read_manifest, tmp_path)


@many
@given(
    findings=spoilt_json(FINDINGS),
    dictionary=spoilt_json(DICTIONARY),
    settings_=damaged(yaml.safe_dump(SETTINGS).encode()),
)
def test_the_other_files_of_a_run(tmp_path, findings, dictionary, settings_):
    asked(read_entry, files(tmp_path, "findings.json", findings), list[FindingEntry], [])
    asked(read_entry, files(tmp_path, "metrics.json", dictionary), Dictionary, {})
    asked(read_entry, files(tmp_path, "config.yaml", settings_), Settings, {})


PLAN = json.loads(json_text(as_json(scan_plan(tasks={"text": task_plan(None)}))))


@many
@given(spoilt(PLAN))
def test_a_plan(data):
    asked(from_json, ScanPlan, data, None)


ROW = {
    "run_id": "r", "mode": "free", "student": "swap", "layer": 3, "site": "resid_post", "metric": "kl", "stat": "mean",
    "value": 0.5, "n": 10,
}  # fmt: skip
TABLE = to_parquet(as_table([ROW]))


def other_column(name: str, value) -> bytes:
    """The table with something else in one column."""
    table = pq.read_table(io.BytesIO(TABLE))
    sink = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array([value])), sink)
    return sink.getvalue()


values = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=9)
)


@many
@given(
    damaged(TABLE)
    | st.builds(
        other_column, st.sampled_from(pq.read_table(io.BytesIO(TABLE)).column_names), values
    )
)
def test_a_table(data):
    asked(from_parquet, data)


INDEX = {
    "count": 1,
    "parts": [{"file": "a.safetensors", "sha256": "0"}],
    "fingerprint": {"a": 1},
    "info": {},
}


@many
@given(data=spoilt_json(INDEX))
def test_the_state_of_a_stopped_run(tmp_path, data):
    files(tmp_path, "state.json", data)
    asked(State(tmp_path).load, {"a": 1})


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5000 + "1", "9" * 6000, "NaN", "null", ""]
)
def test_json_that_is_made_to_harm(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    reader = models.read_config_file if name == "config.json" else read_manifest
    with pytest.raises(MismatchError, match=name):
        reader(tmp_path)
