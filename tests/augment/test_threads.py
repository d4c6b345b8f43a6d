from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from medssl.augment.threads import in_threads, share


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_every_thread_computes_on_one_core_and_the_caller_keeps_its_own():
    assert in_threads(lambda _: torch.get_num_threads(), range(6)) == [1] * 6
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two_threads")
def test_work_may_be_shared_out_by_what_is_shared_out_already():
    found = np.zeros((2, 1 << 18))

    def fill(row: int) -> None:
        share(lambda start, stop: found[row, start:stop].fill(row + 1), 1 << 18, voxels=1 << 18)

    in_threads(fill, range(2))
    assert (found == [[1.0], [2.0]]).all()


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("num", "voxels"), [(5, 1 << 20), (5, 10), (1, 1 << 20)])
def test_every_part_is_done_once(num, voxels):
    done = np.zeros(num, int)

    def work(start: int, stop: int) -> None:
        done[start:stop] += 1

    share(work, num, voxels=voxels)
    assert (done == 1).all()
