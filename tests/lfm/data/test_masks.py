"""Masks as the model is told them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lfm.data.masks import GREY, at_latent_size, hide


@given(place=st.tuples(st.integers(0, 15), st.integers(0, 15)), factor=st.sampled_from([1, 2, 4, 8]))
def test_one_missing_pixel_is_hidden_and_makes_its_latent_missing(place: tuple[int, int], factor: int) -> None:
    mask = np.zeros((1, 16, 16), np.uint8)
    mask[0][place] = 1
    image = np.full((1, 16, 16, 3), 200, np.uint8)
    hidden = hide(image, mask)
    assert hidden.dtype == np.uint8 and (hidden[0][place] == GREY).all()
    assert (hidden != image).any(-1).sum() == 1
    small = at_latent_size(mask, factor)
    assert small.dtype == np.uint8 and small.shape == (1, 16 // factor, 16 // factor)
    assert np.argwhere(small[0]).tolist() == [[place[0] // factor, place[1] // factor]]
