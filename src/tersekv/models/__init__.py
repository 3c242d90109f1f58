"""Getting a real model: `load(name)` and, without its weights, `config(name)`."""

from tersekv.models.loading import LoadedModel, config, load

__all__ = ["LoadedModel", "config", "load"]
