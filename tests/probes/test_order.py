"""Probes of position: planted losses are seen, and what cannot matter reads exactly or nearly 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from asking import readings, setting, subjects
from random_models import build

from mismatch.errors import UsageError
from mismatch.models.layout import Layout
from mismatch.probes.base import Subject
from mismatch.probes.forced import entering, update
from mismatch.probes.order_sensitivity import OrderSensitivity
from mismatch.probes.position_decoding import RIDGE, Decoder, PositionDecoding, _gaps
from mismatch.probes.shift_invariance import ShiftInvariance
from mismatch.probes.shuffle_sensitivity import ShuffleSensitivity


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_without_position_sees_a_set(layer):
    answers = OrderSensitivity(setting()).run(subjects(build("llama"), f"layer{layer}:nope"))
    for keep in (1, 16, 64):
        stat = (f"change[keep={keep}]", layer, None)
        assert readings(answers, "teacher")[stat].value() > 1e-3
        assert readings(answers, "swap")[stat].value() < 1e-5


def test_what_a_compressive_memory_holds_has_no_order():
    """80 tokens in segments of 32: the last one begins at 64, so 16 stay in place."""
    answers = OrderSensitivity(setting()).run(
        subjects(build("llama"), "layer1:infini(segment=32)", ("zero",))
    )
    got = readings(answers, "swap")
    assert got["change[keep=16]", 1, None].value() < 1e-5
    assert got["change[keep=1]", 1, None].value() > 1e-3
    assert (
        readings(answers, "zero")["change[keep=1]", 1, None].n == 0
    )  # adds nothing: no share of it


def test_change_is_that_of_the_plain_module():
    """One attention called by hand on a permuted input."""
    model = build("llama")
    probe = OrderSensitivity(setting(samples=2))
    got = readings(probe.run(subjects(model, "layer1:nope")), "teacher")
    draw = probe.setting.draw("order_sensitivity")
    orders = {keep: probe._orders(keep, draw) for keep in (1, 16, 64)}
    ids = torch.from_numpy(probe.ids)
    block, kept = model.model.layers[1], {}
    hook = block.self_attn.register_forward_pre_hook(
        lambda _m, args, kwargs: kept.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        hook.remove()
        x = kept.pop("hidden_states")
        plain = block.self_attn(hidden_states=x, **kept)[0][:, -1]
        for keep, order in orders.items():
            mixed = torch.stack([row[torch.from_numpy(o)] for row, o in zip(x, order, strict=True)])
            moved = block.self_attn(hidden_states=mixed, **kept)[0][:, -1]
            share = (moved - plain).norm(dim=-1) / plain.norm(dim=-1)
            assert (order[:, 0] == 0).all()
            assert (order[:, -keep:] == np.arange(80)[-keep:]).all()
            value = got[f"change[keep={keep}]", 1, None].value()
            assert value == pytest.approx(float(share.mean()), rel=1e-4)


def test_forced_runs_repeat_the_forward(family):
    """The stream entering a block, and what its attention adds, as a whole forward has them; the first block too."""
    model = build(family)
    layout = Layout.of(model)
    ids = torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        streams = entering(layout, ids, [0, 2])
        for layer in (0, 2):
            assert torch.equal(streams[layer], hidden[layer])
            added = update(Subject.teacher(layout), layer, ids, streams[layer])
            assert added.shape == streams[layer].shape and added.abs().max() > 0
        changed = update(Subject.teacher(layout), 0, ids, streams[0] * 1.5)
        assert not torch.equal(changed, update(Subject.teacher(layout), 0, ids, streams[0]))


def test_rope_is_relative_and_learned_positions_are_not():
    found = {}
    for family in ("llama", "gpt2"):
        probe = ShiftInvariance(setting())
        assert probe.shifts == [1, 256, 432]  # the last: as far as 80 tokens fit into 512
        got = readings(probe.run(subjects(build(family), "layer1.attn:identity")), "teacher")
        found[family] = [got[f"kl[shift={s}]"].value() for s in probe.shifts]
    assert max(found["llama"]) < 1e-8
    assert min(found["gpt2"]) > 1e-4


def test_text_that_fills_the_context_cannot_be_shifted():
    with pytest.raises(UsageError, match="a shifted text of 81 tokens is longer than the context"):
        ShiftInvariance(setting(context=80))


def test_far_order_does_not_reach_a_model_with_narrow_windows():
    """Three layers that read two tokens each reach three tokens back: less than 16 - 8."""
    answers = ShuffleSensitivity(setting()).run(
        subjects(build("llama"), "all:sliding_window(window=2)")
    )
    assert set(readings(answers)) == {"kl[near=16]", "kl[near=48]"}
    for near in (16, 48):
        assert readings(answers, "teacher")[f"kl[near={near}]"].value() > 1e-4
        assert readings(answers, "swap")[f"kl[near={near}]"].value() == 0
    with pytest.raises(UsageError, match="needs windows of 20 tokens or more, and they have 18"):
        ShuffleSensitivity(setting(seq_len=18))


def test_decoder_is_ridge_regression():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(6, 20, 7)) * np.array([1, 2, 3, 1, 1, 5, 0.1]) + 0.3
    y = np.tile(np.arange(1, 20), (6, 1)).astype(float)
    dealt = draw.permutation(y.ravel()).reshape(y.shape)
    decoder = Decoder(7)
    for part in (slice(0, 4), slice(4, 6)):
        rows = torch.from_numpy(x[part, 1:]).flatten(0, 1)
        targets = torch.from_numpy(np.stack([y[part], dealt[part]], -1)).flatten(0, 1)
        decoder.update(rows, targets)
    decoder.solve()
    rows, n = x[:, 1:].reshape(-1, 7), x[:, 1:].shape[0] * 19
    z = (rows - rows.mean(0)) / rows.std(0)
    for column, target in enumerate((y.ravel(), dealt.ravel())):
        extra = np.sqrt(RIDGE * n) * np.eye(7)  # ridge as least squares with more rows
        wanted, *_ = np.linalg.lstsq(
            np.concatenate([z, extra]),
            np.concatenate([target - target.mean(), np.zeros(7)]),
            rcond=None,
        )
        got = decoder.weights[:, column].numpy() * rows.std(0)
        np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-10)
    test, truth = draw.normal(size=(3, 19, 7)), np.arange(1.0, 20)
    kept = np.ones((3, 19), bool)
    kept[1, 4] = False
    scored = decoder.score(
        torch.from_numpy(test), torch.from_numpy(truth).expand(3, -1), torch.from_numpy(kept)
    )
    explained, _, total, count = scored.T
    made = (test - rows.mean(0)) @ decoder.weights[:, 0].numpy() + y.mean()
    left = np.where(kept, (truth - made) ** 2, 0).sum(1)
    np.testing.assert_allclose(total - explained, left, rtol=1e-8)
    np.testing.assert_allclose(total, (kept * (truth - y.mean()) ** 2).sum(1), rtol=1e-8)
    assert list(count) == [19, 18, 19]


def test_position_is_decoded_where_it_is_planted():
    """gpt2 adds a vector for each position; dealt positions cannot be learned."""
    answers = PositionDecoding(setting(windows=32)).run(
        subjects(build("gpt2"), "layer0.attn:identity")
    )
    got = readings(answers, "teacher")
    assert got["r2", 0, None].value() > 0.5
    assert got["r2_shuffled", 0, None].value() < 0.2


def planted(code):
    """A probe on streams that hold nothing but `code(position, window)` in the first channel, and noise beside it."""

    def readings_of(monkeypatch):
        noise = np.random.default_rng(1)

        def finals(subjects, ids, wanted, visit):
            value = noise.normal(size=(len(ids), ids.shape[1], 4))
            value[..., 0] = code(np.arange(ids.shape[1])[None], ids[:, :1].numpy())
            for tap in wanted(subjects[0]):
                visit(subjects[0], tap, torch.from_numpy(value).float())
            yield subjects[0], None

        monkeypatch.setattr("mismatch.probes.position_decoding.finals", finals)
        asked = subjects(build("llama"), "layer1.attn:identity")[:1]
        found = readings(PositionDecoding(setting(windows=64)).run(asked), "teacher")
        assert found["distance_r2_shuffled", 2, None].value() < 0.05
        return {stat: found[stat, 2, None].value() for stat in ("r2", "distance_r2")}

    return readings_of


def test_a_distance_is_read_where_each_text_has_a_place_of_its_own_to_count_from(monkeypatch):
    """Distances survive an unknown offset per window, which absolute positions do not."""
    from_zero = planted(lambda position, window: position / 20)(monkeypatch)
    assert from_zero["r2"] > 0.99 and from_zero["distance_r2"] > 0.99
    from_anywhere = planted(lambda position, window: position / 20 + window)(monkeypatch)
    assert from_anywhere["r2"] < 0.3
    assert from_anywhere["distance_r2"] > 0.99


def test_a_place_that_two_tokens_share_says_nothing_of_their_distance(monkeypatch):
    same = planted(lambda position, window: window + 0 * position)(monkeypatch)
    assert abs(same["r2"]) < 0.1 and abs(same["distance_r2"]) < 0.1


def test_pairs_of_a_distance():
    """The earlier token says nothing of the distance, and no pair leaves its window."""
    gaps = _gaps(4000, 12, np.random.default_rng(0))
    assert gaps.shape == (4000, 6)  # behind tokens 1 .. 6, 1 to 5 on
    assert set(np.unique(gaps)) == {1, 2, 3, 4, 5}
    np.testing.assert_allclose(gaps.mean(0), 3, atol=0.1)
    assert _gaps(4, 3, np.random.default_rng(0)).shape == (4, 0)  # one distance: nothing to tell


def test_too_few_documents_to_fit_and_test():
    with pytest.raises(UsageError, match=r"at least 4 documents, .* there are 3"):
        PositionDecoding(setting(docs=np.arange(16) % 3))
