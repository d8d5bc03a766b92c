"""The model patches: one file a family, and the one public entrance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .report import PrefillReport, SdtpHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..schedule import PruningSchedule
    from ..scorers import StageInput

__all__ = ["PrefillReport", "SdtpHandle", "apply_sdtp"]


def apply_sdtp(
    model: Any,
    pruners: Mapping[int, Any] | str | Callable[[StageInput], Any],
    schedule: PruningSchedule,
    backend: str = "auto",
    *,
    later_turns: bool = True,
    evict_earlier_kv: bool = False,
) -> SdtpHandle:
    """Make a model prune long prompts during prefill.

    Acts on this instance only, by replacing the ``forward`` of its decoder. ``generate()`` and plain calls go on
    working; prompts shorter than ``schedule.min_prompt`` are left alone. With a keep ratio of 1.0 the model computes
    what it did before, bit for bit.

    A call with ``logits_to_keep=k`` treats the last ``k - 1`` tokens as standing behind the prompt: they are never
    pruned. A call without it returns the logits of the kept tokens only.

    Under the block budget a prompt may come in pieces: ``generate(prefill_chunk_size=...)``, later turns of a chat, a
    kept prefix and what follows it; the cache is that of one call with the whole. A call of the model itself with
    ``sdtp_prompt_length=columns`` reads a piece of a prompt of so many columns; without it, a call that continues a
    cache adds tokens and prunes none. So does a later turn under the global budget, while ``generate()`` refuses there
    what stands directly behind a pruned prompt, unless `later_turns` is False: it would not be what one prompt with all
    the tokens is. ``generate()`` takes the settings of :meth:`SdtpHandle.request` as keywords.

    Parameters
    ----------
    model : Qwen2ForCausalLM or Qwen2Model
        With sdpa, eager, flex or flash attention; on one device, by an accelerate ``device_map``, or tensor parallel.
    pruners : mapping of int to module, str or callable
        For every layer of the schedule a :class:`TokenPruner`, or any module that turns hidden states ``[..., D]``
        into scores ``[...]``; the result of :func:`load_pruners`; the name of a training-free scorer (``"random"``,
        ``"recent"``, ``"norm"``, ``"attention"``); or a function of a :class:`~sdtp_kernels.scorers.StageInput`. Under
        the block budget a :class:`TokenPruner` scores by its MLP alone, and a function prunes prompts in pieces only if
        it is declared :func:`~sdtp_kernels.scorers.block_local`.
    schedule : PruningSchedule
    backend : str, default "auto"
        A name from :func:`explain_backends`; a name never falls back to another backend.
    later_turns : bool, default True
        Under the block budget, whether a prompt that continues a cache (a later turn of a chat, what follows a kept
        prefix) is pruned as it completes blocks. Generated tokens wait for the next prompt. False: all that follows the
        first prompt is added whole, under either budget.
    evict_earlier_kv : bool, default False
        Drop what a stage prunes from the caches of the layers below it as well. All layers then hold the same tokens,
        those that the last stage keeps; tokens that come later see nothing else in any layer. A prompt has to be
        prefilled in one piece, and later turns are not pruned.

    Returns
    -------
    SdtpHandle
        Undoes the patch (``remove()``, or at the end of a ``with`` block) and reports on the last prefill.

    Raises
    ------
    ValueError
        If pruners, schedule and model do not fit together, a weight is not finite, or no backend has that name.
    NotImplementedError
        If the model's family, attention or version of transformers is not supported.
    BackendUnavailableError
        If the named backend cannot run on the model's device.
    RuntimeError
        If the model is patched already.
    """
    from . import qwen2  # transformers is imported where it is used

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    families = {"qwen2": qwen2.apply_sdtp_to_qwen2}
    if model_type not in families:
        raise NotImplementedError(
            f"no SDTP patch for {type(model).__name__} (model_type={model_type!r}); supported: {', '.join(families)}"
        )
    return families[model_type](
        model, pruners, schedule, backend, later_turns=later_turns, evict_earlier_kv=evict_earlier_kv
    )
