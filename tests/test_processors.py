"""The runner of other processors' settings: what it says of each, and that a setting without effect is an error."""

import pytest

from experiments.demos import NAMES, row
from tests.processors import NEWEST, SETTINGS, effect, probe

PLAIN = {"torch": "2.13.0", "threads": 2, "capability": "AVX512", "mkl": True, "product": "a", "softmax": "b", "gelu": "c"}


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("as-it-is", {}, "torch 2.13.0, AVX512, 2 threads"),
        ("sse4", {"product": "x", "gelu": "y"}, "other bits in a product of float32 matrices (and in gelu)"),
        ("avx2", {"softmax": "x"}, "the SAME bits in a product: MKL has one kernel for both on this processor; "),
        ("one-thread", {"threads": 1}, "torch.get_num_threads() is 1"),
        (NEWEST, {"torch": "2.14.1"}, "torch 2.14.1, not 2.13.0"),
    ],
)
def test_a_setting_says_how_it_shows(name, changed, said):
    assert effect(name, PLAIN | changed, PLAIN).startswith(said)


def test_a_setting_without_effect_is_an_error_where_the_processor_could_tell():
    with pytest.raises(RuntimeError, match="^sse4: took no effect"):
        effect("sse4", PLAIN, PLAIN)
    with pytest.raises(RuntimeError, match="^one-thread: torch still has 2 threads"):
        effect("one-thread", PLAIN, PLAIN)
    older = PLAIN | {"capability": "AVX2"}
    assert effect("avx2", older, older).startswith("IDENTICAL to as-it-is: nothing to leave out on this processor (AVX2,")


def test_the_probe_has_the_same_bits_twice():
    assert probe() == probe()
    assert set(SETTINGS) == {"as-it-is", "avx2", "sse4", "one-thread"}


def test_a_line_of_the_five_demos_says_how_far_static_is_behind(tmp_path):
    lines = [f"- {name}: accuracy {value:.4f}, f1 0.5000" for name, value in zip(NAMES, (0.63, 0.62, 0.615), strict=True)]
    (tmp_path / "report.md").write_text("\n".join(["# docstrings", *lines]), encoding="utf-8")
    (tmp_path / "minutes.txt").write_text("7.1", encoding="utf-8")
    assert row("sse4", 2, tmp_path) == "| sse4 | 2 | 0.630 | 0.620 | 0.615 | -1.5 | 7.1 |"
