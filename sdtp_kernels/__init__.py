"""SDTP: saliency-driven dynamic token pruning of long prompts (arXiv 2504.04514)."""

__version__ = "0.1.0"

try:
    from .backends import BackendStatus, BackendUnavailableError, explain_backends
    from .chat import chat_inputs
    from .kv_predictor import KVPredictor
    from .models import PrefillReport, SdtpHandle, apply_sdtp, remove_sdtp
    from .ops import (
        PrunedTokens,
        gather_tokens,
        position_attention,
        prompt_bias,
        prune_tokens,
        score_tokens,
        select_tokens,
        window_attention,
    )
    from .pruner import TokenPruner
    from .pruner_file import PrunerStack, load_pruners, save_pruners
    from .schedule import PruningSchedule, StagePlan, front_loaded
except (ImportError, OSError) as error:
    # Without a torch that loads nothing above can work, but `sdtp doctor` must be able to say so.
    _torch_error = error

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"sdtp_kernels.{name} does not load: {_torch_error}") from _torch_error
        raise AttributeError(f"module 'sdtp_kernels' has no attribute {name!r}")


__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "KVPredictor",
    "PrefillReport",
    "PrunedTokens",
    "PrunerStack",
    "PruningSchedule",
    "SdtpHandle",
    "StagePlan",
    "TokenPruner",
    "apply_sdtp",
    "chat_inputs",
    "explain_backends",
    "front_loaded",
    "gather_tokens",
    "load_pruners",
    "position_attention",
    "prompt_bias",
    "prune_tokens",
    "remove_sdtp",
    "save_pruners",
    "score_tokens",
    "select_tokens",
    "window_attention",
]
