"""How much each linear layer contributes to the predicted class, after LRP-QViT.

    r_l = mean over images of   a_l / sum of a over the layers,      a_l = sum |y_l * d logit / d y_l|

y_l is the layer's output, logit the image's largest. LRP-QViT (Ranjan and Savakis, arXiv:2401.11243) propagates
relevance from the predicted class back to the input and has no public code. This is our re-implementation: it reads
relevance as gradient x activation and does not claim that paper's numbers. Magnitudes are summed: signed sums are about
the same in every cut through the network, by conservation, and would tell nothing about a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pyvit_accel.calibrate.observers import call_arguments
from pyvit_accel.errors import Unsupported


def relevance(
    model: nn.Module, batches: Tensor | Mapping | Iterable, modules: Iterable[nn.Module] | None = None
) -> dict[str, float]:
    """{dotted name: relevance}, summing to 1, for every nn.Linear that the batches reach, or for `modules`.

    batches as for `observe`. The model returns logits (B, classes), or an object with them in .logits, or a tuple that
    starts with them. Parameters and their gradients are left as they are. Raises Unsupported when one of `modules` was
    not reached, or does not influence the logits.
    """
    if model.training:
        raise ValueError("relevance: the model is in training mode, dropout would change it; call model.eval()")
    names = {module: name or "the model itself" for name, module in model.named_modules()}
    watched = [m for m in names if isinstance(m, nn.Linear)] if modules is None else list(modules)
    for module in watched:
        if module not in names:
            raise ValueError(f"relevance: a {type(module).__name__} in modules is not part of the model")
    seen: list[tuple[nn.Module, Tensor]] = []

    def hook(module, args, output):
        if not output.requires_grad:  # parameters may be frozen and the input an image
            output = output.detach().requires_grad_()
        seen.append((module, output))
        return output.clone()  # what follows may work in place

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total, images = dict.fromkeys(watched, 0.0), 0
    handles = [module.register_forward_hook(hook) for module in watched]
    try:
        for index, batch in enumerate([batches] if isinstance(batches, (Tensor, Mapping)) else batches):
            args, kwargs = call_arguments(batch, index, device)
            seen.clear()
            with torch.enable_grad():
                logits = _logits(model(*args, **kwargs))
                if not seen:
                    raise Unsupported(
                        "relevance: no calibration batch reached a layer; it has no linear, or give modules"
                    )
                # Images do not meet in eval mode, so one backward serves all of the batch.
                grads = torch.autograd.grad(logits.amax(1).sum(), [y for _, y in seen], allow_unused=True)
            amounts = {module: torch.zeros(len(logits), dtype=torch.float64) for module in watched}
            for (module, y), grad in zip(seen, grads, strict=True):
                if grad is not None:
                    amounts[module] += (y.detach() * grad).abs().reshape(len(logits), -1).double().sum(1).cpu()
            share = torch.stack([*amounts.values()])
            share = share / share.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
            for module, of_images in zip(amounts, share, strict=True):
                total[module] += float(of_images.sum())
            images += len(logits)
    finally:
        for handle in handles:
            handle.remove()
    if images == 0:
        raise ValueError("relevance: no calibration batches; give at least one (an exhausted generator counts as none)")
    silent = [names[module] for module in watched if total[module] == 0]
    if modules is not None and silent:
        raise Unsupported(f"relevance: {', '.join(silent)} does not influence the logits of any calibration image")
    whole = sum(total.values())
    return {names[module]: amount / whole for module, amount in total.items() if amount > 0}


def _logits(output) -> Tensor:
    output = getattr(output, "logits", output)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"relevance: the model gave {what}; expected logits (B, classes), in .logits or first in a tuple"
        )
    return output
