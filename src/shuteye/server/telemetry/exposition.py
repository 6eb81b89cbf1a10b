"""Metrics of several registries as one page, in Prometheus' text format, which has each family once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from prometheus_client import CollectorRegistry, generate_latest

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(frozen=True, slots=True)
class _Families:
    """As much of a registry as is needed to write it out."""

    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def exposition_of(registries: Iterable[CollectorRegistry]) -> bytes:
    """All that they hold; the families' samples one registry after the other."""
    families: dict[str, Metric] = {}
    for registry in registries:
        for family in registry.collect():
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)
    return generate_latest(cast(CollectorRegistry, _Families(families.values())))
