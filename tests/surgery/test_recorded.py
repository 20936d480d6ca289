"""What transformers records of a student, and what is said where it is not the stream."""

from __future__ import annotations

import warnings

import pytest
import torch

import mismatch

IDS = torch.arange(3, 15)[None]
ASKED = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}


def student_of(tiny, toy, swap):
    model = tiny("llama", vocab_size=len(toy.tokenizer), attn_implementation="eager")
    return mismatch.swap((model, toy.tokenizer), swap)


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        ("layer1:infini(segment=4)", {"output_attentions": "layer 1 (attn)"}),
        (
            "layer0:parallel(infini(segment=4)); layer2:zero",
            {"output_attentions": "layer 0 (attn), layer 2 (attn)"},
        ),
        (
            "layer1.block:zero",
            {
                "output_hidden_states": "layer 1 (block)",
                "output_attentions": "layer 1 (block)",
            },
        ),
    ],
)
def test_a_record_that_lacks_a_layer_is_warned_of(tiny, toy, swap, said):
    student = student_of(tiny, toy, swap)
    for settings in (ASKED, {}):
        if not settings:  # asked for by the config, as a pipeline does it
            for name in said:
                setattr(student.model.config, name, True)
        with pytest.warns(UserWarning, match="the entry of") as warned:
            student.model(IDS, **settings)
        words = [str(one.message) for one in warned]
        assert words == [
            f"{name}: the entry of {places} is missing, so that later ones move to the front, or is that of the module "
            "inside. Read a layer by a hook on student.layout.blocks[layer], or by mismatch.trace"
            for name, places in said.items()
        ]
    student.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student.model(IDS, **ASKED)


def test_what_is_right_is_not_warned_of(tiny, toy):
    student = student_of(tiny, toy, "layer1.mlp:zero; layer2.norm1:dyt(alpha=1)")
    seen = [IDS]
    for block in student.layout.blocks:
        block.register_forward_hook(lambda _m, _args, out: seen.append(out))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = student.model(IDS, **ASKED)
    assert len(out.attentions) == 3
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[1:-1], seen[1:-1], strict=True))
    again = mismatch.swap((student.model, toy.tokenizer), "layer1:zero")
    with pytest.warns(UserWarning, match=r"the entry of layer 1 \(attn\)") as warned:
        again.model(IDS, output_attentions=True)
    assert len(warned) == 1
