"""Outlines and scribbles: Canny's steps on pictures whose edges are known, and lines as a hand draws them."""

import math

import pytest
import torch

from sd.training.outlines import agreement, outlines, scribbles, slopes, smooth


def plain(*colour, size=64):
    return torch.tensor(colour, dtype=torch.float32)[None, :, None, None].expand(1, 3, size, size).clone()


def test_smoothing_is_a_gaussian():
    dot = torch.zeros(1, 1, 15, 15)
    dot[..., 7, 7] = 1
    blurred = smooth(dot, 1.5)
    assert blurred.sum() == pytest.approx(1, abs=1e-3)
    at = {x: math.exp(-(x**2) / 4.5) for x in range(-5, 6)}
    assert blurred[0, 0, 7, 9].item() == pytest.approx(at[2] / sum(at.values()) ** 2, abs=1e-5)
    assert torch.equal(smooth(torch.ones(1, 3, 9, 9), 1.0).round(decimals=5), torch.ones(1, 3, 9, 9))


def test_slopes_are_levels_a_pixel():
    ramp = 0.03 * torch.arange(8.0).expand(1, 2, 8, 8) + 0.01 * torch.arange(8.0)[:, None]
    dx, dy = slopes(ramp)
    assert torch.allclose(dx[..., 1:-1, 1:-1], torch.tensor(0.03), atol=1e-6)
    assert torch.allclose(dy[..., 1:-1, 1:-1], torch.tensor(0.01), atol=1e-6)


def test_a_square_has_a_thin_outline():
    picture = plain(-0.5, -0.5, -0.5)
    picture[..., 20:44, 20:44] = 0.5
    lines = outlines(picture)[0, 0]
    assert 4 * 22 <= lines.sum() <= 4 * 26  # one pixel wide
    near = torch.zeros(64, 64)
    near[18:46, 18:46] = 1
    near[22:42, 22:42] = 0
    assert (lines * near).sum() == lines.sum()
    assert lines.unique().tolist() == [0, 1]


def test_colours_of_the_same_brightness_have_an_edge_and_a_plain_picture_none():
    picture = plain(0.2, -0.2, 0.0)
    picture[..., 32:, :] = torch.tensor([-0.4, 0.1, 0.0])[:, None, None]  # 0.299 R + 0.587 G + 0.114 B hardly changes
    assert outlines(picture)[0, 0, 30:34].sum() == 64
    assert outlines(plain(0.3, 0.1, 0.9)).sum() == 0


def test_stars_are_left_out():
    picture = plain(-1, -1, -1)
    picture[..., 10:12, 10:12] = 1
    picture[..., 40:42, 50:52] = 1
    assert outlines(picture).sum() == 0


def test_weak_edges_are_kept_where_they_go_on_from_strong_ones():
    picture = plain(0, 0, 0)
    picture[..., 32:, :] = torch.linspace(0.6, 0.25, 64)  # from column 41 on too weak alone
    assert outlines(picture)[0, 0, 30:34, :45].any(dim=0).all()
    assert not outlines(picture)[..., 52:].any()  # too far from the strong part
    alone = plain(0, 0, 0)
    alone[..., 32:, :] = 0.3
    assert outlines(alone).sum() == 0


def test_scribbles_are_bent_thick_and_broken():
    lines = torch.zeros(40, 1, 64, 64)
    lines[..., 32, :] = 1
    drawn = scribbles(lines, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [0, 1]
    columns = drawn.sum(dim=2)  # (40, 1, 64): the width of the line in each column
    widths = columns[columns > 0]
    assert widths.quantile(0.02) >= 1
    assert widths.quantile(0.98) <= 5
    assert widths.max() >= 4
    whole = (columns > 0).float().mean(dim=(1, 2))  # the share of each line that is there
    assert 0.1 < whole.min() < 0.5 < whole.mean() < 0.9
    assert whole.max() == 1
    _, rows, _ = drawn[:, 0].nonzero(as_tuple=True)
    assert 2 < (rows - 32).abs().max() < 12
    assert torch.equal(drawn, scribbles(lines, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, scribbles(lines, torch.Generator().manual_seed(1)))


def test_agreement_by_hand():
    given, found = torch.zeros(2, 1, 1, 16, 16)
    given[..., 4, :] = 1  # 16 pixels, of which the first 8 are found two pixels below
    found[..., 6, :6] = 1  # and reach two pixels further
    found[..., 12, 3] = 1
    assert agreement(given, found, within=2) == (8 / 16, 6 / 7)
    assert agreement(given, found, within=1) == (0, 0)
    assert agreement(torch.zeros_like(given), found, within=2) == (1, 0)
