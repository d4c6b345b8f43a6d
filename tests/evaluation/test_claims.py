"""Claims: one machine wins, a dead one's claim is taken over, a live one's is not."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from medssl.evaluation import claims
from medssl.evaluation.claims import Claim


def test_one_of_many_wins_and_the_claim_is_free_again_after_release(tmp_path: Path) -> None:
    claims = [Claim(tmp_path / "a" / "run.claim") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = [claim for claim, has in zip(claims, pool.map(Claim.take, claims), strict=True) if has]
    assert len(won) == 1
    assert not claims[0].take() or claims[0] is won[0]
    won[0].release()
    assert not (tmp_path / "a" / "run.claim").exists()
    with Claim(tmp_path / "a" / "run.claim").wait():
        assert not Claim(tmp_path / "a" / "run.claim").take()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_claim_that_is_not_renewed_is_taken_over_by_one(tmp_path: Path) -> None:
    path = tmp_path / "run.claim"
    dead = Claim(path)
    assert dead._make()  # as left by a machine that lost its power: nobody renews it
    old = time.time() - 1000
    os.utime(path, (old, old))
    others = [Claim(path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = [claim for claim, has in zip(others, pool.map(Claim.take, others), strict=True) if has]
    assert len(won) == 1
    dead.release()
    assert path.exists(), "a claim that was taken over is not its first holder's to remove"
    won[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_is_made_between_look_and_move_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.claim"
    path.write_text("dead")
    faster = Claim(path)

    def meanwhile(looked_at: Path) -> float:
        path.unlink()
        assert faster.take()
        return time.time() + 10_000

    monkeypatch.setattr(claims, "_now", meanwhile)
    assert not Claim(path).take()
    assert path.read_text() == faster._token
    faster.release()
    assert list(tmp_path.iterdir()) == []


def test_a_live_claim_is_renewed_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.claim"
    with Claim(path, expires_s=0.5).wait(every_s=0.01):
        time.sleep(1.2)
        assert not Claim(path, expires_s=0.5).take()
    assert not path.exists()
