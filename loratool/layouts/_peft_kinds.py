"""What PEFT's configs of other kinds than LoRA say about their modules, and how to say it for modules at hand.

One function to read and one to write for each `peft_type`: see PEFT's `tuners/{loha,lokr,ia3,oft,boft}/config.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from loratool.core.errors import FormatError, NotRepresentable, few
from loratool.core.layout import alpha_scalar
from loratool.core.module import Module
from loratool.core.target import may_be
from loratool.layouts._peft_config import Matcher, number, paths_said, pattern, ranks_said

Named = Sequence[tuple[str, Module]]
"""Modules with their paths as PEFT sees them."""


class Kind(NamedTuple):
    """One `peft_type`: the family of its modules, what its config makes of them, and the fields that say so again.

    `write` gets the modules and the paths that its targets are told by.
    """

    family: str
    read: Callable[[Mapping[str, Any], Named], list[Module]]
    write: Callable[[Named], dict[str, Any]]


# -- LoHa and LoKr ----------------------------------------------------------------------------------------------------


def _with_alphas(config: Mapping[str, Any], named: Named) -> list[Module]:
    alphas = Matcher(pattern(config, "alpha_pattern"))
    default = number(config, "alpha")
    return [replace(module, alpha=alphas(path, 8.0 if default is None else default)) for path, module in named]


def _loha(named: Named) -> dict[str, Any]:
    kernels = [module for _, module in named if any(size > 1 for size in module.targets[0].shape[2:])]
    tucker = [module for module in kernels if "t1" in module.factors]
    if tucker and len(tucker) < len(kernels):
        raise _cannot([m for m in kernels if "t1" not in m.factors], "Tucker cores for all convolutions or for none")
    return ranks_said({path: (module.rank, module.scale) for path, module in named}, "alpha") | {
        "use_effective_conv2d": bool(tucker)
    }


def _read_lokr(config: Mapping[str, Any], named: Named) -> list[Module]:
    """With both sides whole PEFT still multiplies by alpha / r, which the factors do not tell."""
    ranks = Matcher(pattern(config, "rank_pattern"))
    default = number(config, "r") or 8.0
    found = []
    for (path, _), module in zip(named, _with_alphas(config, named), strict=True):
        rank = ranks(path, default)
        if {"w1", "w2"} <= module.factors.keys() and module.alpha is not None and module.alpha != rank:
            factors = {**module.factors, "scale": alpha_scalar(module.alpha / rank, module.dtype)}
            module = replace(module, factors=factors)
        found.append(module)
    return found


def _lokr(named: Named) -> dict[str, Any]:
    sizes = [_sides(module) for _, module in named]
    factor = _factor(sizes)
    if factor is None:
        raise _cannot([module for _, module in named], "Kronecker factors of sizes that one decompose_factor gives")
    both = any("w1_a" in module.factors for _, module in named)
    tucker = any("t2" in module.factors for _, module in named)
    said: dict[str, tuple[int, float]] = {}
    for (path, module), ((a, b), (c, d)) in zip(named, sizes, strict=True):
        whole = {"w1", "w2"} <= module.factors.keys()
        rank = -(-max(c, d) // 2) if whole else module.rank  # the least that leaves w2 whole
        rank = max(rank, -(-max(a, b) // 2)) if whole and both else rank
        first, second = both and rank < max(a, b) / 2, rank < max(c, d) / 2
        kernel = any(size > 1 for size in module.targets[0].shape[2:])
        fits = ("w1_a" in module.factors) == first and ("w2_a" in module.factors) == second
        if not fits or ("t2" in module.factors) != (tucker and second and kernel):
            raise _cannot([module], "factors that are whole, or products, as rank and sizes have it")
        scale = module.factors["scale"].item() if "scale" in module.factors else module.scale
        said[path] = (rank, scale)
    settings = {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": tucker}
    return ranks_said(said, "alpha") | settings


def _sides(module: Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of w1 and of w2, kernel aside."""
    shapes = module.shapes
    first = shapes["w1"] if "w1" in shapes else (shapes["w1_a"][0], shapes["w1_b"][1])
    if "w2" in shapes:
        second = shapes["w2"]
    elif "t2" in shapes:
        second = (shapes["w2_a"][1], shapes["w2_b"][1])
    else:
        kernel = math.prod(module.targets[0].shape[2:])
        second = (shapes["w2_a"][0], math.prod(shapes["w2_b"][1:]) // kernel)
    return (first[0], first[1]), (second[0], second[1])


def _factor(sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> int | None:
    """The decompose_factor by which PEFT cuts all of these weights so; None if there is none."""
    wanted = {(a * c, (a, c)) for (a, _), (c, _) in sizes} | {(b * d, (b, d)) for (_, b), (_, d) in sizes}
    for factor in (-1, *sorted({size for _, pair in wanted for size in pair})):
        if all(_factorised(total, factor) == pair for total, pair in wanted):
            return factor
    return None


def _factorised(total: int, factor: int) -> tuple[int, int]:
    """PEFT's two factors of a size: `factor` itself if it divides it, else the nearest to the root below it."""
    if factor > 0 and total % factor == 0:
        return factor, total // factor
    limit = min(total if factor == -1 else factor, math.isqrt(total))
    first = next(size for size in range(limit, 0, -1) if total % size == 0)
    return first, total // first


# -- IA3, OFT, BOFT ---------------------------------------------------------------------------------------------------


def _read_ia3(config: Mapping[str, Any], named: Named) -> list[Module]:
    """The vector of a feed-forward layer is one of its inputs; of a convolution its shape does not tell."""
    told = config.get("feedforward_modules")
    found = []
    for path, module in named:
        role = next(role for role in ("output_l", "input_l") if role in module.factors)
        vector = module.factors[role]
        if len(vector.shape) > 2 and isinstance(told, (list, str)):
            role_told = "input_l" if _names(told, path) else "output_l"
            module = _as_role(module, role, role_told)
        found.append(module)
    return found


def _as_role(module: Module, role: str, other: str) -> Module:
    if role == other:
        return module
    factors = {other if name == role else name: factor for name, factor in module.factors.items()}
    keys = {other if name == role else name: key for name, key in module.keys.items()}
    shape = module.family.shape({name: factor.shape for name, factor in factors.items()})
    (first, *rest) = module.targets
    # Without a table the target has the shape of the update, as far as that is known.
    target = first if may_be(shape, first.shape) else first._replace(shape=shape)
    return replace(module, factors=factors, keys=keys, targets=(target, *rest))


def _names(told: list[str] | str, path: str) -> bool:
    if isinstance(told, str):
        try:
            return re.fullmatch(told, path) is not None
        except re.error as error:
            raise FormatError(f"{told!r} is not a regular expression: {error}", key="feedforward_modules") from error
    return any(isinstance(one, str) and path.endswith(one) for one in told)


def _ia3(named: Named) -> dict[str, Any]:
    fed = [path for path, module in named if "input_l" in module.factors]
    others = frozenset(path for path, _ in named) - set(fed)
    return {"feedforward_modules": paths_said(fed, others) if fed else []}


def _read_oft(config: Mapping[str, Any], named: Named) -> list[Module]:
    terms = number(config, "num_cayley_neumann_terms")
    by_series = config.get("use_cayley_neumann", False) is True
    added: dict[str, float] = {}
    if by_series:
        added["terms"] = 5.0 if terms is None else terms
    if config.get("coft") is True:
        eps = number(config, "eps")
        added["eps"] = 6e-5 if eps is None else eps
    return [
        replace(module, factors={**module.factors, **{r: alpha_scalar(v, module.dtype) for r, v in added.items()}})
        for _, module in named
    ]


def _oft(named: Named) -> dict[str, Any]:
    modules = [module for _, module in named]
    counts = {module.factors["R"].shape[0] for module in modules}
    sizes = {(1 + math.isqrt(1 + 8 * module.factors["R"].shape[1])) // 2 for module in modules}  # of triangles
    if len(sizes) > 1 and len(counts) > 1:
        raise _cannot(modules, "blocks of one size, or of one number")
    settings: dict[str, Any] = {"r": 0, "oft_block_size": sizes.pop()} if len(sizes) == 1 else {}
    settings = settings or {"r": counts.pop(), "oft_block_size": 0}
    terms = _one(modules, "terms")
    eps = _one(modules, "eps")
    return settings | {
        "block_share": counts == {1},
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": 5 if terms is None else int(terms),
        "coft": eps is not None,
        "eps": 6e-5 if eps is None else eps,
    }


def _one(modules: Sequence[Module], role: str) -> float | None:
    """The one value of a constant that all modules share, None if they have none."""
    values = {module.factors[role].item() if role in module.factors else None for module in modules}
    if len(values) > 1:
        raise _cannot(modules, f"one value of {role} for all modules")
    return values.pop()


def _boft(named: Named) -> dict[str, Any]:
    modules = [module for _, module in named]
    shapes = {module.factors["R"].shape for module in modules}
    stages, counts, sizes = ({shape[at] for shape in shapes} for at in range(3))
    if len(stages) > 1 or (len(counts) > 1 and len(sizes) > 1):
        raise _cannot(modules, "blocks of one size, or of one number, in one number of stages")
    by_size = {"boft_block_size": min(sizes), "boft_block_num": 0}
    by_count = {"boft_block_size": 0, "boft_block_num": min(counts)}
    return (by_size if len(sizes) == 1 else by_count) | {"boft_n_butterfly_factor": stages.pop()}


def _cannot(modules: Sequence[Module], what: str) -> NotRepresentable:
    names = tuple(module.title for module in modules)
    return NotRepresentable(
        f"{len(names)} {modules[0].family.title} modules cannot be written as they are ({few(names)}): "
        f"a config of PEFT knows {what}",
        modules=names,
        hint="rewrite them with --approximate lora and --rank N or --energy E",
    )


KINDS: Mapping[str, Kind] = {
    "LOHA": Kind("loha", _with_alphas, _loha),
    "LOKR": Kind("lokr", _read_lokr, _lokr),
    "IA3": Kind("ia3", _read_ia3, _ia3),
    "OFT": Kind("oft", _read_oft, _oft),
    "BOFT": Kind("boft", lambda config, named: [module for _, module in named], _boft),
}
