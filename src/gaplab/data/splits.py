"""Which samples are trained on: a pure function of the labels and the seed."""

import numpy as np
from numpy.typing import NDArray

from gaplab.seeding import derive_seed

Indices = NDArray[np.int64]


def stratified_order(labels: Indices, seed: int) -> Indices:
    """A random order of `range(N)` in which every prefix holds each class about in its share.

    The i-th sample of a shuffled class of n gets the key (i + u) / n, u uniform in [0, 1); the keys are sorted. Splits
    cut from this order are stratified, and a smaller one is inside a larger one. Of K classes, one of n samples is off
    by less than 1 + K n / N in a prefix: 2 where the classes are of one size, 1 where it is rare. A class with most of
    the samples makes up for all the others; beside 500 classes of 2, one of 1 000 was off by 14.
    """
    rng = np.random.default_rng(derive_seed(seed, "split"))
    keys = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        keys[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return np.argsort(keys, kind="stable")


def split(labels: Indices, num_train: int, num_valid: int, seed: int) -> tuple[Indices, Indices]:
    """Disjoint, sorted indices of the train and the valid split, out of N = len(labels) ≥ num_train + num_valid."""
    order = stratified_order(labels, seed)
    return np.sort(order[num_valid : num_valid + num_train]), np.sort(order[:num_valid])


def noisy_labels(labels: Indices, train: Indices, share: float, num_classes: int, seed: int) -> Indices:
    """A copy of `labels` in which `share` of those at `train` is replaced by another class, drawn uniformly.

    The samples hit at a smaller share are among those hit at a larger one.
    """
    rng = np.random.default_rng(derive_seed(seed, "label_noise"))
    order, shift = rng.permutation(train), rng.integers(1, num_classes, len(train))
    hit = round(share * len(train))
    noisy = labels.copy()
    noisy[order[:hit]] = (noisy[order[:hit]] + shift[:hit]) % num_classes
    return noisy
