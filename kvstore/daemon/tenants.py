"""Who may act for which tenant, and which namespaces are then theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from kvstore.errors import RefusedError
from kvstore.store.quota import DEFAULT_TENANT
from kvstore.store.shelves import NO_TENANT

if TYPE_CHECKING:
    from kvstore.config import Config

_ROOT_UID: Final = 0


class TenantRule(NamedTuple):
    """One configured tenant. A *shared* one uses the public namespaces, not its own."""

    uids: tuple[int, ...] = ()
    shared: bool = False


class Tenants:
    """All tenants, in the order of their numbers: 0 is nobody in particular."""

    def __init__(self, rules: Mapping[str, TenantRule]) -> None:
        self._rules = dict(rules)
        self._numbers = {name: number for number, name in enumerate(self._rules, 1)}

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the tenants that *config* has."""
        return cls({name: TenantRule(of.uids, of.shared) for name, of in config.tenants.items()})

    @property
    def names(self) -> Sequence[str]:
        """All names, by number."""
        return (NO_TENANT, *self._rules)

    def admit(self, name: str, uid: int) -> tuple[int, str]:
        """Return the number of tenant *name* and the scope of its namespaces (empty: public).

        Root and the daemon's own user may be anyone. Raises `RefusedError` for others that are
        not configured to be, and for a tenant that nobody has configured.
        """
        if name == NO_TENANT:
            return DEFAULT_TENANT, NO_TENANT
        rule = self._rules.get(name)
        if rule is None or uid not in {os.getuid(), _ROOT_UID, *rule.uids}:
            raise RefusedError(f"uid {uid} may not act for tenant {name!r} (tenants.*.uids)")
        return self._numbers[name], NO_TENANT if rule.shared else name
