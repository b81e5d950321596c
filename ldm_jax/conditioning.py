"""What a network is conditioned by => what its cross-attentions add, for all of them at once."""

from collections.abc import Iterator, Mapping
from functools import partial, reduce
from operator import getitem
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Bool, Float


class Condition(NamedTuple):
    """What a network, one of its blocks or a unit is conditioned by."""

    tokens: Float[Array, "b n e"]
    mask: Bool[Array, "b n"] | None = None  # Which tokens count; None for all.
    embedding: Float[Array, "b e"] | None = None  # For the residual blocks.
    added: Any = None  # What `attend_to_token` found for this part; None if it was not called.

    def of(self, name: str) -> "Condition":
        """What the part of that name is conditioned by."""
        return self._replace(added=self.added and self.added.get(name))


def attend_to_token(
    layer: Any, variables: Mapping[str, Any], token: Float[Array, "b 1 e"], *, train: bool = False
) -> dict[str, Any]:
    """What the cross-attentions of a network add to its maps, all of one width at a time.

    With one token that depends on no map. Unit by unit it took a GPU some 20 kernels each, of which
    none had enough to do: 0.9 ms of a training step of the default network, whatever the batch.

    Args:
        layer: a `CrossAttention` outside of any network.
        variables: of the network.
        token: the only one.
        train: as in `UNet`.

    Returns:
        In the place of each unit that has a "cross": its result (b, 1, 1, c) and new statistics.
    """
    by_width = {}
    held = {name: variables[name] for name in ("params", "batch_stats") if variables.get(name)}
    for path in _find_cross(variables["params"]):
        own = {name: reduce(getitem, path, tree)["cross"] for name, tree in held.items()}
        by_width.setdefault(own["params"]["out"]["bias"].size, {})[path] = own
    added = {}
    for width, parts in by_width.items():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts.values())
        image = jnp.zeros((len(token), 1, 1, width), token.dtype)  # Of which the size alone counts.
        options = {"train": train, "mutable": ["batch_stats"]}
        run = partial(layer.apply, image=image, cond=token, **options)
        results = jax.vmap(run)(stacked)
        for i, path in enumerate(parts):
            added[path] = jax.tree.map(lambda x, i=i: x[i], results)
    return unflatten_dict(added)


def _find_cross(params: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the units that have a cross-attention."""
    if "cross" in params:
        yield path
    for name, part in params.items():
        if isinstance(part, Mapping):
            yield from _find_cross(part, (*path, name))


class AddedByToken(nn.Module):
    """In the place of a `CrossAttention`: what `attend_to_token` found for it.

    It returns the result and keeps the statistics.
    """

    @nn.compact
    def __call__(self, added: tuple[Array, Any]) -> Float[Array, "b 1 1 c"]:
        result, updates = added
        for norm, statistics in updates.get("batch_stats", {}).items():
            _Statistics(name=norm)(statistics)
        return result


class _Statistics(nn.Module):
    """In the place of a norm, of which nothing but the statistics is asked."""

    @nn.compact
    def __call__(self, statistics: Mapping[str, Array]) -> None:
        for name, value in statistics.items():
            if self.is_mutable_collection("batch_stats"):
                self.put_variable("batch_stats", name, value)
