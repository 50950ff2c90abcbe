"""Sizes of one model under one id, and models made from another one: how they are told apart, and when not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from loratool.core import identify
from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture, Checkpoint, Namings, Variant, Voice
from loratool.core.detect import Detection, detect
from loratool.core.identify import checkpoint_of
from loratool.core.naming import Naming
from loratool.core.target import Target
from loratool.core.tensor import Held, LazyTensor
from tests.contracts import check_architecture

Shapes = dict[str, tuple[int, ...]]


def table(shapes: Shapes) -> Callable[[], Namings]:
    return lambda: {"own": Naming({path: (Target("transformer", path, shape),) for path, shape in shapes.items()})}


def model(name: str, shapes: Shapes, *variants: Variant, kin: str = "", fact: str = "") -> Architecture:
    return Architecture(
        id=name,
        title=name.title(),
        components={"transformer": table(shapes)},
        writes={"diffusers": {"transformer": Voice("transformer.", "own")}},
        facts={"modelspec.architecture": fact or name},
        variants=variants,
        kin=kin,
    )


def blocks(count: int, width: int, *more: str) -> Shapes:
    return {f"blocks.{i}.{part}": (width, width) for i in range(count) for part in ("q", "k", "v", *more)}


def empty(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, "F32", Held(b""))


def lora(shapes: Shapes, **metadata: str) -> Bundle:
    tensors: dict[str, LazyTensor] = {}
    for path, (out, columns) in shapes.items():
        tensors[f"transformer.{path}.lora_A.weight"] = empty((4, columns))
        tensors[f"transformer.{path}.lora_B.weight"] = empty((out, 4))
    return Bundle(tensors, metadata)


SMALL, LARGE, WITH_IMAGES = blocks(3, 8), blocks(5, 16), blocks(3, 8, "k_img")
SIZED = model(
    "sized",
    SMALL,
    Variant("Sized Large", {"transformer": table(LARGE)}, facts={"modelspec.architecture": "large"}),
    Variant("Sized with images", {"transformer": table(WITH_IMAGES)}),
)


def found(bundle: Bundle, among: Iterable[Architecture]) -> Detection:
    result = detect(bundle, among)
    assert result is not None
    return result


def test_sizes_are_whole_architectures_of_one_id() -> None:
    check_architecture(SIZED)
    assert [size.title for size in SIZED.sizes] == ["Sized", "Sized Large", "Sized with images"]
    assert {size.id for size in SIZED.sizes} == {"sized"}
    assert [size.facts["modelspec.architecture"] for size in SIZED.sizes] == ["sized", "large", "sized"]
    assert all(size.sizes == (size,) for size in SIZED.sizes[1:])


@pytest.mark.parametrize(
    ("shapes", "title"),
    [
        pytest.param(SMALL, "Sized", id="standard"),
        pytest.param(LARGE, "Sized Large", id="by-shape"),
        pytest.param(WITH_IMAGES, "Sized with images", id="by-name"),
        pytest.param({"blocks.0.q": (8, 8), "blocks.4.q": (8, 8)}, "Sized Large", id="by-a-block-that-one-has-only"),
        pytest.param({"blocks.0.q": (32, 32)}, "Sized", id="another-width"),
    ],
)
def test_sizes_are_told_apart(shapes: Shapes, title: str) -> None:
    best = found(lora(shapes), [SIZED]).best
    assert (best.architecture.id, best.architecture.title) == ("sized", title)
    assert best.architecture in SIZED.sizes


def test_only_the_sizes_that_are_needed_are_built() -> None:
    def never() -> Namings:
        raise AssertionError("built")

    lazy = model("lazy", SMALL, Variant("Lazy Large", {"transformer": never}))
    assert found(lora(SMALL), [lazy]).best.architecture is lazy


def test_a_size_is_never_a_rival_of_another() -> None:
    twins = model("twins", SMALL, Variant("Other twin", {"transformer": table(SMALL)}))
    result = found(lora(SMALL), [twins])
    assert (result.best.architecture, result.tie, result.runner_up) == (twins, (), None)


OLD = model("old", blocks(3, 8, "o"))
NEW = model("new", SMALL, kin="old")
STRANGER = model("stranger", SMALL)


def test_what_two_models_share_is_the_older_ones() -> None:
    result = found(lora(SMALL), [NEW, OLD])
    assert (result.best.architecture.id, result.others, result.tie) == ("old", ("New",), ())


def test_the_header_decides_where_names_do_not() -> None:
    header = {"modelspec.architecture": "new"}
    for models in ([NEW, OLD], [OLD, NEW], [STRANGER, OLD, NEW]):
        result = found(lora(SMALL, **header), models)
        assert (result.best.architecture.id, result.others, result.tie) == ("new", (), ())


def test_the_header_does_not_outweigh_names() -> None:
    result = found(lora(OLD_ONLY, **{"modelspec.architecture": "new"}), [NEW, OLD])
    assert result.best.architecture.id == "old"


OLD_ONLY = {path: shape for path, shape in blocks(3, 8, "o").items() if path.endswith(".o")}


def test_bare_names_are_of_the_model_that_was_published_under_them() -> None:
    bare = Voice("", "own")
    spoken = {"reads": {"diffusers": {"transformer": (bare,)}}}
    published = replace(STRANGER, **spoken, checkpoints=(Checkpoint("own", {"transformer": bare}),))
    prefixed = Checkpoint("own", {"transformer": Voice("model.", "own")})
    other = replace(OLD, **spoken, checkpoints=(prefixed,))
    names = {key.removeprefix("transformer."): tensor for key, tensor in lora(SMALL).tensors.items()}
    result = found(Bundle(names), [other, published])
    assert (result.best.architecture, result.others, result.tie) == (published, ("Old",), ())
    assert found(lora(SMALL), [other, published]).best.architecture.open


def test_strangers_tie() -> None:
    result = found(lora(SMALL), [OLD, STRANGER, NEW])
    assert result.best.architecture.open
    assert set(result.tie) == {"old", "stranger", "new"}


def test_a_checkpoint_tells_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = replace(SIZED, checkpoints=(Checkpoint("own", {"transformer": Voice("", "own")}),))
    monkeypatch.setattr(identify, "architectures", lambda: {"sized": sized})
    for size, shapes in zip(sized.sizes, (SMALL, LARGE, WITH_IMAGES), strict=True):
        assert checkpoint_of({f"{path}.weight": empty(shape) for path, shape in shapes.items()}) is size
