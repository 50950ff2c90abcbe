"""LyCORIS itself: what its networks save is read to their own deltas, and what we write it loads and merges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from loratool.core.adapter import Adapter
from loratool.core.errors import NotRepresentable
from loratool.ops.approximate import Wish
from loratool.ops.convert import convert
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from loratool.ops.save import save
from tests.contracts import assert_same
from tests.oracles.models import sd15_unet

BLOCKS = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
NAMES = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
SETTINGS = ("TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "LORA_PREFIX", "ENABLE_CONV", "TARGET_EXCLUDE_NAME")

NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"network_module": "lora", "conv_lora_dim": 0},
    "locon": {"network_module": "locon"},
    "locon, Tucker": {"network_module": "locon", "use_tucker": True},
    "locon, rs_lora": {"network_module": "locon", "rs_lora": True},
    "locon, use_scalar": {"network_module": "locon", "use_scalar": True},
    "locon, dora": {"network_module": "locon", "weight_decompose": True},
    "locon, dora per column": {"network_module": "locon", "weight_decompose": True, "wd_on_out": False},
    "lokr": {"network_module": "lokr", "factor": 4},
    "lokr, square factors": {"network_module": "lokr"},
    "lokr, both factored": {"network_module": "lokr", "factor": 8, "decompose_both": True},
    "lokr, whole": {"network_module": "lokr", "factor": 8, "full_matrix": True},
    "lokr, Tucker": {"network_module": "lokr", "factor": 4, "use_tucker": True},
    "lokr, unbalanced": {"network_module": "lokr", "factor": 4, "unbalanced_factorization": True},
    "lokr, rs_lora": {"network_module": "lokr", "factor": 4, "rs_lora": True},
    "lokr, use_scalar": {"network_module": "lokr", "factor": 4, "use_scalar": True},
    "lokr, dora": {"network_module": "lokr", "factor": 4, "weight_decompose": True},
    "lokr, dora per column": {"network_module": "lokr", "factor": 4, "weight_decompose": True, "wd_on_out": False},
    "loha": {"network_module": "loha"},
    "loha, Tucker": {"network_module": "loha", "use_tucker": True},
    "loha, rs_lora": {"network_module": "loha", "rs_lora": True},
    "loha, use_scalar": {"network_module": "loha", "use_scalar": True},
    "loha, dora": {"network_module": "loha", "weight_decompose": True},
    "loha, dora per column": {"network_module": "loha", "weight_decompose": True, "wd_on_out": False},
    "dylora": {"network_module": "dylora", "lora_dim": 8, "conv_lora_dim": 8, "block_size": 2},
}
each_network = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(autouse=True)
def _kohya_names() -> Iterator[None]:
    """LyCORIS keeps its preset in the class: kohya's prefix for these tests only."""
    before = {name: getattr(LycorisNetwork, name) for name in SETTINGS}
    LycorisNetwork.apply_preset(
        {
            "lora_prefix": "lora_unet",
            "target_module": BLOCKS,
            "target_name": NAMES,
            "enable_conv": True,
            "exclude_name": [r"(up_blocks\.[012]|down_blocks\.[23]|mid_block)(\.|$)"],
        }
    )
    yield
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """Stable Diffusion 1.5's UNet, a tenth as wide."""
    torch.manual_seed(0)
    return sd15_unet().requires_grad_(False)


def trained(unet: nn.Module, network: str) -> LycorisNetwork:
    """A LyCORIS network of random values, none of them zero."""
    torch.manual_seed(1)
    options = {"lora_dim": 2, "alpha": 1.0, "conv_lora_dim": 3, "conv_alpha": 2.0, **NETWORKS[network]}
    made = LycorisNetwork(unet, **options)
    with torch.no_grad():
        for module in made.loras:
            made.add_module(module.lora_name, module)
            for name, parameter in module.named_parameters():
                if "dora" in name:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                else:
                    parameter.copy_(
                        torch.randn_like(parameter).abs() + 0.1
                        if parameter.dim() == 0
                        else torch.randn_like(parameter) * 0.3
                    )
    return made


def saved(made: LycorisNetwork, path: Path) -> Path:
    """As LyCORIS saves it, each alpha a 0-d tensor."""
    made.save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2"})
    return path


def trained_delta(module: nn.Module) -> torch.Tensor:
    """What a module's forward adds to the base weight before any DoRA."""
    with torch.no_grad():
        if isinstance(module, DyLoraModule):
            up, down = torch.cat(list(module.up_list), 1), torch.cat(list(module.down_list))
            return (up @ down).reshape(module.shape) * module.scale
        if isinstance(module, (LokrModule, LohaModule)):
            # Not get_diff_weight: it multiplies by alpha / rank a second time and forgets the scalar.
            return module.get_weight(module.shape) * module.scalar
        return module.get_diff_weight()[0]


def stems(adapter: Adapter) -> dict[str, Any]:
    """Modules by the stem of their keys."""
    return {next(iter(module.keys.values())).partition(".")[0]: module for module in adapter.modules}


def converted(path: Path, to: str, output: Path) -> Path:
    """`path` in another layout, proved as the command does."""
    adapter = open_adapter(path)
    proof = save(convert(adapter, to), adapter, output)
    assert proof is not None
    assert proof.worst <= proof.tolerance
    return output


def header(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata() or {})


def assert_identical(path: Path, original: Path) -> None:
    """Same keys, shapes, dtypes, values and metadata."""
    found, expected = load_file(path), load_file(original)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key
    assert header(path) == header(original)


@each_network
def test_deltas_are_those_lycoris_trains_with(network: str, unet: nn.Module, tmp_path: Path) -> None:
    made = trained(unet, network)
    path = saved(made, tmp_path / "lycoris.safetensors")
    adapter = open_adapter(path)
    assert (adapter.layout, adapter.architecture.id, adapter.components) == ("kohya", "sd15", ("unet",))
    assert not adapter.extras
    assert not adapter.unread_families
    assert sum(len(module.keys) for module in adapter.modules) == len(load_file(path))
    modules = stems(adapter)
    assert modules.keys() == {module.lora_name for module in made.loras}
    for theirs in made.loras:
        ours = modules[theirs.lora_name]
        assert_same(ours.delta().reshape(theirs.shape), trained_delta(theirs), theirs.lora_name, 1e-6)
        if getattr(theirs, "wd", False):
            assert ours.magnitude is not None
            assert ours.magnitude.shape == theirs.dora_scale.shape
            assert torch.equal(ours.magnitude.load(), theirs.dora_scale.detach())
            assert ours.magnitude_per_row == theirs.wd_on_out


@each_network
def test_to_comfyui_and_back_is_the_identity(network: str, unet: nn.Module, tmp_path: Path) -> None:
    original = saved(trained(unet, network), tmp_path / "original.safetensors")
    there = converted(original, "comfyui", tmp_path / "there.safetensors")
    assert open_adapter(there).layout == "comfyui"
    assert_identical(converted(there, "kohya", tmp_path / "back.safetensors"), original)


OF_THE_WEIGHT: dict[str, dict[str, Any]] = {
    "ia3": {"network_module": "ia3"},
    "ia3, on input": {"network_module": "ia3", "train_on_input": True},
    "oft": {"network_module": "diag-oft"},
    "oft, constrained": {"network_module": "diag-oft", "constraint": 1e-3},
    "oft, rescaled": {"network_module": "diag-oft", "rescaled": True},
    "boft, rescaled": {"network_module": "boft", "rescaled": True},
    "glora": {"network_module": "glora"},
}
FOR_COMFYUI = ("oft", "boft, rescaled", "glora")


@pytest.mark.parametrize("network", OF_THE_WEIGHT)
def test_what_changes_the_weight_is_kept_in_every_spelling_that_has_words(
    network: str, unet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read with no key left over, written in kohya's spelling as it was, and in ComfyUI's where that means the same."""
    monkeypatch.setitem(NETWORKS, network, OF_THE_WEIGHT[network])
    original = saved(trained(unet, network), tmp_path / "original.safetensors")
    adapter = open_adapter(original)
    family = network.partition(",")[0]
    assert {module.family.id for module in adapter.modules} == {family}
    assert not adapter.extras and not adapter.unread_families
    assert sum(len(module.keys) for module in adapter.modules) == len(load_file(original))
    again = converted(original, "kohya", tmp_path / "again.safetensors")
    found, expected = load_file(again), load_file(original)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    if network in FOR_COMFYUI:
        there = converted(original, "comfyui", tmp_path / "there.safetensors")
        assert_identical(converted(there, "kohya", tmp_path / "back.safetensors"), original)
    else:
        with pytest.raises(NotRepresentable, match="comfyui") as raised:
            convert_file(original, "comfyui", tmp_path / "there.safetensors")
        assert raised.value.modules and "--approximate lora" in str(raised.value)
        assert "--base CHECKPOINT" in str(raised.value)
    half = convert_file(original, "kohya", tmp_path / "half.safetensors", dtype="F16")
    assert half.proof is not None and 0 < half.proof.worst < 2e-3


PEFT_CUTS_OTHERWISE = ("lokr", "lokr, Tucker")
REFUSED = {
    "locon, Tucker": "mid",
    "locon, dora per column": "DoRA magnitude per input",
    "lokr": "LoKr",
    "lokr, Tucker": "LoKr",
    "lokr, dora": "LoKr",
    "lokr, dora per column": "DoRA magnitude per input",
}


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("network", [name for name in REFUSED if name not in PEFT_CUTS_OTHERWISE])
def test_what_peft_cannot_express_is_refused_by_name(network: str, to: str, unet: nn.Module, tmp_path: Path) -> None:
    path = saved(trained(unet, network), tmp_path / "lycoris.safetensors")
    adapter = open_adapter(path)
    blocked = [m for m in adapter.modules if network != "locon, Tucker" or "mid" in m.factors]
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    with pytest.raises(NotRepresentable, match=REFUSED[network]) as raised:
        convert_file(path, to, output)
    assert raised.value.modules == tuple(module.title for module in blocked)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert f"{len(blocked)} of {len(adapter.modules)} modules" in message
    assert blocked[0].title in message
    # A magnitude per column cannot be approximated either: nothing is offered that would not help.
    assert ("--approximate lora" in message) == ("column" not in network)
    assert not output.exists()


@pytest.mark.parametrize("network", PEFT_CUTS_OTHERWISE)
def test_kronecker_factors_that_peft_would_not_make_are_refused(network: str, unet: nn.Module, tmp_path: Path) -> None:
    """LyCORIS sorts the two factors of a size, PEFT does not: 4 is 1 x 4 or 4 x 1."""
    path = saved(trained(unet, network), tmp_path / "lycoris.safetensors")
    with pytest.raises(NotRepresentable, match=r"LoKr modules .* one decompose_factor gives; .*--approximate lora"):
        convert_file(path, "peft", tmp_path / "out")
    with pytest.raises(NotRepresentable, match="no spelling for the w1 of a LoKr module"):
        convert_file(path, "diffusers", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("network", "to"), [("locon, Tucker", "diffusers"), ("lokr", "peft"), ("lokr, Tucker", "diffusers")]
)
def test_the_offered_approximation_helps(network: str, to: str, unet: nn.Module, tmp_path: Path) -> None:
    path = saved(trained(unet, network), tmp_path / "lycoris.safetensors")
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    report = convert_file(path, to, output, approximate=Wish(energy=1.0))
    assert report.approximated
    before = {module.targets: module for module in open_adapter(path).modules}
    after = open_adapter(output)
    assert {module.targets for module in after.modules} == before.keys()
    for module in after.modules:
        whole = before[module.targets].delta()
        assert_same(module.delta().reshape(whole.shape), whole, module.title, 1e-5)


LOADED = ["lora", "locon", "locon, Tucker", "locon, rs_lora", "lokr", "lokr, whole"]
"""LyCORIS 4.1.3 cannot load its own Tucker, unbalanced or wholly factored LoKr, nor magnitudes per column."""


@pytest.mark.parametrize("network", LOADED)
def test_lycoris_merges_what_we_write(network: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = sd15_unet().requires_grad_(False)
    source = saved(trained(unet, network), tmp_path / "source.safetensors")
    tensors = load_file(source)
    if "lokr" in network:  # alpha / rank 1: LyCORIS' merge of LoKr, unlike its forward, applies it twice
        for key in [key for key in tensors if key.endswith(".alpha")]:
            stem = key.removesuffix(".alpha")
            tensors[key] = torch.tensor(float(tensors.get(f"{stem}.lokr_w2_a", torch.empty(1, 1)).shape[1]))
        save_file(tensors, source)
    foreign = converted(source, "comfyui", tmp_path / "comfyui.safetensors")
    plain = {key: value for key, value in header(foreign).items() if key != "loratool.origin"}
    save_file(load_file(foreign), foreign, plain)  # no return ticket: it is really written anew
    written = converted(foreign, "kohya", tmp_path / "written.safetensors")

    unet.double()  # so that the sum is not rounded at the size of the weights
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    loaded, state = create_lycoris_from_weights(1.0, str(written), unet)
    assert {key.partition(".")[0] for key in state} == {module.lora_name for module in loaded.loras}
    with torch.no_grad():
        loaded.merge_to(1.0)
    changes = {n: p.detach() - before[n] for n, p in unet.named_parameters() if not torch.equal(p, before[n])}
    expected = {f"{m.targets[0].path}.weight": m.delta() for m in open_adapter(source).modules}
    assert changes.keys() == expected.keys()
    for name, change in changes.items():
        assert_same(change, expected[name].reshape(change.shape), name, 1e-6)
