"""Which models name an instance, and the other way round; kept with every change of a record."""

from __future__ import annotations

from mm.core.ids import InstanceId, ModelId


class InstanceIndex:
    """A relation of models and instances. Each change costs what changed, never the whole."""

    def __init__(self) -> None:
        self._models: dict[InstanceId, set[ModelId]] = {}
        self._instances: dict[str, frozenset[InstanceId]] = {}

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._instances

    def __len__(self) -> int:
        """The models that name any instance."""
        return len(self._instances)

    def models(self, instance_id: InstanceId) -> frozenset[ModelId]:
        """Answer the models that name the instance."""
        return frozenset(self._models.get(instance_id, ()))

    def instances(self) -> frozenset[InstanceId]:
        """Answer every instance that is named."""
        return frozenset(self._models)

    def set(self, model_id: ModelId, instances: frozenset[InstanceId]) -> None:
        """Say which instances the model names now."""
        known = self._instances.get(model_id, frozenset())
        if instances == known:
            return
        for instance_id in known - instances:
            models = self._models[instance_id]
            models.discard(model_id)
            if not models:
                del self._models[instance_id]
        for instance_id in instances - known:
            self._models.setdefault(instance_id, set()).add(model_id)
        if instances:
            self._instances[model_id] = instances
        else:
            del self._instances[model_id]
