"""Names, refusals before weights are read, silent failures after; nothing asks the network."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mismatch.errors import ModelError
from mismatch.models import folder as weights
from mismatch.models import load as models
from mismatch.texts.demo import fetch


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        pytest.fail("weights were read before the refusal")

    monkeypatch.setattr(models.transformers.AutoModelForCausalLM, "from_pretrained", read)


def refused(folder: Path | str, match: str, **options: object) -> ModelError:
    with pytest.raises(ModelError, match=match) as error:
        models.load(folder, device="cpu", **options)
    return error.value


# names


def test_a_fetched_name_a_folder_and_its_path_are_the_same_model(toy, toy_folder):
    named = models.load("glassllm", device="cpu")
    assert named.info.sha256 == toy.info.sha256
    assert named.info.name == "glassllm"
    assert "Lewis Carroll" in named.info.note
    assert named.info.path == str(toy_folder)
    assert named.info.parameters == 852_608
    assert named.info.dtype == "float32"


def test_a_loaded_model_is_ready_to_be_traced(toy):
    assert not toy.model.training
    assert not any(p.requires_grad for p in toy.model.parameters())
    assert toy.model.config._attn_implementation == "sdpa"  # transformers' default


def test_a_name_that_was_not_fetched_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MISMATCH_CACHE", str(tmp_path))
    error = refused("smollm2", "smollm2 is not here yet")
    assert "mismatch fetch smollm2" in error.hint
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("name", "match", "hint"),
    [
        ("smolm2", "no model is called 'smolm2'", "did you mean `smollm2`?"),
        ("sotu", "sotu is a text, not a model", "one to fetch: smollm2, glassllm"),
        ("./nowhere", "no model folder ./nowhere", "a folder, a hub id"),
        ("some-owner/some-name", "the Hugging Face hub did not deliver it", "a folder, a hub id"),
    ],
)
def test_names_that_lead_nowhere(name, match, hint):
    assert hint in refused(name, match).hint


def test_a_file_is_not_a_folder(toy_folder):
    refused(toy_folder / "model.safetensors", "is a file")


# config


def test_read_config_needs_no_weights(model_folder):
    folder = model_folder()
    (folder / "model.safetensors").unlink()
    config, source = models.read_config(folder)
    assert config.num_hidden_layers == 4
    assert source.folder == folder.resolve()


@pytest.mark.usefixtures("no_weights_read")
class TestRefusedBeforeWeightsAreRead:
    def test_no_config(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        refused(tmp_path, "has no config.json.*it holds: notes.txt")

    @pytest.mark.parametrize(
        ("file", "hint"), [("adapter_config.json", "peft adapter"), ("m.gguf", "GGUF is not read")]
    )
    def test_no_config_but_something_known(self, tmp_path, file, hint):
        (tmp_path / file).write_text("{}")
        assert hint in refused(tmp_path, "has no config.json").hint

    def test_broken_config(self, model_folder):
        folder = model_folder()
        (folder / "config.json").write_text('{"model_type": ')
        refused(folder, "config.json is not valid JSON")

    def test_config_of_something_else(self, model_folder):
        folder = model_folder()
        (folder / "config.json").write_text('{"name": "x"}')
        refused(folder, "names no model_type")

    def test_impossible_config(self, model_folder):
        refused(model_folder(hidden_size=130), "is not a valid config|divisible")

    def test_unknown_family(self, model_folder):
        refused(model_folder(model_type="llamma"), "model_type 'llamma' is unknown to transformers")

    def test_remote_code(self, model_folder):
        folder = model_folder(model_type="own", auto_map={"AutoConfig": "own.Config"})
        error = refused(folder, r"run its own code \(own.Config\), which is off")
        assert "--trust-remote-code" in error.hint

    def test_no_weights(self, model_folder):
        folder = model_folder()
        (folder / "model.safetensors").unlink()
        refused(folder, "has a config but no weights")

    def test_pickle_only(self, model_folder):
        folder = model_folder()
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        error = refused(folder, r"only as pickle \(pytorch_model.bin\), which is refused")
        assert "--allow-pickle" in error.hint

    @pytest.mark.parametrize("keep", [0, 7, 5000, -1])
    def test_truncated(self, model_folder, keep):
        path = model_folder() / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        refused(path.parent, "model.safetensors is truncated")

    def test_too_long(self, model_folder):
        path = model_folder() / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"x")
        refused(path.parent, "model.safetensors is too long")

    def test_not_safetensors(self, model_folder):
        path = model_folder() / "model.safetensors"
        path.write_bytes((4).to_bytes(8, "little") + b"nope")
        refused(path.parent, "is not safetensors: ")

    def test_git_lfs_pointer(self, model_folder):
        path = model_folder() / "model.safetensors"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        refused(path.parent, "Git LFS pointer")

    def test_missing_shard(self, sharded):
        (sharded / "model-00002-of-00002.safetensors").unlink()
        refused(sharded, "1 of 2 shards of its index are missing: model-00002")

    def test_shard_without_its_tensor(self, sharded):
        path = sharded / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
        path.write_text(json.dumps(index))
        refused(sharded, "lacks 1 tensors .* first ghost")

    def test_broken_index(self, sharded):
        (sharded / "model.safetensors.index.json").write_text("[]")
        refused(sharded, "is not a safetensors index")

    def test_no_tokenizer(self, model_folder):
        folder = model_folder()
        for path in folder.glob("tokenizer*"):
            path.unlink()
        refused(folder, "has no tokenizer that can be loaded")

    def test_unknown_dtype(self, toy_folder):
        refused(toy_folder, "unknown dtype 'int3'; known: auto, float32", dtype="int3")

    def test_device_that_is_not_there(self, toy_folder):
        with pytest.raises(ModelError, match="device nowhere cannot be used"):
            models.load(toy_folder, device="nowhere")

    def test_device_and_device_map(self, toy_folder):
        refused(toy_folder, "exclude one another", device_map="auto")


@pytest.fixture
def sharded(model_folder) -> Path:
    """The toy's folder with its weights in two files and an index."""
    folder = model_folder()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# what loads all the same


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_shards_load(sharded, toy):
    assert same_weights(models.load(sharded, device="cpu").model, toy.model)


def test_pickle_loads_when_asked_for(model_folder, toy):
    folder = model_folder()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = models.load(folder, device="cpu", allow_pickle=True)
    assert same_weights(loaded.model, toy.model)
    assert len(loaded.info.sha256) == 64


def test_remote_code_is_left_alone_when_transformers_has_the_family(model_folder, toy):
    folder = model_folder(auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('code was run')\n")
    loaded = models.load(folder, device="cpu")
    assert type(loaded.model) is type(toy.model)
    assert same_weights(loaded.model, toy.model)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16", torch.bfloat16])
def test_dtype(toy_folder, dtype):
    loaded = models.load(toy_folder, dtype=dtype, device="cpu")
    assert loaded.model.dtype == models.DTYPES.get(dtype, dtype)
    assert loaded.info.dtype == str(loaded.model.dtype).removeprefix("torch.")


def test_device_map(toy_folder, toy):
    loaded = models.load(toy_folder, device_map={"": "cpu"})
    assert same_weights(loaded.model, toy.model)


@pytest.mark.parametrize("family_name", ["gemma3_text", "gpt2", "gpt_neox"])
def test_a_saved_model_of_another_family_loads(tiny, tmp_path, toy, family_name):
    model = tiny(family_name, vocab_size=1024)
    model.save_pretrained(tmp_path)
    toy.tokenizer.save_pretrained(tmp_path)
    assert same_weights(models.load(tmp_path, device="cpu").model, model)


# silent failures


def test_weights_that_are_missing_are_not_left_at_random(model_folder):
    folder = model_folder()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "1 tensors of LlamaForCausalLM are not in its weights .*layers.2.mlp.up_proj")


def test_a_rope_base_that_was_lost(model_folder):
    """Both spellings in one file, and they disagree: transformers 5 takes its own."""
    folder = model_folder(
        rope_theta=50000.0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    refused(folder, r"rope_theta \[10000.0, 50000.0\], the loaded model has \[10000.0\]")


def test_a_tokenizer_of_another_model(model_folder):
    folder = model_folder()
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = [dict(tokenizer["added_tokens"][0], id=1024 + i, content=f"<{i}>") for i in range(3)]
    tokenizer["added_tokens"] += added
    path.write_text(json.dumps(tokenizer))
    refused(folder, "the tokenizer has 1,027 tokens, the embedding 1,024 rows")


# fingerprint


def test_the_fingerprint_changes_with_any_weight_and_with_the_config(model_folder):
    folder = model_folder()
    path = folder / "model.safetensors"

    def read() -> str:
        return weights.fingerprint(folder, weights.check_weights(folder))

    before = read()
    assert read() == before
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight
    path.write_bytes(content)
    assert read() != before
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert read() == before
    config = folder / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert read() != before


def test_a_model_in_memory_is_named_by_its_tensors(tiny):
    model = tiny("llama")
    before = models.describe(model)
    assert models.describe(tiny("llama")).sha256 == before.sha256
    assert models.describe(tiny("llama", seed=1)).sha256 != before.sha256
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert models.describe(model).sha256 != before.sha256
    assert before.parameters == model.num_parameters()


def test_the_cache_is_where_it_was_told_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("MISMATCH_CACHE", str(tmp_path / "x"))
    assert fetch.cache_dir() == tmp_path / "x"
    monkeypatch.delenv("MISMATCH_CACHE")
    assert fetch.cache_dir().name in ("mismatch", "Cache")
