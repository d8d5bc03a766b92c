"""What ``evict_earlier_kv`` saves and costs: bytes of the cache, and the loss on text after a pruned prompt.

``python benchmarks/evict_earlier_kv.py --out benchmarks/results/evict.jsonl``: SmolLM2-135M with its pruners, held-out
documents. The prompt is prefilled, then the text after it is read through the cache, as generated tokens would be.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics

import torch
from transformers import DynamicCache

from sdtp_eval.checkpoints import DEFAULT_PRUNERS, bundled_pruners, default_checkpoint, load_checkpoint
from sdtp_eval.texts import is_held_out, iter_documents
from sdtp_kernels import PruningSchedule, apply_sdtp, load_pruners
from sdtp_kernels.models.compat import CACHE

METHODS = [(keep, evicts) for keep in (0.9, 0.8) for evicts in (False, True)]


@torch.no_grad()
def read(model, ids: torch.Tensor, tokens: int) -> tuple[float, int]:
    """Mean loss on what stands after the first `tokens`, and the bytes that they hold in the cache."""
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :tokens], **{CACHE: cache}, logits_to_keep=1).logits[0]
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    after = model(ids[:, tokens:-1], **{CACHE: cache}).logits[0]
    return torch.nn.functional.cross_entropy(torch.cat([first, after]), ids[0, tokens:]).item(), kv_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="file that gets a row for every document, method and keep ratio")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--after", type=int, default=64)
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(default_checkpoint())
    pruners = load_pruners(bundled_pruners()[DEFAULT_PRUNERS])
    rows: list[dict[str, object]] = []
    for name, text in iter_documents():
        ids = (
            tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens + args.after] if is_held_out(name) else None
        )
        if ids is None or ids.shape[1] < args.tokens + args.after:
            continue
        dense, dense_bytes = read(model, ids, args.tokens)
        for keep, evicts in METHODS:
            schedule = PruningSchedule.every(model.config.num_hidden_layers, keep_ratio=keep)
            with apply_sdtp(model, pruners, schedule, evict_earlier_kv=evicts, dropped_kv="none"):
                nll, kv_bytes = read(model, ids, args.tokens)
            row = {"document": name, "keep_ratio": keep, "evict_earlier_kv": evicts, "tokens": args.tokens}
            row |= {"nll": nll, "nll_dense": dense, "kv_bytes": kv_bytes, "kv_bytes_dense": dense_bytes}
            rows.append(row | {"machine": platform.machine(), "torch": torch.__version__})
        if len(rows) == len(METHODS) * args.documents:
            break
    with open(args.out, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print("| keep per stage | evict_earlier_kv | KV cache | NLL minus dense, nats a token | n |\n|---|---|---|---|---|")
    for keep, evicts in METHODS:
        own = [row for row in rows if (row["keep_ratio"], row["evict_earlier_kv"]) == (keep, evicts)]
        increase = [row["nll"] - row["nll_dense"] for row in own]
        error = statistics.stdev(increase) / len(own) ** 0.5
        share = own[0]["kv_bytes"] / own[0]["kv_bytes_dense"]
        print(f"| {keep} | {evicts} | {share:.0%} | {statistics.mean(increase):.3f} +- {error:.3f} | {len(own)} |")


if __name__ == "__main__":
    main()
