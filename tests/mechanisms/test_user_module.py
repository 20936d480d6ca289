"""A module from another package, named in the swap: a subclass of Mechanism, or a plain torch module."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_models import FAMILIES, N_LAYERS, in_chunks, part, swap, tiny, tokens
from torch import nn

import mismatch
from mismatch.catalog import explain
from mismatch.errors import MismatchError, SpecError, SurgeryError, UsageError
from mismatch.layout import Layout
from mismatch.registry import mechanisms
from mismatch.spec import check, format, parse
from mismatch.tracing import probe

SOURCE = '''
"""Parts of somebody's own."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from mismatch.mechanisms.base import Wrapper
from mismatch.mechanisms.calling import first_of, with_first


@dataclass(frozen=True)
class HalfConfig:
    factor: Annotated[float, "0..1"] = 0.5
    """What the output is multiplied by."""


class Half(Wrapper):
    """Less of it."""

    Config = HalfConfig
    slots = ("attn", "mlp")
    identity = "factor=1"
    state = "the original's"
    source = "an example"

    def forward(self, *args, **kwargs):
        out = self.original(*args, **kwargs)
        return with_first(out, first_of(out) * self.settings.factor)


class Quarter(Half):
    def forward(self, *args, **kwargs):
        return with_first(super().forward(*args, **kwargs), 0)


class Gated(nn.Module):
    """An MLP of one gate."""

    slots = ("mlp",)

    def __init__(self, config, width: int = 3, bias=True, name="x", kinds=()):
        super().__init__()
        self.down = nn.Linear(config.hidden_size, width, bias=bias)
        self.up = nn.Linear(width, config.hidden_size, bias=bias)
        self.seen = (width, bias, name, kinds)

    def forward(self, x):
        return self.up(torch.sigmoid(self.down(x)))


class Past(nn.Module):
    """Attention to the mean of all tokens so far, in no cache."""

    def __init__(self, config, layer_idx, scale=1.0):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_idx, self.scale = layer_idx, scale

    def forward(self, hidden_states, **kwargs):
        count = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
        mean = hidden_states.cumsum(1) / count[:, None].to(hidden_states.dtype)
        return self.scale * self.project(mean), None


class PerToken(nn.Module):
    """What an attention may be that mixes nothing."""

    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        return self.project(hidden_states), None


class Doubled(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return 2 * hidden_states


class Returns(nn.Module):
    """Gives back what it is told."""

    def __init__(self, what="tensor"):
        super().__init__()
        self.what = what

    def forward(self, hidden_states, **kwargs):
        h = hidden_states
        return {
            "tensor": h,
            "pair": (h, None),
            "three": (h, None, None),
            "narrow": (h[..., :3], None),
            "short": h[:, :-1],
            "wide_format": h.double(),
            "nothing": None,
            "list": [h],
        }[self.what]


class Closed(nn.Module):
    def forward(self, x):
        return x, None


class NotAModule:
    pass


def a_function():
    pass
'''


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """`theirs.parts`, and `theirs` that only imports from it."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "__init__.py").write_text("from theirs.parts import Gated, a_function\n")
    (folder / "parts.py").write_text(SOURCE)
    (folder / "wrong.py").write_text("class Broken(:\n")
    (folder / "fails.py").write_text("import no_such_package\nclass Fine: pass\n")
    (folder / "raises.py").write_text("raise ValueError('not today')\nclass Fine: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("theirs")]:
        del sys.modules[name]


def refusal(text, error=SurgeryError, family="llama"):
    with pytest.raises(error) as caught:
        swap(tiny(family), text)
    return str(caught.value)


# a subclass of Mechanism -------------------------------------------------------------------------


def test_a_mechanism_of_another_package_is_one_of_ours():
    model, ids = tiny("llama"), tokens(2, 9)
    student = swap(model, "layer1:theirs.parts:Half(factor=1)")
    assert torch.equal(student.model(ids).logits, model(ids).logits)
    clause = student.plan.clauses[0]
    assert (clause.mechanism, clause.slot, clause.identity) == (
        "theirs.parts:Half",
        "attn",
        "factor=1",
    )
    half = swap(model, "layer1.mlp:theirs.parts:Half")
    x = torch.randn(1, 4, 24)
    torch.testing.assert_close(part(half, slot="mlp")(x), 0.5 * model.model.layers[1].mlp(x))


def test_its_arguments_are_checked_as_ours_are():
    assert format(parse("layer1:theirs.parts:Half(factor=0.5)")) == "layer1:theirs.parts:Half"
    assert refusal("layer1:theirs.parts:Half(factor=2)", SpecError) == (
        "`factor` must be float in 0..1, got 2\n"
        "  layer1:theirs.parts:Half(factor=2)\n"
        "                                  ^"
    )
    assert "cannot go into the slot `block`" in refusal("layer1.block:theirs.parts:Half", SpecError)


def test_it_nests():
    model, ids = tiny("llama"), tokens(2, 9)
    student = swap(model, "layer1:parallel(theirs.parts:Half(factor=1), alpha=0.5)")
    x = torch.randn(1, 4, 24)
    embeddings = model.model.rotary_emb(x, torch.arange(4)[None])
    (ours, _), (theirs, _) = (
        attn(hidden_states=x, position_embeddings=embeddings, attention_mask=None)
        for attn in (part(student), model.model.layers[1].self_attn)
    )
    torch.testing.assert_close(ours, 1.5 * theirs)
    assert student.model(ids).logits.isfinite().all()


# a plain module ----------------------------------------------------------------------------------


def test_a_plain_module_is_built_of_its_arguments_the_config_and_the_layer():
    model = tiny("llama")
    text = 'layer1:theirs.parts:Gated(width=5, bias=false, name="a b", kinds=[p, q])'
    student = swap(model, text)
    mine = part(student, slot="mlp").module
    assert mine.seen == (5, False, "a b", ("p", "q"))
    assert mine.down.weight.shape == (5, 24)
    past = part(swap(model, "layer2.attn:theirs.parts:Past(scale=2.0)"), 2).module
    assert (past.layer_idx, past.scale) == (2, 2.0)
    clause = student.plan.clauses[0]
    assert clause.new_parameters == {"module.down.weight": 120, "module.up.weight": 120}
    assert clause.dropped.keys() == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert (clause.old, clause.new) == ("LlamaMLP", "Gated")
    assert clause.args == {"width": 5, "bias": False, "name": "a b", "kinds": ("p", "q")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        "layer1:theirs.parts:Gated",
        "layer1.attn:theirs.parts:Past",
        "layer1.block:theirs.parts:Doubled",
        "all.attn:theirs.parts:PerToken",
        "layer1.norm1:theirs.parts:Doubled",
        "final_norm:theirs.parts:Doubled",
        "layer1.mlp:theirs.parts:Doubled; layer1.mlp:parallel(theirs.parts:Gated, alpha=0.5)",
    ],
)
def test_it_is_called_as_its_slot_is_in_every_family(family, text):
    model, ids = tiny(family), tokens(2, 15)
    student = swap(model, text)
    logits = student.model(ids).logits
    assert logits.isfinite().all()
    assert not torch.equal(logits, model(ids).logits)
    student.undo()
    assert torch.equal(student.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("slot", ["attn", "block"])
def test_positions_stay_right_when_it_writes_nothing_to_the_cache(family, slot):
    model, ids = tiny(family), tokens(2, 15)
    name = "PerToken" if slot == "attn" else "Doubled"
    for layers in ("layer0", f"layer{N_LAYERS - 1}", "all"):
        student = swap(model, f"{layers}.{slot}:theirs.parts:{name}").model
        whole = student(ids).logits
        torch.testing.assert_close(in_chunks(student, ids, 4), whole, atol=1e-4, rtol=1e-5)


def test_one_that_writes_to_the_cache_is_left_to_it():
    model, ids = tiny("llama"), tokens(2, 15)
    student = swap(model, "layer0.attn:theirs.parts:LlamaAttention").model
    torch.testing.assert_close(in_chunks(student, ids, 4), student(ids).logits, atol=1e-4, rtol=0)
    whole = student.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = student.generate(
        ids, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(whole, plain)


def test_the_plan_warns_of_generation_where_a_cache_is_handed_over():
    model = tiny("llama")
    (note,) = swap(model, "layer1.attn:theirs.parts:Past").plan.clauses[0].notes
    assert "use_cache=False" in note
    assert swap(model, "layer1:theirs.parts:Gated").plan.clauses[0].notes == ()


def test_its_draws_depend_on_seed_and_place_only():
    model = tiny("llama")

    def weight(seed=0, layer=1):
        student = swap(model, f"layer{layer}:theirs.parts:Gated", seed)
        return part(student, layer, "mlp").module.down.weight

    state = torch.random.get_rng_state()
    assert torch.equal(weight(), weight())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(weight(seed=1), weight())
    assert not torch.equal(weight(layer=2), weight())


def test_it_takes_the_models_format_and_builds_without_weights():
    student = swap(tiny("llama").to(torch.bfloat16), "layer1:theirs.parts:Gated")
    assert part(student, slot="mlp").module.up.weight.dtype == torch.bfloat16
    assert student.model(tokens(1, 5)).logits.dtype == torch.bfloat16
    with torch.device("meta"):
        student = swap(tiny("llama"), "layer1:theirs.parts:Gated")
    assert all(p.device.type == "meta" for p in student.model.parameters())


def test_under_autocast_its_output_may_have_autocasts_format():
    student = swap(tiny("llama"), "layer1:theirs.parts:Gated")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student.model(tokens(1, 5)).logits.isfinite().all()


def test_a_library_class_and_a_class_that_a_package_only_imports():
    model, x = tiny("llama"), torch.randn(1, 4, 24)
    student = swap(model, "layer1.mlp:torch.nn:Linear(in_features=24, out_features=24, bias=false)")
    mine = part(student, slot="mlp")
    torch.testing.assert_close(mine(x), x @ mine.module.weight.T)
    gated = swap(model, "layer1:theirs:Gated(width=2)")  # its slots are read off the class
    assert gated.plan.clauses[0].slot == "mlp"


def test_a_class_of_a_notebook(monkeypatch):
    monkeypatch.setattr(mechanisms(), "_added", {})

    class Mine(nn.Module):
        """Made in a cell."""

        slots = ("mlp",)

        def __init__(self, factor=2):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x

    mechanisms().add("mine_of_test", Mine)
    student = swap(tiny("llama"), "layer1:mine_of_test(factor=3)")
    assert torch.equal(part(student, slot="mlp")(torch.ones(1, 1, 24)), torch.full((1, 1, 24), 3.0))


def test_explain_shows_what_its_file_says():
    text = explain("theirs.parts:Gated")
    assert text.startswith("theirs.parts:Gated   mechanism\n\nParts of somebody's own.")
    assert "slots  mlp" in text


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such.package:X",
            "the mechanism `no_such.package:X` cannot be used: there is no module "
            "`no_such.package`",
        ),
        (
            "theirs.nowhere:X",
            "the mechanism `theirs.nowhere:X` cannot be used: there is no module `theirs.nowhere`",
        ),
        (
            "theirs.parts:Gate",
            "the mechanism `theirs.parts:Gate` cannot be used: module `theirs.parts` has no class "
            "`Gate`",
        ),
        (
            "theirs.parts:a_function",
            "the mechanism `theirs.parts:a_function` cannot be used: module `theirs.parts` has no "
            "class `a_function`",
        ),
    ],
)
def test_a_name_that_leads_nowhere(name, message):
    text = f"layer1.attn:{name}"
    got = refusal(text, SpecError)
    column = " " * len("layer1.attn:")
    hint = (
        "\n\nhint: Python must be able to import it: install its package, or put its folder on "
        "PYTHONPATH"
        if "no module" in message
        else ""
    )
    assert got == f"{message}\n  {text}\n  {column}^{hint}"


def test_a_file_with_a_fault_in_it():
    got = refusal("layer1.attn:theirs.wrong:Broken", SpecError)
    assert "wrong.py` line 1: " in got
    got = refusal("layer1.attn:theirs.fails:Fine", UsageError)
    assert got == (
        "the mechanism `theirs.fails:Fine` cannot be loaded: No module named 'no_such_package'"
    )
    got = refusal("layer1.attn:theirs.raises:Fine", UsageError)
    assert got == "the mechanism `theirs.raises:Fine` cannot be loaded: ValueError: not today"


def test_what_is_no_module_class():
    hint = "\n\nhint: name a subclass of torch.nn.Module, or of mismatch.mechanisms.base.Mechanism"
    assert refusal("layer1.attn:theirs.parts:NotAModule") == (
        "`theirs.parts:NotAModule` is the class NotAModule, which is no torch.nn.Module" + hint
    )
    got = refusal("layer1.attn:theirs:a_function", SpecError)
    assert "module `theirs` has no class `a_function`" in got


def test_a_slot_must_be_named_when_the_class_does_not():
    assert refusal("layer1:theirs.parts:Past", SpecError).endswith(
        "hint: name one, as in `layer1.attn:theirs.parts:Past`"
    )


def test_arguments_that_the_constructor_does_not_take():
    assert refusal("layer1:theirs.parts:Gated(widht=4)") == (
        "layer1.mlp: `theirs.parts:Gated` does not take (widht=4): got an unexpected keyword "
        "argument 'widht'\n\n"
        "hint: its constructor is Gated(config, width: 'int' = 3, bias=True, name='x', kinds=()); "
        "config and layer_idx are filled in"
    )
    assert refusal("layer1.mlp:torch.nn:Linear(in_features=24)").startswith(
        "layer1.mlp: `torch.nn.modules.linear:Linear` does not take (in_features=24): missing a "
        "required argument: 'out_features'\n\nhint: its constructor is Linear(in_features: int, "
    )
    assert "takes named arguments only, got 4" in refusal("layer1:theirs.parts:Gated(4)", SpecError)
    got = refusal('layer1:theirs.parts:Gated(width="x")')
    assert got.startswith(
        "`theirs.parts:Gated` at layer 1 `mlp` could not be built from LlamaMLP: TypeError: "
    )


def test_a_mechanism_whose_config_is_elsewhere_and_takes_something_else(tmp_path):
    got = refusal("layer1.attn:theirs.parts:Quarter(fctor=1)", SpecError)
    assert "did you mean `factor`?" in got  # in the same file: read from the text
    more = "from theirs.parts import Half\nclass Third(Half):\n    pass\n"
    (tmp_path / "theirs" / "more.py").write_text(more)
    got = refusal("layer1.attn:theirs.more:Third(fctor=1)")
    assert got.startswith(
        "the settings of `theirs.more:Third` cannot be made of its arguments: "
        "HalfConfig.__init__() got an unexpected keyword argument 'fctor'"
    )


NEEDS = "(Tensor[1, 8, 24] float32, attention weights or None)"


@pytest.mark.parametrize(
    ("slot", "what", "message"),
    [
        (
            "attn",
            "tensor",
            "returned Tensor[1, 8, 24] float32; the slot `attn` needs the pair "
            f"{NEEDS}\n\nhint: return output, None",
        ),
        (
            "attn",
            "three",
            "returned (Tensor[1, 8, 24] float32, None, None); the slot `attn` needs the pair "
            + NEEDS,
        ),
        (
            "attn",
            "narrow",
            f"returned (Tensor[1, 8, 3] float32, None); the slot `attn` needs the pair {NEEDS}",
        ),
        ("attn", "nothing", f"returned None; the slot `attn` needs the pair {NEEDS}"),
        ("mlp", "list", "returned list; the slot `mlp` needs Tensor[1, 8, 24] float32"),
        (
            "mlp",
            "pair",
            "returned (Tensor[1, 8, 24] float32, None); the slot `mlp` needs Tensor[1, 8, 24] "
            "float32",
        ),
        (
            "block",
            "short",
            "returned Tensor[1, 7, 24] float32; the slot `block` needs Tensor[1, 8, 24] float32",
        ),
        (
            "norm1",
            "wide_format",
            "returned Tensor[1, 8, 24] float64; the slot `norm1` needs Tensor[1, 8, 24] float32",
        ),
        (
            "gate_proj",
            "tensor",
            "returned Tensor[1, 8, 24] float32; the slot `gate_proj` needs Tensor[1, 8, 40] "
            "float32",
        ),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_result_that_does_not_fit_is_found_by_the_probe(slot, what, message, layer):
    model = tiny("llama")
    student = swap(model, f"layer{layer}.{slot}:theirs.parts:Returns(what={what})")
    with pytest.raises(SurgeryError) as caught:
        probe.prove_student(Layout.of(model), student.layout, student.plan.first)
    assert str(caught.value) == f"layer{layer}.{slot}: `theirs.parts:Returns` {message}"


def test_a_forward_that_cannot_be_called_as_the_slot_is():
    model = tiny("llama")
    student = swap(model, "layer0.attn:theirs.parts:Closed")
    with pytest.raises(SurgeryError) as caught:
        probe.prove_student(Layout.of(model), student.layout, student.plan.first)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "layer0.attn: `theirs.parts:Closed` cannot be called as this slot is: missing a required "
        "argument: 'x'"
    )
    assert lines[1].startswith("  the slot is called with  (hidden_states=..., ")
    assert "past_key_values=..." in lines[1]
    assert lines[2] == "  its forward takes        (x)"
    assert lines[-1] == (
        "hint: name hidden_states first, and take what it does not use as **kwargs"
    )


def test_through_the_whole_of_mismatch():
    """`mismatch.swap` proves the student, so the error comes before any text is read or traced."""
    model = tiny("llama")
    with pytest.raises(SurgeryError, match="the slot `attn` needs the pair"):
        mismatch.swap((model, None), "layer0.attn:theirs.parts:Returns")
    student = mismatch.swap((model, None), "layer1:theirs.parts:Gated(width=4)")
    assert student.plan.spec == "layer1:theirs.parts:Gated(width=4)"


def test_a_swap_that_names_a_class_is_checked_without_importing_it(tmp_path):
    code = (
        "import sys; from mismatch.spec import parse, check;"
        "check(parse('layer1:theirs.parts:Gated(width=4)'));"
        "assert not {'torch', 'theirs', 'theirs.parts'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(tmp_path)})
    assert str(check(parse("layer1:theirs.parts:Gated(width=4)"))) == (
        "layer1:theirs.parts:Gated(width=4)"
    )
    assert issubclass(SurgeryError, MismatchError)
