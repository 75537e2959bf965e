"""From the names of linears, as a user gives them, to modules of the base."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from manyhats.adapters.formats.peft.tensors import Target, find_target
from manyhats.adapters.formats.saved_head import alternatives
from manyhats.adapters.heads import TaskKind
from manyhats.adapters.sites import POOLER, PROJECTION, BaseDescription, Site
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.methods import ALL_LINEARS, AdapterSettings, Ia3Settings, LoraSettings

_POOLERS = dict.fromkeys(("camembert", "roberta", "xlm-roberta"), ("pooler.dense",))
"""What transformers' models without a head have where a head would be, by ``model_type``, though no head reads it."""


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
    """The names that ``all-linear`` and IA3's defaults stand for, so that records of a training run have them.

    Where keys and values are in one module with queries, IA3 rescales all of it by default, as PEFT's defaults do.
    """
    match settings:
        case LoraSettings(target_modules=asked):
            all_linears = [name for name in base.linears if not Site(0, name).is_of_mixture]
            names = (each for name in asked for each in (all_linears if name == ALL_LINEARS else (name,)))
            return replace(settings, target_modules=tuple(dict.fromkeys(names)))
        case Ia3Settings(output_modules=asked) if asked == Ia3Settings().output_modules:
            sites = [[part.site.name for part in parts] for parts in base.modules.values()]
            along = (name for names in sites if not set(asked).isdisjoint(names) for name in names)
            return replace(settings, output_modules=tuple(dict.fromkeys((*asked, *along))))
    return settings


def choose_modules(names: Sequence[str], setting: str, base: BaseDescription) -> ChosenModules:
    """Find the modules that a list of names selects.

    A name is a module's path or the end of one, as in PEFT: ``q_proj``, ``layers.3.self_attn.q_proj``, ``lm_head``; or
    a linear as it is called here, which a family calls otherwise: ``q_proj`` is BERT's ``query``. If the checkpoint has
    several linears in one module, as in Phi-3's ``qkv_proj``, together they select that module.

    Args:
        names: or ``all-linear``.
        setting: the one they come from.
        base: whose modules.

    Raises:
        SettingError: a name is not a module's; lists the valid ones.
    """
    known = _known_modules(base)
    named, by_site = _selected(names, setting, base, known)
    chosen = {path for path in known if any(matches(path, name) for name in named)} | by_site
    targets = [target for path, target in known.items() if path in chosen]
    return ChosenModules(
        tuple(sorted(named | _names_of(by_site, chosen, base))),
        tuple(sorted(targets, key=lambda target: target.parts[0].site)),
    )


def _selected(
    names: Sequence[str], setting: str, base: BaseDescription, known: Mapping[str, Target]
) -> tuple[set[str], set[str]]:
    """The names that are ends of paths, and the paths of modules that the others select."""
    fused = {
        part.site.name: _last(path)
        for path, target in known.items()
        if len(target.parts) > 1
        for part in target.parts
    }
    named: set[str] = set()
    by_site: set[str] = set()
    for name in names:
        if name == ALL_LINEARS:
            by_site |= {path for path, target in known.items() if not target.is_head}
        elif any(matches(path, name) for path in known):
            _check_alone(name, setting, base)
            named.add(name)
        elif name in fused:
            _check_whole(fused[name], names, setting, fused)
            by_site |= {path for path in known if _last(path) == fused[name]}
        elif name in base.linears:
            by_site |= {path for path, target in known.items() if target.parts[0].site.name == name}
        else:
            listed = ", ".join(sorted(_names_of(known, known, base)))
            raise SettingError(setting, f"{name!r} is not a linear of this base; it has {listed}")
    return named, by_site


def _names_of(paths: Collection[str], chosen: Collection[str], base: BaseDescription) -> set[str]:
    """The shortest ends of some paths that are ends of no module that is not chosen."""
    others = [path for path in (*base.modules, *_modules_of_heads(base)) if path not in chosen]
    names = set()
    for path in paths:
        parts = path.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        names.add(next(end for end in ends if not any(matches(other, end) for other in others)))
    return names


def _modules_of_heads(base: BaseDescription) -> tuple[str, ...]:
    """Modules of heads, whose ends may be those of linears."""
    kinds = (TaskKind.CLASSIFY, TaskKind.CLASSIFY_TOKENS)
    parts = (part for kind in kinds for layers in alternatives(kind, base) for part in layers)
    return (*(part.module for part in parts), *_POOLERS.get(base.model_type, ()))


def _check_alone(name: str, setting: str, base: BaseDescription) -> None:
    """Refuse a name that is also a head's: that is trained as a whole."""
    for path in _modules_of_heads(base):
        if matches(path, name):
            raise SettingError(
                setting, f"{name!r} also names {path}, which is part of heads; name the others by longer ends"
            )


def matches(path: str, name: str) -> bool:
    """Whether a module's path is, or ends with, a name."""
    return path == name or path.endswith(f".{name}")


def _known_modules(base: BaseDescription) -> dict[str, Target]:
    """Path → module, for every module of linears in the layers, and embedding and head.

    The pooler is part of heads, and what widens narrow embeddings is not trained.
    """
    found = (
        (path, find_target(path, base))
        for path, parts in base.modules.items()
        if parts[0].site not in (POOLER, PROJECTION)
    )
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
