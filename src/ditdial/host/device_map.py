"""Where ``from_pretrained`` puts the weights of an elastic model: its device map.

accelerate offloads what is there when it places a model, so new tensors must be added first. The
model is loaded into memory, made elastic and placed then.
"""

from __future__ import annotations

from typing import Any

PLACES = ("device_map", "max_memory", "offload_folder", "offload_state_dict")
"""Arguments of ``from_pretrained`` that say where weights go."""

ELSEWHERE = ("cpu", "disk")
"""Places in a device map that weights are fetched from at each call."""


def offloads(options: dict[str, Any]) -> bool:
    """Whether arguments of ``from_pretrained`` may leave weights elsewhere between calls.

    A quantised model is placed while it is loaded.
    """
    places = options.get("device_map")
    if options.get("quantization_config") is not None:
        return False
    if isinstance(places, dict):
        return any(place in ELSEWHERE for place in places.values())
    return places in ("auto", "balanced", "balanced_low_0", "sequential")


def without_places(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load the same model into memory."""
    return {name: value for name, value in options.items() if name not in PLACES}


def dispatch(model: Any, news: str, options: dict[str, Any]) -> None:
    """Place an elastic model as ``from_pretrained`` would have placed the stock model.

    Args:
        news: the submodule with new tensors, which maps of stock models do not name.
        options: of ``from_pretrained``.

    Raises:
        ValueError: a map that leaves out a module, or weights for the disk without a folder.
    """
    import accelerate
    from accelerate.utils import get_balanced_memory, offload_state_dict

    places, memory = options["device_map"], options.get("max_memory")
    folder = options.get("offload_folder")
    if isinstance(places, str):
        whole = _kept_whole(model, places)
        if places != "sequential":
            memory = get_balanced_memory(model, memory, whole, low_zero=places == "balanced_low_0")
        places = accelerate.infer_auto_device_map(model, memory, whole)
    elif "" not in places:
        devices = [place for place in places.values() if place not in ELSEWHERE]
        places = {news: devices[0] if devices else "cpu", **places}
    if "disk" in places.values() and folder is not None:
        state = model.state_dict()
        there = [name for name, place in places.items() if place == "disk"]
        named = [key for key in state if any(not n or f"{key}.".startswith(f"{n}.") for n in there)]
        offload_state_dict(folder, {key: state[key] for key in named})
    accelerate.dispatch_model(model, places, offload_dir=folder)


def _kept_whole(model: Any, places: str) -> list[str]:
    """Names of classes whose modules go to one device; some of them are here under other names."""
    stock = set(model._get_no_split_modules(places))
    kinds = {type(module) for module in model.modules()}
    return [kind.__name__ for kind in kinds if stock & {base.__name__ for base in kind.__mro__}]
