import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lmlosses.lab.plotting import COLORS, INK, Slider, rounded, svg, use_style

matplotlib.use("Agg")


def line(slope):
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, slope])
    return figure


def slider(**changes):
    settings = {"describe": lambda slope: f"A line of slope {slope} & more.", "start": 1}
    return Slider("knob", "slope", [1, 2, 3], line, **{**settings, **changes})


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#121212"])
def test_words_and_curves_stand_out_on_both_grounds(ground):
    assert contrast(INK, ground) > 4
    assert all(contrast(color, ground) > 3 for color in COLORS)


def test_rounding_leaves_no_negative_zero_and_no_torch():
    values = rounded(torch.tensor([-0.0001, 0.12349], dtype=torch.float32))
    assert values.dtype == np.float64
    assert np.array_equal(values, [0.0, 0.123]) and not np.signbit(values[0])


def test_same_figure_gives_the_same_bytes():
    use_style()
    assert svg(line(2)) == svg(line(2)) != svg(line(3))


def test_figures_are_closed_once_drawn():
    before = plt.get_fignums()
    svg(line(1))
    assert plt.get_fignums() == before


def test_slider_shows_one_frame_and_names_them_all():
    html = slider()._repr_html_()
    assert html.count('class="slider-frame"') == 3
    assert html.count(" hidden>") == 2
    assert 'aria-label="A line of slope 2 &amp; more.">' in html
    assert "<output>2</output>" in html and 'max="2" value="1"' in html
    # names of XML vocabularies are the only addresses; nothing fetches them
    assert set(re.findall(r'https?://([^/"]+)', html)) == {"www.w3.org"}


def test_slider_is_the_same_in_every_run():
    assert slider()._repr_html_() == slider()._repr_html_()


def test_no_id_stands_twice_in_a_slider():
    ids = re.findall(r'\bid="([^"]+)"', slider()._repr_html_())
    assert len(ids) == len(set(ids)) > 1


@pytest.mark.bad_input
def test_slider_of_one_setting_is_refused():
    with pytest.raises(ValueError, match="values must hold at least two settings; got 1"):
        Slider("knob", "slope", [1], line, describe=str)


@pytest.mark.bad_input
def test_slider_that_starts_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"start must lie in \[0, 3\); got 3"):
        slider(start=3)
