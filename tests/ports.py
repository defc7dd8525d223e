"""Where processes of this machine meet, for tests that start them without a launcher."""

import socket


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def place_of(rank: int, port: int) -> dict[str, str]:
    """The environment of process `rank` of two."""
    numbers = {"MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}
