"""From a folder of scans to label maps with scores: pretrain on all, fine-tune on the labelled, test on the rest.

Copy this file and edit it. Run:  python pipelines/pretrain_then_segment.py SCANS OUT [--table splits.csv]
SCANS is a decathlon, BIDS-like or plain folder (see `medssl scan --help`). Needs 3 GB of memory and, for scans of
64^3 voxels, about half an hour on two cores; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import medssl
from medssl.data.scan import ScanConfig
from medssl.evaluation.assess import EvaluateConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scans", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", type=Path, help="CSV with case_id and subject_id, split")
    parser.add_argument("--method", default="voco", choices=["voco", "mae"])
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="override of both recipes")
    args = parser.parse_args()
    out: Path = args.out

    # 1. What is there? Refused files are listed with their reasons beside the table.
    options = {"modality": "MR", **({"table": str(args.table)} if args.table else {})}
    found = medssl.scan(args.scans, out / "cohort.csv", config=ScanConfig.parse(options))
    print(found.ledger.summary())

    # 2. One orientation, spacing and intensity scale, once.
    config = medssl.PrepareConfig.parse(medssl.load_yaml(CONFIGS / "prepare" / "mr_crop.yaml"))
    medssl.prepare(config, cohort=found.path, out=out / "store")

    # 3. Learn from every training scan, labelled or not.
    recipe = CONFIGS / "pretrain" / f"{args.method}.yaml"
    encoder = medssl.pretrain(recipe, store=out / "store", out=out / args.method, overrides=args.overrides)
    print(f"{args.method}:", dict(encoder.metrics), *encoder.alarms)

    # 4. Learn the labels.
    recipe = CONFIGS / "finetune" / "segment.yaml"
    model = medssl.finetune(
        recipe, store=out / "store", out=out / "segment", encoder=encoder.bundle, overrides=args.overrides
    )

    # 5. Label the test scans, each on its own grid, and compare with the reference.
    test = medssl.Cohort.from_csv(found.path).select(split="test", labelled=True)
    medssl.predict(model.bundle, [Path(case.image) for case in test], out=out / "predictions")
    held_out = EvaluateConfig(split="test")
    scores = medssl.evaluate(out / "predictions", found.path, out=out / "metrics", config=held_out)
    print("\n".join(scores.sentences()))


if __name__ == "__main__":
    main()
