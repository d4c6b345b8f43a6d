"""How quick are augmented crops? medssl's whole loader beside MONAI, TorchIO and batchgeneratorsv2, in turns, one run.

    python benchmarks/augment_speed.py -o benchmarks/results

Four CT-like volumes with labels are written once, as NIfTI for the others and as a store for medssl. Every contestant
has a process of its own and, with its workers, is stopped while it is not its turn. A turn first takes what was made
ahead, uncounted, then as many batches as fill the time. With ``--gpu`` the augmentation of a VoCo batch is compared
with the step that it is for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nibabel as nib
import numpy as np
import provenance
from augment_contestants import BATCH, CONTESTANTS
from augment_costs import costs
from scipy import ndimage

SHAPE = (224, 224, 176)
CASES = 4
LISTS = {"affine+intensity": False, "with elastic": True}
GOALS = {"affine+intensity": 5.0, "with elastic": 10.0}
WORKERS = {"medssl": (0, 2)}
PEER_WORKERS = (0, 2)
END_SECONDS = 60
SAMPLE_SECONDS = 0.05


def volume(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Body with texture and noise in HU, (X, Y, Z), and five organs as labels."""
    rng = np.random.default_rng(number)
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True)
    texture = ndimage.zoom(rng.normal(size=(28, 28, 22)).astype(np.float32), 8, order=3) * 40
    hu = np.where(axes[0] ** 2 / 0.8 + axes[1] ** 2 / 0.6 < 1, 40 + texture, -1000)
    label = np.zeros(SHAPE, np.uint8)
    for value in range(1, 6):
        centre, radius = rng.uniform(-0.5, 0.5, 3), rng.uniform(0.15, 0.35, 3)
        organ = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radius, strict=True)) < 1
        label[organ], hu[organ] = value, hu[organ] + 40 * value - 100
    hu += rng.normal(0, 15, SHAPE).astype(np.float32)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), label


def write(folder: Path) -> None:
    """The volumes as NIfTI and, prepared, as a store."""
    from medssl.data.cohort import Case, Cohort
    from medssl.data.prepare import PrepareConfig, prepare

    cases = []
    for number in range(CASES):
        image, label = folder / f"{number}_image.nii", folder / f"{number}_label.nii"
        for path, array in zip((image, label), volume(number), strict=True):
            nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
        cases.append(
            Case(
                case_id=f"case{number}",
                subject_id=f"case{number}",
                image=str(image),
                label=str(label),
                modality="CT",
                split="train",
            )
        )
    Cohort(cases).to_csv(folder / "cohort.csv")
    config = PrepareConfig.parse({"modality": "CT", "intensity": {"mode": "hu"}})
    result = prepare(config, cohort=folder / "cohort.csv", out=folder / "store", workers=1)
    if result.store is None or len(result.store.cases) != CASES:
        raise RuntimeError(result.ledger.to_csv())


@dataclass
class Contestant:
    """One loader in a process group of its own.

    Args:
        name: Of the loader.
        workers: Processes beside its own.
        rates: Crops a second of each turn.
        peak_mib: Largest sum of the proportional set sizes of its processes that was seen.
    """

    name: str
    workers: int
    folder: Path
    edge: int
    elastic: bool
    rates: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, str(Path(__file__).with_name("augment_contestants.py")), self.name]
        command += ["--folder", str(self.folder), "--edge", str(self.edge), "--workers", str(self.workers)]
        log = (self.folder / f"{self.name} {self.workers}.log").open("w")
        self.process = subprocess.Popen(
            [*command, *["--elastic"] * self.elastic],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        self._answer()
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGCONT)
        try:
            process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def turn(self, seconds: float) -> float:
        """Crops a second, with everybody else stopped."""
        assert self.process is not None
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        print(seconds, file=self.process.stdin, flush=True)
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        rate: float = answer["crops"] / answer["seconds"]
        return rate

    def remember(self, seconds: float) -> None:
        """A turn in which only memory is looked at; nobody else may be alive, for shared pages are shared out."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                self.peak_mib = max(self.peak_mib, self._pss_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.turn(seconds)
        ended.set()
        watcher.join()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = (self.folder / f"{self.name} {self.workers}.log").read_text().strip().splitlines()
            raise RuntimeError(f"{self.name}, {self.workers} workers: ended. {log[-1] if log else ''}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def _pss_mib(self) -> float:
        assert self.process is not None
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) != self.process.pid:
                    continue
                lines = (folder / "smaps_rollup").read_text().splitlines()
            except (OSError, IndexError):  # it has just ended
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024


def race(
    folder: Path, *, edge: int, elastic: bool, rounds: int, seconds: float, names: Sequence[str]
) -> list[Contestant]:
    """All contestants for one list and size: each alone for its memory, then all in turns."""
    everyone = [
        Contestant(name, workers, folder, edge, elastic)
        for name in names
        for workers in WORKERS.get(name, PEER_WORKERS)
    ]
    for one in everyone:
        with one:
            one.remember(seconds)
    with ExitStack() as stack:
        for one in everyone:
            stack.enter_context(one)
        for number in range(rounds):
            for one in everyone if number % 2 else reversed(everyone):
                one.rates.append(one.turn(seconds))
            shown = ", ".join(f"{one.name} {one.workers}: {one.rates[-1]:.2f}" for one in everyone)
            print(f"{edge}, elastic {elastic}, round {number + 1}: {shown}", file=sys.stderr, flush=True)
    return everyone


def judge(everyone: Sequence[Contestant]) -> dict[str, Any]:
    """medssl with its best number of workers against whoever was quickest in each round."""
    ours, peers = [one for one in everyone if one.name == "medssl"], [one for one in everyone if one.name != "medssl"]
    mine = max(ours, key=lambda one: statistics.median(one.rates))
    best = max(peers, key=lambda one: statistics.median(one.rates))
    ratios = [rate / max(one.rates[k] for one in peers) for k, rate in enumerate(mine.rates)]
    return {
        "workers": mine.workers,
        "peer": f"{best.name}, {best.workers} workers",
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "mib": mine.peak_mib,
        "peer_mib": best.peak_mib,
    }


INTRODUCTION = """\
{cases} generated CT-like volumes of {shape} voxels of 1 mm, int16, with a label map; batches of {batch} crops, image
and label. `affine+intensity`: random crop, window, mirror (half on each axis), rotation ±15° about each axis and scale
0.9–1.1, noise of sigma up to 0.1, contrast, brightness, gamma 0.7–1.5, on every sample. `with elastic`: besides, a
deformation of up to 6 mm. Each contestant is a process with its workers, stopped while others have their turn;
{rounds} rounds of at least {seconds:g} s each in changing order. A turn takes first, uncounted, what was made ahead. A
ratio is medssl over the quickest of all peers in the same round. Memory is the highest sum of proportional set sizes
over the processes of a contestant, in a turn of its own with no other alive; caches count. Each has 0 and 2
workers, and the best number is taken. medssl cuts its crops with the margin of training; without workers it keeps
decoded volumes in memory.

The peers do a little less than is asked, in their favour. MONAI's window is in its cache, which is not copied, and no
metadata is tracked; it moves crops of the final size, whose corners are then border, and smooths its elastic field with
a sigma of 8. batchgeneratorsv2 has all volumes in memory, windowed. TorchIO's queue draws one change for the 8 crops of
a volume; the other row of TorchIO augments crops of its sampler from volumes in memory, with rotation and elastic
deformation in one resampling. It has no contrast and brightness: one `Lambda` does both.
"""


def _page(
    results: dict[tuple[str, int], list[Contestant]], table: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[str]:
    yield from provenance.head(
        "Augmented crops, whole loaders beside each other",
        *("numpy", "torch", "numba", "monai", "torchio", "batchgeneratorsv2", "SimpleITK"),
    )
    shape = " x ".join(map(str, SHAPE))
    yield INTRODUCTION.format(cases=CASES, shape=shape, batch=BATCH, rounds=options.rounds, seconds=options.seconds)
    if missing := set(CONTESTANTS) - set(options.names):
        yield f"Left out of this run: {', '.join(sorted(missing))}."
        yield ""
    yield "| list | crop | times the best peer (least–most) | goal | workers | MiB | best peer | its MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for (name, edge), everyone in results.items():
        found = judge(everyone)
        yield (
            f"| {name} | {edge}³ | **{found['ratio']:.2f}** ({found['least']:.2f}–{found['most']:.2f}) "
            f"| {GOALS[name]:g} | {found['workers']} | {found['mib']:.0f} | {found['peer']} | {found['peer_mib']:.0f} |"
        )
    for (name, edge), everyone in results.items():
        yield from [
            "",
            f"## {name}, {edge}³",
            "",
            "| loader | workers | crops/s (quartiles) | MiB |",
            "|---|---|---|---|",
        ]
        for one in everyone:
            low, middle, high = statistics.quantiles(one.rates, n=4, method="inclusive")
            yield f"| {one.name} | {one.workers} | {middle:.1f} ({low:.1f}–{high:.1f}) | {one.peak_mib:.0f} |"
    if table:
        yield from ["", "## Cost of each augment", ""]
        yield "Milliseconds a sample on one thread, medians in turns, draws included: 96³ float32 in 3D, 512² in 2D;"
        yield "augments with their defaults and p = 1, counterparts with their defaults and probability 1."
        yield from ["", "| augment | image | medssl ms | MONAI ms | TorchIO ms |", "|---|---|---|---|---|"]
        for row in table:
            cells = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("medssl", "MONAI", "TorchIO")]
            yield f"| {row['name']} | {row['image']} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--names", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--no-costs", action="store_true", help="leave out the table of single augments")
    parser.add_argument("--gpu", action="store_true", help="only the share of a VoCo step that augmentation takes")
    parser.add_argument("--folder", type=Path, help="where the volumes are, or are written; by default a temporary one")
    parser.add_argument("-o", "--out", type=Path, help="folder for augment_speed.md; JSON is printed in any case")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that those who wait for their turn end too
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "store" / "store.json").exists():
            write(folder)
        if options.gpu:
            from augment_gpu import measure

            print(json.dumps(measure(folder / "store"), indent=1))
            return
        results = {
            (kind, edge): race(
                folder,
                edge=edge,
                elastic=LISTS[kind],
                rounds=options.rounds,
                seconds=options.seconds,
                names=options.names,
            )
            for kind in options.lists
            for edge in options.edges
        }
    table = [] if options.no_costs else costs()
    for (kind, edge), everyone in results.items():
        rates = {f"{one.name} {one.workers}": [one.rates, one.peak_mib] for one in everyone}
        print(json.dumps({"list": kind, "edge": edge, **rates}))
    if "medssl" not in options.names or len(options.names) < 2:
        return
    for (kind, edge), everyone in results.items():
        print(json.dumps({"list": kind, "edge": edge, **judge(everyone)}))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "augment_speed.md").write_text("\n".join(_page(results, table, options)) + "\n")


if __name__ == "__main__":
    main()
