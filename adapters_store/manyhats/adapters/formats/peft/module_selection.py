"""Which modules PEFT's config selects, to refuse a file whose tensors say otherwise.

An adapter acts on the modules that its tensors name. PEFT, loading the file, goes by the config: it silently drops the
tensors of any module that ``target_modules``, ``exclude_modules`` or ``layers_to_transform`` leaves out, and so would
give other numbers. A module that is selected and has no tensors stays as the method starts it, without any effect.

The tensors alone decide where the config does not say: ``target_modules`` is missing; the config selects nothing of the
base, so that PEFT could not load the file at all; or a pattern cannot be run here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, ArtifactError
from manyhats.adapters.formats.config_fields import parse_flag
from manyhats.adapters.formats.peft.regex import Regex, RegexSet, translate, translate_ending
from manyhats.adapters.formats.peft.tensors import ModuleTensors
from manyhats.adapters.sites import EMBEDDING, HEAD, BaseDescription

TARGETS = "target_modules"
EXCLUDED = "exclude_modules"
LAYERS = "layers_to_transform"
LAYERS_PATTERN = "layers_pattern"

_ALL_LINEARS = "all-linear"
_KNOWN_ENDS = ("embed_tokens", "lm_head")
"""The names by which PEFT knows an embedding and a head that are one."""

Matches = Callable[[str], bool]


def check_selected(
    config: Mapping[str, Any],
    modules: Collection[ModuleTensors],
    base: BaseDescription,
    *,
    unread: Collection[str] = (),
) -> None:
    """Check that PEFT would use the tensors of all these modules.

    Args:
        config: the parsed ``adapter_config.json``.
        modules: of the base; those that the file has tensors for.
        base: the resident one.
        unread: fields that PEFT's config of this method does not have.

    Raises:
        AdapterInvalidError: the config leaves a module out, which names a tensor and the field; or a field has the
            wrong type.
    """
    read = {field: value for field, value in config.items() if field not in unread}
    selection = _parse_selection(read, base)
    left_out = [tensors for tensors in modules if selection.field_without(tensors.module) is not None]
    if is_tying_ensured(read, base):
        # To select one of the two is to select both.
        tied = (base.path_of(EMBEDDING), base.path_of(HEAD))
        if any(selection.field_without(module) is None for module in tied):
            left_out = [tensors for tensors in left_out if base.module_of(tensors.module) not in tied]
    if left_out and any(selection.field_without(module) is None for module in base.modules):
        first = left_out[0]
        field = selection.field_without(first.module)
        raise AdapterInvalidError(
            first.any_name, f"acts on {first.module}, which {field} leaves out; PEFT would not use it"
        )


def is_tying_ensured(config: Mapping[str, Any], base: BaseDescription) -> bool:
    """Whether whatever changes one of a tied embedding and head also changes the other.

    PEFT does as ``ensure_weight_tying`` asks only where the config selects one of them by a name that it knows.
    """
    asked = parse_flag("ensure_weight_tying", config.get("ensure_weight_tying"))
    if not base.is_tied or not asked:
        return False
    saved = _parse_names("modules_to_save", config.get("modules_to_save")) or []
    targets = _parse_names(TARGETS, config.get(TARGETS)) or []
    names = [*saved, *([] if isinstance(targets, str) else targets)]
    if any(name.rpartition(".")[2] in _KNOWN_ENDS for name in names):
        return True
    return isinstance(targets, str) and any(map(_matching(TARGETS, targets, unclear=True), _KNOWN_ENDS))


@dataclass(frozen=True, slots=True)
class _ModuleSelection:
    """The config's fields, each as a question about a module's path; a field that is not set selects all."""

    is_target: Matches
    is_excluded: Matches
    is_in_layers: Matches

    def field_without(self, module: str) -> str | None:
        """The field that leaves a module out; None if it is selected."""
        if self.is_excluded(module):
            return EXCLUDED
        if not self.is_target(module):
            return TARGETS
        return None if self.is_in_layers(module) else LAYERS


def _parse_selection(config: Mapping[str, Any], base: BaseDescription) -> _ModuleSelection:
    targets = _parse_names(TARGETS, config.get(TARGETS))
    excluded = _parse_names(EXCLUDED, config.get(EXCLUDED))
    is_in_layers = _parse_layers(config)
    # PEFT asks for the layer where a name is the end of a path, not where it is the whole, nor with a pattern.
    whole = frozenset(targets or ())
    return _ModuleSelection(
        is_target=_all if targets is None else _targets(targets, base),
        is_excluded=_matching(EXCLUDED, excluded, unclear=False) if excluded else _none,
        is_in_layers=_all
        if isinstance(targets, str)
        else lambda module: module in whole or is_in_layers(module),
    )


def _targets(names: str | list[str], base: BaseDescription) -> Matches:
    if isinstance(names, str) and names.lower() == _ALL_LINEARS:
        ends = (base.path_of(EMBEDDING), base.path_of(HEAD))
        return lambda module: base.module_of(module) not in ends
    return _matching(TARGETS, names, unclear=True)


def _matching(field: str, names: str | list[str], *, unclear: bool) -> Matches:
    """What a pattern or a list of names matches; ``unclear`` is the answer for a pattern that can't be run."""
    if isinstance(names, list):
        listed = frozenset(names)
        return lambda module: not listed.isdisjoint(ends_of(module))
    compiled = _compile(field, [names], translate)
    if compiled is None:
        return _all if unclear else _none
    return lambda module: compiled.first_match(module) is not None


def _parse_layers(config: Mapping[str, Any]) -> Matches:
    """``layers_to_transform``: the layers' numbers, found in a path as PEFT finds them."""
    value = config.get(LAYERS)
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list | None) or any(type(layer) is not int for layer in layers or ()):
        raise AdapterInvalidError(LAYERS, "must be a layer's number, or a list of them")
    patterns = _parse_names(LAYERS_PATTERN, config.get(LAYERS_PATTERN))
    if not layers:
        return _all
    wanted = frozenset(layers)
    if not patterns:
        return lambda module: _layer_of(module, None) in wanted
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # PEFT puts the pattern between others without a group around it: a choice would be one between all of these.
    is_choice = any("|" in pattern for pattern in patterns)
    compiled = None if is_choice else _compile(LAYERS_PATTERN, patterns, translate_ending)
    if compiled is None:
        return _all
    return lambda module: _layer_of(module, compiled) in wanted


def _layer_of(module: str, containers: RegexSet | None) -> int | None:
    """The first number in a path that follows a list of layers: one so named or, without names, any in a module."""
    segments = module.split(".")
    for at in range(1, len(segments) - 1):
        if not segments[at].isdecimal():
            continue
        if containers is None:
            if at >= 2:
                return int(segments[at])
        elif containers.first_match(".".join(segments[:at])) is not None:
            return int(segments[at])
    return None


def ends_of(module: str) -> list[str]:
    """The path itself, and what follows each of its dots."""
    segments = module.split(".")
    return [".".join(segments[at:]) for at in range(len(segments))]


def _compile(
    field: str, patterns: Sequence[str], translation: Callable[[str, str, str], Regex]
) -> RegexSet | None:
    """None if one of them can't be run."""
    try:
        return RegexSet(field, (translation(pattern, field, "the pattern") for pattern in patterns))
    except ArtifactError:
        return None


def _parse_names(field: str, value: Any) -> str | list[str] | None:
    if isinstance(value, str | None):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterInvalidError(field, "must be a list of module names, or a pattern")
    return value


def _all(_: str) -> bool:
    return True


def _none(_: str) -> bool:
    return False
