"""The command group ``sdtp bench``."""

from __future__ import annotations

from typing import Any

from sdtp_bench import compare, end_to_end, gpu_check, host, memory, multi, op, peers, report, roofline


def add_command(subparsers: Any) -> None:
    """Add ``bench`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("bench", help="speed and memory: the pruning step, and whole prefills")
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    op.add_parsers(commands)
    compare.add_parser(commands)
    roofline.add_parser(commands)
    end_to_end.add_parsers(commands)
    gpu_check.add_parser(commands)
    host.add_parser(commands)
    memory.add_parser(commands)
    multi.add_parser(commands)
    peers.add_parser(commands)
    report.add_parser(commands)
