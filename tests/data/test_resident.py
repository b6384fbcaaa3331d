import torch

from gaplab.data.resident import Resident, moments, pixel_sums


def test_moments_are_those_of_the_chosen_samples_in_float64():
    pixels = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = Resident(pixels, torch.zeros(50)).moments(torch.arange(10, 40))
    chosen = pixels[10:40].double() / 255
    torch.testing.assert_close(mean, chosen.mean((0, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(std, chosen.std((0, 2, 3), correction=0), rtol=0, atol=1e-12)


def test_a_constant_channel_has_standard_deviation_one():
    pixels = torch.full((2, 1, 3, 3), 7, dtype=torch.uint8)
    mean, std = moments([pixel_sums(pixels)], 18)
    assert (float(mean), float(std)) == (7 / 255, 1.0)


def test_digest_changes_with_a_pixel_and_with_a_label():
    pixels, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    other_pixels, other_labels = pixels.clone(), labels.clone()
    other_pixels[3, 0, 1, 1], other_labels[3] = 1, 1
    digests = {Resident(*pair).digest() for pair in [(pixels, labels), (other_pixels, labels), (pixels, other_labels)]}
    assert len(digests) == 3
