from itertools import chain

import torch

from gaplab.data.loader import ChunkLoader, EpochOrder, augmentation

INDICES = torch.arange(100, 201)  # 101 samples


def batches_of(chunk_size: int, epoch: int = 0, least: int = 1, begin: int = 0) -> list[list[int]]:
    sampler = EpochOrder(INDICES, seed=3)
    sampler.set_epoch(epoch)
    numbers = []

    def read(batches, epoch, first):
        numbers.append(first)
        return ((batch, batch) for batch in batches)

    loader = ChunkLoader(read, sampler, 10, chunk_size, least)
    loader.begin = begin
    chunks = list(loader)
    assert numbers == [begin]
    assert len(chunks) == len(loader)
    return [images.tolist() for chunk in chunks for images, _ in chunk]


def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own():
    first, second = batches_of(4, epoch=0), batches_of(4, epoch=1)
    assert sorted(chain(*first)) == sorted(chain(*second)) == INDICES.tolist()
    assert first != second
    assert [len(batch) for batch in first] == [10] * 10 + [1]


def test_chunk_size_changes_nothing():
    assert batches_of(1) == batches_of(4) == batches_of(50)


def test_an_epoch_goes_on_where_it_was_left_in_as_many_chunks():
    for chunk_size in (1, 4, 50):
        for begin in range(12):
            assert batches_of(chunk_size, begin=begin) == batches_of(4)[begin:]


def test_a_last_batch_of_one_sample_is_left_out_for_batchnorm():
    assert [len(batch) for batch in batches_of(4, least=2)] == [10] * 10


def test_chunks_read_batches_only_when_these_are_used():
    read = []
    loader = ChunkLoader(lambda batches, *_: ((read.append(0), b) for b in batches), EpochOrder(INDICES, 0), 10, 4)
    first, *_ = list(loader)
    assert read == []
    next(iter(first))
    assert len(read) == 1


IMAGES = torch.arange(1, 1 + 64 * 3 * 6 * 5).remainder(255).add(1).to(torch.uint8).reshape(64, 3, 6, 5)


def test_flip_mirrors_about_half_of_the_pictures_each_as_a_whole():
    flipped = augmentation("flip", 4, seed=0, epoch=0)(IMAGES, 0, len(IMAGES), 0)
    same = [bool(torch.equal(a, b)) for a, b in zip(IMAGES, flipped, strict=True)]
    mirrored = [bool(torch.equal(a.flip(2), b)) for a, b in zip(IMAGES, flipped, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48


def test_crop_shifts_each_picture_on_its_own_and_zeros_move_in():
    shifted = augmentation("crop", 2, seed=0, epoch=0)(IMAGES, 0, len(IMAGES), 0)
    padded = torch.nn.functional.pad(IMAGES, (2, 2, 2, 2))
    found = set()
    for image, result in zip(padded, shifted, strict=True):
        windows = {(y, x): image[:, y : y + 6, x : x + 5] for y in range(5) for x in range(5)}
        found |= {place for place, window in windows.items() if torch.equal(window, result)}
    assert shifted.shape == IMAGES.shape
    assert len(found) > 15  # of 25 places


def test_augmentation_depends_on_seed_epoch_and_batch_alone():
    def crop(epoch, batch):
        torch.rand(1)
        return augmentation("crop_flip", 2, seed=0, epoch=epoch)(IMAGES, batch, len(IMAGES), 0)

    assert torch.equal(crop(0, 0), crop(0, 0))
    assert not torch.equal(crop(0, 0), crop(0, 1))
    assert not torch.equal(crop(0, 0), crop(1, 0))
