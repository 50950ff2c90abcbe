"""Places: the folders in which programs keep models and LoRAs, and what is found in them by name.

`os.path` asks whether things exist: it says no where pathlib raises, for a folder that may not be entered, say.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from loratool.core.errors import UsageError
from loratool.files.bundle import PICKLES
from loratool.files.checkpoint import WEIGHTS
from loratool.ops.config import Config, absolute, read_config

MODEL_FOLDERS = {
    "models/checkpoints": "ComfyUI",
    "models/diffusion_models": "ComfyUI",
    "models/unet": "ComfyUI",
    "models/Stable-diffusion": "WebUI",
    "Models/StableDiffusion": "StabilityMatrix",
    "Models/DiffusionModels": "StabilityMatrix",
    "Models/Unet": "StabilityMatrix",
}
LORA_FOLDERS = {
    "models/loras": "ComfyUI",
    "models/Lora": "WebUI",
    "models/LyCORIS": "WebUI",
    "Models/Lora": "StabilityMatrix",
    "Models/LyCORIS": "StabilityMatrix",
}
ROOT_VARIABLES = ("COMFYUI_PATH", "COMFYUI_HOME", "WEBUI_PATH", "SD_WEBUI_PATH", "SD_WEBUI_HOME", "FORGE_PATH")
"""Environment variables that name the install folder of a program."""

BASES_VARIABLE = "LORATOOL_BASES"
_PROGRAMS = ("ComfyUI", "stable-diffusion-webui", "stable-diffusion-webui-forge")
_AT_HOME = (*_PROGRAMS, "Documents/ComfyUI", "StabilityMatrix/Data", "AppData/Roaming/StabilityMatrix")

_DEEPEST = 6
_WHOLE = ("model_index.json", "adapter_config.json")
"""A folder with one of these is one model or one adapter, not a place with several."""


@dataclass(frozen=True)
class Around:
    """What names depend on beside the command line: the environment, the home folder and the config file."""

    environ: Mapping[str, str]
    home: Path
    config: Config


@dataclass(frozen=True)
class Root:
    """The install folder of a program, and who named it."""

    path: Path
    source: str


@dataclass(frozen=True)
class Place:
    """A folder to look in, with everything below it unless it is not `deep`. `source` says whose it is."""

    path: Path
    source: str
    deep: bool = True


@dataclass(frozen=True)
class Found:
    """A file (or a whole model's folder) in a place. `name` is its path below the place without `.safetensors`."""

    path: Path
    name: str
    place: Place

    @property
    def stem(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]

    @property
    def pickle(self) -> bool:
        """Whether it is a PyTorch file, by its suffix."""
        return self.path.suffix.lower() in PICKLES


def look_around(environ: Mapping[str, str] | None = None, home: Path | None = None) -> Around:
    """The surroundings; those of this process where nothing is given. Raises UsageError for a broken config file."""
    environ = os.environ if environ is None else environ
    home = home or Path(environ.get("HOME") or os.path.expanduser("~"))
    return Around(environ, home, read_config(environ, home))


# -- where to look ---------------------------------------------------------------------------------------------------


def roots(around: Around) -> tuple[Root, ...]:
    """The install folders to look in, whether they exist or not: configured, from the environment, common ones."""
    named = [Root(path, "config file") for path in around.config.roots]
    named += [
        Root(absolute(around.environ[name], around.home), name) for name in ROOT_VARIABLES if around.environ.get(name)
    ]
    # Who names the folder with the models in it means the folder it is in.
    named = [Root(root.path.parent, root.source) if root.path.name.lower() == "models" else root for root in named]
    named += [Root(around.home / name, "home folder") for name in _AT_HOME]
    named += [Root(here / name, "current folder") for here in _here() for name in ("", *_PROGRAMS)]
    found: dict[str, Root] = {}
    for root in named:
        found.setdefault(os.path.realpath(root.path), root)
    return tuple(found.values())


def _here() -> Iterator[Path]:
    try:
        yield Path.cwd()
    except OSError:
        return  # it was removed meanwhile


def model_places(around: Around) -> tuple[Place, ...]:
    """The folders of checkpoints that exist, those of LORATOOL_BASES first."""
    entries = named_by_variable(around)
    named = [Place(path, BASES_VARIABLE) for name, path in entries if name is None and os.path.exists(path)]
    return _distinct([*named, *_below(roots(around), MODEL_FOLDERS)])


def lora_places(around: Around) -> tuple[Place, ...]:
    """The folders of LoRAs that exist: configured ones, those of programs, and the current folder itself."""
    named = [Place(path, "config file") for path in around.config.loras if os.path.exists(path)]
    here = [Place(path, "current folder", deep=False) for path in _here()]
    return _distinct([*named, *_below(roots(around), LORA_FOLDERS), *here])


def named_by_variable(around: Around) -> tuple[tuple[str | None, Path], ...]:
    """The entries of LORATOOL_BASES: (name, path) of `name=path`, (None, folder) of others."""
    found: list[tuple[str | None, Path]] = []
    for entry in around.environ.get(BASES_VARIABLE, "").split(os.pathsep):
        name, equals, path = entry.strip().partition("=")
        if equals and is_name(name.strip()) and path.strip():
            found.append((name.strip(), absolute(path.strip(), around.home)))
        elif entry.strip():
            found.append((None, absolute(entry.strip(), around.home)))
    return tuple(found)


def hub_cache(around: Around) -> Path:
    """The folder of the Hugging Face cache, by the rules of huggingface_hub."""
    environ = around.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            return absolute(environ[variable], around.home)
    if environ.get("HF_HOME"):
        return absolute(environ["HF_HOME"], around.home) / "hub"
    cache = environ.get("XDG_CACHE_HOME")
    return (absolute(cache, around.home) if cache else around.home / ".cache") / "huggingface" / "hub"


def _below(found: Iterable[Root], folders: Mapping[str, str]) -> Iterator[Place]:
    for root in found:
        for folder, program in folders.items():
            if os.path.isdir(root.path / folder):
                yield Place(root.path / folder, program)


def _distinct(places: Iterable[Place]) -> tuple[Place, ...]:
    """Each folder once: two names may lead to one, and some disks do not tell `models` from `Models`."""
    found: dict[tuple[int, int] | str, Place] = {}
    for place in places:
        try:
            state = place.path.stat()
            key: tuple[int, int] | str = (state.st_dev, state.st_ino) if state.st_ino else os.path.realpath(place.path)
        except OSError:
            key = os.path.realpath(place.path)
        found.setdefault(key, place)
    return tuple(found.values())


# -- what is there ---------------------------------------------------------------------------------------------------


def files_in(places: Iterable[Place]) -> Iterator[Found]:
    """The weight files and whole models in places, by name; each once, whatever links lead to it. Nothing is opened."""
    seen: set[str] = set()
    for place in places:
        for path in _walk(place.path, _DEEPEST if place.deep else 0, set()):
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                below = path.relative_to(place.path) if path != place.path else Path(path.name)
                yield Found(path, plain(below.as_posix()), place)


def _walk(path: Path, deeper: int, entered: set[str]) -> Iterator[Path]:
    if not os.path.isdir(path):
        if path.suffix.lower() in (WEIGHTS, *PICKLES):
            yield path
        return
    real = os.path.realpath(path)
    if real in entered:
        return  # links in a circle
    entered.add(real)
    try:
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
    except OSError:
        return
    if any(name in names for name in _WHOLE):
        yield path
        return
    for name in names:
        if deeper or not os.path.isdir(path / name):
            yield from _walk(path / name, deeper - 1, entered)


def called(name: str, files: Iterable[Found]) -> list[Found]:
    """The files of a name: the bare one (`style`) or with folders (`anime/style`), with or without `.safetensors`.

    A pickle (`style.pt`) is only meant where nothing else is called so, by its name without the suffix, too.
    """
    wanted, files = plain(name.replace("\\", "/")), list(files)
    found = [file for file in files if wanted in (file.name, file.stem)]
    found = [file for file in found if not file.pickle] or found
    return found or [f for f in files if f.pickle and wanted in (os.path.splitext(n)[0] for n in (f.name, f.stem))]


def plain(name: str) -> str:
    """A name without `.safetensors`."""
    return name[: -len(WEIGHTS)] if name.lower().endswith(WEIGHTS) else name


def is_name(text: str) -> bool:
    """Whether a text can be the name of a base model: no path, no list."""
    return bool(text) and text[0].isalnum() and all(c.isalnum() or c in "._+-" for c in text)


def check_name(text: str) -> str:
    """The text itself. Raises UsageError for what cannot be a name."""
    if not is_name(text):
        raise UsageError(f"{text!r} cannot be a name", hint="a name has letters, digits and . _ + - only: `my-model`")
    return text


def counted(number: int, word: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """`did you mean NAME? `, or nothing if no name is near."""
    folded = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), folded, 1, 0.6)
    return f"did you mean {folded[near[0]]}? " if near else ""
