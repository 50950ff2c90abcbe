"""The tables of the newer image models, in every size: contract, schemas, real classes, diffusers' converters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from fixtures import image_models, make_schemas
from loratool.core.architecture import Architecture, Checkpoint
from loratool.core.naming import Naming
from loratool.core.target import Target
from tests.architectures.test_converters import Numbers, assert_converted, numbered_checkpoint, rows_at_home
from tests.architectures.test_tables import table_schema
from tests.contracts import check_architecture

torch = pytest.importorskip("torch")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

IDS = (
    "sd21",
    "sdxl-refiner",
    "sd3",
    "flux",
    "chroma",
    "flux2",
    "lumina2",
    "z-image",
    "qwen-image",
    "pixart",
    "auraflow",
    "sana",
    "hidream",
)


def table(name: str) -> Architecture:
    found: Architecture = import_module(f"loratool.architectures.{name.replace('-', '_')}").ARCHITECTURE
    return found


def schema_name(size: Architecture, component: str) -> str:
    standard = table(size.id)
    other = size is not standard and size.components[component] is not standard.components[component]
    slug = re.sub(r"[^a-z0-9.]+", "-", size.title.lower())
    return f"{size.id}-{component}" + (f"-{slug}" if other else "")


SIZES = [size for name in IDS for size in table(name).sizes]
COMPONENTS = {schema_name(size, component): (size, component) for size in SIZES for component in size.components}

each_model = pytest.mark.parametrize("name", IDS)
each_component = pytest.mark.parametrize("name", COMPONENTS)


@each_model
def test_contract(name: str) -> None:
    check_architecture(table(name))


@each_component
def test_table_equals_schema(name: str) -> None:
    size, component = COMPONENTS[name]
    assert table_schema(size.namings(component)) == image_models.read(name)


@pytest.mark.parametrize("name", image_models.SCHEMAS)
def test_schema_equals_real_class(name: str) -> None:
    pytest.importorskip("transformers")
    assert image_models.SCHEMAS[name]() == image_models.read(name)


def test_every_component_has_a_schema() -> None:
    known = {*image_models.SCHEMAS, *image_models.SAME, *make_schemas.SCHEMAS}
    assert COMPONENTS.keys() <= known
    assert set(image_models.SAME.values()) <= make_schemas.SCHEMAS.keys()


@pytest.mark.parametrize(
    "schema", [{"a.0.b": [2], "a.1.b": [2], "a.3.b": [2], "a.2.b": [3], "c": [1], "x.2-1.y": [4], "a.0.b.7.c": [5]}]
)
def test_folding_is_exact(schema: make_schemas.Schema) -> None:
    folded = image_models.folded(schema)
    assert len(folded) < len(schema)
    assert image_models.unfolded(folded) == schema


# -- checkpoints, by diffusers' single-file converters -----------------------------------------------------------------

Extra = Callable[[dict[str, Tensor]], None]


def with_keys(*names: str, blocks: str = "", count: int = 0) -> Extra:
    """What a converter needs to be there beside weights."""

    def add(checkpoint: dict[str, Tensor]) -> None:
        for name in names:
            checkpoint[name] = torch.zeros(1)
        for index in range(count):
            checkpoint[f"{blocks}.{index}.scale_shift_table"] = torch.zeros(1)

    return add


def nothing(checkpoint: dict[str, Tensor]) -> None:
    """For converters that need weights only."""


NO_PREFIX = ("flux2", "auraflow", "lumina2")
SANA_KEYS = ("pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table")
SINGLE_FILES: list[tuple[str, str, Extra]] = [
    ("sd3", "convert_sd3_transformer_checkpoint_to_diffusers", with_keys("pos_embed")),
    ("flux", "convert_flux_transformer_checkpoint_to_diffusers", nothing),
    ("chroma", "convert_chroma_transformer_checkpoint_to_diffusers", nothing),
    ("flux2", "convert_flux2_transformer_checkpoint_to_diffusers", nothing),
    ("lumina2", "convert_lumina2_to_diffusers", with_keys("norm_final.weight")),
    ("z-image", "convert_z_image_transformer_checkpoint_to_diffusers", with_keys("norm_final.weight")),
    ("auraflow", "convert_auraflow_transformer_checkpoint_to_diffusers", with_keys("positional_encoding")),
    ("hidream", "convert_hidream_transformer_to_diffusers", nothing),
]
CONVERTED = [(size, converter, extra) for name, converter, extra in SINGLE_FILES for size in table(name).sizes]


def checkpoint_of(size: Architecture, kind: int) -> Checkpoint:
    """The bare original checkpoint (0), or ComfyUI's (1)."""
    return size.checkpoints[kind]


@pytest.mark.parametrize("kind", [0, 1], ids=["native", "comfyui"])
@pytest.mark.parametrize(
    ("size", "converter", "extra"), CONVERTED, ids=[size.title.replace(" ", "-") for size, *_ in CONVERTED]
)
def test_checkpoints(size: Architecture, converter: str, extra: Extra, kind: int) -> None:
    voice = checkpoint_of(size, kind).voices["transformer"]
    if voice.prefix and size.id in NO_PREFIX:
        pytest.skip("diffusers' converter takes no prefix off")
    naming = size.naming("transformer", voice.naming)
    checkpoint = numbered_checkpoint(naming, voice.prefix)
    given = {key: tensor for key, tensor in checkpoint.items() if converts_bias(size, key)}
    extra(given)
    converted = getattr(single_file, converter)(given)
    assert_converted(checkpoint, voice.prefix, naming, size.naming("transformer", "diffusers"), converted)


def converts_bias(size: Architecture, key: str) -> bool:
    """Biases of these models' weights are not all converted; AuraFlow has but one."""
    return not key.endswith(".bias") or size.id != "auraflow" or key == "init_x_linear.bias"


@pytest.mark.parametrize("size", table("sana").sizes, ids=lambda size: size.title.replace(" ", "-"))
def test_sana_checkpoints(size: Architecture) -> None:
    """diffusers' converter is that of the first Sana: it knows neither 1.5's norms nor Sprint's second embedder."""
    naming = size.naming("transformer", "native")
    checkpoint = numbered_checkpoint(naming, "")
    given = dict(checkpoint)
    count = sum(name.endswith(".attn.qkv") for name in naming)
    with_keys(*SANA_KEYS, blocks="blocks", count=count)(given)
    converted = single_file.convert_sana_transformer_to_diffusers(given)
    sprint = "time_embed.emb.timestep_embedder."
    loaded = {key.replace(sprint, "time_embed.timestep_embedder.") if "Sprint" in size.title else key: tensor
              for key, tensor in converted.items()}  # fmt: skip
    unknown = (".norm_q", ".norm_k", "guidance_embedder.linear_1", "guidance_embedder.linear_2")
    canonical = size.naming("transformer", "diffusers")
    known = Naming({name: targets for name, targets in canonical.items() if not name.endswith(unknown)})
    assert_converted(checkpoint, "", naming, known, loaded)


@pytest.mark.parametrize(
    ("name", "config"), [("sd21", image_models.SD21_UNET), ("sdxl-refiner", image_models.REFINER_UNET)]
)
def test_unets(name: str, config: dict[str, Any]) -> None:
    voice = table(name).checkpoints[0].voices["unet"]
    naming = table(name).naming("unet", voice.naming)
    checkpoint = numbered_checkpoint(naming, voice.prefix)
    converted = single_file.convert_ldm_unet_checkpoint(dict(checkpoint), config)
    assert_converted(checkpoint, voice.prefix, naming, table(name).naming("unet", "diffusers"), converted)


@pytest.mark.parametrize(("name", "component"), [("sd21", "text_encoder"), ("sdxl-refiner", "text_encoder_2")])
def test_open_clip(name: str, component: str) -> None:
    voice = table(name).checkpoints[0].voices[component]
    namings = table(name).namings(component)
    checkpoint = numbered_checkpoint(namings[voice.naming], voice.prefix)
    given = dict(checkpoint)
    if component == "text_encoder":  # the 24th layer and the projection, which nothing uses
        given |= {key: torch.zeros(1024, 1) for key in single_file.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE}
    converted = single_file.convert_open_clip_checkpoint(None, given, prefix=voice.prefix)
    assert_converted(checkpoint, voice.prefix, namings[voice.naming], namings["hf"], converted)


# -- adapters, by diffusers' LoRA converters ---------------------------------------------------------------------------

BLOCKS_ONLY = re.compile(r"^(layers|noise_refiner|context_refiner)\.\d+\.")
NO_KOHYA = ("guidance_embedder.", "_modulation", "norm_out.")


def linears(naming: Naming) -> dict[str, tuple[Target, ...]]:
    return {name: targets for name, targets in naming.items() if len(targets[0].shape) == 2}


def lora_of(naming: Naming, names: Iterable[str], stem: Callable[[str], str], suffixes: tuple[str, str]) -> tuple[
    dict[str, Tensor], dict[str, Tensor]
]:  # fmt: skip
    """(the ups by tensor key, the file): every row of every up another number."""
    ups: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    numbers = Numbers()
    for name in names:
        up = numbers.column(naming[name])
        ups[naming.home(naming[name][0]).tensor_key] = up
        lora[stem(name) + suffixes[0]] = torch.ones(1, 1, dtype=torch.float64)
        lora[stem(name) + suffixes[1]] = up
    return ups, lora


AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
LORAS = [
    ("chroma", "kohya", "bfl", "_convert_kohya_flux_lora_to_diffusers", DOWN_UP),
    ("flux2", "comfyui", "native", "_convert_non_diffusers_flux2_lora_to_diffusers", AB),
    ("flux2", "comfyui", "native", "_convert_non_diffusers_flux2_lora_to_diffusers", DOWN_UP),
    ("flux2", "kohya", "native", "_convert_kohya_flux2_lora_to_diffusers", DOWN_UP),
    ("lumina2", "comfyui", "native", "_convert_non_diffusers_lumina2_lora_to_diffusers", AB),
    ("qwen-image", "comfyui", "diffusers", "_convert_non_diffusers_qwen_lora_to_diffusers", AB),
    ("qwen-image", "kohya", "diffusers", "_convert_non_diffusers_qwen_lora_to_diffusers", DOWN_UP),
    ("z-image", "comfyui", "diffusers", "_convert_non_diffusers_z_image_lora_to_diffusers", AB),
    ("z-image", "kohya", "diffusers", "_convert_non_diffusers_z_image_lora_to_diffusers", DOWN_UP),
    ("hidream", "comfyui", "diffusers", "_convert_non_diffusers_hidream_lora_to_diffusers", AB),
]
SIZED_LORAS = [(size, *rest) for name, *rest in LORAS for size in table(name).sizes]


def is_known(size: Architecture, layout: str, converter: str, name: str) -> bool:
    """Whether diffusers' converter has a rule, and a right one, for a canonical name."""
    if size.id == "lumina2":
        return BLOCKS_ONLY.match(name) is not None
    if converter == "_convert_kohya_flux2_lora_to_diffusers":
        return not any(part in name for part in NO_KOHYA)
    if converter == "_convert_non_diffusers_flux2_lora_to_diffusers":
        return name != "norm_out.linear"  # taken over without the swap that its checkpoint converter makes
    if size.id == "chroma":
        return "distilled_guidance_layer" not in name
    return not (layout == "kohya" and ("2-1" in name or "addition_t_embedding" in name))


@pytest.mark.parametrize(
    ("size", "layout", "spelling", "converter", "suffixes"),
    SIZED_LORAS,
    ids=[f"{size.title.replace(' ', '-')}-{layout}-{suffixes[1][1:7]}" for size, layout, *_, suffixes in SIZED_LORAS],
)
def test_loras(size: Architecture, layout: str, spelling: str, converter: str, suffixes: tuple[str, str]) -> None:
    """A voice that a layout writes or reads is what diffusers' loader understands by it, row order included."""
    naming, canonical = size.naming("transformer", spelling), size.naming("transformer", "diffusers")
    voice = next(v for c, v in size.voices(layout) if c == "transformer" and v.naming == spelling)
    wanted = {name: targets for name, targets in linears(canonical).items() if is_known(size, layout, converter, name)}
    kept = {target for targets in wanted.values() for target in targets}
    names = [name for name, targets in linears(naming).items() if set(targets) <= kept]
    separator = "_" if layout == "kohya" else "."
    ups, lora = lora_of(naming, names, lambda name: voice.prefix + name.replace(".", separator), suffixes)
    converted = getattr(conversion, converter)(lora)
    loaded = {
        key.removeprefix("transformer.").removesuffix(AB[1]): tensor
        for key, tensor in converted.items()
        if key.endswith(AB[1])
    }
    assert loaded.keys() == wanted.keys()
    for name, targets in wanted.items():
        ours = torch.cat([rows_at_home(ups, "", naming, target) for target in targets])
        assert torch.equal(loaded[name], ours), name


def test_fused_z_image_lora() -> None:
    """The fused spelling, which diffusers reads from files with `.lora.up.weight` only."""
    size = table("z-image")
    naming, canonical = size.naming("transformer", "native"), size.naming("transformer", "diffusers")
    names = [name for name in linears(naming) if ".attention." in name]
    ups, lora = lora_of(naming, names, lambda name: name, (".lora.down.weight", ".lora.up.weight"))
    converted = conversion._convert_non_diffusers_z_image_lora_to_diffusers(lora)
    loaded = {
        key.removeprefix("transformer.").removesuffix(AB[1]): tensor
        for key, tensor in converted.items()
        if key.endswith(AB[1])
    }
    wanted = {name for name in linears(canonical) if ".attention." in name}
    assert loaded.keys() == wanted
    for name in wanted:
        assert torch.equal(loaded[name], rows_at_home(ups, "", naming, canonical[name][0])), name


def test_chroma_spells_what_it_shares_as_flux_does() -> None:
    """What `kin` promises: every name that Chroma shares with Flux is spelled alike in every layout."""
    flux, chroma = table("flux"), table("chroma")
    shared = set(chroma.naming("transformer", "diffusers")) & set(flux.naming("transformer", "diffusers"))
    assert len(shared) > 500
    for layout in chroma.writes:
        ours = {voice for component, voice in chroma.voices(layout) if component == "transformer"}
        theirs = {voice for component, voice in flux.voices(layout) if component == "transformer"}
        assert ours <= theirs, layout
    for spelling in ("diffusers", "bfl", "omi"):
        mine, other = chroma.naming("transformer", spelling), flux.naming("transformer", spelling)
        assert all(mine[name] == other[name] for name in set(mine) & set(other)), spelling
