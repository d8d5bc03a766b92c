"""The model card of a pruner file, for ``hf upload``: what its header says, as a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdtp_kernels import PrunerStack

_CARD = """\
---
library_name: sdtp-kernels
base_model: {model}
tags:
- token-pruning
- long-context
- prefill
---

# SDTP pruners of {model}

These pruners let a `transformers` model of type `{model_type}` drop prompt tokens during the prefill, by
[sdtp-kernels](https://pypi.org/project/sdtp-kernels/). This is no model: it needs the base model's weights.

```python
from sdtp_kernels import apply_sdtp, load_pruners

pruners = load_pruners("USER/REPOSITORY")
with apply_sdtp(model, pruners, 0.9):  # each stage keeps 0.9 of the tokens that it gets
    output = model.generate(**inputs)
```

## What is in the file

{contents}

## How it was trained

{training}

The figures of this page are of held-out prompts of the training's own kind. What pruning costs on your texts:
`sdtp eval run --model MODEL --data TEXTS --methods pruners.safetensors attention recent`.
"""


def make_card(stack: PrunerStack) -> str:
    """A page in Markdown, with the metadata that the hub reads.

    Parameters
    ----------
    stack : PrunerStack
        As ``sdtp train`` writes it.
    """
    header, facts = stack.header, stack.header.training
    predictor = stack.kv_predictor
    contents = [
        ("layers before which tokens are dropped", ", ".join(map(str, header.layers))),
        ("hidden size", header.hidden_size),
        ("width of the MLPs", stack[header.layers[0]].w1.shape[0]),
        (
            "terms beside the MLP",
            ", ".join(name for name in ("distance", "attention", "lexical") if getattr(header, name)) or "-",
        ),
        ("pooling, tokens", header.pooling),
        ("scores averaged over the stages", "yes" if header.averaging else "no"),
    ]
    if predictor is not None:
        contents.append(("KV predictor", f"rank {predictor.rank or 'full'}, {predictor.num_bytes / 1e6:.1f} MB"))
    prompts, validation = facts["saliency"]["prompts"], facts["validation"]
    training: list[tuple[str, Any]] = [
        ("prompts", f"{prompts['training']}, and {prompts['validation']} held out"),
        ("data", ", ".join(map(str, facts["saliency"]["data"]))),
        ("what a token is worth", ", ".join(facts["target"])),
        ("loss", ", ".join(f"{name} x {weight:g}" for name, weight in facts["settings"]["loss"].items())),
        ("steps", f"{facts['steps']}, best {facts['best_step']}"),
        *((f"held-out {name}", f"{validation[name]:.4f}") for name in facts["settings"]["loss"]),
        ("held-out rank correlation", _mean(validation["spearman"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]
    return _CARD.format(
        model=facts["saliency"]["model"]["name"],
        model_type=header.model_type,
        contents=_table(contents),
        training=_table(training),
    )


def _mean(by_layer: dict[str, float]) -> str:
    return f"{sum(by_layer.values()) / len(by_layer):.3f}"


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
