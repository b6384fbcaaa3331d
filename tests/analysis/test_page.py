"""The page says first what was found, shows every number as people write it, and needs nothing but itself."""

import re
from base64 import b64encode
from html import unescape

import pytest

from gaplab import notes
from gaplab.analysis import page

PNG = b"\x89PNG\r\n\x1a\n rest"
ESTIMATE = {"n": 6, "mean": 0.0215, "sd": 0.001, "low": 0.0205, "high": 0.0225}
CONTRAST = {
    "name": "bn: true − false",
    "n": 6,
    "difference": -0.00123,
    "sd": 0.001,
    "low": -0.0023,
    "high": -0.0001,
    "effect_size": -1.23,
    "p": 0.03,
    "p_holm": 0.0601,
    "p_exact": 0.03125,
    "p_equivalent": 0.0004,
    "verdict": "inconclusive",
    "seeds_needed": 23,
    "reason": "",
}
EMPTY = dict.fromkeys(CONTRAST) | {"name": "x", "n": 1, "verdict": "inconclusive", "reason": "1 seed <only>"}
VALID = CONTRAST | {"difference": -0.0517, "verdict": "real", "seeds_needed": None}
WORSE = {"name": "bn: true − false", "verdict": "worse network, gap undecided", "tone": "bad"}


def build_report(**changes):
    condition = {"label": "bn=false", "best": True, "seeds": [0, 1, 2, 3, 4, 5]}
    condition |= {"failed": [], "diverged": [], "unfinished": []}
    estimates = {"gap/acc": ESTIMATE, "valid/acc": ESTIMATE | {"mean": 0.9772}}
    lost = {
        "label": "bn=true",
        "best": False,
        "seeds": [0],
        "diverged": [1, 2],
        "estimates": {"gap/acc": None, "valid/acc": None},
    }
    section = {
        "data": "mnist",
        "facts": {"network": "mlp hidden_dims=[64]", "images": "270 train, 30 valid"},
        "gap": "gap/acc",
        "factors": {"bn": ["false", "true"], "init": ["a", "b"]},
        "notes": ["left out, diverged: 2 runs"],
        "conditions": [condition | {"estimates": estimates}, condition | lost],
        "contrasts": {"gap/acc": {"effects": [CONTRAST], "against": [EMPTY]}, "valid/acc": {"effects": [VALID]}},
        "outcomes": {
            "effects": [WORSE | {"contrasts": {"gap/acc": CONTRAST, "valid/acc": VALID}}],
            "against": [{"name": "x", "verdict": "", "tone": "open", "contrasts": {"gap/acc": EMPTY}}],
        },
        "figures": ["mnist_conditions.png", "mnist_gone.png"],
    }
    verdict = {
        "claim": "overfitting",
        "question": "Does it shrink the gap?",
        "verdict": "contradicted",
        "summary": "It does not.",
        "evidence": ["gap +0.13 pp"],
        "seeds_needed": None,
    }
    return {
        "title": "a sweep",
        "generated": "2026-11-23T17:00:00",
        "claim": "overfitting",
        "margin": 0.002,
        "confidence": 0.95,
        "sources": ["outputs/sweeps/1"],
        "commands": ["python src/train.py -m model.bn=false,true"],
        "notes": ["the folder of job 3 is gone"],
        "verdicts": [verdict],
        "sections": [section],
    } | changes


@pytest.fixture
def images(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    return {"mnist_conditions.png": tmp_path / "a.png", "mnist_gone.png": tmp_path / "gone.png"}


def words(html):
    """What a reader sees, on one line."""
    return unescape(" ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL).split()))


def test_verdict_comes_first_then_what_was_left_out_then_numbers_then_figures(images):
    seen = words(page.render(build_report(), images))
    order = ["a sweep", "python src/train.py -m model.bn=false,true", "contradicted", "It does not.", "gap +0.13 pp"]
    order += [
        "job 3 is gone",
        "diverged: 2 runs",
        "network mlp hidden_dims=[64] images 270 train, 30 valid",
        "Conditions",
    ]
    order += ["Effects and interactions", "tests of each metric", "Each condition against bn=false"]
    order += ["Every dot is a run", "How to read"]
    places = [seen.index(part) for part in order]
    assert places == sorted(places)


def test_numbers_are_written_as_people_do(images):
    seen = words(page.render(build_report(), images))
    assert "bn=false highest valid accuracy 6 +2.15 ± 0.10 [+2.05, +2.25] 0.9772 ± 0.0010" in seen
    assert "bn=true 2 diverged 0 of 3 – –" in seen
    assert "6 −0.12 [−0.23, −0.01] −1.23 0.060 < 0.001 inconclusive; 23 seeds would decide" in seen
    assert "x 1 – – – – – inconclusive 1 seed <only>" in seen
    assert "0.2 pp" in seen


def test_of_one_factor_contrasts_are_not_said_twice(images):
    report = build_report()
    report["sections"][0]["factors"].pop("init")
    seen = words(page.render(report, images))
    assert "Effects and interactions" in seen
    assert "Each condition against" not in seen


def test_a_loss_is_not_in_pp(images):
    report = build_report()
    report["sections"][0]["contrasts"] = {"gap/loss": {"effects": [CONTRAST]}}
    report["sections"][0]["outcomes"] = {"effects": [WORSE | {"contrasts": {"gap/loss": CONTRAST}}]}
    assert "difference 95 %" in words(page.render(report, images))
    assert page.change(0.0123, "gap/loss") == "+0.0123"


def test_page_needs_nothing_else(images):
    html = page.render(build_report(), images)
    assert f'src="data:image/png;base64,{b64encode(PNG).decode()}"' in html
    assert html.count("<img") == 1  # the other one has no file
    bare = re.sub(r"base64,[^\"]*", "", html)
    for outside in ("http", "//", "<script", "<link", "@import", "url("):
        assert outside not in bare
    assert 'lang="en"' in html
    assert 'name="viewport"' in html
    assert 'alt="mnist conditions"' in html
    assert all("scope=" in cell for cell in re.findall(r"<th\b[^>]*>", html))


def test_everything_is_escaped():
    evil = "<script>alert(1)</script>"
    report = build_report(title=evil, notes=[evil], sources=[evil])
    report["verdicts"][0] |= {"summary": evil, "evidence": [evil], "question": evil}
    report["sections"][0] |= {"data": evil, "factors": {evil: [evil]}, "notes": [evil]}
    report["sections"][0]["conditions"][0]["label"] = evil
    report["sections"][0]["contrasts"]["gap/acc"]["effects"] = [CONTRAST | {"name": evil, "reason": evil}]
    report["sections"][0]["outcomes"]["effects"][0]["name"] = evil
    report["sections"][0]["facts"] = {"network": evil}
    report["commands"] = [evil]
    html = page.render(report, {})
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 15


def test_without_claim_notes_or_runs_the_page_still_says_so():
    section = {"data": "mnist", "factors": {}, "notes": [], "conditions": [], "contrasts": {}, "figures": []}
    section |= {"facts": {}, "outcomes": {}}
    seen = words(page.render(build_report(claim=None, verdicts=[], notes=[], sources=[], sections=[section]), {}))
    assert "No claim is judged here" in seen
    assert "Nothing: every run finished." in seen


def test_small_negative_numbers_do_not_become_minus_zero():
    assert page.change(-0.00001, "gap/acc") == "+0.00"
    assert page.change(None, "gap/acc") == "–"
    assert [page.p_value(p) for p in (None, 0.0002, 0.0601, 0.0497)] == ["–", "< 0.001", "0.060", "0.0497"]


def test_every_figure_has_a_caption_by_the_end_of_its_name():
    for kind, caption in page.CAPTIONS.items():
        assert page.caption_of(f"fashion_mnist_{kind}.png") == caption


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["gap/acc"], "smaller than 5 pp either way"),
        (["gap/loss"], "smaller than 0.05 nats either way"),
        (
            ["gap/acc", "valid/acc", "valid/loss"],
            "smaller than 5 pp (gap/acc, valid/acc) or 0.05 nats (valid/loss) either",
        ),
    ],
)
def test_the_margin_is_said_in_the_unit_of_its_metric(metrics, said, images):
    report = build_report(margin=0.05)
    report["sections"][0]["contrasts"] = {name: {"effects": [CONTRAST], "against": []} for name in metrics}
    assert said in words(page.render(report, images))
    text = "\n".join(notes._outcomes(report["sections"][0], 0.05))
    margin = said.removeprefix("smaller than ").partition(" either")[0]
    assert f"**Effects of what was varied** (equivalent: within {margin})" in text


def test_gap_and_accuracy_stand_in_one_row_and_a_worse_network_has_no_good_colour(images):
    html = page.render(build_report(), images)
    row = re.search(r"<tr><th scope=.row.>bn: true − false.*?</tr>", html, re.DOTALL).group()
    assert "−0.12" in row
    assert "−5.17" in row
    assert '<span class="tag bad">worse network, gap undecided</span>' in row
