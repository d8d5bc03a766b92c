"""Checkpoints, texts and programs that show what pruning does to a model: its speed, its cache and its answers."""
