"""Whether a swapped model can be loaded again: refused when it is saved, not noticed when it is loaded.

A checkpoint holds the swaps and the tensors; loading makes the swaps again on the plain model of the config. So the
model must have exactly the tensors that come of that, and nothing that is in no tensor. Others change it after the
swap: peft puts adapters in, `merge_and_unload` takes them out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mismatch.errors import SurgeryError
from mismatch.models.layout import Layout
from mismatch.models.skeleton import skeleton
from mismatch.surgery.codes import of_codes
from mismatch.surgery.loading import rebuilt

if TYPE_CHECKING:
    from mismatch.surgery.saving import Swapped

PLAIN = (
    "student.merged() makes a plain model of one with adapters, `mismatch merge` of a checkpoint"
)


def check_loadable(model: Swapped, state: Mapping[str, Tensor]) -> None:
    """Refuse what loading would refuse, or load as something else.

    Args:
        model: a swapped model.
        state: the tensors that will be written, by name.

    Raises:
        SurgeryError: it has other tensors than its swaps make, or adapters that are merged or switched off.
    """
    _check_adapters(model)
    plain = Layout.of(skeleton(copy.deepcopy(model.config)))
    wanted = rebuilt(plain, model.swap_record, "this model").layout.model.state_dict()
    codes = of_codes(state)  # not of the shape of a matrix, and more of them
    own = {name for name in state if name in wanted or name not in codes}
    for what, names, hint in (
        (
            "holds {} tensors that its swaps do not make",
            own - wanted.keys(),
            f"merge what peft put into it (`merge_and_unload`), or save that with peft; {PLAIN}",
        ),
        ("lacks {} tensors that its swaps make", wanted.keys() - own, PLAIN),
        (
            "holds {} tensors of another shape than its config says",
            {
                name
                for name in own & wanted.keys()
                if name not in codes and state[name].shape != wanted[name].shape
            },
            "set the config to what was done to the model",
        ),
    ):
        if names:
            raise SurgeryError(
                f"this model cannot be saved: it {what.format(len(names))}, first {min(names)}, so it could not be "
                "loaded again",
                hint=hint,
            )


def _check_adapters(model: Any) -> None:
    for path, layer in model.named_modules():
        if not isinstance(getattr(layer, "merged_adapters", None), list):
            continue
        for what, found in (("merged", layer.merged), ("switched off", layer.disable_adapters)):
            if found:
                raise SurgeryError(
                    f"this model cannot be saved: the adapter of {path} is {what}, and loaded again it would be "
                    "added to what is there",
                    hint=f"unmerge it, or switch it on; {PLAIN}",
                )
