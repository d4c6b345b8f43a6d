"""Does pretraining help on my data? MAE and VoCo against training from scratch, at several label budgets.

Copy this file and edit it. Run:  python pipelines/label_savings.py STORE OUT
STORE is what `medssl prepare` wrote, with labelled cases in the splits train, val and test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import medssl

CONFIGS = Path(__file__).parent.parent / "configs"

ARMS = {
    "scratch": {},
    "mae": {"pretrain": str(CONFIGS / "pretrain" / "mae.yaml")},
    "voco": {"pretrain": str(CONFIGS / "pretrain" / "voco.yaml")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()

    plan = {
        "finetune": medssl.load_yaml(CONFIGS / "finetune" / "segment.yaml"),
        "arms": ARMS,
        "budgets": [*args.budgets, "all"],
        "seeds": list(range(args.seeds)),
        "workers": args.workers,
    }
    result = medssl.study(plan, store=args.store, out=args.out)
    print(result.summary.to_string(index=False))
    print("\n".join(result.sentences))
    print("report:", result.report)


if __name__ == "__main__":
    main()
