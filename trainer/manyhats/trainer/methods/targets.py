"""From the names of linears, as a user gives them, to modules of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from manyhats.adapters.formats.peft.tensors import Target, find_target
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.methods import ALL_LINEARS, AdapterSettings, LoraSettings


@dataclass(frozen=True, slots=True)
class ChosenModules:
    """The modules that a list of names selects.

    Attributes:
        names: sorted; PEFT finds the same modules by them.
        targets: in order of site.
    """

    names: tuple[str, ...]
    targets: tuple[Target, ...]


def with_named_modules(settings: AdapterSettings, base: BaseDescription) -> AdapterSettings:
    """The names that ``all-linear`` stands for, so that records of a training run say what it acted on."""
    if not isinstance(settings, LoraSettings):
        return settings
    asked = settings.target_modules
    all_linears = [name for name in base.linears if not Site(0, name).is_of_mixture]
    names = (each for name in asked for each in (all_linears if name == ALL_LINEARS else (name,)))
    return replace(settings, target_modules=tuple(dict.fromkeys(names)))


def choose_modules(names: Sequence[str], setting: str, base: BaseDescription) -> ChosenModules:
    """Find the modules that a list of names selects.

    A name is a module's path or the end of one, as in PEFT: ``q_proj``, ``layers.3.self_attn.q_proj``, ``lm_head``. If
    the checkpoint has several linears in one module, as in Phi-3's ``qkv_proj``, together they select that module.

    Args:
        names: or ``all-linear``.
        setting: the one they come from.
        base: whose modules.

    Raises:
        SettingError: a name is not a module's; lists the valid ones.
    """
    known = _known_modules(base)
    fused = {
        part.site.name: _last(path)
        for path, target in known.items()
        if len(target.parts) > 1
        for part in target.parts
    }
    chosen: set[str] = set()
    for name in names:
        if name == ALL_LINEARS:
            chosen |= {_last(path) for path, target in known.items() if not target.is_head}
        elif any(matches(path, name) for path in known):
            chosen.add(name)
        elif name in fused:
            _check_whole(fused[name], names, setting, fused)
            chosen.add(fused[name])
        else:
            listed = ", ".join(sorted({_last(path) for path in known}))
            raise SettingError(setting, f"{name!r} is not a linear of this base; it has {listed}")
    targets = [target for path, target in known.items() if any(matches(path, name) for name in chosen)]
    return ChosenModules(
        tuple(sorted(chosen)), tuple(sorted(targets, key=lambda target: target.parts[0].site))
    )


def matches(path: str, name: str) -> bool:
    """Whether a module's path is, or ends with, a name."""
    return path == name or path.endswith(f".{name}")


def _known_modules(base: BaseDescription) -> dict[str, Target]:
    """Path → module, for every module of linears."""
    found = ((path, find_target(path, base)) for path in base.modules)
    return {path: target for path, target in found if target is not None}


def _check_whole(module: str, names: Sequence[str], setting: str, fused: Mapping[str, str]) -> None:
    """A module of several linears is adapted as one; ``fused`` says which linear is in which."""
    parts = [part for part, other in fused.items() if other == module]
    if missing := [part for part in parts if part not in names]:
        raise SettingError(
            setting,
            f"this base has {', '.join(parts)} in one module, {module}: name that, "
            f"or {', '.join(missing)} as well",
        )


def _last(path: str) -> str:
    return path.rpartition(".")[2]
