"""What a magnetic resonance scanner does to an image: bias, noise of magnitudes, and faults of k-space.

All take the darkest voxel of a sample and channel for no signal, whatever constant the preparation has taken off, and
give the magnitude of the faulty image on top of it. Faults of k-space take the crop for the whole field of view: what
leaves it on one side comes in on the other, as in a scan along the phase-encoding axis. Only ringing does not wrap.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from medssl.augment.base import (
    Augment,
    AugmentConfig,
    Draws,
    NonNegativeRange,
    Params,
    Share,
    ShareRange,
    uniform,
    wide,
)
from medssl.augment.fields import add_normal
from medssl.augment.images import NOT_HU
from medssl.augment.kspace import THICK_RATIO, Lines, LinesConfig, darkest, frequencies
from medssl.augment.products import product
from medssl.augment.spatial import Affine, AffineConfig, thick_axes

_BIAS_ORDER = 3
_MOVE_JITTER = 0.3
_MR = frozenset({"MR"})


def _ordered(bounds: tuple[int, int]) -> tuple[int, int]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lower bound {bounds[0]} is above the upper bound {bounds[1]}; swap them")
    return bounds


_FromOne = Annotated[int, Field(ge=1)]
_FromTwo = Annotated[int, Field(ge=2)]


class BiasFieldConfig(AugmentConfig):
    """Options of :class:`BiasField`; ``coefficient`` is the largest amount of each polynomial term."""

    coefficient: float = Field(default=0.3, ge=0.0)


class BiasField(Augment[BiasFieldConfig]):
    """Multiply by a smooth field, ``exp`` of a cubic polynomial in the place, as the coil of a scanner does.

    The field acts on what exceeds the darkest voxel of each sample and channel, so that air stays dark.

    Reference: Sudre, Cardoso, Ourselin, Longitudinal segmentation of age-related white matter hyperintensities,
    Medical Image Analysis 2017, as in TorchIO's RandomBiasField.
    Deviations: zero is moved to the darkest voxel.
    """

    name: ClassVar[str] = "bias_field"
    config_class = BiasFieldConfig
    takes = NOT_HU
    modalities = _MR

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the coefficient of ``x^i y^j z^k`` for all ``i + j + k <= 3``."""
        side = torch.arange(_BIAS_ORDER + 1)
        used = side[:, None, None] + side[:, None] + side <= _BIAS_ORDER
        even = 2 * torch.rand(used.shape, generator=generator) - 1
        return {"coefficients": even * used * self.config.coefficient}

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + (x - low) * exp(polynomial)`` with places in [-1, 1] along each axis."""
        field = params["coefficients"].to(x.device, non_blocking=True)
        if x.ndim == 4:
            field = field[..., 0]
        for length in x.shape[2:]:
            place = torch.linspace(-1, 1, length, device=x.device) if length > 1 else x.new_zeros(1)
            powers = torch.stack([place**exponent for exponent in range(_BIAS_ORDER + 1)])
            field = product(field.movedim(1, -1), powers)
        low = darkest(x)
        return (x - low).mul_(field.exp_()[:, None]).add_(low)


class RicianNoiseConfig(AugmentConfig):
    """Options of :class:`RicianNoise`; ``sigma`` of each of both parts of the signal, in the units of the image."""

    sigma: NonNegativeRange = (0.0, 0.1)


class RicianNoise(Augment[RicianNoiseConfig]):
    """Add Gaussian noise to the real and the imaginary part of the signal and take the magnitude.

    Air gets the Rayleigh distribution, with mean ``1.25 sigma``, and bright tissue a normal one.

    Reference: Gudbjartsson, Patz, The Rician distribution of noisy MRI data, Magnetic Resonance in Medicine 1995,
    eq. 1; as in MONAI's RandRicianNoise.
    Deviations: zero is moved to the darkest voxel. One receiving coil is assumed: several coils or parallel imaging
    give other distributions, and noise that varies with the place.
    """

    name: ClassVar[str] = "rician_noise"
    config_class = RicianNoiseConfig
    takes = NOT_HU
    modalities = _MR

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the standard deviation and the seeds of both fields."""
        return {
            "sigma": uniform(self.config.sigma, generator),
            "field_seeds": torch.randint(2**62, (2,), generator=generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + |x - low + sigma (n_1 + i n_2)|``."""
        low = darkest(x)
        first, second = params["field_seeds"].unbind(dim=1)
        real = add_normal(x - low, first, params["sigma"])
        return torch.hypot(real, add_normal(torch.zeros_like(x), second, params["sigma"])).add_(low)


class SpikesConfig(AugmentConfig):
    """Options of :class:`Spikes`.

    ``num``: how many samples of k-space are struck, at least and at most; ``intensity``: height of each as a share of
    the centre of k-space, so the stripes have this share of the mean brightness: on brains faint at 0.03, plain at 0.1,
    and with several at 0.13 more than the contrast of grey and white matter; ``thick_ratio`` as in
    :class:`~medssl.augment.spatial.AffineConfig`.
    """

    num: Annotated[tuple[_FromOne, _FromOne], AfterValidator(_ordered)] = (1, 3)
    intensity: NonNegativeRange = (0.03, 0.1)
    thick_ratio: float = Field(default=THICK_RATIO, gt=1.0)


class Spikes(Augment[SpikesConfig]):
    """Add single false samples of k-space, which lay stripes over the image (herringbone).

    Places in k-space are drawn evenly, and the phase of each spike too. Thick slices have a k-space each: there a spike
    strikes one slice. The wave of a sample is known in closed form, so nothing is transformed.

    Reference: Zhuo, Gullapalli, MR artifacts, safety, and quality control, RadioGraphics 2006; as in TorchIO's
    RandomSpike.
    Deviations: zero is moved to the darkest voxel; the magnitude is given, where TorchIO and MONAI take the real part;
    all spikes of an image have the same height, where TorchIO measures each by the highest before it, and they add to
    what is there, where MONAI replaces it.
    """

    name: ClassVar[str] = "spikes"
    config_class = SpikesConfig
    takes = NOT_HU
    modalities = _MR

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw which spikes there are, their places in k-space as shares of its edges, phases in turns, and height."""
        low, high = self.config.num
        count = torch.randint(low, high + 1, (), generator=generator)
        return {
            "is_there": torch.arange(high) < count,
            "place": torch.rand(high, 3, generator=generator, dtype=torch.float64),
            "phase": torch.rand(high, generator=generator, dtype=torch.float64),
            "intensity": uniform(self.config.intensity, generator),
        }

    def change(
        self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Float64[Tensor, "b d"]
    ) -> Float[Tensor, "b c *s"]:
        """Give ``low + |x - low + height * sum_j exp(2πi (phase_j + k_j · x / n))|``."""
        across = thick_axes(spacing_mm, self.config.thick_ratio)
        wave = torch.polar(params["is_there"].double(), 2 * torch.pi * params["phase"])[:, :, None]
        waves = []
        for axis, length in enumerate(x.shape[2:]):
            index = (params["place"][:, :, axis] * length).floor().long()
            turns = (index - length // 2)[..., None] * torch.arange(length) / length
            encoded = torch.polar(torch.ones_like(turns, dtype=torch.float64), 2 * torch.pi * turns.double())
            in_one_slice = F.one_hot(index, length).to(encoded.dtype)
            waves.append(torch.where(across[:, axis, None, None], in_one_slice, encoded))
        for factor in waves[:-1]:
            wave = (wave[..., None] * factor[:, :, None]).flatten(2)
        plane, last = (part.to(x.device, torch.complex64, non_blocking=True) for part in (wave, waves[-1]))
        stripes = product(plane.mT, last).reshape(len(x), 1, *x.shape[2:])
        low = darkest(x)
        signal = x - low
        height = wide(params["intensity"], x) * signal.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
        return torch.hypot(signal.addcmul_(height, stripes.real), height * stripes.imag).add_(low)


class GhostingConfig(LinesConfig):
    """Options of :class:`Ghosting`; see :class:`LinesConfig` for more.

    ``num_ghosts``: every how many-th line is struck, at least and at most; ghosts lie at every so many-th part of the
    field of view; ``intensity``: share of these lines that is lost, so each ghost has ``intensity / num_ghosts`` of the
    image; ``centre``: share of the lines, about the centre of k-space, that is kept; of 0, the one line at the centre.
    """

    num_ghosts: Annotated[tuple[_FromTwo, _FromTwo], AfterValidator(_ordered)] = (2, 6)
    intensity: ShareRange = (0.2, 0.8)
    centre: Share = 0.0


class Ghosting(Lines[GhostingConfig]):
    """Weaken every n-th line of k-space, as breathing or a pulse does, which repeats the image along the phase axis.

    Which line is the first of them is drawn, as motion does not wait for the centre of k-space.

    Reference: Wood, Henkelman, MR image artifacts from periodic motion, Medical Physics 1985; as in TorchIO's
    RandomGhosting.
    Deviations: zero is moved to the darkest voxel; the magnitude is given, where TorchIO's real part loses ghosts for
    some lengths; the kept centre is symmetric. Ghosts that leave the crop come in at its other side, as they do in the
    field of view of a scan; those of what lies outside the crop are missing.
    """

    name: ClassVar[str] = "ghosting"
    config_class = GhostingConfig

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the phase axis, the number of ghosts, the strength, and the first line as a share of the period."""
        low, high = self.config.num_ghosts
        return {
            "axis": torch.rand((), generator=generator),
            "num_ghosts": torch.randint(low, high + 1, (), generator=generator),
            "intensity": uniform(self.config.intensity, generator),
            "first": torch.rand((), generator=generator),
        }

    def lines(self, length: int, params: Params) -> Float32[Tensor, "b 1 n"]:
        """``1 - intensity`` for the lines that are struck, else 1."""
        period = params["num_ghosts"][:, None]
        first = (params["first"][:, None] * period).floor().long()
        is_struck = (torch.arange(length) - first) % period == 0
        is_kept = frequencies(length).abs() <= self.config.centre * length / 2
        return (1 - params["intensity"][:, None] * (is_struck & ~is_kept))[:, None]


class RingingConfig(LinesConfig):
    """Options of :class:`Ringing`; see :class:`LinesConfig` for more.

    ``cut``: share of the lines, the outer ones, that is missing; ``every_axis``: along all axes in place of one drawn.
    """

    cut: ShareRange = (0.1, 0.5)
    every_axis: bool = False


class Ringing(Lines[RingingConfig]):
    """Leave the outer lines of k-space out, which blurs edges and lets them ring (Gibbs, truncation).

    Reference: Zhuo, Gullapalli, MR artifacts, safety, and quality control, RadioGraphics 2006; as in MONAI's
    GibbsNoise.
    Deviations: zero is moved to the darkest voxel and the magnitude is given; k-space is cut as it is scanned, along
    axes, where MONAI cuts out a ball, and about its centre for even lengths too. The crop is mirrored at its faces
    before the transform, where MONAI's wraps and lets a face ring with the jump to the opposite one.
    """

    name: ClassVar[str] = "ringing"
    config_class = RingingConfig
    wraps = False

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the phase axis and the share that is cut."""
        return {"axis": torch.rand((), generator=generator), "cut": uniform(self.config.cut, generator)}

    def axes(self, x: Float[Tensor, "b c *s"], params: Params, spacing_mm: Tensor) -> Tensor:
        """One, drawn, or all."""
        return self.encoded(x, spacing_mm) if self.config.every_axis else super().axes(x, params, spacing_mm)

    def lines(self, length: int, params: Params) -> Float32[Tensor, "b 1 n"]:
        """1 for the lines that are there, else 0."""
        reach = (1 - params["cut"][:, None]) * length / 2
        return (frequencies(length).abs() <= reach).float()[:, None]


class MotionConfig(LinesConfig):
    """Options of :class:`Motion`; see :class:`LinesConfig` for more.

    ``rotation_deg`` about and ``translation_mm`` along the X, Y and Z axis: largest amounts; ``num_moves``: how often
    the patient moves in the time of a scan.
    """

    rotation_deg: tuple[float, float, float] = (3.0, 3.0, 3.0)
    translation_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    num_moves: int = Field(default=2, ge=1)


class Motion(Lines[MotionConfig]):
    """Put k-space together from lines of the image in several poses, as of a patient who moves between them.

    Poses are drawn about the one in which the centre of k-space is taken, which is that of the image: it stays on its
    label. Lines are taken in order of frequency, and moves come at even times, each jittered by up to 0.3 of the time
    between them.

    Reference: Shaw, Sudre, Ourselin, Cardoso, MRI k-space motion artefact augmentation, MIDL 2019; as in TorchIO's
    RandomMotion.
    Deviations: zero is moved to the darkest voxel and the magnitude is given, where TorchIO takes the real part; the
    phase axis is drawn, where TorchIO takes the last; rotations are about the centre of the crop, where TorchIO's are
    about the origin of the world; voxels from outside extend the border. What is smeared over a face of the crop
    comes in at the opposite one, as in a scan.
    """

    name: ClassVar[str] = "motion"
    config_class = MotionConfig

    def __init__(self, config: MotionConfig | None = None, *, salt: int = 0) -> None:
        super().__init__(config, salt=salt)
        pose = AffineConfig(
            rotation_deg=self.config.rotation_deg,
            translation_mm=self.config.translation_mm,
            scale=(1.0, 1.0),
            thick_ratio=self.config.thick_ratio,
        )
        self._pose = Affine(pose)

    def sample(self, generator: torch.Generator) -> Draws:
        """Draw the phase axis, the times of the moves as shares of the scan, and a pose before and after each."""
        moves = self.config.num_moves
        jitter = (2 * torch.rand(moves, generator=generator) - 1) * _MOVE_JITTER
        poses = [self._pose.sample(generator) for _ in range(moves + 1)]
        return {
            "axis": torch.rand((), generator=generator),
            "time": (torch.arange(1, moves + 1) + jitter) / (moves + 1),
            **{f"pose_{key}": torch.stack([torch.as_tensor(pose[key]) for pose in poses]) for key in poses[0]},
        }

    def lines(self, length: int, params: Params) -> Float32[Tensor, "b m n"]:
        """1 for the lines that are taken in a pose, else 0."""
        starts = (params["time"] * length).floor().long()
        pose = (torch.arange(length) >= starts[..., None]).sum(dim=1)
        return F.one_hot(pose, self.config.num_moves + 1).mT.float()

    def copies(
        self, signal: Float[Tensor, "b c *s"], lines: Float32[Tensor, "b m n"], params: Params, spacing_mm: Tensor
    ) -> Float[Tensor, "b m c *s"]:
        """The image in each pose; as it is in the pose of the centre of k-space."""
        is_moved = lines[:, :, lines.shape[2] // 2] == 0
        poses = {key.removeprefix("pose_"): value for key, value in params.items() if key.startswith("pose_")}
        copies = [
            self._pose.change(signal, {"on": on, **{key: value[:, place] for key, value in poses.items()}}, spacing_mm)
            for place, on in enumerate(is_moved.unbind(dim=1))
        ]
        return torch.stack(copies, dim=1)
