import numpy as np
import pytest

from gaplab.data.splits import noisy_labels, split, stratified_order

LABELS = np.repeat([0, 1, 2], [500, 300, 13])


def test_every_prefix_of_the_order_is_stratified():
    order = stratified_order(LABELS, seed=0)
    assert np.array_equal(np.sort(order), np.arange(len(LABELS)))
    for count in (1, 10, 99, 400, 800):
        share = np.bincount(LABELS[order[:count]], minlength=3)
        expected = count * np.bincount(LABELS) / len(LABELS)
        assert np.abs(share - expected).max() <= 1.5


@pytest.mark.parametrize("counts", [[1000] + [2] * 500, [100] * 10])
def test_a_class_is_off_by_no_more_than_its_share_of_what_the_others_are_off(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    shares = np.array(counts) / len(labels)
    held = np.eye(len(counts))[labels[stratified_order(labels, seed=0)]].cumsum(0)
    off = np.abs(held - np.arange(1, len(labels) + 1)[:, None] * shares).max(0)
    assert (off < 1 + len(counts) * shares).all()
    assert off.max() > 9 or len(counts) == 10  # so "to within one sample" holds of the rare classes alone


def test_splits_are_disjoint_sized_and_seeded():
    train, valid = split(LABELS, 700, 113, seed=1)
    assert (len(train), len(valid)) == (700, 113)
    assert not set(train) & set(valid)
    assert np.array_equal(train, split(LABELS, 700, 113, seed=1)[0])
    assert not np.array_equal(train, split(LABELS, 700, 113, seed=2)[0])


def test_a_smaller_train_split_is_inside_a_larger_one():
    small, large = split(LABELS, 50, 100, seed=0), split(LABELS, 500, 100, seed=0)
    assert set(small[0]) < set(large[0])
    assert np.array_equal(small[1], large[1])


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_label_noise_hits_its_share_of_the_training_labels_alone(share):
    train, valid = split(LABELS, 600, 200, seed=0)
    noisy = noisy_labels(LABELS, train, share, num_classes=3, seed=0)
    assert (noisy[train] != LABELS[train]).sum() == round(share * 600)
    assert np.array_equal(noisy[valid], LABELS[valid])
    assert set(np.unique(noisy)) <= {0, 1, 2}


def test_more_noise_hits_the_same_samples_and_more():
    train, _ = split(LABELS, 600, 200, seed=0)
    little, much = (noisy_labels(LABELS, train, share, 3, seed=0) for share in (0.1, 0.4))
    hit = np.flatnonzero(little != LABELS)
    assert np.array_equal(much[hit], little[hit])
