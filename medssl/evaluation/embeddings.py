"""The table that ``medssl embed`` writes: what an encoder makes of each case, slice or patch, and where it lies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Float64

from medssl.errors import ReadError
from medssl.runfolder import atomic_path

TEXTS = ("case_id", "subject_id", "split", "modality", "plane")
NUMBERS = ("x_mm", "y_mm", "z_mm", "body_lr", "body_ap", "body_si")
COUNTS = ("slice", "windows")
_KEY = b"medssl"
_FLOOR = 1e-12


@dataclass(frozen=True)
class Embeddings:
    """Vectors of one encoder.

    Args:
        table: One row a vector: ``case_id, subject_id, split, modality``; the centre of what was seen in world mm
            (RAS+; missing where the file states no voxel size) and as shares of the body box; ``plane`` and ``slice``
            where it is one; ``windows``, over how many the vector is the mean.
        vectors: In the order of the rows.
        about: Where they come from: level, bundle digest, fingerprint of the store, and options.
    """

    table: pd.DataFrame
    vectors: Float32[np.ndarray, "n d"]
    about: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a Parquet file.

        Raises:
            ReadError: if it cannot be read, or ``medssl embed`` did not write it (E_FORMAT).
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            found = pq.read_table(path)
            about = json.loads(found.schema.metadata[_KEY])
            vectors = found["vector"].combine_chunks()
            values = np.asarray(vectors.flatten(), np.float32).reshape(found.num_rows, int(about["dimensions"]))
            return cls(found.drop_columns(["vector"]).to_pandas(), values, about)
        except OSError as error:
            raise ReadError(f"{path}: cannot be read. Give the Parquet file that medssl embed wrote.") from error
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ReadError(
                f"{path}: is no table of embeddings. Give the Parquet file that medssl embed wrote.", code="E_FORMAT"
            ) from error

    def write(self, path: Path) -> None:
        """Write a Parquet file, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        count, size = self.vectors.shape
        columns: dict[str, Any] = {name: pa.array(self.table[name], pa.string()) for name in TEXTS}
        columns |= {name: pa.array(self.table[name], pa.float64(), from_pandas=True) for name in NUMBERS}
        columns |= {name: pa.array(self.table[name].astype("Int64"), pa.int64()) for name in COUNTS}
        offsets = pa.array(np.arange(count + 1) * size, pa.int32())
        columns["vector"] = pa.ListArray.from_arrays(offsets, pa.array(self.vectors.ravel(), pa.float32()))
        about = json.dumps({**self.about, "dimensions": size}, sort_keys=True)
        written = pa.table(columns).replace_schema_metadata({_KEY: about.encode()})
        with atomic_path(path) as temporary:
            pq.write_table(written, temporary)

    def select(self, split: str | None) -> Self:
        """Those of one split; all for None."""
        if split is None:
            return self
        kept = (self.table["split"] == split).to_numpy()
        return type(self)(self.table[kept].reset_index(drop=True), self.vectors[kept], self.about)

    def by_case(self) -> Self:
        """One vector a case, the mean of all that it has, in the order of their first rows."""
        codes, cases = pd.factorize(self.table["case_id"])
        sums = np.zeros((len(cases), self.vectors.shape[1]))
        np.add.at(sums, codes, self.vectors)
        means = (sums / np.bincount(codes, minlength=len(cases))[:, None]).astype(np.float32)
        table = self.table.drop_duplicates("case_id").reset_index(drop=True)
        return type(self)(table, means, self.about)


def unit_vectors(
    vectors: Float[np.ndarray, "n d"], *, others: Sequence[Float[np.ndarray, "m d"]] = ()
) -> list[Float64[np.ndarray, "k d"]]:
    """Vectors whose scalar products are cosines that tell cases apart.

    What all cases have in common would make every cosine nearly 1; so each feature is first brought to mean 0 and
    spread 1 over all vectors at hand. A feature that never varies becomes 0.

    Args:
        vectors: Of one set.
        others: Further sets, treated together with it.

    Returns:
        Unit vectors of the set and of each other set.
    """
    sets = [np.asarray(each, np.float64) for each in (vectors, *others)]
    joined = np.concatenate(sets)
    mean, spread = joined.mean(axis=0), joined.std(axis=0)
    scale = np.where(spread > 1e-6 * np.maximum(1e-6, np.abs(mean)), spread, np.inf)
    scaled = [(each - mean) / scale for each in sets]
    return [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), _FLOOR) for each in scaled]
