"""The ``medssl`` command. Each subcommand calls the public function of the same name; heavy imports wait for it."""

from __future__ import annotations

import errno
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from medssl.errors import ExitCode, MedSSLError
from medssl.ledger import Outcome, printable

_UsageFault: Any = typer.BadParameter.mro()[2]  # ClickException, of click or of the copy that newer typers carry
_ENVIRONMENT_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EFBIG}

app = typer.Typer(
    name="medssl",
    help="Self-supervised learning on medical images, from raw scans to a trusted segmentation. "
    "For research use only; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one value, as in --set key=value; repeatable.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write.")]
Store = Annotated[Path, typer.Option("--store", help="Folder that `medssl prepare` wrote.")]
Recipe = Annotated[Path, typer.Argument(help="YAML recipe; see the configs folder.")]
Regularise = Annotated[
    bool, typer.Option("--regularise", help="Interpolate missing or uneven slices of a DICOM series, and say so.")
]
Xform = Annotated[str | None, typer.Option(help="Where two NIfTI transforms disagree: sform or qform.")]
AssumeSpacing = Annotated[
    tuple[float, float, float] | None, typer.Option(help="Voxel size in mm of scans that state none.")
]
WhichVolume = Annotated[str | None, typer.Option(help="Of several volumes: its number, from 0, or channels.")]
IsLabel = Annotated[bool, typer.Option("--label", help="It is a label map, a DICOM-SEG or an RTSTRUCT.")]
OnImage = Annotated[
    Path | None, typer.Option("--on", help="Image that the label map must lie on; needed for contours.")
]
ResumeOption = Annotated[str, typer.Option("--resume", help="auto: go on where a stopped run stood; must; never.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from medssl import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show warnings only.")] = False,
    version: Annotated[  # noqa: ARG001  its callback does the work
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options that stand before the command."""
    ctx.obj = {"debug": debug}
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(levelname)s %(message)s")


@app.command()
def scan(
    data: Annotated[
        Path,
        typer.Argument(help="Folder of scans (DICOM, NIfTI and others in any mix), an archive, or a CSV of cases."),
    ],
    out: Out,
    table: Annotated[Path | None, typer.Option(help="CSV with case_id and any of subject_id, split, modality.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the table to keep, between commas: diagnosis,age,site.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="CT, MR, PT, US, XR or other, for all cases.")] = None,
    keep_names: Annotated[
        bool, typer.Option("--keep-names", help="Make case and subject ids of file names, not of keyed hashes.")
    ] = False,
    volumes: Annotated[
        str, typer.Option(help="Of several volumes in one item: auto, all, first, middle, channels or refuse.")
    ] = "auto",
    regularise: Regularise = False,
    label_grid: Annotated[
        str, typer.Option(help="Labels on another grid than their image: same refuses, resample, or trust.")
    ] = "same",
    xform: Xform = None,
    assume_spacing: AssumeSpacing = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Find images and labels in an export and check each.

    Writes a cohort table, a report page, and what was refused and why.
    """
    from medssl.config import apply_overrides
    from medssl.data.scan import ScanConfig
    from medssl.data.scan import scan as run

    given: dict[str, Any] = {
        "names": "keep" if keep_names else "hash",
        "volumes": volumes,
        "regularise": regularise,
        "label_grid": label_grid,
        "xform": xform,
        "assume_spacing_mm": assume_spacing,
    }
    if table is not None:
        given["table"] = str(table)
    if columns is not None:
        given["columns"] = [name.strip() for name in columns.split(",")]
    if modality is not None:
        given["modality"] = modality
    config = ScanConfig.parse(apply_overrides(given, overrides or []), source="scan options")
    result = run(data, out, config=config, dry_run=dry_run)
    see = [result.path.with_name(name) for name in ("report.html", "refused.csv")]
    _close(result.ledger, f"cohort of {len(result.cohort)} cases", out, dry_run=dry_run, see=see)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="File of any format, a folder, or an archive.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    label: IsLabel = False,
    on: OnImage = None,
    volume: WhichVolume = None,
    regularise: Regularise = False,
    xform: Xform = None,
    assume_spacing: AssumeSpacing = None,
    show_all: Annotated[bool, typer.Option("--all", help="Tell all of every image in a large folder.")] = False,
    overrides: Overrides = None,
) -> None:
    """Tell what an image or folder holds and what is wrong.

    Of a few images all is told: geometry, units, order of slices, what to do. Of many, one line each.
    """
    from medssl.data.doctor import doctor as run

    reading = _reading(volume, overrides, regularise=regularise, xform=xform, assume_spacing_mm=assume_spacing)
    found = run(path, label=label, on=on, reading=reading)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else _lines(found.text(in_full=show_all)))
    raise typer.Exit(int(found.exit_code()))


@app.command()
def convert(
    item: Annotated[Path, typer.Argument(help="DICOM folder or file, or an image of any other format.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="File ending in .nii.gz, .nii, .mha or .nrrd; or a folder for all volumes."),
    ],
    label: IsLabel = False,
    on: OnImage = None,
    volume: WhichVolume = None,
    regularise: Regularise = False,
    xform: Xform = None,
    assume_spacing: AssumeSpacing = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Write a volume as medssl sees it, on its own grid."""
    from medssl.data.convert import convert as run

    reading = _reading(volume, overrides, regularise=regularise, xform=xform, assume_spacing_mm=assume_spacing)
    for path in run(item, out, label=label, on=on, reading=reading, dry_run=dry_run):
        typer.echo(f"{'would write' if dry_run else 'wrote'} {_lines(str(path))}")


@app.command()
def prepare(
    config: Recipe,
    cohort: Annotated[Path, typer.Option("--cohort", help="Table that `medssl scan` wrote.")],
    out: Out,
    workers: Annotated[int, typer.Option(help="Processes; 0 chooses by the machine.")] = 0,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Bring every case to one orientation, spacing and scale."""
    from medssl.config import apply_overrides, load_yaml
    from medssl.data.prepare import PrepareConfig
    from medssl.data.prepare import prepare as run

    parsed = PrepareConfig.parse(apply_overrides(load_yaml(config), overrides or []), source=str(config))
    result = run(parsed, cohort=cohort, out=out, workers=workers, dry_run=dry_run)
    _close(result.ledger, "store", out, dry_run=dry_run, see=[out / "refused.csv"])


@app.command()
def gallery(
    augment: Annotated[
        str, typer.Argument(help="Name of a preset, or a YAML file: a list of augments, or a recipe with its augments.")
    ],
    store: Store,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .html to write.")],
    cases: Annotated[int, typer.Option(help="How many cases, spread evenly over the store.")] = 3,
    views: Annotated[int, typer.Option(help="How many views of each as training sees them.")] = 4,
    crop: Annotated[str | None, typer.Option(help="Voxels of the crops, as in 64,64,32; 1 last for pictures.")] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Show what augments and crops look like on your images."""
    from medssl.showcase.gallery import GalleryConfig
    from medssl.showcase.gallery import gallery as run

    given = {"cases": cases, "views": views, "crop": _numbers("--crop", crop), "seed": seed}
    config = GalleryConfig.parse(given, source="gallery options")
    result = run(augment, store=store, out=out, config=config, overrides=overrides or [], dry_run=dry_run)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{'would write' if dry_run else 'wrote'} {_lines(str(out))}")


@app.command()
def plan(
    store: Annotated[Path, typer.Argument(help="Folder that `medssl prepare` wrote, with labels.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The recipe to write, a .yaml.")],
    encoder: Annotated[Path | None, typer.Option(help="Bundle of the encoder that will be fine-tuned.")] = None,
    minutes: Annotated[float, typer.Option(help="Minutes of training on this machine.")] = 60.0,
    memory_gib: Annotated[
        float | None, typer.Option(help="GiB that training may take; 70 % of what is free by default.")
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Plan a segmentation recipe for your labels and machine, with reasons."""
    from medssl.blueprint.fit import PlanConfig
    from medssl.blueprint.plan import plan as run
    from medssl.config import apply_overrides

    given = apply_overrides({"minutes": minutes, "memory_gib": memory_gib}, overrides or [])
    config = PlanConfig.parse(given, source="plan options")
    result = run(store, out=out, encoder=encoder, config=config, dry_run=dry_run)
    for key, value, reason in result.choices:
        typer.echo(_lines(f"{key}: {value}" + (f"  ({reason})" if reason else "")))
    for remark in result.remarks:
        typer.echo(f"warning: {_lines(remark)}", err=True)
    typer.echo(f"{'would write' if dry_run else 'wrote'} {_lines(str(out))}")


@app.command()
def pretrain(
    recipe: Recipe,
    store: Store,
    out: Out,
    resume: ResumeOption = "auto",
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Pretrain an encoder on unlabelled images; leaves a bundle."""
    from medssl.recipe import pretrain as run

    result = run(recipe, store=store, out=out, overrides=overrides or [], resume=_resume(resume), dry_run=dry_run)
    _report_training(result, dry_run=dry_run)


@app.command()
def finetune(
    recipe: Recipe,
    store: Store,
    out: Out,
    encoder: Annotated[
        Path | None, typer.Option(help="Bundle of a pretrained encoder; without it, from scratch.")
    ] = None,
    resume: ResumeOption = "auto",
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train on label maps, or on a column of a table."""
    from medssl.recipe import finetune as run

    result = run(
        recipe,
        store=store,
        out=out,
        encoder=encoder,
        overrides=overrides or [],
        resume=_resume(resume),
        dry_run=dry_run,
    )
    _report_training(result, dry_run=dry_run)


@app.command()
def adopt(
    checkpoint: Annotated[Path, typer.Argument(help="A public checkpoint: .pt, .pth, .ckpt or .safetensors.")],
    family: Annotated[
        str, typer.Option("--as", help="Whose names its tensors have, for example voco_swin; any other word lists all.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle to write.")],
    prepare: Annotated[
        Path | None, typer.Option(help="Recipe by which images are prepared for it, where that was not published.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights.")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Make a bundle of a public checkpoint; runs no code in it."""
    from medssl.adoption import AdoptConfig
    from medssl.adoption import adopt as run
    from medssl.config import apply_overrides, load_yaml

    given: dict[str, Any] = {"family": family, "licence": licence}
    if prepare is not None:
        given["prepare"] = load_yaml(prepare)
    config = AdoptConfig.parse(apply_overrides(given, overrides or []), source="adopt options")
    result = run(checkpoint, out=out, config=config, dry_run=dry_run)
    for sentence in result.sentences:
        typer.echo(_lines(sentence))
    typer.echo(_lines(f"{'would write' if dry_run else 'wrote'} bundle: {out}"))


@app.command()
def crossval(
    recipe: Recipe,
    store: Store,
    out: Out,
    folds: Annotated[int, typer.Option(help="Number of folds; subjects are dealt, never split.")] = 5,
    encoder: Annotated[
        Path | None, typer.Option(help="Bundle of a pretrained encoder; without it, from scratch.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the deal of subjects.")] = 0,
    device: Annotated[str, typer.Option(help="Of scoring: auto, cpu, cuda or cuda:N.")] = "auto",
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train one model a fold and score each on unseen subjects."""
    from medssl.evaluation.folds import crossval as run

    result = run(
        recipe,
        store=store,
        out=out,
        folds=folds,
        encoder=encoder,
        overrides=overrides or [],
        seed=seed,
        device=device,
        dry_run=dry_run,
    )
    for line in result.sentences():
        typer.echo(line)
    typer.echo(_lines(f"{'would write' if dry_run else 'wrote'} an ensemble: {out}"))


@app.command()
def postprocess(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `medssl finetune` left, or folder of an ensemble.")],
    store: Store,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Choose on the split val how label maps are cleaned."""
    from medssl.config import apply_overrides
    from medssl.evaluation.postprocess import PostprocessConfig
    from medssl.evaluation.postprocess import postprocess as run

    config = PostprocessConfig.parse(apply_overrides({}, overrides or []), source="postprocess options")
    result = run(bundle, store=store, config=config, dry_run=dry_run)
    for line in result.sentences():
        typer.echo(line)
    typer.echo(_lines(f"{'would write' if dry_run else 'wrote'} {result.path}"))


@app.command()
def predict(
    bundles: Annotated[
        list[Path],
        typer.Argument(help="Bundle that `medssl finetune` left; several, or a folder of them, are an ensemble."),
    ],
    scans: Annotated[Path, typer.Argument(help="A scan, a folder of scans, or the cohort.csv of a scan.")],
    out: Out,
    overlap: Annotated[float, typer.Option(help="Share by which neighbouring windows overlap, in [0, 0.9].")] = 0.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    xform: Xform = None,
    assume_spacing: AssumeSpacing = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Write one label map a scan, on its own grid; or a table."""
    from medssl.config import apply_overrides
    from medssl.evaluation.predict import PredictConfig
    from medssl.evaluation.predict import predict as run

    given = {"overlap": overlap, "xform": xform, "assume_spacing_mm": assume_spacing}
    config = PredictConfig.parse(apply_overrides(given, overrides or []), source="predict options")
    bundle = bundles if len(bundles) > 1 else bundles[0]
    result = run(bundle, scans, out=out, device=device, dry_run=dry_run, **config.model_dump())
    made = "a table" if {path.suffix for path in result.outputs} == {".csv"} else "label maps"
    _close(result.ledger, made, out, dry_run=dry_run, see=[out / "refused.csv"])


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Folder of predicted label maps, or predictions.csv of classes or numbers.")
    ],
    labels: Annotated[
        Path,
        typer.Argument(
            help="Folder of reference label maps of the same names, or the cohort.csv that was predicted; for "
            "predictions.csv a table with the truth."
        ),
    ],
    out: Out,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Measure Dice, surface Dice and HD95 in mm; AUROC, calibration or error of a table (--set column=...)."""
    from medssl.config import apply_overrides
    from medssl.evaluation.assess import EvaluateConfig, EvaluateResult
    from medssl.evaluation.assess import evaluate as run
    from medssl.evaluation.judge import JudgeConfig, JudgeResult, judge

    given = apply_overrides({}, overrides or [])
    result: EvaluateResult | JudgeResult
    if predictions.suffix.lower() == ".csv":
        judging = JudgeConfig.parse(given, source="evaluate options")
        result = judge(predictions, labels, out=out, config=judging, dry_run=dry_run)
    else:
        config = EvaluateConfig.parse(given, source="evaluate options")
        result = run(predictions, labels, out=out, config=config, dry_run=dry_run)
    for line in result.sentences():
        typer.echo(line)
    _close(result.ledger, "metrics", out, dry_run=dry_run, see=[out / "refused.csv"])


@app.command()
def study(
    config: Recipe,
    store: Store,
    out: Out,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Does pretraining help? Compare with the from-scratch twin."""
    from medssl.evaluation.study import study as run

    result = run(config, store=store, out=out, overrides=overrides or [], dry_run=dry_run)
    for line in result.sentences:
        typer.echo(line)
    typer.echo(f"{'would write' if dry_run else 'wrote'} {out}")


@app.command()
def embed(
    bundle: Annotated[Path, typer.Argument(help="Bundle of an encoder, or of what was fine-tuned from one.")],
    store: Store,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .parquet to write.")],
    level: Annotated[str, typer.Option(help="One vector a volume, slice or patch.")] = "volume",
    scratch: Annotated[bool, typer.Option("--scratch", help="Fresh weights instead, as a control.")] = False,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Write the features of every case, slice or patch to a table."""
    from medssl.config import apply_overrides
    from medssl.evaluation.embed import EmbedConfig
    from medssl.evaluation.embed import embed as run

    given = apply_overrides({"level": level, "scratch": scratch}, overrides or [])
    result = run(bundle, store=store, out=out, config=EmbedConfig.parse(given, source="embed options"), dry_run=dry_run)
    written = "embeddings" if dry_run else f"{result.rows} vectors of {result.dimensions} numbers"
    _close(result.ledger, written, out, dry_run=dry_run)


@app.command()
def probe(
    embeddings: Annotated[Path, typer.Argument(help="Table that `medssl embed` wrote.")],
    facts: Annotated[Path, typer.Option(help="CSV with case_id and the column, or a store that has it.")],
    target: Annotated[str, typer.Option(help="Column to be read.")],
    out: Out,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """What do the features know of a column, and of the scanner?"""
    from medssl.config import apply_overrides
    from medssl.evaluation.probing import ProbeConfig
    from medssl.evaluation.probing import probe as run

    config = ProbeConfig.parse(apply_overrides({}, overrides or []), source="probe options")
    result = run(embeddings, facts=facts, target=target, out=out, config=config, dry_run=dry_run)
    for sentence in result.sentences:
        typer.echo(_lines(sentence))
    typer.echo(_lines(f"{'would write' if dry_run else 'wrote'} {out}"))


@app.command()
def similar(
    embeddings: Annotated[Path, typer.Argument(help="Table that `medssl embed` wrote.")],
    case: Annotated[str, typer.Option(help="Case id.")],
    top: Annotated[int, typer.Option(help="How many.")] = 10,
    others_only: Annotated[bool, typer.Option("--others-only", help="No other image of the same subject.")] = False,
    store: Annotated[Path | None, typer.Option(help="The store that was embedded, for pictures.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The .html to write; else only printed.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Find the cases most similar to one."""
    from medssl.evaluation.neighbours import similar as run

    result = run(embeddings, case=case, top=top, others_only=others_only, store=store, out=out, dry_run=dry_run)
    for row in result.table.to_dict("records"):
        typer.echo(_lines(f"{row['rank']:>3}  {row['cosine']:+.3f}  {row['case_id']}  {row['subject_id']}"))
    for path in result.written:
        typer.echo(_lines(f"wrote {path}"))


@app.command()
def leaks(
    first: Annotated[Path, typer.Argument(help="What is trained on: a store, a cohort.csv, or a table of embeddings.")],
    second: Annotated[Path, typer.Argument(help="What is tested on: another of the same kind.")],
    out: Out,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Is an image of one set, or a copy of it, in the other?"""
    from medssl.config import apply_overrides
    from medssl.evaluation.leakage import LeaksConfig
    from medssl.evaluation.leakage import leaks as run

    config = LeaksConfig.parse(apply_overrides({}, overrides or []), source="leaks options")
    result = run(first, second, out=out, config=config, dry_run=dry_run)
    for sentence in result.sentences:
        typer.echo(_lines(sentence))
    if dry_run:
        typer.echo(_lines(f"would write {out}"))
        return
    _close(result.ledger, "comparison", out, dry_run=dry_run, see=[out / "report.html", out / "leaks.csv"])


@app.command()
def drift(
    reference: Annotated[Path, typer.Argument(help="Embeddings of the store that was trained on.")],
    new: Annotated[Path, typer.Argument(help="Embeddings of new images, by the same bundle.")],
    out: Out,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Do new images look like those that were trained on?"""
    from medssl.config import apply_overrides
    from medssl.evaluation.drift import DriftConfig
    from medssl.evaluation.drift import drift as run

    config = DriftConfig.parse(apply_overrides({}, overrides or []), source="drift options")
    for sentence in run(reference, new, out=out, config=config, dry_run=dry_run).sentences:
        typer.echo(_lines(sentence))
    typer.echo(_lines(f"{'would write' if dry_run else 'wrote'} {out}"))


@app.command()
def demo(
    out: Out = Path("medssl-demo"),
    seed: Annotated[int, typer.Option(help="Of the phantoms and of every run.")] = 0,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Run the whole path, tiny, on generated phantoms."""
    from medssl.config import apply_overrides
    from medssl.quickstart import DemoConfig
    from medssl.quickstart import demo as run

    config = DemoConfig.parse(apply_overrides({"seed": seed}, overrides or []), source="demo options")
    for name, path in run(out, seed=config.seed, steps_share=config.steps_share, dry_run=dry_run).items():
        typer.echo(f"{name:<12} {path}")


def main() -> None:
    """Run the command line and end with the exit code that errors.py documents."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold images
    sys.exit(run_guarded(lambda: app(standalone_mode=False), debug="--debug" in sys.argv))


def run_guarded(command: Callable[[], Any], *, debug: bool = False) -> int:
    """Run ``command``; turn what medssl refuses into one line on stderr and an exit code.

    Args:
        command: Called without arguments; an integer that it returns is the exit code.
        debug: Let the traceback through.
    """
    try:
        result = command()
    except MedSSLError as error:
        if debug:
            raise
        return _say(f"{error.code}: {error.message}", error.exit_code)
    except _UsageFault as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say(
            "E_STOPPED: stopped by Ctrl-C. The same command goes on where this one stood.", ExitCode.INTERRUPTED
        )
    except MemoryError as error:
        if debug:
            raise
        return _say(
            f"E_MEMORY: out of memory ({error}). Use smaller crops or batches, or fewer workers.", ExitCode.ENVIRONMENT
        )
    except OSError as error:
        if debug or error.errno not in _ENVIRONMENT_FAULTS:
            raise
        return _say(f"E_ENVIRONMENT: {error.filename}: {error.strerror}. Mend it and run again.", ExitCode.ENVIRONMENT)
    return result if isinstance(result, int) else ExitCode.OK


def _say(line: str, code: int) -> int:
    typer.echo(_lines(line), err=True)
    return int(code)


def _lines(text: str) -> str:
    """Text for the terminal: names of files may hold anything, and only our own line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def _reading(volume: str | None, overrides: list[str] | None, **given: Any) -> Any:
    """Read options of one item, from the command line."""
    from medssl.config import apply_overrides
    from medssl.data.reading import Reading

    choice = int(volume) if volume is not None and volume.isdigit() else volume
    if not (choice is None or isinstance(choice, int) or choice == "channels"):
        raise typer.BadParameter(f"--volume is a number from 0, or channels, not {volume}")
    return Reading.parse(apply_overrides({"volume": choice, **given}, overrides or []), source="read options")


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Whole numbers between commas."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(f"{option} is whole numbers between commas, not {text}")
    return [int(part) for part in parts]


def _resume(value: str) -> Any:
    if value not in {"auto", "never", "must"}:
        raise typer.BadParameter(f"--resume is auto, never or must, not {value}")
    return value


def _close(ledger: Any, what: str, out: Path, *, dry_run: bool, see: Sequence[Path] = ()) -> None:
    """Print what became of the inputs, and where to look, and leave with the ledger's exit code."""
    from medssl.report.closing import closing_lines

    for line in closing_lines(ledger):
        typer.echo(printable(line), err=True)
    typer.echo(_lines(f"{ledger.summary()}; {'would write' if dry_run else 'wrote'} {what}: {out}"))
    is_whole = ledger.count(Outcome.REJECTED) == 0
    told = [] if dry_run else [str(path) for path in see if not (is_whole and path.name == "refused.csv")]
    if told:
        typer.echo(_lines(f"look at {', '.join(told)}"))
    raise typer.Exit(int(ledger.exit_code()))


def _report_training(result: Any, *, dry_run: bool) -> None:
    for name, value in sorted(result.metrics.items()):
        typer.echo(f"{name} {value:.4g}")
    for alarm in result.alarms:
        typer.echo(f"warning: {alarm}", err=True)
    typer.echo(f"{'would write' if dry_run else 'wrote'} bundle: {result.bundle}")
