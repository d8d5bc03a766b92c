"""Prompts of one length, padded batches and schedules, for models of six layers."""

import torch

from sdtp_kernels import PruningSchedule

LAYERS = (1, 3, 4)
SCHEDULES = {
    "global": PruningSchedule(layers=LAYERS, keep_ratio=0.7),
    "per stage": PruningSchedule(layers=LAYERS, keep_ratio=(0.9, 1.0, 0.5), sink=2, recent=0.2),
    "block": PruningSchedule(layers=LAYERS, keep_ratio=0.7, budget="block", block_size=32),
    "block, whole": PruningSchedule(layers=LAYERS, keep_ratio=0.8, budget="block", block_size=50),
}
TOKENS = 200
LENGTHS = (TOKENS, 131, 70)  # of the rows of a padded batch
SHORT_LENGTHS = (TOKENS, 96, 40)  # the last is shorter than min_prompt


def prompt(tokens=TOKENS, batch=1):
    return torch.randint(1, 256, (batch, tokens), generator=torch.Generator().manual_seed(2))


def padded_batch(lengths=LENGTHS):
    ids = prompt(max(lengths), len(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : ids.shape[1] - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, **settings}
    return model.generate(**inputs, **settings)
