"""What the classes of a patched model do: a decoder that prunes, and the model around it.

They are mixed into the classes that the model has, and :func:`exchange` gives it the result. Whatever holds the model,
copies it or wraps its methods goes on working: a copy or an unpickled model has the new class and a handle of its own,
a replica runs its own modules. Without an open handle each method computes what the model's own class does, so a bound
method may outlive the patch.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from . import compat
from .call import Call, CallInfo
from .checks import check_takes_chunks
from .decoder import classify, run
from .masks import masks_for_generate, teach_sdpa
from .settings import SETTINGS, make_settings

if TYPE_CHECKING:
    from .handle import SdtpHandle

INFO = "sdtp_call"  # carries a CallInfo from the outer model to the decoder
PROMPT_LENGTH = "sdtp_prompt_length"  # how a caller says how many columns the prompt of this call has


def handle_of(module: Any) -> SdtpHandle | None:
    """The open handle of a patched module."""
    handle: SdtpHandle | None = module.__dict__.get("_sdtp")
    return handle if handle is not None and handle.is_open else None


class _Patched:
    """Mixed into the class of a patched module."""

    _sdtp_dense: ClassVar[type]
    _sdtp_arguments: ClassVar[tuple[str, ...]]
    """Names of the arguments of its own class's ``forward``."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class below is made at run time, so pickle is told how.
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        kind = PruningDecoder if isinstance(self, PruningDecoder) else PruningCausalLM
        return (_rebuild, (self._sdtp_dense, kind), *state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        handle = handle_of(self)
        if handle is None:
            _restore(self)
        else:
            if handle.kv_predictor is not None:
                teach_sdpa()  # of this process
            handle.attach(self, _restore)  # type: ignore[arg-type]


class PruningDecoder(_Patched):
    """A family's ``Model`` that prunes."""

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        handle, info = handle_of(self), kwargs.pop(INFO, None)
        cache = compat.take_cache(kwargs) if cache is None else cache
        call = Call.DENSE
        if handle is not None:
            if info is None:  # called by itself
                info = _take_info(handle, kwargs)
            inputs = input_ids if inputs_embeds is None else inputs_embeds
            width = 0 if inputs is None else inputs.shape[1]
            call, info = classify(handle, info, len(self.layers), cache, width)
        if handle is None or call is Call.DENSE:
            return _dense(self).forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{compat.CACHE: cache},
                **kwargs,
            )
        if info.reads_all and call is Call.PROMPT and not torch.compiler.is_compiling():
            handle.warn_once(
                "the output of a pruned prompt has the kept tokens alone, and its index is no position in the prompt: "
                "handle.report().kept says which tokens they are; to score the last k, pass logits_to_keep=k + 1"
            )
        return run(
            self, handle, call, info, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, kwargs
        )


class PruningCausalLM(_Patched):
    """A family's ``ForCausalLM`` whose decoder prunes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Here as well as in `forward`: accelerate replaces the one, PEFT does not come by the other.
        args, kwargs = _prepare(self, args, kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _prepare(self, args, kwargs)
        return _dense(self).forward(self, *args, **kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """``generate()`` that takes the settings of a request as keywords, or in its generation config."""
        handle = handle_of(self)
        if handle is None:
            return _dense(self).generate(self, *args, **kwargs)
        configs = [self.generation_config, args[1] if len(args) > 1 else None, kwargs.get("generation_config")]
        given = {
            name: value for config in configs for name in SETTINGS if (value := getattr(config, name, None)) is not None
        }
        given |= {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        settings = make_settings(handle.schedule, **given) if given else handle.settings()
        with handle.using(settings):
            return _dense(self).generate(self, *args, **kwargs)

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if handle_of(self) is not None:
            raise NotImplementedError(
                "generate_batch: continuous batching keeps one length for all layers in its paged cache, which pruning "
                "cannot. Use generate() with a left-padded batch, or remove_sdtp(model) first"
            )
        return _dense(self).generate_batch(self, *args, **kwargs)

    def create_masks_for_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if handle_of(self) is None:
            return _dense(self).create_masks_for_generate(*args, **kwargs)
        return masks_for_generate(*args, **kwargs)

    def _prefill(
        self: Any,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """``generate()``'s prefill, which alone knows how long the prompt is that its chunks belong to."""
        handle, dense = handle_of(self), _dense(self)
        if handle is None:
            return dense._prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration)
        cache, current = model_kwargs.get(compat.CACHE), handle.current
        if generation_config.prefill_chunk_size is not None:
            check_takes_chunks(cache)
        if is_first_iteration:  # an assistant model drafts by calls that are no prefill
            attention_mask = model_kwargs.get("attention_mask")
            columns = (input_ids if attention_mask is None else attention_mask).shape[1]
            model_kwargs[PROMPT_LENGTH] = columns
            current.rows_per_setting = max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            current.prompt_columns = columns if cache is None else None
            if cache is None and (generation_config.guidance_scale or 1) != 1:
                raise NotImplementedError(
                    "use_cache=False with guidance_scale: every step reads two prompts again, whose lengths are not "
                    "told apart. Leave use_cache=False out"
                )
        try:
            return dense._prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration)
        finally:
            model_kwargs.pop(PROMPT_LENGTH, None)


def _prepare(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of the outer model, with a :class:`CallInfo` for its decoder."""
    handle = handle_of(model)
    if INFO in kwargs:
        return args, kwargs if handle is not None else {k: v for k, v in kwargs.items() if k != INFO}
    if handle is None:
        return args, kwargs
    given = {**dict(zip(model._sdtp_arguments, args, strict=False)), **kwargs}
    info, current = _take_info(handle, kwargs), handle.current
    logits_to_keep, is_index = given.get("logits_to_keep", 0), False
    if isinstance(logits_to_keep, torch.Tensor):
        logits_to_keep, is_index = 1, True
    keep_last = max(int(logits_to_keep) - 1, 0)
    if current.prompt_columns is not None and given.get(compat.CACHE) is None:
        inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if inputs is not None:
            keep_last = max(keep_last, inputs.shape[1] - current.prompt_columns)  # the answer so far
    info = info._replace(
        keep_last=keep_last,
        reads_loss=given.get("labels") is not None,
        reads_all=not is_index and logits_to_keep == 0 and info.prompt_length is None,
        reads_index=is_index,
    )
    return args, {**kwargs, INFO: info}


def _take_info(handle: SdtpHandle, kwargs: dict[str, Any]) -> CallInfo:
    """Remove what only the patch reads from the keywords of a call."""
    given = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    settings = make_settings(handle.schedule, **given) if given else None
    prompt_length = kwargs.pop(PROMPT_LENGTH, None)
    return CallInfo(prompt_length=prompt_length, settings=settings, reads_all=prompt_length is None)


def _dense(module: Any) -> Any:
    """The class whose methods compute without pruning."""
    return getattr(type(module), "_sdtp_dense", type(module))


# ---------------------------------------------------------------------------------- exchanging a class, and back


@functools.cache
def _pruning_class(dense: Any, kind: Any) -> type:
    forward: Any = kind.forward
    arguments = tuple(inspect.signature(dense.forward).parameters)[1:]
    names = {
        "_sdtp_arguments": arguments,
        "__module__": dense.__module__,
        "__qualname__": dense.__qualname__,
        "__doc__": dense.__doc__,
    }
    if kind is PruningCausalLM:  # generate() and trainers ask for the signature
        inner = forward

        @functools.wraps(dense.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(self, *args, **kwargs)

    return type(dense.__name__, (kind, dense), {**names, "forward": forward, "_sdtp_dense": dense})


def _rebuild(dense: type, kind: type) -> Any:
    made: Any = _pruning_class(dense, kind)
    return made.__new__(made)


def exchange(module: Any, kind: Any, handle: SdtpHandle) -> None:
    handle.attach(module, _restore)
    module._sdtp = handle
    if not isinstance(module, kind):
        dense: Any = type(module)
        _become(module, _pruning_class(dense, kind))


def _restore(module: Any) -> None:
    """Make a module what it was, apart from what others have done to it meanwhile."""
    module.__dict__.pop("_sdtp", None)
    # Where somebody has made a class of ours into another one, it stays: without a handle it does not prune.
    if "_sdtp_dense" in vars(type(module)):
        _become(module, _dense(module))


def _become(module: Any, made: Any) -> None:
    """Exchange the class; a bound method of the old one, below accelerate's hook or left by it, follows."""
    old: Any = type(module)
    module.__class__ = made
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__func__ is old.forward:
            setattr(module, name, types.MethodType(made.forward, module))
