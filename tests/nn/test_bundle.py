from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from medssl import runfolder
from medssl.errors import CheckpointError, ConfigError, EnvironmentFaultError, ExitCode
from medssl.nn import bundle as bundle_module
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.bundle import Passport, load_bundle, load_into, save_bundle
from medssl.nn.decoder import Decoder

BACKBONE = {"name": "unet", "channels": [4, 8], "strides": [2, 2], "blocks": [1, 1], "norm": "group"}
FILES = ("weights.safetensors", "passport.json", "digests.json")


def encoder(in_channels: int = 1, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone(BACKBONE, in_channels=in_channels, spatial_dims=3)


def passport(**changes: Any) -> Passport:
    values: dict[str, Any] = {
        "kind": "encoder",
        "backbone": BACKBONE,
        "spatial_dims": 3,
        "in_channels": 1,
        "prepare": {"modality": "MR", "spacing_mm": [1.0, 1.0, 1.5]},
        "unit": "arbitrary",
        "spacing_mm": (1.0, 1.0, 1.5),
        "crop_voxels": (16, 16, 16),
        "recipe": {"seed": 3, "method": {"name": "voco"}},
        "method": "voco",
        "data_fingerprint": "ab12",
        "versions": {"medssl": "0.1.0"},
    }
    return Passport(**(values | changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    save_bundle(folder, {"encoder": encoder()}, passport())
    return folder


def resign(folder: Path) -> None:
    """Make the digests true again after a file was changed on purpose."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[:2]}
    (folder / FILES[2]).write_text(json.dumps(digests))


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / FILES[0])
    resign(folder)


def test_an_encoder_comes_back_bit_for_bit_and_gives_the_same_features(saved: Path) -> None:
    original, bundle = encoder(), load_bundle(saved)
    again = bundle.build_encoder()
    assert bundle.passport == passport()
    ours, theirs = original.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].numpy().tobytes() == theirs[key].numpy().tobytes() for key in ours)
    x = torch.randn(1, 1, 9, 8, 7)
    assert all(torch.equal(a, b) for a, b in zip(original(x), again(x), strict=True))


def test_a_segmenter_keeps_encoder_and_decoder_apart(tmp_path: Path) -> None:
    network = encoder()
    decoder = Decoder(network.channels, network.strides, 3, 3).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    card = passport(
        kind="segmenter", decoder=decoder.config, label_values=(0, 1, 2), label_names=("background", "head", "tail")
    )
    save_bundle(tmp_path / "b", {"encoder": network, "decoder": decoder}, card)
    bundle = load_bundle(tmp_path / "b")
    assert {key.partition(".")[0] for key in bundle.tensors} == {"encoder", "decoder"}
    assert bundle.passport.decoder is not None
    again = Decoder(**bundle.passport.decoder)
    report = load_into(again, bundle.tensors, prefix="decoder")
    assert len(report.matched) == len(decoder.state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in decoder.state_dict().items())
    load_into(encoder(seed=1), bundle.tensors, prefix="encoder")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_found(saved: Path, name: str) -> None:
    path = saved / name
    data = path.read_bytes()
    positions = range(0, len(data), max(1, len(data) // 60))
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            load_bundle(saved)
        assert caught.value.code == "E_DIGEST"
        assert caught.value.exit_code is ExitCode.INTEGRITY
    path.write_bytes(data)
    load_bundle(saved)


def test_the_error_names_the_damaged_file_and_what_to_do(saved: Path) -> None:
    (saved / "passport.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"passport\.json does not match .* Copy it again"):
        load_bundle(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, name: str, keep: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError) as caught:
        load_bundle(saved)
    assert caught.value.code == "E_DIGEST"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_or_folder_is_no_bundle(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load_bundle(saved)
    with pytest.raises(CheckpointError, match="Give the folder of a bundle"):
        load_bundle(saved / "nowhere")


def test_a_renamed_key_is_refused_with_a_table(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved / FILES[0])
    tensors["encoder.levels.0.0.convs.0.wait"] = tensors.pop("encoder.levels.0.0.convs.0.weight")
    rewrite(saved, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_bundle(saved).build_encoder()
    assert caught.value.code == "E_WEIGHTS"
    text = str(caught.value)
    total = len(tensors)
    assert f"{total - 1} of {total} tensors match" in text
    assert re.search(rf"matched +{total - 1}\n", text)
    assert re.search(r"missing +1  levels\.0\.0\.convs\.0\.weight\n", text)
    assert re.search(r"unexpected +1  levels\.0\.0\.convs\.0\.wait\n", text)
    assert re.search(r"mis-shaped +0$", text)


def test_a_refused_load_leaves_the_module_as_it_was(saved: Path) -> None:
    tensors = dict(load_bundle(saved).tensors)
    tensors.pop("encoder.levels.1.0.shortcut.weight")
    fresh, untouched = encoder(seed=5), encoder(seed=5)
    with pytest.raises(CheckpointError, match=r"missing +1"):
        load_into(fresh, tensors, prefix="encoder")
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in untouched.state_dict().items())


def test_missing_unexpected_and_mis_shaped_tensors_are_told_apart() -> None:
    module = nn.Linear(3, 2)
    tensors = {"m.weight": torch.zeros(2, 4), "m.extra": torch.zeros(1), "other.bias": torch.zeros(2)}
    with pytest.raises(CheckpointError) as caught:
        load_into(module, tensors, prefix="m")
    text = str(caught.value)
    assert "0 of 2 tensors match" in text
    assert re.search(r"missing +1  bias", text)
    assert re.search(r"unexpected +1  extra", text)
    assert re.search(r"mis-shaped +1  weight \(found float32 2x4, needed float32 2x3\)", text)


def test_another_number_type_is_no_match() -> None:
    with pytest.raises(CheckpointError, match=r"found float64 2, needed float32 2"):
        load_into(nn.PReLU(2), {"m.weight": torch.zeros(2, dtype=torch.float64)}, prefix="m")


def test_a_prefix_that_is_not_there_matches_nothing(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="weights of teacher: 0 of"):
        load_into(encoder(), load_bundle(saved).tensors, prefix="teacher")


def test_a_long_table_is_cut() -> None:
    module = nn.ModuleList(nn.Linear(1, 1) for _ in range(10))
    with pytest.raises(CheckpointError, match="and 12 more"):
        load_into(module, {}, prefix="m")


def test_a_full_match_reports_every_tensor(saved: Path) -> None:
    fresh = encoder(seed=2)
    report = load_into(fresh, load_bundle(saved).tensors, prefix="encoder")
    assert report.is_full
    assert set(report.matched) == set(fresh.state_dict())
    assert f"matched {len(report.matched):5d}" in report.describe()


def test_another_number_of_channels_breaks_the_contract(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="images of 1 channels, found 2") as caught:
        load_bundle(saved).build_encoder(in_channels=2)
    assert caught.value.code == "E_CONTRACT"
    assert load_bundle(saved).build_encoder(in_channels=1).in_channels == 1


def test_an_adapted_stem_gives_the_same_features_for_equal_channels(saved: Path) -> None:
    original, adapted = encoder(), load_bundle(saved).build_encoder(in_channels=3, adapt_stem=True)
    x = torch.randn(2, 1, 8, 8, 8)
    for a, b in zip(original(x), adapted(x.expand(-1, 3, -1, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    report = load_into(encoder(in_channels=2), load_bundle(saved).tensors, prefix="encoder", adapt_stem=True)
    assert set(report.adapted) == {"levels.0.0.convs.0.weight", "levels.0.0.shortcut.weight"}
    assert report.is_full


def test_only_the_image_channels_of_a_backbone_are_adapted() -> None:
    with pytest.raises(CheckpointError, match=r"mis-shaped +1"):
        load_into(nn.Conv3d(2, 3, 1, bias=False), {"m.weight": torch.zeros(3, 4, 1, 1, 1)}, prefix="m", adapt_stem=True)
    tensors = {f"m.{key}": value for key, value in encoder().state_dict().items()} | {"m.extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unexpected +1  extra"):
        load_into(encoder(in_channels=2), tensors, prefix="m", adapt_stem=True)


def test_a_backbone_that_this_version_lacks_breaks_the_contract(tmp_path: Path) -> None:
    save_bundle(tmp_path / "b", {"encoder": encoder()}, passport(backbone={"name": "mamba"}))
    with pytest.raises(CheckpointError, match=r"no 'mamba'.*0\.1\.0") as caught:
        load_bundle(tmp_path / "b").build_encoder()
    assert caught.value.code == "E_CONTRACT"


@pytest.mark.parametrize(
    "content", ['{"schema_version": 99}', "[]", "{", '{"schema_version": 1, "kind": "encoder"}', '{"kind": "encoder"}']
)
def test_a_passport_of_another_version_is_refused(saved: Path, content: str) -> None:
    (saved / FILES[1]).write_text(content)
    resign(saved)
    with pytest.raises(CheckpointError) as caught:
        load_bundle(saved)
    assert caught.value.code == "E_VERSION"


def test_a_pickle_in_place_of_the_weights_is_never_unpickled(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"encoder": Trap()}, saved / FILES[0])
    resign(saved)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_bundle(saved)
    assert not (tmp_path / "sprung").exists()


def test_no_file_of_the_networks_knows_pickle() -> None:
    for path in Path(bundle_module.__file__).parent.glob("*.py"):
        assert not re.search(r"import pickle|(?<!safetensors\.)torch\.(load|save)\(|joblib|dill", path.read_text()), (
            path.name
        )


def test_the_passport_holds_no_path(tmp_path: Path) -> None:
    recipe = {
        "store": "/home/jane/patients/store",
        "arms": [{"bundle": "runs/voco/bundle"}, "C:\\scans\\a.nii", "~store", "voco"],
        "train": {"lr": 0.001, "steps": 3},
    }
    save_bundle(tmp_path / "b", {"encoder": encoder()}, passport(recipe=recipe))
    text = (tmp_path / "b" / FILES[1]).read_text()
    assert not re.search(r"jane|patients|runs/|scans|~store|" + re.escape(str(tmp_path)), text)
    kept = load_bundle(tmp_path / "b").passport.recipe
    assert kept["train"] == {"lr": 0.001, "steps": 3}
    assert kept["arms"] == [{"bundle": "<path>"}, "<path>", "<path>", "voco"]


def test_the_passport_says_research_use_only_and_survives_odd_metrics(tmp_path: Path) -> None:
    save_bundle(tmp_path / "b", {"encoder": encoder()}, passport(metrics={"pearson": 0.7, "hd95_mm": math.nan}))
    card = load_bundle(tmp_path / "b").passport
    assert card.intended_use == "research use only; not a medical device"
    assert card.metrics == {"pearson": 0.7, "hd95_mm": None}


def test_an_inconsistent_passport_is_refused() -> None:
    content = passport().to_dict()
    with pytest.raises(ConfigError, match="a segmenter needs decoder and label_values"):
        Passport.parse(content | {"kind": "segmenter"})
    with pytest.raises(ConfigError, match="differ in length"):
        Passport.parse(content | {"label_values": [0, 1], "label_names": ["background"]})


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    network = encoder()
    with torch.no_grad():
        next(network.parameters()).view(-1)[3] = math.nan
    with pytest.raises(CheckpointError, match=r"not finite, first encoder\.levels\.0"):
        save_bundle(tmp_path / "b", {"encoder": network}, passport())
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_folder_is_never_seen(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (saved / name).read_bytes() for name in FILES}
    write = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        if self.name == FILES[1]:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    for target in (saved, saved.parent / "second"):
        with pytest.raises(EnvironmentFaultError) as caught:
            save_bundle(target, {"encoder": encoder(seed=9)}, passport())
        assert caught.value.code == "E_DISK_FULL"
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]
    assert {name: (saved / name).read_bytes() for name in FILES} == before


def test_the_folder_appears_only_when_all_files_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    sync = runfolder.sync

    def watch(path: Path, *, deep: bool = True) -> None:
        if deep and path.is_dir():
            assert not (tmp_path / "b").exists()
            seen.append({child.name for child in path.iterdir()})
        sync(path, deep=deep)

    monkeypatch.setattr(runfolder, "sync", watch)
    save_bundle(tmp_path / "b", {"encoder": encoder()}, passport())
    assert seen == [set(FILES)]
    assert load_bundle(tmp_path / "b").passport.kind == "encoder"


def test_saving_again_replaces_the_bundle_and_honours_the_umask(saved: Path) -> None:
    save_bundle(saved, {"encoder": encoder(seed=4)}, passport(method="mae"))
    bundle = load_bundle(saved)
    assert bundle.passport.method == "mae"
    assert torch.equal(
        bundle.tensors["encoder.levels.0.0.convs.0.weight"], encoder(seed=4).state_dict()["levels.0.0.convs.0.weight"]
    )
    assert sorted(path.name for path in saved.parent.iterdir()) == ["bundle"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE((saved / FILES[0]).stat().st_mode) == 0o666 & ~mask
