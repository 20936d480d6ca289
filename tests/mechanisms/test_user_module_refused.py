"""A module from another package that cannot be used: what is said of it."""

from __future__ import annotations

import pytest
from tiny_models import swap, tiny

from mismatch.errors import SpecError, SurgeryError, UsageError
from mismatch.forward import verify as probe
from mismatch.models.layout import Layout
from mismatch.spec import format, parse

pytestmark = pytest.mark.usefixtures("theirs")


def refusal(text, error=SurgeryError, family="llama"):
    with pytest.raises(error) as caught:
        swap(tiny(family), text)
    return str(caught.value)


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


def test_its_arguments_are_checked_as_ours_are():
    assert format(parse("layer1:theirs.parts:Half(factor=0.5)")) == "layer1:theirs.parts:Half"
    assert refusal("layer1:theirs.parts:Half(factor=2)", SpecError) == (
        "`factor` must be float in 0..1, got 2\n"
        "  layer1:theirs.parts:Half(factor=2)\n"
        "                                  ^"
    )
    assert "cannot go into the slot `block`" in refusal("layer1.block:theirs.parts:Half", SpecError)
