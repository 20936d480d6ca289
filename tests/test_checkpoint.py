"""Checkpoints as folders: what is in them, who can read them, what may be done with what was read."""

from __future__ import annotations

import copy
import json
import runpy
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mismatch
from mismatch import checkpoint, models, record, saving
from mismatch.errors import (
    MismatchError,
    ModelError,
    OutputError,
    RunError,
    SpecError,
    SurgeryError,
    UsageError,
)
from mismatch.mechanisms.base import Wrapper
from mismatch.mechanisms.calling import first_of, with_first
from mismatch.mechanisms.identity import Identity
from mismatch.registry import mechanisms

SWAP = "layer1:infini(segment=8); layer2.mlp:mean; norms:dyt; layer2:parallel(infini(segment=8), alpha=0.5)"
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def teacher(toy):
    return mismatch.load(toy[:2])


@pytest.fixture(scope="module")
def student(teacher):
    """Every tensor of it is its own and was moved: a trained student."""
    made = mismatch.swap(
        teacher, SWAP, calibration=["a b c d e f g " * 90], calibration_tokens=96, seq_len=64
    )
    with torch.no_grad():
        for weight in made.model.parameters():
            weight.data = weight * 1.01
    return made


@pytest.fixture(scope="module")
def saved(student, tmp_path_factory):
    """Not to be changed by a test."""
    extra = {"rungs": ["closed-form"], "kl": float("nan")}
    return student.save(tmp_path_factory.mktemp("checkpoints") / "saved", extra=extra)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that may be changed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """What transformers copies out of a folder before it runs it lands here."""
    place = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(place))
    monkeypatch.syspath_prepend(str(tmp_path))  # put back after the test, with what init adds
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    place.mkdir()
    (place / "__init__.py").touch()
    yield {"trust_remote_code": True}
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def edited(folder, **changes):
    """The record in config.json, changed."""
    config = json.loads((folder / "config.json").read_text())
    config["mismatch"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors(folder, change):
    """The weights, changed in place by `change(dict)`."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


# What is in it


def test_the_folder(saved, teacher):
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json", "generation_config.json", "mismatch.json", "model.safetensors",
        "modeling_mismatch.py", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "mismatch"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    entry = config["mismatch"]
    assert (entry["format"], entry["model_type"]) == (1, "llama")
    assert entry["base"] == {"name": "a loaded model", "sha256": teacher.info.sha256}
    assert entry["shared"]["lm_head.weight"] == "model.embed_tokens.weight"
    assert record.extra(saved) == {"rungs": ["closed-form"], "kl": None}


def test_the_swap_is_written_with_every_argument(saved):
    """A default that changes later must not change what an old checkpoint is."""
    (swap,) = record.read(saved).swaps
    assert swap.text.startswith(
        "layer1:infini(segment=8, update=linear, gate_init=0.0, feature_map=elu, sinks=0, first_segment=blend); "
        "layer2.mlp:mean; norms:dyt(alpha=none, inherit=true)"
    )


def test_a_base_in_a_folder_is_named_without_its_path(toy_folder, tmp_path):
    student = mismatch.swap(mismatch.load(toy_folder), "layer1:nope")
    written = record.read(student.save(tmp_path / "saved"))
    assert written.base == record.Base(toy_folder.name, models.load(toy_folder).info.sha256)
    assert str(toy_folder) not in (tmp_path / "saved/config.json").read_text()


def test_each_tensor_is_in_the_file_once(saved, student):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    shared = record.read(saved).shared
    assert names | shared.keys() == student.model.state_dict().keys()
    assert not names & shared.keys()
    unique = {id(p): p for p in student.model.state_dict(keep_vars=True).values()}
    assert len(names) == len(unique)


# Who reads it


def test_load(saved, student):
    again = mismatch.load(saved)
    assert torch.equal(logits(again.model), logits(student.model))
    assert not again.model.training
    assert not any(p.requires_grad for p in again.model.parameters())
    assert again.tokenizer("Once upon a time") == student.tokenizer("Once upon a time")
    assert type(again.tokenizer) is type(student.tokenizer)
    assert again.info.note.startswith(
        "a loaded model with layer1:infini(segment=8); layer2.mlp:mean"
    )
    assert again.info.path == str(saved)
    assert again.info.parameters == student.model.num_parameters()


def test_auto_model_with_the_code_of_the_folder(saved, student, remote):
    config = AutoConfig.from_pretrained(saved, **remote)
    assert config.model_type == "llama"
    model, told = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True, **remote)
    assert all(told[f"{kind}_keys"] == [] for kind in ("missing", "unexpected", "mismatched"))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert torch.equal(logits(model), logits(student.model))
    assert all(p.requires_grad for p in model.parameters())
    assert model.generation_config.eos_token_id == student.model.generation_config.eos_token_id


def test_without_trust_nothing_takes_it_for_the_plain_model(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ModelError) as caught:
        models.load(saved)
    assert str(caught.value) == (
        f"{saved} is a checkpoint of a swapped model, not a plain one\n\nhint: mismatch.load reads both"
    )


def test_the_code_of_the_folder_says_what_is_missing(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "mismatch.checkpoint", None)
    with pytest.raises(ImportError) as caught:
        runpy.run_path(str(saved / "modeling_mismatch.py"))
    version = record.read(saved).version
    assert str(caught.value) == (
        f"parts of this model were replaced by `mismatch` {version}, which is not installed here: get its source and "
        "`pip install ./mismatch` (the package called mismatch on PyPI is another one)"
    )


def test_pipeline(saved, student, remote):
    pipe = transformers.pipeline("text-generation", model=str(saved), **remote)
    (made,) = pipe("Once upon a time", max_new_tokens=9, do_sample=False)
    ids = student.tokenizer("Once upon a time", return_tensors="pt").input_ids
    out = student.model.generate(ids, max_new_tokens=9, do_sample=False)[0]
    assert made["generated_text"] == student.tokenizer.decode(out, skip_special_tokens=True)


def test_plain_tokenizer_and_loading_options(saved, student, remote):
    tokenizer = AutoTokenizer.from_pretrained(saved, **remote)
    assert tokenizer("a b")["input_ids"] == student.tokenizer("a b")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation="eager", **remote
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["quantization_config", "gguf_file", "state_dict"])
def test_what_it_cannot_be_loaded_with(saved, name):
    with pytest.raises(ModelError, match=f"cannot be loaded with `{name}`"):
        checkpoint.MismatchForCausalLM.from_pretrained(saved, **{name: {}})


def test_loading_does_not_move_the_callers_random_numbers(saved):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    mismatch.load(saved)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("swap", ["layer1.block:skip", "final_norm:dyt(alpha=0.5)", "layer0:zero"])
def test_load_in_families(family, swap, tiny, toy, tmp_path):
    student = mismatch.swap((tiny(family, vocab_size=1024), toy.tokenizer), swap)
    path = student.save(tmp_path / "saved")
    assert torch.equal(logits(mismatch.load(path).model), logits(student.model))


# Number formats


def test_dtype_stays_what_it_was_unless_asked(toy, tmp_path):
    model, tokenizer, _ = models.load(toy.info.path, dtype="bfloat16", device="cpu")
    student = mismatch.swap((model, tokenizer), "layer1:infini(segment=8); norms:dyt(alpha=0.5)")
    path = student.save(tmp_path / "saved")
    again = mismatch.load(path)
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again.model), logits(student.model))
    wide = mismatch.load(path, dtype="float32").model
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for name, weight in again.model.named_parameters():
        assert torch.equal(wide.get_parameter(name), weight.float())


def test_tensors_of_another_dtype_than_the_rest_keep_it(toy, tmp_path):
    """A gate that was trained in float32 in a model of bfloat16."""
    model, tokenizer, _ = models.load(toy.info.path, dtype="bfloat16", device="cpu")
    student = mismatch.swap((model, tokenizer), "layer1:infini(segment=8)")
    student.model.model.layers[1].self_attn.gate.data = torch.randn(4)
    again = mismatch.load(student.save(tmp_path / "saved")).model
    assert again.model.layers[1].self_attn.gate.dtype == torch.float32
    assert torch.equal(logits(again), logits(student.model))
    # Also where nothing was replaced, although such a model does not run.
    student.model.model.norm.weight = nn.Parameter(torch.rand(128))
    path = student.save(tmp_path / "mixed")
    again = checkpoint.MismatchForCausalLM.from_pretrained(path)
    for a, b in zip(student.model.parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# Shared tensors


def test_paths_that_were_parted_stay_parted(teacher, tmp_path):
    """`parallel` shares its projections at first; whoever trains them apart must get both back."""
    student = mismatch.swap(teacher, "layer1:parallel(infini(segment=8), alpha=0.5)")
    attn = student.model.model.layers[1].self_attn
    attn.inner.q_proj = nn.Linear(128, 128, bias=False)
    attn.original.k_proj = attn.original.v_proj  # and these two were made one
    path = student.save(tmp_path / "saved")
    again = mismatch.load(path).model
    assert torch.equal(logits(again), logits(student.model))
    here = again.model.layers[1].self_attn
    assert here.inner.q_proj.weight is not here.original.q_proj.weight
    assert here.inner.o_proj.weight is here.original.o_proj.weight
    assert here.original.k_proj.weight is here.original.v_proj.weight


def test_a_head_that_was_untied(teacher, tmp_path):
    student = mismatch.swap(teacher, "layer1:nope")
    head = student.model.lm_head
    head.weight = nn.Parameter(head.weight * 2)
    again = mismatch.load(student.save(tmp_path / "saved")).model
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(student.model))


def test_a_block_under_two_names_that_was_parted(teacher, tmp_path):
    """In `layer1.block:parallel(zero)` the whole block is one module under two names."""
    student = mismatch.swap(teacher, "layer1.block:parallel(identity, alpha=0.5)")
    block = student.model.model.layers[1]
    assert block.inner.original is block.original
    block.inner.original = copy.deepcopy(block.original)
    block.inner.original.mlp.up_proj.weight.data.mul_(2)
    path = student.save(tmp_path / "saved")
    again = mismatch.load(path).model
    assert torch.equal(logits(again), logits(student.model))


# What a mechanism computes for itself and does not save


class Drawn(Wrapper):
    """drawn: a buffer outside the state dict, drawn from the seed. Inherited, new, dropped: for this test."""

    Config = Identity.Config
    slots = ("attn",)
    identity = "none"
    state = "none"
    source = "a test"

    def __init__(self, original, config, context):
        super().__init__(original, config, context)
        draws = torch.Generator().manual_seed(context.seed)
        self.register_buffer("basis", torch.randn(8, generator=draws), persistent=False)
        self.factor = float(torch.randn((), generator=draws))

    def forward(self, *args, **kwargs):
        output = self.original(*args, **kwargs)
        return with_first(output, first_of(output) * (self.factor + self.basis.sum()))


def test_buffers_outside_the_state_dict_are_built_not_left_as_garbage(teacher, tmp_path, remote):
    mechanisms().add("drawn", Drawn)
    student = mismatch.swap(teacher, "layer1:drawn", seed=7)
    path = student.save(tmp_path / "saved")
    for model in (
        mismatch.load(path).model,
        AutoModelForCausalLM.from_pretrained(path, **remote),
    ):
        assert torch.equal(
            model.model.layers[1].self_attn.basis, student.model.model.layers[1].self_attn.basis
        )
        assert torch.equal(logits(model), logits(student.model))


# What may be done with it


def test_save_pretrained_of_what_was_loaded(saved, student, tmp_path, remote):
    model = AutoModelForCausalLM.from_pretrained(saved, **remote)
    with torch.no_grad():
        model.model.layers[1].self_attn.gate.add_(1.0)
    model.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", **remote)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(student.model))
    assert record.read(tmp_path / "second") == record.read(saved)


def test_save_pretrained_of_a_student_is_whole(student, tmp_path, remote):
    student.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **remote)
    assert torch.equal(logits(again), logits(student.model))


def test_shards_and_back(saved, student, tmp_path):
    model = mismatch.load(saved).model
    model.save_pretrained(tmp_path / "parts", max_shard_size="600KB")
    names = sorted(p.name for p in (tmp_path / "parts").glob("model*.safe*"))
    assert len(names) > 3
    assert names[-1] == "model.safetensors.index.json"
    student.tokenizer.save_pretrained(tmp_path / "parts")
    again = mismatch.load(tmp_path / "parts")
    assert torch.equal(logits(again.model), logits(student.model))
    again.model.save_pretrained(tmp_path / "parts")
    assert [p.name for p in (tmp_path / "parts").glob("model*.safe*")] == ["model.safetensors"]
    assert torch.equal(logits(mismatch.load(tmp_path / "parts").model), logits(student.model))


def test_save_pretrained_refuses_what_it_would_lose(saved, tmp_path):
    model = mismatch.load(saved).model
    with pytest.raises(UsageError, match="does not know `push_to_hub`"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    state = model.state_dict()
    del state["model.layers.1.self_attn.gate"]
    with pytest.raises(
        UsageError, match=r"lacks 1 tensors of this model, first model.layers.1.self_attn.gate"
    ):
        model.save_pretrained(tmp_path / "x", state_dict=state)


def test_trainer(saved, student, tmp_path, remote):
    """Two steps, one saved on the way; what it saves is a checkpoint, and training goes on from the middle."""
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1).tolist()]

    def trainer(where, **more):
        transformers.set_seed(0)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / where), max_steps=2, save_steps=1, report_to="none", use_cpu=True,
            per_device_train_batch_size=2, learning_rate=1e-2, logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(saved, **remote)
        return transformers.Trainer(
            model, args, train_dataset=rows, processing_class=student.tokenizer
        )

    first = trainer("a")
    first.train()
    gate = first.model.model.layers[1].self_attn.gate
    assert not torch.equal(gate, student.model.model.layers[1].self_attn.gate)
    first.save_model()
    again = mismatch.load(tmp_path / "a")
    assert torch.equal(logits(again.model), logits(first.model.eval()))
    second = trainer("b")
    second.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-1"))
    assert torch.equal(logits(second.model.eval()), logits(first.model))


def test_swapped_further(saved, student, tmp_path):
    loaded = mismatch.load(saved)
    before = logits(loaded.model)
    more = mismatch.swap(loaded, "layer0.mlp:zero", seed=5)
    assert not torch.equal(logits(more.model), before)
    path = mismatch.save_checkpoint(more, tmp_path / "more")
    written = record.read(path)
    assert [swap.seed for swap in written.swaps] == [0, 5]
    assert written.swaps[1].text == "layer0.mlp:zero"
    assert written.base == record.read(saved).base
    again = mismatch.load(path)
    assert torch.equal(logits(again.model), logits(more.model))
    more.undo()
    assert torch.equal(logits(more.model), before)
    assert more.model.swap_record == loaded.model.swap_record


def test_a_place_that_is_taken_cannot_be_taken_again(saved):
    loaded = mismatch.load(saved)
    with pytest.raises(SpecError) as caught:
        mismatch.swap(loaded, "layer1:random")
    assert str(caught.value) == (
        "layer 1 `attn` is replaced twice: by `infini` and `random`\n  layer1:random\n  ^\n\n"
        "hint: one replacement per slot; wrappers such as `parallel` may come on top"
    )
    assert mismatch.swap(loaded, "layer1:zero").plan.layers == (1,)


def test_it_can_be_checked_and_traced(saved, tmp_path):
    text = ["one two three four five six seven eight nine ten. " * 40]
    result = mismatch.trace(
        str(saved),
        swap="layer3:identity",
        data=text,
        tokens=128,
        seq_len=64,
        controls=["zero"],
        dtype="float32",
    )
    table = result.table
    kl = table[(table["metric"] == "kl") & (table["site"] == "logits") & (table["stat"] == "mean")]
    assert kl[kl["student"] == "swap"]["value"].eq(0).all()
    assert kl[kl["student"] == "zero"]["value"].gt(0).all()


def test_a_block_that_was_replaced_as_a_whole_can_be_the_teachers(teacher, tmp_path):
    path = mismatch.swap(teacher, "layer1.block:skip").save(tmp_path / "saved")
    loaded = mismatch.load(path)
    assert loaded.layout.whole_blocks == {1}
    text = ["one two three four five six seven eight nine ten. " * 40]
    result = mismatch.trace(
        loaded, mismatch.swap(loaded, "layer0:zero"), data=text, tokens=64, seq_len=64, controls=[]
    )
    sites = result.table[result.table["layer"] == 1]["site"].unique()
    assert set(sites) == {"resid_pre", "resid_post"}


def test_a_loaded_model_and_a_student_are_teachers_too(student, saved, remote):
    again = mismatch.load((student.model, student.tokenizer))
    assert again.model is student.model
    model = AutoModelForCausalLM.from_pretrained(saved, **remote)
    assert mismatch.swap((model, student.tokenizer), "layer3:nope").plan.layers == (3,)


def test_an_undone_student_is_a_plain_model_again(teacher, tmp_path):
    student = mismatch.swap(teacher, "layer1:zero")
    student.undo()
    assert type(student.model) is type(teacher.model)
    student.model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(teacher.model))
    with pytest.raises(SurgeryError, match="holds no swap that could be saved"):
        student.save(tmp_path / "saved")
    with pytest.raises(SurgeryError, match="nothing is swapped in this LlamaForCausalLM"):
        mismatch.save_checkpoint(teacher, tmp_path / "saved")


# What is refused


def refused(folder, **options):
    with pytest.raises(MismatchError) as caught:
        mismatch.load(folder, **options)
    return caught.value


def test_another_format(folder):
    error = refused(edited(folder, format=2, version="9.1"))
    assert isinstance(error, ModelError)
    assert str(error) == (
        f"{folder} is a checkpoint of format 2, written by mismatch 9.1; this is mismatch "
        f"{mismatch.__version__}, which reads format 1\n\nhint: load it with the version that wrote it"
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"swaps": []}, "it names no swap"),
        (
            {"swaps": [{"swap": "all:zero"}]},
            "its `mismatch` entry cannot be read (KeyError('seed'))",
        ),
        ({"shared": None}, "its `mismatch` entry cannot be read"),
    ],
)
def test_a_broken_record(folder, change, what):
    assert f"{folder} is not a whole checkpoint: {what}" in str(refused(edited(folder, **change)))


def test_no_record_at_all(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["mismatch"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json has no `mismatch` entry with a format" in str(refused(folder))


def test_an_unknown_mechanism(folder):
    error = refused(edited(folder, swaps=[{"swap": "layer1:infinit(segment=8)", "seed": 0}]))
    assert str(error).startswith(
        f"{folder}: its swap cannot be made again: unknown mechanism `infinit`\n  layer1:infinit(segment=8)\n"
        "         ^\n\nhint: it was written by mismatch "
    )


def test_a_swap_that_does_not_fit(folder):
    error = refused(edited(folder, swaps=[{"swap": "layer9:zero", "seed": 0}]))
    assert "its swap cannot be made again: layer 9 does not exist" in str(error)


def test_a_class_named_by_its_module_wants_trust(folder):
    edited(folder, swaps=[{"swap": "layer1:parallel(some_package.part:Evil)", "seed": 0}])
    error = refused(folder)
    assert str(error) == (
        f"{folder}: its swap needs `some_package.part:Evil`, a class that is not mismatch's own; importing it runs its "
        "code, which is off\n\nhint: read that code first, then --trust-remote-code "
        "(in Python: trust_remote_code=True)"
    )
    assert "cannot be made again" in str(refused(folder, trust_remote_code=True))


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "has no tokenizer that can be loaded" in str(refused(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has a config but no weights" in str(refused(folder))


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "is truncated" in str(refused(folder))


def test_tensors_that_are_missing(folder):
    names = ["model.layers.1.self_attn.gate", "model.layers.0.mlp.up_proj.weight"]
    tensors(folder, lambda held: [held.pop(name) for name in names])
    error = refused(folder)
    assert str(error).startswith(
        f"{folder}: 2 tensors are not in its weights, first model.layers.0.mlp.up_proj.weight\n\n"
        "hint: the folder is not as student.save() wrote it, or another version of mismatch builds"
    )


def test_tensors_that_belong_nowhere(folder):
    tensors(folder, lambda held: held.update(other=torch.zeros(2)))
    assert "1 tensors belong to no part of it, first other" in str(refused(folder))


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.gate", "model.layers.0.mlp.up_proj.weight"]
)
def test_tensors_of_another_shape(folder, name, remote):
    tensors(folder, lambda held: held.update({name: torch.zeros(3)}))
    assert f"1 tensors have another shape than its parts, first {name}" in str(refused(folder))
    with pytest.raises(ModelError, match="have another shape"):
        AutoModelForCausalLM.from_pretrained(folder, **remote)


def test_a_second_name_of_nothing(folder):
    shared = {**record.read(folder).shared, "model.nothing": "model.embed_tokens.weight"}
    assert "belong to no part of it, first model.nothing" in str(
        refused(edited(folder, shared=shared))
    )


def test_code_of_a_plain_folder(toy_folder):
    with pytest.raises(ModelError, match="is not a checkpoint of mismatch"):
        checkpoint.MismatchForCausalLM.from_pretrained(toy_folder)


# Writing


def test_nothing_is_overwritten_unasked(student, saved, tmp_path):
    with pytest.raises(OutputError) as caught:
        student.save(saved)
    assert str(caught.value) == (
        f"the folder {saved} exists and is not empty\n\n"
        "hint: give another path, or overwrite=True to replace the checkpoint in it"
    )
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        student.save(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="is not a checkpoint of mismatch and is not overwritten"):
        student.save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_overwrite_replaces_all_of_an_older_checkpoint(teacher, folder):
    student = mismatch.swap(teacher, "layer3:nope")
    student.save(folder, overwrite=True)
    assert not (folder / "mismatch.json").exists()
    assert torch.equal(logits(mismatch.load(folder).model), logits(student.model))
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_an_empty_folder_is_taken(teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    mismatch.swap(teacher, "layer3:nope").save(tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()


@pytest.mark.parametrize("at", ["save_file", "write_atomic"])
def test_a_save_that_fails_leaves_what_was_there(student, folder, monkeypatch, at):
    def full(*args, **kwargs):
        if at == "write_atomic":
            raise OSError(28, "No space left on device")
        raise saving.SafetensorError("Error while serializing: I/O error: No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(saving, at, full)
    for path, options in ((folder, {"overwrite": True}), (folder.parent / "new", {})):
        with pytest.raises(RunError, match="No space left on device"):
            student.save(path, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_state_that_is_no_tensor_is_refused(teacher, tmp_path):
    class Stateful(nn.Identity):
        def get_extra_state(self):
            return {"step": 3}

    student = mismatch.swap(teacher, "layer3:nope")
    student.model.model.layers[3].self_attn.memory = Stateful()
    with pytest.raises(SurgeryError, match="is not a tensor but dict: safetensors cannot hold it"):
        student.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
