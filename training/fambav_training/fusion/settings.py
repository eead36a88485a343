"""Other fusion on a configuration that exists already, for good or for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modeling_fambav import FambaVConfig

UNFUSED = {"fusion_strategy": "none"}
STRATEGIES = ("all", "interleaved", "lower", "upper")  # those with one number of tokens for all their layers


def with_fusion(config: FambaVConfig, fusion: dict[str, Any]) -> FambaVConfig:
    """A copy of a configuration with these fusion fields instead of its own.

    Args:
        config: stays as it is.
        fusion: fusion fields. With a `fusion_strategy`, the layers and the schedule are those given or the strategy's
            own, because those of the configuration belong to its own strategy.

    Raises:
        ValueError, StrictDataclassError: if a field has a wrong value, or fields contradict each other.
    """
    fields = config.to_dict()
    if "fusion_strategy" in fusion:
        fields.update(fusion_start_layer=None, fusion_end_layer=None, fusion_schedule=None)
    # A new configuration, so that fields that go together are checked together
    return FambaVConfig(**{**fields, **fusion})


def set_fusion(config: FambaVConfig, fusion: dict[str, Any]) -> None:
    """Change the fusion fields of a configuration as `with_fusion` does, all of them or, in an error, none."""
    config.update(_fusion_fields(with_fusion(config, fusion)))


@contextmanager
def fused(config: FambaVConfig, fusion: dict[str, Any]) -> Iterator[None]:
    """Within this context, the configuration has these fusion fields, see `with_fusion`."""
    own = _fusion_fields(config)
    set_fusion(config, fusion)
    try:
        yield
    finally:
        config.update(own)


def _fusion_fields(config: FambaVConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FambaVConfig.__dataclass_fields__ if name.startswith("fusion_")}
