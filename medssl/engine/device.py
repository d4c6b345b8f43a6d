"""Where and in what precision the loop runs, on Lightning Fabric; and what a fault of the device is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import distributed

from medssl.engine.optim import TrainConfig
from medssl.errors import EnvironmentFaultError


class KeepInputs(MixedPrecision):
    """Autocast that leaves what goes in and out alone: HU, millimetres and labels do not survive bf16."""

    def convert_input(self, data: Any) -> Any:
        """The data as they are."""
        return data

    def convert_output(self, data: Any) -> Any:
        """The data as they are."""
        return data


def ranks() -> tuple[int, int]:
    """Number of this process and number of processes; ask inside the factory of batches that ``fit`` is given."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def resolve_precision(precision: Literal["auto", "32", "bf16", "16"], *, device: str) -> Literal["32", "bf16", "16"]:
    """What ``auto`` means on ``device`` ("cpu", "cuda", ...): bf16 where the hardware multiplies it, else 32."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    if device == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "32"
    return "32"


def make_fabric(config: TrainConfig, *, unused_parameters: bool = False) -> tuple[Fabric, Literal["32", "bf16", "16"]]:
    """Fabric on the best accelerator there is, launched, and the precision that it runs in.

    Args:
        config: Devices, strategy and precision.
        unused_parameters: Whether some parameters get no gradient in some steps, which DDP must then look for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(config.precision, device=device)
    plugin: Precision = Precision()
    if precision == "bf16":
        plugin = KeepInputs("bf16-mixed", device)
    elif precision == "16":
        plugin = KeepInputs("16-mixed", device)
    strategy: str | DDPStrategy = config.strategy
    if unused_parameters and config.devices > 1 and config.strategy in {"auto", "ddp"}:
        strategy = DDPStrategy(find_unused_parameters=True)
    fabric = Fabric(accelerator=device, strategy=strategy, devices=config.devices, plugins=plugin)
    fabric.launch()
    return fabric, precision


def seed_draws(seed: int, *, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device``; far quicker than ``torch.manual_seed``, which seeds all."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def use_channels_last(module: torch.nn.Module) -> None:
    """Keep convolution kernels channels-last; activations then follow by themselves."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def compile_children(module: torch.nn.Module) -> None:
    """Compile the child modules that hold parameters, in place; draws and losses between them stay eager."""
    for child in module.children():
        if any(True for _ in child.parameters()):
            child.compile()


@contextmanager
def device_faults(config: TrainConfig) -> Iterator[None]:
    """Turn memory that runs out, or a device that is lost, into one sentence and exit code 5.

    Raises:
        EnvironmentFaultError: names the setting that needs less memory, or the device's own words.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(config) from error
    except torch.AcceleratorError as error:
        raise EnvironmentFaultError(
            f"the device failed: {str(error).splitlines()[0]}. The last checkpoint is good; check the device "
            "and run the same command again.",
            code="E_DEVICE",
        ) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise _out_of_memory(config) from error
        raise


def _out_of_memory(config: TrainConfig) -> EnvironmentFaultError:
    batch = max(1, config.batch_size // 2)
    less = (
        f"train.batch_size={batch} train.accumulate={config.accumulate * 2}"
        if batch < config.batch_size
        else "a smaller crop_voxels"
    )
    return EnvironmentFaultError(
        f"memory ran out at {config.batch_size} samples a step. The last checkpoint is good, but of "
        f"other batches; start in another folder with {less}.",
        code="E_OUT_OF_MEMORY",
    )
