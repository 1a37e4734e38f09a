"""`rarefy eval | unpack | check`: what a model directory is worth, made dense again, proved."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.text
import torch
import tyro

from rarefy.bench.memory import high_water
from rarefy.bench.perplexity import Perplexity, Text, perplexity, read_windows
from rarefy.bench.progress import tracked
from rarefy.bench.words import grouped
from rarefy.cli.output import AsJson, console, grid, print_json, share
from rarefy.cli.quiet import quiet
from rarefy.io.calibration import default_length
from rarefy.io.directory import read_model
from rarefy.io.packed import unpack_directory
from rarefy.io.pretrained import context_length, read_config, read_tokenizer
from rarefy.io.prove import check_directory

__all__ = ["check", "evaluate", "unpack"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def evaluate(
    model_dir: tyro.conf.Positional[Path],
    text: Path,
    length: int | None = None,
    windows: int | None = None,
    bos: Literal["text", "window", "none"] = "text",
    field: str | None = None,
    batch: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    threads: int | None = None,
    as_json: AsJson = False,
) -> int:
    """Perplexity, bits per byte and top-1 accuracy of a language model on a text, in windows that do not overlap.

    The text is tokenised once and cut into windows; a last part that fills none is left out. In each window every token
    but the first is predicted: the perplexity that papers on pruning give, at the same --length and text. Packed
    directories are evaluated as they are.

    Args:
        model_dir: the directory of the model.
        text: what to predict: plain text, .jsonl or .parquet. Kept apart from what was calibrated on.
        length: tokens in a window; by default the model's context, 2048 at most.
        windows: how many at most, from the beginning of the text.
        bos: text: the tokenizer's first token stands once, before the text, as in published tables; window: before
            each window, within its length; none: nowhere.
        field: of .jsonl and .parquet; by default text.
        batch: windows at a time.
        dtype: to compute in; by default as stored.
        threads: of the processor.
        as_json: the numbers as JSON.
    """
    _refuse_counts(windows=windows, batch=batch, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    config = read_config(model_dir)
    _refuse_no_language_model(model_dir, config)
    context = context_length(config)
    if length is not None and context is not None and length > context:
        raise ValueError(f"--length {length} is more than the model's context of {context} tokens")
    with quiet():
        found = read_windows(
            text, read_tokenizer(model_dir), length or default_length(context), count=windows, bos=bos, field=field
        )
        model: Any = read_model(model_dir)
        if dtype is not None:
            model.to(_DTYPES[dtype])
        with tracked("evaluating") as progress:
            got = perplexity(
                model, found.windows, batch=batch, bytes_per_token=found.bytes_per_token, progress=progress
            )
    settings = {
        "model": str(model_dir),
        "text": text.name,
        "bos": bos,
        "dtype": _dtype(model),
        "peak_memory": high_water(),
    }
    if as_json:
        print_json({**settings, **got.to_dict()})
    else:
        _show(got, found, settings, model_dir.resolve().name)
    return 0


def unpack(
    model_dir: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    as_json: AsJson = False,
) -> int:
    """Write a packed directory as an ordinary dense one: the same values bit for bit, the same config.json.

    Args:
        model_dir: what `rarefy prune --packed` wrote.
        out: a new folder.
        as_json: say as JSON what was written.
    """
    _refuse_used(out)
    read_config(model_dir)
    with quiet():
        unpack_directory(model_dir, out)
    sizes = {"packed": _bytes(model_dir), "dense": _bytes(out)}
    if as_json:
        print_json({"model": str(model_dir), "out": str(out), "bytes": sizes})
    else:
        print(f"{out}: {sizes['dense'] / 1e6:.2f} MB of weights, {sizes['packed'] / 1e6:.2f} MB packed in {model_dir}")
    return 0


def check(model_dir: tyro.conf.Positional[Path], as_json: AsJson = False) -> int:
    """Prove what a pruned directory says of itself: counts, pattern and zeros, weight for weight. Exit code 1 if not.

    Args:
        model_dir: what `rarefy prune` wrote.
        as_json: what was found as JSON.
    """
    read_config(model_dir)
    try:
        with quiet():
            record: Any = check_directory(model_dir)
    except RuntimeError as error:
        if as_json:
            print_json({"model": str(model_dir), "holds": False, "broken": str(error)})
        sys.stderr.write(f"rarefy: {' '.join(str(error).split())}\n")
        return 1
    if as_json:
        print_json({"model": str(model_dir), "holds": True, **record.model_dump(mode="json")})
        return 0
    print(
        f"{model_dir}: all that rarefy.json says is true. {len(record.sites)} layers keep {grouped(record.kept)} of "
        f"{grouped(record.total)} weights ({share(record.total - record.kept, record.total)} zeros), pattern "
        f"{record.pattern}; no value is NaN or infinite."
    )
    return 0


# --- the work behind them --------------------------------------------------------------------------------------------


def _show(got: Perplexity, text: Text, settings: dict[str, Any], name: str) -> None:
    shown = console()
    source, memory = settings["text"], settings["peak_memory"]
    shown.print(
        rich.text.Text(
            f"{name} · {source} · {grouped(got.windows)} windows of {grouped(got.length)} tokens", style="bold"
        )
    )
    between = "" if got.low is None else f"{got.low:.2f} to {got.high:.2f}"
    bits = "–" if got.bits_per_byte is None else f"{got.bits_per_byte:.3f}"
    rows = [
        ("perplexity per token", f"{got.value:.2f}", between),
        ("bits per byte", bits, ""),
        ("top-1 accuracy", f"{100 * got.top1:.2f} %", ""),
        ("speed", f"{grouped(round(got.tokens_per_second))} tokens/s", ""),
        ("memory at most", f"{memory / 1e9:.2f} GB", ""),
    ]
    shown.print(grid(("", "", "95 % interval"), rows))
    used = got.windows * got.length
    shown.print(
        rich.text.Text(
            f"{grouped(got.targets)} targets, all tokens of a window but its first; {grouped(used)} tokens in windows, "
            f"{grouped(text.tokens_in_text)} in the text; {_BOS[text.bos]}; {settings['dtype']}. The interval is over "
            "windows: how much another part of such text would move the number. Two models on the same windows differ "
            "by less than their intervals suggest.",
            style="dim",
        )
    )


_BOS = {
    "text": "the tokenizer's first token once, before the text",
    "window": "each window begins with the tokenizer's first token",
    "none": "no special tokens",
}


def _refuse_no_language_model(model_dir: Path, config: Any) -> None:
    names = list(getattr(config, "architectures", None) or [])
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    if names and names[0] not in set(causal.values()):
        raise ValueError(
            f"{model_dir} holds a {names[0]}, which is no causal language model: perplexity is that of models that "
            "predict the next token, such as LlamaForCausalLM or GPT2LMHeadModel"
        )


def _refuse_counts(**given: int | None) -> None:
    for name, x in given.items():
        if x is not None and x < 1:
            raise ValueError(f"--{name} {x}: at least 1 is needed")


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: give a new one, or empty it first")


def _dtype(model: torch.nn.Module) -> str:
    return str(next(p.dtype for p in model.parameters())).removeprefix("torch.")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
