"""llama.cpp as a peer, by the wheel ``xllamacpp``, which carries it whole: time to the first token, and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WIDE = "F16"  # the 16-bit form; BF16 took 3 % longer to the first token of 2048 on a CPU with instructions for it
ROOM = 256  # tokens of the context after the prompt


class LlamaCpp:
    """One GGUF file, loaded.

    Parameters
    ----------
    file : Path
    longest : int
        Tokens of the longest prompt.
    threads : int

    Raises
    ------
    ImportError
        Without ``xllamacpp``.
    RuntimeError
        If llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, longest: int, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = longest + ROOM, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> str:
        """Greedy continuation of exactly this prompt, as text.

        Raises
        ------
        RuntimeError
            If the server refuses, or did not read the whole prompt.
        """
        answer = self._server.handle_completions(
            {"prompt": list(prompt), "n_predict": new_tokens, "temperature": 0.0, "cache_prompt": False}
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        read = answer["timings"]["prompt_n"]
        if read != len(prompt):
            raise RuntimeError(f"llama.cpp read {read} of {len(prompt)} tokens of the prompt")
        return str(answer["choices"][0]["text"])


def version() -> str:
    """Of the wheel; an ``ImportError`` where it is not installed."""
    import xllamacpp

    return str(xllamacpp.__version__)


def file_type(file: Path) -> str:
    """How a GGUF file stores its matrices, such as ``Q4_1``."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(file).fields["general.file_type"]
    return str(LlamaFileType(field.contents()).name).removeprefix("MOSTLY_")


def widen(file: Path, dest: Path) -> None:
    """Copy a GGUF file with its matrices in 16 bits; vectors stay in 32, as llama.cpp has them."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(file)
    writer = GGUFWriter(dest, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        value = field.contents()
        if name == "general.file_type":
            value = int(LlamaFileType[f"MOSTLY_{WIDE}"])
        is_array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        kind = GGMLQuantizationType.F32 if len(tensor.shape) == 1 else GGMLQuantizationType[WIDE]
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
