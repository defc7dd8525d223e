"""What of a run shapes its weights, and what may differ when it is resumed, or from one group to another."""

import hashlib
from typing import Any

from fastweight.configs import to_json
from fastweight.data import Store
from fastweight.train.config import TrainConfig
from fastweight.train.source import describe_contents

# Nothing here changes the weights of a given step, but for max_seconds, which makes the rate follow the clock; it is
# free so that a run can be given more time.
FREE = ("log", "max_seconds", "max_bad_steps", "device", "mesh")
FREE_OF_REPLICAS = ("most", "least", "lighthouse", "timeout_seconds", "wait_seconds")


def shaping_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape the weights, in their JSON form; stores without their places."""
    settings = {name: value for name, value in config.to_dict().items() if name not in FREE}
    data, replicas = settings["data"], settings["replicas"]
    settings["data"] = {name: value for name, value in data.items() if name not in ("store", "mix")}
    settings["data"]["mix"] = list(data["mix"].values())
    settings["replicas"] = {name: value for name, value in replicas.items() if name not in FREE_OF_REPLICAS}
    return settings


def fingerprint(store: Store, config: TrainConfig) -> str:
    """A name for the data itself: the folders may move, their contents may not change."""
    return hashlib.sha256(to_json(describe_contents(store, config.data)).encode()).hexdigest()
