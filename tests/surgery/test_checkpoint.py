"""Checkpoints as folders: what is in them, and that transformers and mismatch read the same model out of them."""

from __future__ import annotations

import copy
import json
import runpy
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mismatch
from mismatch.errors import ModelError, SurgeryError
from mismatch.mechanisms.base import Wrapper
from mismatch.mechanisms.identity import Identity
from mismatch.mechanisms.parts.calling import first_of, with_first
from mismatch.models import load as models
from mismatch.models import swap_record as record
from mismatch.registry import mechanisms
from mismatch.surgery import loading as checkpoint

IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


# What is in it


def test_the_folder(saved_toy, toy_teacher):
    assert sorted(path.name for path in saved_toy.iterdir()) == [
        "config.json", "generation_config.json", "mismatch.json", "model.safetensors",
        "modeling_mismatch.py", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((saved_toy / "config.json").read_text())
    assert config["model_type"] == "mismatch"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    entry = config["mismatch"]
    assert (entry["format"], entry["model_type"]) == (1, "llama")
    assert entry["base"] == {"name": "a loaded model", "sha256": toy_teacher.info.sha256}
    assert entry["shared"]["lm_head.weight"] == "model.embed_tokens.weight"
    assert record.extra(saved_toy) == {"stages": ["closed-form"], "kl": None}


def test_who_may_read_a_folder_may_read_its_weights(saved_toy):
    """safetensors 0.8 lets the owner alone."""
    modes = {file.name: file.stat().st_mode & 0o777 for file in saved_toy.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_swap_is_written_with_every_argument(saved_toy):
    """A default that changes later must not change what an old checkpoint is."""
    (swap,) = record.read(saved_toy).swaps
    assert swap.text.startswith(
        "layer1:infini(segment=8, update=linear, gate_init=0.0, feature_map=elu, sinks=0, first_segment=blend, "
        'overlap=0, normalizer=gate, slots=0, slot_score=learned, memory_position="none"); '
        "layer2.mlp:mean; norms:dyt(alpha=none, inherit=true)"
    )


def test_a_base_in_a_folder_is_named_without_its_path(toy_folder, tmp_path):
    student = mismatch.swap(mismatch.load(toy_folder), "layer1:nope")
    written = record.read(student.save(tmp_path / "saved"))
    assert written.base == record.Base(toy_folder.name, models.load(toy_folder).info.sha256)
    assert str(toy_folder) not in (tmp_path / "saved/config.json").read_text()


def test_each_tensor_is_in_the_file_once(saved_toy, swapped_toy):
    with safe_open(saved_toy / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    shared = record.read(saved_toy).shared
    assert names | shared.keys() == swapped_toy.model.state_dict().keys()
    assert not names & shared.keys()
    unique = {id(p): p for p in swapped_toy.model.state_dict(keep_vars=True).values()}
    assert len(names) == len(unique)


# Who reads it


def test_load(saved_toy, swapped_toy):
    again = mismatch.load(saved_toy)
    assert torch.equal(logits(again.model), logits(swapped_toy.model))
    assert not again.model.training
    assert not any(p.requires_grad for p in again.model.parameters())
    assert again.tokenizer("Once upon a time") == swapped_toy.tokenizer("Once upon a time")
    assert type(again.tokenizer) is type(swapped_toy.tokenizer)
    assert again.info.note.startswith(
        "a loaded model with layer1:infini(segment=8); layer2.mlp:mean"
    )
    assert again.info.path == str(saved_toy)
    assert again.info.parameters == swapped_toy.model.num_parameters()


def test_auto_model_with_the_code_of_the_folder(saved_toy, swapped_toy, remote_code):
    config = AutoConfig.from_pretrained(saved_toy, **remote_code)
    assert config.model_type == "llama"
    model, told = AutoModelForCausalLM.from_pretrained(
        saved_toy, output_loading_info=True, **remote_code
    )
    assert all(told[f"{kind}_keys"] == [] for kind in ("missing", "unexpected", "mismatched"))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert torch.equal(logits(model), logits(swapped_toy.model))
    assert all(p.requires_grad for p in model.parameters())
    assert model.generation_config.eos_token_id == swapped_toy.model.generation_config.eos_token_id


def test_without_trust_nothing_takes_it_for_the_plain_model(saved_toy):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(saved_toy)
    with pytest.raises(ModelError) as caught:
        models.load(saved_toy)
    assert str(caught.value) == (
        f"{saved_toy} is a checkpoint of a swapped model, not a plain one\n\nhint: mismatch.load reads both"
    )


def test_the_code_of_the_folder_says_what_is_missing(saved_toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "mismatch.checkpoint", None)
    with pytest.raises(ImportError) as caught:
        runpy.run_path(str(saved_toy / "modeling_mismatch.py"))
    version = record.read(saved_toy).version
    assert str(caught.value) == (
        f"modules of this model were replaced by `mismatch` {version}, which is not installed here: "
        "`pip install llm-mismatch` (the package called mismatch on PyPI is another one)"
    )


def test_pipeline(saved_toy, swapped_toy, remote_code):
    pipe = transformers.pipeline("text-generation", model=str(saved_toy), **remote_code)
    (made,) = pipe("Once upon a time", max_new_tokens=9, do_sample=False)
    ids = swapped_toy.tokenizer("Once upon a time", return_tensors="pt").input_ids
    out = swapped_toy.model.generate(ids, max_new_tokens=9, do_sample=False)[0]
    assert made["generated_text"] == swapped_toy.tokenizer.decode(out, skip_special_tokens=True)


def test_plain_tokenizer_and_loading_options(saved_toy, swapped_toy, remote_code):
    tokenizer = AutoTokenizer.from_pretrained(saved_toy, **remote_code)
    assert tokenizer("a b")["input_ids"] == swapped_toy.tokenizer("a b")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(
        saved_toy,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        attn_implementation="eager",
        **remote_code,
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["quantization_config", "gguf_file", "state_dict"])
def test_what_it_cannot_be_loaded_with(saved_toy, name):
    with pytest.raises(ModelError, match=f"cannot be loaded with `{name}`"):
        checkpoint.MismatchForCausalLM.from_pretrained(saved_toy, **{name: {}})


def test_layers_may_be_offloaded_and_are_not_saved(toy_teacher, tmp_path):
    student = mismatch.swap(toy_teacher, "layer1:infini(segment=8)")
    path = student.save(tmp_path / "saved")

    def load(offloaded):
        names = ("embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(4)))
        places = {f"model.{name}": "disk" if name == offloaded else "cpu" for name in names}
        return checkpoint.MismatchForCausalLM.from_pretrained(
            path, device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path / "offloaded"
        )

    model = load("layers.3")
    assert torch.equal(logits(model), logits(student.model))
    with pytest.raises(SurgeryError, match="lies on no device"):
        model.save_pretrained(tmp_path / "again")
    # A swapped module is built from weights that are there, and they stay.
    swapped = load("layers.1")
    assert torch.equal(logits(swapped), logits(student.model))
    assert not any(tensor.is_meta for tensor in swapped.model.layers[1].self_attn.parameters())
    assert swapped.model.layers[1].mlp.up_proj.weight.is_meta


def test_loading_does_not_move_the_callers_random_numbers(saved_toy):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    mismatch.load(saved_toy)
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


def test_paths_that_were_parted_stay_parted(toy_teacher, tmp_path):
    """`parallel` shares its projections at first; whoever trains them apart must get both back."""
    student = mismatch.swap(toy_teacher, "layer1:parallel(infini(segment=8), alpha=0.5)")
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


def test_a_head_that_was_untied(toy_teacher, tmp_path):
    student = mismatch.swap(toy_teacher, "layer1:nope")
    head = student.model.lm_head
    head.weight = nn.Parameter(head.weight * 2)
    again = mismatch.load(student.save(tmp_path / "saved")).model
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(student.model))


def test_a_block_under_two_names_that_was_parted(toy_teacher, tmp_path):
    """In `layer1.block:parallel(zero)` the whole block is one module under two names."""
    student = mismatch.swap(toy_teacher, "layer1.block:parallel(identity, alpha=0.5)")
    block = student.model.model.layers[1]
    assert block.inner.original is block.original
    block.inner.original = copy.deepcopy(block.original)
    block.inner.original.mlp.up_proj.weight.data.mul_(2)
    path = student.save(tmp_path / "saved")
    again = mismatch.load(path).model
    assert torch.equal(logits(again), logits(student.model))


OWN = '''"""A part of the user's own."""
import torch

class Mixer(torch.nn.Module):
    slots = ("attn",)
    def __init__(self, config, rank=4):
        super().__init__()
        self.down = torch.nn.Linear(config.hidden_size, rank)
        self.up = torch.nn.Linear(rank, config.hidden_size)
    def forward(self, hidden_states, **rest):
        return self.up(self.down(hidden_states)), None
'''


def test_a_module_of_the_users_own(toy_teacher, tmp_path, monkeypatch, remote_code):
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    student = mismatch.swap(toy_teacher, "layer1:own_parts:Mixer(rank=3); layer2.mlp:mean")
    path = student.save(tmp_path / "saved")
    with pytest.raises(ModelError, match="its swap needs `own_parts:Mixer`"):
        mismatch.load(path)
    for model in (
        mismatch.load(path, trust_remote_code=True).model,
        AutoModelForCausalLM.from_pretrained(path, **remote_code),
    ):
        assert torch.equal(logits(model), logits(student.model))


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


def test_buffers_outside_the_state_dict_are_built_not_left_as_garbage(
    toy_teacher, tmp_path, remote_code
):
    mechanisms().add("drawn", Drawn)
    student = mismatch.swap(toy_teacher, "layer1:drawn", seed=7)
    path = student.save(tmp_path / "saved")
    for model in (
        mismatch.load(path).model,
        AutoModelForCausalLM.from_pretrained(path, **remote_code),
    ):
        assert torch.equal(
            model.model.layers[1].self_attn.basis, student.model.model.layers[1].self_attn.basis
        )
        assert torch.equal(logits(model), logits(student.model))
