"""Stage 1 of training on a tiny checkpoint: its inputs, a run, runs that are stopped, and what they leave."""

import argparse
import random
import threading

import torch

from helpers.models import make_qwen2, make_tokenizer
from sdtp_eval.parallel import Workers
from sdtp_train import lookup, saliency

TARGETS = ("future_attention", "l2/continuation")


def make_checkpoint(path, **settings):
    """A tiny random model with this tokenizer in a directory."""
    make_qwen2(num_layers=8, hidden_size=32, **settings).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_texts(folder, number=24, lines=60):
    """Text files whose every line says which file it is of."""
    folder.mkdir()
    for i in range(number):
        rng = random.Random(i)
        body = [f"{i:02d}.{k:03d} {' '.join(rng.choices(lookup._WORDS, k=6))}." for k in range(lines)]
        (folder / f"text-{i}.txt").write_text("\n".join(body))
    return folder


def options(place, out, **changes):
    given = {
        "model": place / "model",
        "data": [place / "texts"],
        "out": out,
        "targets": TARGETS,
        "samples": 14,
        "context": [96, 128],
        "continuation": 16,
        "shard-size": 4,
        **changes,
    }
    words = ["saliency"]
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def mark(place, out, **changes):
    parser = argparse.ArgumentParser()
    saliency.add_command(parser.add_subparsers())
    saliency.mark(parser.parse_args(options(place, out, **changes)))


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


class Killed(BaseException):
    pass


def in_two(monkeypatch, work):
    """``work()`` by two threads which take each other for processes of one run; the errors that ended them."""
    barrier, failures, local = threading.Barrier(2), [], threading.local()
    monkeypatch.setattr(
        "sdtp_eval.parallel.join_workers",
        lambda device: Workers(local.index, 2, torch.device("cpu"), barrier.wait, lambda tensors: None),
    )

    def run(index):
        local.index = index
        try:
            work()
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures
