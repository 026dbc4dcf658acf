"""The HTML reports in a real browser, headless and offline: what is drawn, hovered, hidden, sorted, opened and printed."""

import shutil

import pytest

from tests.reports import comparison_page

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as running:
        try:
            opened = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium here ({str(error).splitlines()[0]}): install one, or `playwright install chromium`")
        yield opened
        opened.close()


@pytest.fixture
def report(browser, tmp_path):
    """The page of a comparison, opened from its file without a network; nothing may be logged as an error or be fetched."""
    path = tmp_path / "report.html"
    path.write_text(comparison_page(), encoding="utf-8")
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#frontier .legend .traces")
    yield page
    assert complaints == []
    context.close()


def visible_traces(page):
    return page.locator("#frontier .scatterlayer .trace").count()


def test_answer_stands_first_and_every_method_is_drawn(report):
    box = report.locator(".answer").bounding_box()
    assert box["y"] + box["height"] < report.locator("#frontier").bounding_box()["y"] < 900
    assert visible_traces(report) == 21
    assert report.locator("#frontier .legend .traces").count() == 21
    names = report.locator("#frontier .legend .legendtext").all_text_contents()
    assert len(set(names)) == 21
    plot = report.locator("#frontier").bounding_box()
    for entry in report.locator("#frontier .legend .traces").all():  # none is cut off
        place = entry.bounding_box()
        assert plot["y"] <= place["y"]
        assert place["y"] + place["height"] <= plot["y"] + plot["height"]


def test_pointer_tells_what_a_point_is(report):
    point = report.locator("#frontier .scatterlayer .trace", has=report.locator(".point")).nth(3).locator(".points path").first
    box = point.bounding_box()
    report.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    report.wait_for_selector("#frontier .hoverlayer .hovertext")
    text = report.locator("#frontier .hoverlayer .hovertext").first.text_content()
    assert "25% of heads" in text
    assert "throughput" in text


def test_click_in_the_legend_hides_a_method_and_the_menu_changes_the_recovery(report):
    from playwright.sync_api import expect

    traces = report.locator("#frontier .scatterlayer .trace")
    report.locator("#frontier .legend .legendtoggle").nth(2).click()
    expect(traces).to_have_count(20)
    before = report.locator("#frontier .legend .legendtext").all_text_contents()
    report.locator("#frontier .updatemenu-button").first.click()
    expect(traces).to_have_count(21)
    assert report.locator("#frontier .legend .legendtext").all_text_contents() == before  # the colours mean the same


def test_click_on_a_title_sorts_by_number_and_back(report):
    def column(index):
        return report.locator(f"tbody tr td:nth-child({index + 1})").all_text_contents()

    titles = report.locator("th button").all_text_contents()
    assert len(column(0)) == 41
    for name, direction in (("throughput", -1), ("throughput", 1)):
        report.locator("th button", has_text=name).click()
        values = [float(text.rstrip("x")) for text in column(titles.index(name)) if text != "-"]
        assert values == sorted(values, reverse=direction < 0)
        assert column(titles.index(name))[len(values) :] == ["-"] * (len(column(0)) - len(values))
    report.locator("th button").first.click()
    assert column(0) == sorted(column(0), reverse=True)


def test_maps_open_on_demand(report):
    first = report.locator("details").first
    assert not first.locator("svg").is_visible()
    first.locator("summary").click()
    assert first.locator("svg").is_visible()
    assert first.locator("rect").count() == 6 * 12


def test_it_prints(report):
    pdf = report.pdf(format="A4", landscape=True)
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) > 20_000  # with the drawing and the table
