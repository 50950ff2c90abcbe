"""Baking against LyCORIS: a single file with a network baked into it is the UNet with that network's own weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file
from torch import nn

from loratool.core.registry import architectures
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked
from loratool.ops.unbake_file import unbake_file
from tests.oracles.models import one_thread, pipeline
from tests.oracles.single_files import from_single_file, single_file

SETTINGS = ("TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "LORA_PREFIX", "ENABLE_CONV", "TARGET_EXCLUDE_NAME")
DORA = {"weight_decompose": True}
PER_COLUMN = {"weight_decompose": True, "wd_on_out": False}
LOKR = {"network_module": "lokr", "factor": 4}

NETWORKS: dict[str, dict[str, Any]] = {
    "locon": {"network_module": "locon"},
    "locon, Tucker": {"network_module": "locon", "use_tucker": True},
    "locon, rs_lora": {"network_module": "locon", "rs_lora": True},
    "locon, use_scalar": {"network_module": "locon", "use_scalar": True},
    "locon, dora": {"network_module": "locon", **DORA},
    "locon, dora per column": {"network_module": "locon", **PER_COLUMN},
    "lokr": LOKR,
    "lokr, both factored": {"network_module": "lokr", "factor": 8, "decompose_both": True},
    "lokr, whole": {"network_module": "lokr", "factor": 8, "full_matrix": True},
    "lokr, Tucker": {**LOKR, "use_tucker": True},
    "lokr, use_scalar": {**LOKR, "use_scalar": True},
    "lokr, dora": {**LOKR, **DORA},
    "lokr, dora per column": {**LOKR, **PER_COLUMN},
    "loha": {"network_module": "loha"},
    "loha, Tucker": {"network_module": "loha", "use_tucker": True},
    "loha, use_scalar": {"network_module": "loha", "use_scalar": True},
    "loha, dora": {"network_module": "loha", **DORA},
    "loha, dora per column": {"network_module": "loha", **PER_COLUMN},
    "ia3": {"network_module": "ia3"},
    "ia3, on input": {"network_module": "ia3", "train_on_input": True},
    "oft": {"network_module": "diag-oft"},
    "oft, constrained": {"network_module": "diag-oft", "constraint": 1e-3},
    "oft, rescaled": {"network_module": "diag-oft", "rescaled": True},
    "boft": {"network_module": "boft"},
    "boft, constrained and rescaled": {"network_module": "boft", "constraint": 1e-3, "rescaled": True},
    "glora": {"network_module": "glora"},
    "glora, use_scalar": {"network_module": "glora", "use_scalar": True},
}
OF_THE_WEIGHT = [name for name in NETWORKS if name.startswith(("ia3", "oft", "boft", "glora"))]
"""Networks whose change depends on the weight."""

CASES = [*((name, 1.0) for name in NETWORKS), ("locon, Tucker", -0.6), ("lokr", 0.3), ("lokr, use_scalar", -0.6)]
CASES += [("loha", 0.3), *((name, 0.4) for name in OF_THE_WEIGHT)]
"""DoRA at strength 1 only: of less, LyCORIS has another idea, and scales magnitude / norm - 1."""


@pytest.fixture(autouse=True)
def _kohya_names() -> Iterator[None]:
    """LyCORIS keeps its preset in the class: kohya's prefix, and some blocks, for these tests only."""
    before = {name: getattr(LycorisNetwork, name) for name in SETTINGS}
    LycorisNetwork.apply_preset(
        {
            "lora_prefix": "lora_unet",
            "target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
            "target_name": ["conv_in", "conv_out", "time_embedding.linear_1"],
            "enable_conv": True,
            "exclude_name": [r"(up_blocks\.[012]|down_blocks\.[123])(\.|$)"],
        }
    )
    yield
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base as a single file, and the folder with its configs."""
    folder, pipe = tmp_path_factory.mktemp("base"), pipeline("sd15", zero=False)
    pipe.save_pretrained(folder / "configs")
    return single_file(pipe, "sd15", "ldm", folder / "base.safetensors"), folder / "configs"


def trained(unet: nn.Module, network: str) -> LycorisNetwork:
    """A LyCORIS network on a UNet, with random values, none of them zero."""
    torch.manual_seed(1)
    options = {"lora_dim": 2, "alpha": 1.0, "conv_lora_dim": 3, "conv_alpha": 2.0, **NETWORKS[network]}
    made = LycorisNetwork(unet, **options)
    with torch.no_grad():
        for module in made.loras:
            made.add_module(module.lora_name, module)
            for name, parameter in module.named_parameters():
                if "dora" in name or name == "rescale":
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))  # of what it begins with
                elif parameter.dim() == 0:
                    parameter.copy_(torch.rand_like(parameter) + 0.1)
                else:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
    return made


def merged_weight(module: Any, strength: float) -> torch.Tensor:
    """What LyCORIS puts in place of a weight, in float32.

    Not its `merge_to`: that multiplies the updates of LoKr and LoHa by alpha / rank twice, and forgets their scalar.
    This is what its forward computes.
    """
    if module.name in ("ia3", "diag-oft", "boft", "glora"):
        return module.get_merged_weight(multiplier=strength)[0].reshape(module.org_module[0].weight.shape)
    if isinstance(module, (LokrModule, LohaModule)):
        delta = module.get_weight(module.shape) * module.scalar
    else:
        delta = module.get_diff_weight()[0]
    weight = module.org_module[0].weight
    delta = delta.reshape(weight.shape)
    return module.apply_weight_decompose(weight + delta) if module.wd else weight + delta * strength


@pytest.mark.parametrize(("network", "strength"), CASES)
@torch.no_grad()
def test_every_weight_is_lycoris_own(network: str, strength: float, files: tuple[Path, Path], tmp_path: Path) -> None:
    base, configs = files
    pipe = pipeline("sd15", zero=False)
    made = trained(pipe.unet, network)
    made.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float32, {"ss_network_module": "lycoris.kohya"})
    output = tmp_path / "baked.safetensors"
    report = bake_file(base, [Asked(str(tmp_path / "lycoris.safetensors"), strength)], output, Options())
    assert not report.unmatched and report.adapters[0].matched == len(made.loras) > 40
    loaded = from_single_file(pipe, output, configs)
    assert_weights(loaded.unet, made, strength)
    assert_rest_is_kept(base, output, made)
    if strength == 1:
        assert_same_picture(loaded.unet, pipe.unet, made)


@pytest.mark.parametrize("network", ["ia3", "oft, constrained", "boft", "glora", "loha, Tucker"])
@torch.no_grad()
def test_the_undo_file_gives_the_base_back(network: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = files
    made = trained(pipeline("sd15", zero=False).unet, network)
    made.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float16, {})
    baked, undo = tmp_path / "baked.safetensors", tmp_path / "undo.loratool"
    bake_file(base, [Asked(str(tmp_path / "lycoris.safetensors"), 0.7)], baked, Options(), undo=undo)
    unbake_file(baked, undo, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def assert_weights(unet: nn.Module, made: LycorisNetwork, strength: float) -> None:
    """The weights that LyCORIS makes, to float32's rounding."""
    modules = {f"lora_unet_{path}".replace(".", "_"): module for path, module in unet.named_modules()}
    for theirs in made.loras:
        expected, found = merged_weight(theirs, strength).double(), modules[theirs.lora_name].weight.double()
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= 1e-6, f"{theirs.lora_name}: differs by {error:.2g}"
        assert not torch.equal(expected.float(), theirs.org_module[0].weight)


def assert_rest_is_kept(base: Path, output: Path, made: LycorisNetwork) -> None:
    """Only the weights of the network's modules are others."""
    ldm = architectures()["sd15"].naming("unet", "ldm")
    wanted = {module.lora_name for module in made.loras}
    changed = {
        f"model.diffusion_model.{name}.weight"
        for name, (target,) in ldm.items()
        if f"lora_unet_{target.path}".replace(".", "_") in wanted
    }
    before, after = load_file(base), load_file(output)
    assert list(before) == list(after)
    assert {key for key in before if not torch.equal(before[key], after[key])} == changed


def assert_same_picture(baked: nn.Module, unet: nn.Module, made: LycorisNetwork) -> None:
    """The baked UNet computes what the base computes with the network at work in it."""
    values = torch.Generator().manual_seed(5)
    given = (torch.randn(1, 4, 8, 8, generator=values), torch.tensor(300), torch.randn(1, 6, 24, generator=values))
    with one_thread():
        base = unet(*given).sample
        made.apply_to()
        made.eval()
        expected = unet(*given).sample
        found = baked(*given).sample
    assert (base - expected).norm() > 0.02 * expected.norm()
    # Float32 through 100 layers differs by 1.5e-6. LyCORIS adds what (new weight - base) does to what the base does,
    # which cancels where the new weight is much smaller: such a rescale would differ by 2e-5.
    assert (found - expected).norm() < 1e-5 * expected.norm()
