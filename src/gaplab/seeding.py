"""Independent random streams from one seed."""

import hashlib


def derive_seed(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for the stream that `keys` name (`"order", epoch`), the same on every machine.

    Streams are told apart by a hash, so that the data order of an epoch never depends on what else drew numbers.
    """
    text = "/".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
