"""Tokens that stop for good, A-ViT and IA-RED2: the specification's vector, and removed tokens as masked ones."""

from __future__ import annotations

import pytest
import torch
from _routing import B, C, N, alone, float_blocks, groups, quant_blocks, tokens

from pyvit_accel.tokens import packed
from pyvit_accel.tokens.avit import Halting, HaltingBlocks
from pyvit_accel.tokens.ia_red2 import InterpretedGroups, Interpreter
from pyvit_accel.tokens.routing import MODES


def test_halting_weights_are_the_vector():
    halting = Halting(1, 3, torch.device("cpu"))
    h = [[0.2, 0.6, 0.995], [0.3, 0.5, 0.1], [0.6, 0.1, 0.1], [1.0, 1.0, 1.0]]
    weights = torch.cat([halting.weigh(torch.tensor([row])) for row in h])
    torch.testing.assert_close(weights, torch.tensor([[0.2, 0.6, 1], [0.3, 0.4, 0], [0.5, 0, 0], [0, 0, 0]]))
    assert not halting.active.any()


@torch.no_grad()
def test_removed_tokens_give_what_masked_ones_do(monkeypatch):
    counts = []
    real = packed.packed_block
    monkeypatch.setattr(
        "pyvit_accel.tokens.routing.packed_block", lambda b, x, p: counts.append(int(p.cu_seqlens[-1])) or real(b, x, p)
    )
    blocks, x = quant_blocks(depth=4), tokens()
    y = HaltingBlocks(blocks, 1.0, 0.0)(x)
    assert torch.equal(y, HaltingBlocks(blocks, 1.0, 0.0, mode="masked")(x))
    assert counts[0] == B * N and sorted(counts, reverse=True) == counts and counts[-1] < counts[0] / 2
    # One that stops at once is the first block's output, and no other is run on it.
    assert torch.equal(HaltingBlocks(blocks, 0.0, -100.0)(x), blocks[0](x))
    # One that never stops is the last block's, through all of them.
    assert torch.equal(HaltingBlocks(blocks, 0.0, 100.0)(x), alone(blocks, x, torch.ones(B, N, dtype=torch.bool)))


@torch.no_grad()
def test_float_halting_is_the_published_sum():
    """Step by step, token by token."""
    blocks, x = float_blocks(), tokens()
    method = HaltingBlocks(blocks, 1.0, 0.0, mode="masked")
    expected, y, scores = torch.zeros_like(x), x, []
    stopped = torch.full((B, N), 99)
    for layer, block in enumerate(blocks):
        y = torch.where((stopped > layer)[..., None], block(y, (stopped > layer)[:, None, None]), y)
        scores.append(method.score(y) if layer < 2 else torch.ones(B, N))
        for b in range(B):
            for i in range(N):
                before = sum(s[b, i].item() for s in scores[:-1])
                if stopped[b, i] <= layer:
                    continue
                stops = before + scores[-1][b, i].item() > 0.99
                expected[b, i] += (1 - before if stops else scores[-1][b, i]) * y[b, i]
                stopped[b, i] = layer + 1 if stops else 99
    assert stopped.unique().numel() > 1
    torch.testing.assert_close(method(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_interpreted_groups_drop_for_good(mode):
    method, x = groups(mode), tokens()
    y, stays = method.run(x)
    first = method.interpreters[0](x) >= 0.5
    first[:, 0] = True
    once = alone(method.groups[0], x, first)
    both = first & (method.interpreters[1](once) >= 0.5)
    both[:, 0] = True
    assert torch.equal(stays, both) and B < both.sum() < first.sum() < B * N
    torch.testing.assert_close(y, alone(method.groups[1], once, both))
    assert torch.equal(groups(mode, threshold=0.0).run(x)[1], torch.ones(B, N, dtype=torch.bool))
    assert groups(mode, threshold=1.1).run(x)[1].sum(1).tolist() == [1] * B


@torch.no_grad()
def test_interpreter_scores_by_hand():
    new, x = Interpreter(C, 4), tokens()
    q, k = new.q(x).unflatten(-1, (4, 16)), new.k(new.policy).view(4, 16)
    by_head = [torch.sigmoid(q[:, :, h] @ k[h]) for h in range(4)]
    torch.testing.assert_close(new(x), torch.stack(by_head).mean(0))


@torch.no_grad()
def test_groups_drop_what_they_have_no_room_for():
    _, stays = groups("padded", threshold=0.0, capacity=(0.8, 0.5)).run(tokens())
    assert stays.sum(1).tolist() == [9] * B and stays[:, 0].all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HaltingBlocks([]), "no block came"),
        (lambda: HaltingBlocks(float_blocks(), eps=1.0, mode="masked"), "eps=1.0"),
        (lambda: Interpreter(64, 5), "dim=64 is not a multiple of num_heads=5"),
        (lambda: InterpretedGroups([[]], []), "1 groups, 0 interpreters and 0 capacities"),
        (lambda: groups("padded", capacity=(0.5,)), "2 groups, 2 interpreters and 1 capacities"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
